"""The guide's own loop, as it stands there, with a node that joins and one that leaves midway: each
task runs once.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig
from tests.support.cluster import query
from tests.support.waiting import eventually

_ROOT = Path(__file__).parents[3]
TASKS = 2_000

# The user's program. What is under the line is the guide's loop, word for word; above it stand the
# functions that the guide takes for granted: where tasks come from, and what processing one means.
PROGRAM = """
import json, pathlib, sys, time
from jobsync import Job, Task, CoordinationConfig

name, directory = sys.argv[1], pathlib.Path(sys.argv[2])
settings, total = json.loads(sys.argv[3]), int(sys.argv[4])
coord_config = CoordinationConfig(**settings)
done_here = (directory / (name + '.done')).open('a', buffering=1)

def get_pending_tasks():
    while not (directory / (name + '.leave')).exists():
        done = {int(line) for path in directory.glob('*.done') for line in path.read_text().split()}
        pending = [task for task in range(total) if task not in done]
        if not pending:
            return
        for task in pending:
            if (directory / (name + '.leave')).exists():
                return
            yield task
        time.sleep(0.01)

def process_task(task_id):
    time.sleep(0.004)
    done_here.write(str(task_id) + chr(10))

# ------------------------------------------------------------
with Job(name, coordination_config=coord_config, wait_on_enter=0) as job:
    (directory / (name + '.entered')).touch()
    for task_id in get_pending_tasks():
        task = Task(task_id)

        # Only process if this task belongs to our tokens
        if job.can_claim_task(task):
            job.add_task(task)
            process_task(task_id)

    job.write_audit()
"""


class Workers:
    """Processes that run the program."""

    def __init__(self, config: CoordinationConfig, directory: Path) -> None:
        self.config = config
        self.directory = directory
        self._settings = json.dumps(
            {item.name: getattr(config, item.name) for item in dataclasses.fields(config)},
            default=dict,
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start a worker; it is not waited for."""
        with (self.directory / f'{name}.stderr').open('w') as errors:
            self.processes[name] = subprocess.Popen(
                [
                    sys.executable,
                    '-W',
                    'error',
                    '-c',
                    PROGRAM,
                    name,
                    str(self.directory),
                    self._settings,
                    str(TASKS),
                ],
                cwd=_ROOT,
                stderr=errors,
            )

    def done(self) -> list[tuple[str, int]]:
        """Worker and task of each time that a task was processed."""
        return [
            (path.stem, int(line))
            for path in self.directory.glob('*.done')
            for line in path.read_text().split()
        ]

    def wait_done(self, count: int) -> None:
        """Wait until this many tasks have been processed."""
        eventually(
            lambda: (
                len(self.done()) >= count
                or any(process.poll() for process in self.processes.values())
            ),
            timeout=60,
        )
        self.check()

    def check(self) -> None:
        """Fail where a worker has failed."""
        for name, process in self.processes.items():
            assert not process.poll(), (self.directory / f'{name}.stderr').read_text()


@pytest.fixture
def workers(make_config: Callable[..., CoordinationConfig], tmp_path: Path) -> Iterator[Workers]:
    config = make_config(
        heartbeat_interval_sec=0.5, heartbeat_timeout_sec=3, rebalance_check_interval_sec=3
    )
    workers = Workers(config, tmp_path)
    yield workers
    for process in workers.processes.values():
        if process.poll() is None:
            process.kill()
        process.wait()


def test_each_task_runs_once_while_a_node_joins_and_one_leaves(workers: Workers) -> None:
    for name in ('worker-1', 'worker-2', 'worker-3'):
        workers.start(name)

    workers.wait_done(300)
    workers.start('worker-4')
    eventually(
        lambda: (
            (workers.directory / 'worker-4.done').exists()
            and (workers.directory / 'worker-4.done').read_text()
        ),
        timeout=30,
    )
    workers.check()
    assert len(workers.done()) < TASKS, 'all was done before the node had joined'
    (workers.directory / 'worker-1.leave').touch()
    workers.processes['worker-1'].wait(30)
    workers.check()
    assert len(workers.done()) < TASKS, 'all was done before the node had left'
    for process in workers.processes.values():
        process.wait(60)
    workers.check()

    times = collections.Counter(task for _, task in workers.done())
    assert [task for task in range(TASKS) if not times[task]] == []
    assert {task: count for task, count in times.items() if count != 1} == {}
    by_worker = collections.Counter(worker for worker, _ in workers.done())
    assert all(by_worker[name] > 0 for name in workers.processes), by_worker


def test_the_audit_names_each_task_once_with_the_node_that_ran_it(workers: Workers) -> None:
    for name in ('worker-1', 'worker-2'):
        workers.start(name)
    workers.wait_done(500)
    (workers.directory / 'worker-2.leave').touch()
    for process in workers.processes.values():
        process.wait(60)
    workers.check()

    audited = query(workers.config, 'SELECT node, task_id::int FROM "{}audit"')
    assert sorted(audited) == sorted(workers.done())
    assert len(audited) == TASKS
