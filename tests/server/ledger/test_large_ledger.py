"""The commands for operators on a ledger of a million rows: each statement is short, the process
does not grow, and attempts that run meanwhile do not wait.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.executions import ExecutionFilter, Executions
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.once import once
from tests.support.rows import Rows

#: Fewer, for whoever works at this test.
ROWS = int(os.environ.get('JOBSYNC_TEST_LEDGER_ROWS', '1000000'))
#: An attempt that would wait for a whole pass over the table takes longer than this; one beside a
#: loaded machine does not.
LONGEST_SEC = 2.0
#: Rows that one statement of the test writes, so that none takes long on a busy machine.
_WRITTEN = 50_000
#: Megabytes by which a process may grow: the rows themselves would be hundreds.
GROWTH_MB = 60.0


@pytest.fixture
def large(rows: Rows) -> Rows:
    """Done, failed and lost rows, one of a function of its own at the end."""
    with rows.sessions.session(limited=False, users=True) as connection:
        with connection.cursor() as cursor:
            for first in range(1, ROWS + 1, _WRITTEN):
                cursor.execute(
                    f'INSERT INTO {rows.tables.execution} '
                    '(key, state, node, incarnation, fence, finished_at, error) '
                    "SELECT 'charge:' || lpad(n::text, 9, '0'), CASE n %% 10 WHEN 0 THEN 'failed' "
                    "WHEN 1 THEN 'running' ELSE 'done' END, 'gone', 'life', 1, "
                    'CASE n %% 10 WHEN 1 THEN NULL ELSE now() END, '
                    "CASE n %% 10 WHEN 0 THEN 'ValueError: no' END "
                    'FROM generate_series(%s, %s) AS n',
                    (first, min(first + _WRITTEN - 1, ROWS)),
                )
                connection.commit()
            cursor.execute(
                f'INSERT INTO {rows.tables.execution} (key, state, fence) '
                "VALUES ('mail:1', 'failed', 1)"
            )
    return rows


@pytest.fixture
def longest(ledger: ClusterLedger) -> Iterator[Callable[[], float]]:
    """Makes attempts, one after the other, until it is asked how long the longest took."""
    took: list[float] = []
    stopped = threading.Event()

    def work() -> None:
        for number in itertools.count():
            if stopped.is_set():
                return
            began = time.monotonic()
            with once(ledger, f'live:{number}'):
                pass
            took.append(time.monotonic() - began)

    thread = threading.Thread(target=work)
    thread.start()

    def ask() -> float:
        stopped.set()
        thread.join()
        return max(took)

    yield ask
    ask()


@pytest.mark.timeout(300)
def test_each_statement_is_short_and_no_attempt_waits(
    large: Rows, config: CoordinationConfig, longest: Callable[[], float]
) -> None:
    """The config's heartbeat timeout of a second limits each statement."""
    with Executions(config) as executions:
        assert len(list(executions.find(limit=100))) == 100
        failed = ExecutionFilter(state='failed', node='gone')
        assert executions.count(failed) == ROWS // 10
        assert [each['key'] for each in executions.find(ExecutionFilter(key='%il:_'))] == ['mail:1']
        assert executions.purge(failed) == ROWS // 10
        assert executions.purge(ExecutionFilter(function='charge')) == ROWS - ROWS // 10
        assert executions.show('mail:1')['state'] == 'failed'
    assert longest() < LONGEST_SEC


@pytest.mark.timeout(300)
def test_a_list_of_all_takes_no_memory(
    large: Rows, config: CoordinationConfig, tmp_path: Path
) -> None:
    def run(*words: str) -> tuple[Path, float]:
        """What a command printed, and the most memory that it had, in MB."""
        place = tmp_path / words[-1]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, '-m', 'jobsync_core.cli', 'executions', 'list', *words],
            {
                **os.environ,
                'JOBSYNC_DATABASE_URL': (
                    f'postgresql://{config.user}:{config.password or ""}@{config.host}:'
                    f'{config.port}/{config.dbname}'
                ),
            },
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, str(place), os.O_WRONLY | os.O_CREAT, 0o600)],
        )
        _, status, usage = os.wait4(pid, 0)
        assert status == 0
        return place, usage.ru_maxrss / 1024

    few, little = run('--limit', '1')
    assert 'charge:000000001' in few.read_text(encoding='utf-8')
    for words in (('--json',), ('--all',)):
        place, most = run(*words)
        assert most < little + GROWTH_MB, words
        with place.open(encoding='utf-8') as lines:
            number = sum('charge:' in line for line in lines)
        assert number == ROWS
    if ROWS <= 100_000:
        found = json.loads((tmp_path / '--json').read_text(encoding='utf-8'))
        assert len(found) == ROWS + 1
