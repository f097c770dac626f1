"""Somebody locks a whole table of the ledger: nothing is being executed, and that is what callers,
workers and logs are told.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

import psycopg2
import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import DatabaseRefused, ExecutionRunning
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.current import set_current_ledger
from jobsync_core.ledger.once import exactly_once, once
from tests.support import attempts as by_hand
from tests.support.ledgers import ledgers_of, state_of
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        yield found


@pytest.fixture
def ledger(rows: Rows) -> Iterator[ClusterLedger]:
    with ledgers_of(rows) as make:
        made = make('a')
        set_current_ledger(made)
        yield made
        set_current_ledger(None)


@contextlib.contextmanager
def locked(rows: Rows, sql: str) -> Iterator[int]:
    """Somebody's transaction; the process id of its session."""
    config = rows.config
    with (
        contextlib.closing(
            psycopg2.connect(
                host=config.host,
                port=config.port,
                dbname=config.dbname,
                user=config.user,
                password=config.password,
                application_name='nightly index',
            )
        ) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(sql.format(execution=rows.tables.execution, node=rows.tables.node))
        yield connection.info.backend_pid


@pytest.mark.parametrize(
    ('sql', 'mode', 'table'),
    [
        ('LOCK TABLE {execution} IN SHARE MODE', 'ShareLock', 'sync_execution'),
        (
            'LOCK TABLE {execution} IN ACCESS EXCLUSIVE MODE',
            'AccessExclusiveLock',
            'sync_execution',
        ),
        ('LOCK TABLE {node} IN ACCESS EXCLUSIVE MODE', 'AccessExclusiveLock', 'sync_node'),
    ],
)
def test_a_begin_tells_which_table_is_locked_by_whom_and_pauses_the_workers(
    ledger: ClusterLedger,
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
    sql: str,
    mode: str,
    table: str,
) -> None:
    with caplog.at_level(logging.INFO), locked(rows, sql) as pid:
        for key in ('k1', 'k2'):
            with pytest.raises(DatabaseRefused) as caught:
                by_hand.begin(ledger, key, 60)
            told = str(caught.value)
            assert (
                f"application 'nightly index' (pid {pid}" in told
                and f'has locked {table} ({mode})' in told
            ), told
            assert (caught.value.pause, caught.value.sqlstate) == (True, '55P03')
        assert ledger.pausing.length and ledger.unsettled == 0
    told_of = [
        record.levelname for record in caplog.records if 'nightly index' in record.getMessage()
    ]
    assert told_of == ['WARNING'], 'once, not for each key'
    assert by_hand.begin(ledger, 'k1', 60).attempts == 1 and not ledger.pausing.length


def test_whoever_waits_to_lock_the_table_is_in_the_way_as_well(
    ledger: ClusterLedger, rows: Rows
) -> None:
    with (
        locked(rows, 'SELECT FROM {execution}') as reader,
        locked(rows, 'SELECT 1') as pid,
        contextlib.ExitStack() as stack,
    ):

        def alter() -> None:
            with (
                contextlib.suppress(psycopg2.errors.QueryCanceled),
                locked(rows, 'LOCK TABLE {execution} IN ACCESS EXCLUSIVE MODE'),
            ):
                pass

        thread = threading.Thread(target=alter)
        thread.start()
        stack.callback(thread.join, 10)
        waiters = (
            'SELECT pid FROM pg_locks WHERE NOT granted AND relation = '
            f"'{rows.tables.execution}'::regclass"
        )
        ((waiter,),) = eventually(lambda: rows.run(waiters))
        stack.callback(rows.run, 'SELECT pg_cancel_backend(%s)', waiter)
        with pytest.raises(DatabaseRefused, match=rf'pid {waiter}.*waits to lock sync_execution'):
            by_hand.begin(ledger, 'k', 60)
        assert waiter not in (reader, pid)


def test_a_message_is_not_skipped_as_running_where_nothing_runs(
    ledger: ClusterLedger, rows: Rows
) -> None:
    ran = []

    @exactly_once(key='order', on_running='skip', scope='orders')
    def order() -> None:
        ran.append(1)

    with locked(rows, 'LOCK TABLE {execution} IN SHARE MODE'), pytest.raises(DatabaseRefused):
        order()
    order()
    assert ran == [1]


def test_a_row_of_a_key_that_is_free_may_be_locked_and_then_nobody_is_told_that_it_runs(
    ledger: ClusterLedger, rows: Rows
) -> None:
    with pytest.raises(ZeroDivisionError), once(ledger, 'k'):
        raise ZeroDivisionError
    assert state_of(rows, 'k') == 'failed'
    with locked(rows, "SELECT FROM {execution} WHERE key = 'k' FOR UPDATE"):
        with pytest.raises(DatabaseRefused, match='somebody has locked the row') as caught:
            by_hand.begin(ledger, 'k', 60)
        assert not caught.value.pause
    execution = by_hand.begin(ledger, 'k', 60)
    with (
        locked(rows, "SELECT FROM {execution} WHERE key = 'k' FOR UPDATE"),
        pytest.raises(ExecutionRunning),
    ):
        by_hand.begin(ledger, 'k', 60)
    by_hand.finish(execution)


def test_a_completion_that_meets_the_lock_says_so_and_is_recorded_afterwards(
    ledger: ClusterLedger, rows: Rows
) -> None:
    execution = by_hand.begin(ledger, 'k', 60)
    with locked(rows, 'LOCK TABLE {execution} IN SHARE MODE'):
        began = time.monotonic()
        with pytest.raises(DatabaseRefused, match=r'nightly index.*has locked sync_execution'):
            by_hand.finish(execution)
        assert time.monotonic() - began < 15
        assert ledger.unsettled == 1
    eventually(lambda: state_of(rows, 'k') == 'done', timeout=20)
