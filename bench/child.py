"""One node under measurement: obeys JSON lines on stdin and answers each with a JSON line on
stdout.

The same script runs for both sides, each under its own interpreter, so that both are timed by the
same code. It uses the standard library alone and the side's public API: `python child.py MODULE`,
MODULE being jobsync_core or jobsync. Every time it reports is of CLOCK_MONOTONIC, which all
processes of a machine share.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ['Child']


class Watch:
    """Samples which of some tasks this node may claim, in a thread of its own, and keeps the spans
    in which it may.

    A span runs from the end of the first call that said yes to the beginning of the last one, so it
    errs on the short side.

    Args:
        can_claim: Asked for each task.
        tasks: The tasks.
    """

    def __init__(self, can_claim: Callable[[Any], bool], tasks: Sequence[Any]) -> None:
        self._can_claim = can_claim
        self._tasks = tasks
        self._spans: list[list[list[float]]] = [[] for _ in tasks]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        was = [False] * len(self._tasks)
        while not self._stopping.wait(0.002):
            for index, task in enumerate(self._tasks):
                before = time.monotonic()
                try:
                    may = self._can_claim(task)
                except Exception:  # before it is entered, a Job may refuse to answer
                    may = False
                if may and was[index]:
                    self._spans[index][-1][1] = before
                elif may:
                    after = time.monotonic()
                    self._spans[index].append([after, after])
                was[index] = may

    def stop(self) -> list[list[list[float]]]:
        """End the sampling; the spans of each task, in seconds of CLOCK_MONOTONIC."""
        self._stopping.set()
        self._thread.join()
        return self._spans


def make_ids(kind: str, count: int) -> list[Any]:
    """Task ids of a kind: 'int', 'text', 'path' or 'stride'."""
    makers: dict[str, Callable[[int], Any]] = {
        'int': lambda number: number,
        'text': lambda number: f'order-{number}',
        'path': lambda number: f'customer/{number % 40}/report/{number}',
        'stride': lambda number: 1_000 * number + 7,
    }
    return [makers[kind](number) for number in range(count)]


def to_ranges(tokens: Iterable[int]) -> list[list[int]]:
    """Half-open ranges of some tokens, in order."""
    ranges: list[list[int]] = []
    for token in sorted(tokens):
        if ranges and ranges[-1][1] == token:
            ranges[-1][1] = token + 1
        else:
            ranges.append([token, token + 1])
    return ranges


class Child:
    """The commands that the parent may give: each public method is one.

    Args:
        module: The side under measurement: its Job, Task and CoordinationConfig.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._job: Any = None
        self._watch: Watch | None = None
        self._registered = 0.0

    def make(
        self, name: str, settings: dict[str, Any], wait: int, locks: dict[str, Any] | None = None
    ) -> None:
        """Make the Job. Settings that this side's configuration does not have are left out."""
        known = {item.name for item in dataclasses.fields(self._module.CoordinationConfig)}
        config = self._module.CoordinationConfig(
            **{key: value for key, value in settings.items() if key in known}
        )
        provider = (lambda job: self._register(job, **locks)) if locks else None
        self._job = self._module.Job(
            name, coordination_config=config, wait_on_enter=wait, lock_provider=provider
        )

    def enter(self) -> dict[str, float]:
        """Enter the Job; when that began and ended, and the seconds that lock_provider took."""
        began = time.monotonic()
        self._job.__enter__()
        return {'began': began, 'entered': time.monotonic(), 'registered': self._registered}

    def leave(self) -> float:
        """Leave the Job; the seconds that it took."""
        began = time.monotonic()
        self._job.__exit__(None, None, None)
        return time.monotonic() - began

    def owned(self) -> list[list[int]]:
        """The tokens of this node, as ranges."""
        return to_ranges(self._job.my_tokens)

    def claimable(self, kind: str, count: int) -> int:
        """How many of the tasks this node may claim."""
        return sum(
            self._job.can_claim_task(self._module.Task(task_id))
            for task_id in make_ids(kind, count)
        )

    def claims(self, kind: str, count: int, expected: bool = True) -> float:
        """Nanoseconds of this thread's CPU time for each `can_claim_task(Task(id))`, over `count`
        calls that answer `expected`.
        """
        can_claim, task = self._job.can_claim_task, self._module.Task
        pool = [
            task_id for task_id in make_ids(kind, 4_000) if can_claim(task(task_id)) is expected
        ]
        if not pool:
            raise RuntimeError(f'no task of which the claim is {expected}')
        ids = (pool * (count // len(pool) + 1))[:count]
        began = time.thread_time_ns()
        for task_id in ids:
            can_claim(task(task_id))
        return (time.thread_time_ns() - began) / count

    def memory(self) -> int:
        """Bytes of resident memory, after a garbage collection."""
        gc.collect()
        with open('/proc/self/smaps_rollup', encoding='ascii') as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith('Rss:'))

    def connect(self, driver: str, database: dict[str, Any]) -> None:
        """Open a connection with the bare driver, run one statement and close it."""
        connection = importlib.import_module(driver).connect(**database)
        connection.cursor().execute('select 1')
        connection.close()

    def watch(self, count: int) -> None:
        """Begin to sample `count` tasks; see Watch."""
        self._watch = Watch(
            self._job.can_claim_task,
            [self._module.Task(task_id) for task_id in make_ids('text', count)],
        )

    def watched(self) -> list[list[list[float]]]:
        """End the sampling; the spans of each task."""
        if self._watch is None:
            raise RuntimeError('watch first')
        spans, self._watch = self._watch.stop(), None
        return spans

    def tasks(self, count: int) -> dict[str, float]:
        """Milliseconds for an add_task, and for the write_audit after `count` of them."""
        tasks = [self._module.Task(task_id) for task_id in make_ids('text', count)]
        began = time.monotonic()
        for task in tasks:
            self._job.add_task(task)
        added = time.monotonic()
        self._job.write_audit()
        return {'add': (added - began) / count * 1e3, 'audit': (time.monotonic() - added) * 1e3}

    def register(self, count: int, pattern: str) -> float:
        """Register locks while the cluster runs; seconds."""
        self._register(self._job, count, pattern)
        return self._registered

    def _register(self, job: Any, count: int, pattern: str) -> None:
        locks = [(task_id, pattern, 'measured') for task_id in make_ids('text', count)]
        began = time.monotonic()
        job.register_locks_bulk(locks)
        self._registered = time.monotonic() - began

    def ledger(self, count: int, threads: int, prefix: str) -> dict[str, float]:
        """Begin and finish `count` executions in `threads` threads: executions per second and the
        median milliseconds of one.
        """
        times: list[float] = []

        def work(thread: int) -> None:
            for number in range(count // threads):
                began = time.monotonic()
                with self._job.once(f'{prefix}-{thread}-{number}'):
                    pass
                times.append(time.monotonic() - began)

        workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
        began = time.monotonic()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if len(times) != count // threads * threads:
            raise RuntimeError('an execution failed')
        return {
            'rate': len(times) / (time.monotonic() - began),
            'ms': sorted(times)[len(times) // 2] * 1e3,
        }


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    child = Child(importlib.import_module(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {'ok': getattr(child, command.pop('do'))(**command)}
        except Exception as error:
            logging.exception('a command failed')
            answer = {'error': f'{type(error).__name__}: {error}'}
        print(json.dumps(answer), flush=True)


if __name__ == '__main__':
    main()
