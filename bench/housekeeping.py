"""What housekeeping, a begin and an end cost beside many live claims and ledger rows: `python -m
bench.housekeeping --rows 3000000`.

Nothing that is live may be read row by row: each figure is to be about the same for a thousand
times as many rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

from jobsync_core import Job
from jobsync_core.embedded import EmbeddedPostgres
from jobsync_core.store.connection import Connection
from jobsync_core.store.housekeeping import CHORES, HousekeepingStore
from jobsync_core.store.tables import Tables

_TRIES = 5
_FILL = """
    INSERT INTO {claim} (node, task_id, created_on, date, token, incarnation)
        SELECT n.name, 'live ' || i, now() - interval '1 hour', current_date, i %% 10000,
            n.incarnation
        FROM {node} AS n, generate_series(1, %(rows)s) AS i;
    INSERT INTO {execution} (key, state, node, incarnation, fence, attempts, started_at,
        finished_at, expires_at)
        SELECT 'live ' || i, CASE WHEN i %% 2 = 0 THEN 'running' ELSE 'done' END, n.name,
            n.incarnation, 1, 1, now(),
            CASE WHEN i %% 2 = 1 THEN now() END, CASE WHEN i %% 2 = 1 THEN now() + interval '7 days'
                END
        FROM {node} AS n, generate_series(1, %(rows)s) AS i"""


def _milliseconds(action: Callable[[], object]) -> float:
    took = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        action()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took)


def _measure(rows: int) -> dict[str, float]:
    with EmbeddedPostgres() as server:
        config = server.config('postgres')
        with Job('bench', config, wait_on_enter=0) as job:
            tables, connection = Tables.of(config), Connection.open(config, 'bench')
            names = {name: getattr(tables, name) for name in ('claim', 'execution', 'node')}
            connection.execute(
                'SET synchronous_commit TO off; SET statement_timeout TO 0;'
                + _FILL.format(**names),
                {'rows': rows},
                timeout=600,
            )
            keys = iter(range(10**9))

            def attempt() -> None:
                with job.once(f'new {next(keys)}'):
                    pass

            store = HousekeepingStore(connection, tables)
            found = {
                chore.name: _milliseconds(partial(store.run, chore, 1000, None)) for chore in CHORES
            }
            found['begin and end of an attempt'] = _milliseconds(attempt)
            connection.close()
            return found


def _main() -> None:
    parser = argparse.ArgumentParser(prog='python -m bench.housekeeping', description=__doc__)
    parser.add_argument(
        '--rows',
        type=int,
        default=3_000_000,
        help='live claims, and as many live rows of the ledger',
    )
    rows = parser.parse_args().rows
    few, many = _measure(1000), _measure(rows)
    print(f'{"ms, median of " + str(_TRIES):40} {"1,000 rows":>12} {f"{rows:,} rows":>16}')
    for name, value in few.items():
        print(f'{name:40} {value:12.1f} {many[name]:16.1f}')


if __name__ == '__main__':
    _main()
