"""What the demos of Celery and Dramatiq have in common: servers, workers that are killed and join,
and the verdict.

`celery_demo.py` and `dramatiq_demo.py` say how a worker is started, a message sent and its result
read.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from examples.core_demo import (
    LEAST_SEC,
    MOST_SEC,
    PINNED,
    SETTINGS,
    TABLES,
    Demo,
    count,
    library,
    query,
    screen,
    sources,
)
from jobsync_core import Execution
from jobsync_core.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServerError

__all__ = ['QueueDemo', 'count_once', 'end_with_the_demo', 'main']

_ROOT = Path(__file__).resolve().parents[1]
#: What each worker works on at the same time.
SLOTS = 2


def count_once(path: str, node: str, execution: Execution) -> dict[str, Any]:
    """Count one file; its row and the record that the key is completed are one transaction."""
    until = time.monotonic() + float(os.environ.get('DEMO_PACE', '0'))
    found = count(library() / path)
    time.sleep(max(0.0, until - time.monotonic()))
    answer = {'path': path, 'lines': found.lines}
    execution.result = (
        answer  # before the transaction, so that it is in it: a duplicate may ask right after
    )
    with execution.transaction() as connection, connection.cursor() as cursor:
        cursor.execute(
            'INSERT INTO result (path, node, functions, classes, lines, problem) VALUES (%s, %s, '
            '%s, %s, %s, %s)',
            (path, node, found.functions, found.classes, found.lines, found.problem),
        )
    return answer


def end_with_the_demo() -> None:
    """End this worker, all of its processes, when nobody holds the demo's pipe open any more: the
    demo is gone.
    """
    path = os.environ.get('DEMO_LIFELINE')
    if path is None:
        return

    def watch() -> None:
        with contextlib.suppress(FileNotFoundError):
            pipe = os.open(
                path, os.O_RDONLY | os.O_NONBLOCK
            )  # a pipe that nobody writes to would not open otherwise
            while True:
                try:
                    os.read(pipe, 1)
                    break
                except BlockingIOError:
                    select.select([pipe], [], [])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class Worker(subprocess.Popen[str]):
    """A worker's main process; `kill` ends its children too, as the loss of its machine would."""

    def kill(self) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


@dataclass
class QueueDemo(Demo):
    """One run with the workers of a queue framework."""

    framework: ClassVar[str]

    place: Path = Path()
    #: What was sent, as `send` returned it, and the part of it whose result has not been seen yet.
    published: list[Any] = field(default_factory=list)
    open: list[Any] = field(default_factory=list)

    @staticmethod
    @abstractmethod
    def environment(redis: EmbeddedRedis) -> dict[str, str]:
        """Variables by which this process and the workers find the broker."""

    @abstractmethod
    def command(self, name: str) -> list[str]:
        """Arguments of Python that start a worker."""

    @abstractmethod
    def send(self, path: str) -> Any:
        """Send the message of one file."""

    @abstractmethod
    def answer(self, sent: Any) -> Any:
        """The result of what was sent; None as long as there is none, something else than a dict
        for a failure.
        """

    @property
    def lifeline(self) -> Path:
        """The pipe that this process holds open."""
        return self.place / 'lifeline'

    def start(self, name: str, grace: float = 0.0) -> None:
        environment = {
            **os.environ,
            'DEMO_LIFELINE': str(self.lifeline),
            'DEMO_PACE': str(self.pace),
            'JOBSYNC_NODE_NAME': name,
            'PYTHONPATH': os.pathsep.join(filter(None, (str(_ROOT), os.environ.get('PYTHONPATH')))),
        }
        with (self.place / f'{name}.log').open('w') as log:
            # A session of its own, so that Ctrl-C reaches the demo alone, which then ends its
            # workers.
            self.workers[name] = Worker(
                [sys.executable, *self.command(name)],
                env=environment,
                cwd=self.place,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def publish(self, repeats: list[str]) -> None:
        """Send a message per file, and those in `repeats` once more, in any order."""
        for path in random.Random(1).sample(
            [*self.paths, *repeats], len(self.paths) + len(repeats)
        ):
            self.published.append(self.send(path))
        self.open = list(self.published)
        self.note(
            f'{len(self.published)} tasks are published, {len(repeats)} of them repeat another one'
        )

    def nodes(self) -> int:
        """Number of nodes that own tokens."""
        return int(query(self.config, 'SELECT count(DISTINCT node) FROM demo_assignment')[0][0])

    def unanswered(self) -> bool:
        """Whether a message has no result yet."""
        while self.open and self.answer(self.open[-1]) is not None:
            self.open.pop()
        return bool(self.open)

    def finish(self) -> None:
        """Shut the workers down in order."""
        for process in self.workers.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 30
        for process in self.workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))


def verdict(demo: QueueDemo, repeats: list[str]) -> bool:
    """Print what the database says; whether it is what was promised."""
    rows, files = query(demo.config, 'SELECT count(*)::int, count(DISTINCT path)::int FROM result')[
        0
    ]
    (lost,) = query(
        demo.config,
        'SELECT count(*)::int FROM source WHERE NOT EXISTS (SELECT FROM result WHERE result.path '
        '= source.path)',
    )[0]
    done, mixed = query(
        demo.config,
        """
        SELECT count(*) FILTER (WHERE e.state = 'done')::int, count(*) FILTER (WHERE e.node IS
            DISTINCT FROM r.node)::int
        FROM demo_execution e LEFT JOIN result r ON e.key = 'file:' || r.path""",
    )[0]
    pinned, astray = query(
        demo.config,
        "SELECT count(*)::int, count(*) FILTER (WHERE split_part(node, '@', 1) NOT LIKE %s)::int "
        'FROM result WHERE path LIKE %s',
        (demo.pin, PINNED + '%'),
    )[0]
    functions, classes, lines = query(
        demo.config, 'SELECT sum(functions)::int, sum(classes)::int, sum(lines)::int FROM result'
    )[0]
    (again,) = query(
        demo.config,
        "SELECT count(*)::int FROM demo_execution WHERE key = ANY (%s) AND state = 'done' AND "
        'node <> %s',
        (demo.in_flight, demo.victim_node),
    )[0]
    true_lines = dict(query(demo.config, 'SELECT path, lines FROM result'))
    answers = [demo.answer(sent) for sent in demo.published]
    right = sum(
        isinstance(answer, dict) and true_lines.get(answer['path']) == answer['lines']
        for answer in answers
    )
    crashed = [
        name
        for name, process in demo.workers.items()
        if name != demo.victim and process.returncode != 0
    ]
    checks = [
        ('files', len(demo.paths), True),
        (
            'published, with repeats',
            len(demo.published),
            len(demo.published) == len(demo.paths) + len(repeats),
        ),
        ('rows', rows, rows == len(demo.paths)),
        ('keys completed', done, done == len(demo.paths)),
        ('duplicates', rows - files, rows == files),
        ('lost', lost, lost == 0),
        ('row and ledger name another node', mixed, mixed == 0),
        (
            f'pinned to {demo.pin}, on such a node',
            f'{pinned - astray} of {pinned}',
            astray == 0 and pinned > 0,
        ),
        (
            'tasks with the right result',
            f'{right} of {len(demo.published)}',
            right == len(demo.published),
        ),
        ('killed midway', demo.victim or 'nobody', demo.victim is not None),
        (
            'in its hands, run again elsewhere',
            f'{again} of {len(demo.in_flight)}',
            again == len(demo.in_flight),
        ),
        (
            'kill to full ownership',
            'never' if demo.recovery_sec is None else f'{demo.recovery_sec:.2f} s',
            demo.recovery_sec is not None,
        ),
        ('joined midway', demo.joined or 'nobody', demo.joined is not None),
        ('workers that failed', ', '.join(crashed) or 0, not crashed),
    ]
    print(f'\nCounted: {functions} functions, {classes} classes, {lines} lines. By node:')
    for name, number in query(
        demo.config, 'SELECT node, count(*) FROM result GROUP BY node ORDER BY node'
    ):
        print(f'  {name:<36} {number:>6} files')
    print('\nVerdict, from the database:')
    for label, value, good in checks:
        print(f'  {"ok  " if good else "FAIL"} {label:<36} {value}')
    good = all(good for _, _, good in checks)
    print('\nEach file was counted once.' if good else '\nThe verdict fails.')
    return good


def run(kind: Callable[..., QueueDemo], framework: str, workers: int, limit: int | None) -> int:
    """Run the demo; the exit code."""
    paths = sources(limit)
    others = [path for path in paths if not path.startswith(PINNED)]
    repeats = (
        random.Random(2).sample(others, min(len(others), max(1, len(paths) // 10 - 1)))
        + [path for path in paths if path.startswith(PINNED)][:1]
    )
    print(
        f'{len(paths)} source files of {library()}, {workers} {framework} workers; heartbeats of '
        f'{SETTINGS["heartbeat_interval_sec"]} s, '
        f'dead after {SETTINGS["heartbeat_timeout_sec"]} s (shortened for the demo)',
        flush=True,
    )
    with (
        tempfile.TemporaryDirectory(prefix='jobsync-demo-') as directory,
        contextlib.ExitStack() as stack,
    ):
        place = Path(directory)
        redis = stack.enter_context(EmbeddedRedis())
        server = stack.enter_context(EmbeddedPostgres())
        server.create_database('demo')
        config = server.config('demo', **SETTINGS)
        query(config, TABLES)
        query(config, 'INSERT INTO source SELECT unnest(%s)', (paths,))
        demo = kind(config, paths, LEAST_SEC * workers * SLOTS / len(paths), place=place)
        os.environ.update(JOBSYNC_DATABASE_URL=server.url('demo'), **demo.environment(redis))
        os.mkfifo(demo.lifeline)
        stack.callback(os.close, os.open(demo.lifeline, os.O_RDWR))
        try:
            for number in range(1, workers + 1):
                demo.start(f'worker-{number}-gpu' if number == workers else f'worker-{number}')
            demo.note(f'{workers} workers start')
            _follow(demo, workers, repeats)
            demo.finish()
        finally:
            demo.stop()
        good = verdict(demo, repeats)
        if not good:
            for log in sorted(place.glob('worker-*.log')):
                print(f'\n--- the end of {log.name}\n{log.read_text(errors="replace")[-3000:]}')
        return 0 if good else 1


def _follow(demo: QueueDemo, workers: int, repeats: list[str]) -> None:
    """Publish when all workers are nodes, and do what is due until every task is answered."""
    published = False
    with screen(demo) as show:
        while (
            not published or demo.unanswered() or demo.recovery_sec is None or demo.joined is None
        ):
            if time.monotonic() - demo.began > MOST_SEC or not demo.running:
                demo.note('given up')
                show()
                return
            if _registered(demo):
                if not published and demo.nodes() == workers:
                    demo.publish(repeats)
                    published = True
                if published:
                    demo.look()
                show()
            time.sleep(0.05)


def _registered(demo: QueueDemo) -> bool:
    """Whether the first worker has made the tables."""
    return bool(
        query(
            demo.config,
            "SELECT to_regclass('demo_assignment') IS NOT NULL AND to_regclass('demo_execution') "
            'IS NOT NULL',
        )[0][0]
    )


def main(kind: type[QueueDemo], description: str) -> int:
    """The command line of a demo."""
    parser = argparse.ArgumentParser(description=description.partition('\n')[0])
    parser.add_argument(
        '--files', type=int, metavar='N', help='take a sample of N files (default: all)'
    )
    parser.add_argument(
        '--workers',
        type=int,
        default=3,
        metavar='N',
        help='worker processes at the start, at least 2 (default: 3)',
    )
    options = parser.parse_args()
    if options.workers < 2 or (options.files is not None and options.files < 20):
        parser.error(
            'at least 2 workers and 20 files are needed for one of them to be killed midway'
        )

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(number, interrupt)
    try:
        return run(kind, kind.framework, options.workers, options.files)
    except EmbeddedServerError as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        print('\nInterrupted; everything that was started is ended.')
        return 130
