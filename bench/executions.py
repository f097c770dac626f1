"""What the commands for operators cost beside a large ledger, and what workers notice of them:
`python -m bench.executions --rows 1000000`.

Each statement is to take about the same for any number of rows, the process is not to grow, and
attempts that run meanwhile are to take hardly longer than they do alone.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import closing

from jobsync_core import CoordinationConfig, Job
from jobsync_core.embedded import EmbeddedPostgres
from jobsync_core.executions import ExecutionFilter, Executions
from jobsync_core.store.connection import Connection
from jobsync_core.store.tables import Tables

_FILL = """
    INSERT INTO {execution} (key, state, node, incarnation, fence, attempts, started_at,
        finished_at, expires_at, result, error)
    SELECT 'shop.charge:' || lpad(i::text, 9, '0'),
        CASE i %% 10 WHEN 0 THEN 'failed' WHEN 1 THEN 'running' ELSE 'done' END, 'gone', 'life', 1,
        1, now() - interval '1 day', CASE WHEN i %% 10 <> 1 THEN now() - interval '1 hour' END,
        CASE WHEN i %% 10 <> 1 THEN now() + interval '7 days' END,
        CASE WHEN i %% 10 > 1 THEN '{{"rows": 1}}'::jsonb END,
        CASE WHEN i %% 10 = 0 THEN 'ValueError: no' END
    FROM generate_series(1, %(rows)s) AS i;
    INSERT INTO {attempt} (key, slot, number, fence, outcome, ended_at, expires_at)
    SELECT key, 1, 1, 1, 'failed', now(), now() + interval '7 days' FROM {execution}
    WHERE state = 'failed'"""


_KEYS = itertools.count()


class _Worker(threading.Thread):
    """Makes attempts at new keys, one after the other, until it is stopped."""

    def __init__(self, job: Job) -> None:
        super().__init__(daemon=True)
        self.took: list[float] = []
        self._job = job
        self._stopped = threading.Event()

    def run(self) -> None:
        while not (self._stopped.is_set() and self.took):
            began = time.perf_counter()
            with self._job.once(f'live:{next(_KEYS)}'):
                pass
            self.took.append(1000 * (time.perf_counter() - began))

    def stop(self) -> str:
        """How long its attempts took."""
        self._stopped.set()
        self.join()
        return f'{statistics.median(self.took):8.1f} {max(self.took):8.1f}'


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _print(name: str, job: Job, action: Callable[[], object]) -> None:
    before, worker = _memory(), _Worker(job)
    worker.start()
    began = time.perf_counter()
    found = action()
    took = time.perf_counter() - began
    print(
        f'{name:44} {took:8.2f} s  {_memory() - before:6.1f} MB  {worker.stop()} ms  {found}',
        flush=True,
    )


def _measure(config: CoordinationConfig, rows: int) -> None:
    tables = Tables.of(config)
    with Job('bench', config, wait_on_enter=0) as job:
        with closing(Connection.open(config, 'bench')) as connection:
            names = {name: getattr(tables, name) for name in ('execution', 'attempt')}
            connection.execute(
                'SET synchronous_commit TO off; SET statement_timeout TO 0;'
                + _FILL.format(**names),
                {'rows': rows},
                timeout=600,
            )
        with Executions(config) as executions:
            last = ExecutionFilter(key=f'%{rows:09}')

            def number(which: ExecutionFilter) -> int:
                return sum(1 for _ in executions.find(which))

            _print('attempts alone', job, lambda: time.sleep(2))
            _print('list, the first 100', job, lambda: len(list(executions.find(limit=100))))
            _print('list of one function that has none', job, lambda: number(_NONE))
            _print('list of one key at the end', job, lambda: number(last))
            _print('list of all', job, lambda: number(ExecutionFilter()))
            _print('count of what is lost', job, lambda: executions.count(_LOST))
            _print('purge of what failed', job, lambda: executions.purge(_FAILED))
            _print('purge of all', job, lambda: executions.purge(ExecutionFilter(node='gone')))


_NONE = ExecutionFilter(function='shop.mail')
_LOST, _FAILED = ExecutionFilter(state='lost'), ExecutionFilter(state='failed', node='gone')


def _main() -> None:
    parser = argparse.ArgumentParser(prog='python -m bench.executions', description=__doc__)
    parser.add_argument('--rows', type=int, default=1_000_000, help='rows of the ledger')
    rows = parser.parse_args().rows
    print(f'{rows:,} rows; time, growth of memory, median and longest attempt meanwhile, result')
    with EmbeddedPostgres() as server:
        _measure(server.config('postgres'), rows)


if __name__ == '__main__':
    _main()
