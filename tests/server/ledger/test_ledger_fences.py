"""Fences of the ledger whose loss no other test would notice: each has a test that fails without
it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import DatabaseUnavailable, JobSyncError
from jobsync_core.ledger import unsettled
from jobsync_core.ledger.attempt import Attempt
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.once import once
from jobsync_core.process import this_process
from jobsync_core.store.completions import Completion
from jobsync_core.store.executions import ExecutionStore, Holder
from tests.support import attempts as by_hand
from tests.support.ledger_process import connect
from tests.support.ledgers import ledgers_of, state_of
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

# Notes in which order a transaction comes to its keys.
ORDER = """
CREATE TABLE seen (number serial, transaction bigint, key text);
CREATE FUNCTION note_order() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_catalog
    AS $$
BEGIN
    INSERT INTO seen (transaction, key) VALUES (pg_current_xact_id()::text::bigint, NEW.key);
    RETURN NEW;
END $$;
CREATE TRIGGER note_order BEFORE INSERT OR UPDATE ON {execution} FOR EACH ROW EXECUTE FUNCTION
    note_order();
"""


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        yield found


@pytest.fixture
def ledger(rows: Rows) -> Iterator[ClusterLedger]:
    with ledgers_of(rows) as make:
        yield make('a')


def in_child(action: Callable[[], object]) -> int:
    """Run it in a forked child; how that ended."""
    pid = os.fork()
    if not pid:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize('raises', [False, True], ids=['to its end', 'by an exception'])
def test_a_child_that_is_forked_within_an_attempt_and_leaves_it_does_not_end_it(
    ledger: ClusterLedger, rows: Rows, raises: bool
) -> None:
    block = once(ledger, 'k')
    execution = block.__enter__()
    other = by_hand.begin(ledger, 'other')

    def leave() -> None:
        block.__exit__(*((ValueError, ValueError('x'), None) if raises else (None, None, None)))
        by_hand.finish(other)
        by_hand.abandon(other)
        by_hand.fail(other, ValueError('y'))
        ledger.close()

    assert in_child(leave) == 0
    assert (execution.completed, other.completed) == (False, False)
    assert rows.run(f'SELECT key, state, pid FROM {rows.tables.execution} ORDER BY key') == [
        (key, 'running', os.getpid()) for key in ('k', 'other')
    ]
    block.__exit__(None, None, None)
    assert state_of(rows, 'k') == 'done'


def test_without_looking_at_the_process_the_child_would_end_it(
    ledger: ClusterLedger, rows: Rows
) -> None:
    attempt = Attempt(ledger, 'k', 60)
    attempt.begin()

    def leave() -> None:
        attempt.unsettled.pid = os.getpid()  # what a ledger would see that did not look
        attempt.succeed()
        attempt.settle()

    assert in_child(leave) == 0
    assert state_of(rows, 'k') == 'done'


@pytest.mark.parametrize('end', ['completion', 'failure', 'abandoned'])
def test_an_end_that_the_database_misses_is_remembered_until_it_is_back(
    ledger: ClusterLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    execution = by_hand.begin(ledger, 'k', 60)
    away = [True]
    for name in ('settle', 'finish'):
        original = getattr(ExecutionStore, name)

        def fail(*args: Any, original: Any = original) -> Any:
            if away:
                raise DatabaseUnavailable('away')
            return original(*args)

        monkeypatch.setattr(ExecutionStore, name, fail)
    if end == 'completion':
        with pytest.raises(DatabaseUnavailable):
            by_hand.finish(execution)
    elif end == 'failure':
        by_hand.fail(execution, ValueError('x'))
    else:
        by_hand.abandon(execution)
    assert (ledger.unsettled, state_of(rows, 'k')) == (1, 'running')
    away.clear()
    eventually(lambda: state_of(rows, 'k') == ('done' if end == 'completion' else 'failed'))
    eventually(lambda: ledger.unsettled == 0)


def test_an_attempt_that_may_begin_late_is_let_go_of_whenever_it_does(
    ledger: ClusterLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server executes a statement long after its client has given it up."""
    begin = ExecutionStore.begin
    late: list[tuple[Any, ...]] = []

    def lose(_: ExecutionStore, *args: Any) -> Any:
        late.append(args)
        raise DatabaseUnavailable('no answer')

    monkeypatch.setattr(ExecutionStore, 'begin', lose)
    monkeypatch.setattr(unsettled, '_LAST_RETRY_SEC', 0.05)
    with pytest.raises(DatabaseUnavailable):
        by_hand.begin(ledger, 'k', 60)
    monkeypatch.setattr(ExecutionStore, 'begin', begin)
    for _ in range(2):
        with rows.sessions.session() as connection:
            begin(ExecutionStore(connection, rows.tables), *late[0])
        eventually(lambda: state_of(rows, 'k') == 'failed')


def test_a_result_that_cannot_be_read_fails_nobody_else_of_its_group(
    ledger: ClusterLedger, rows: Rows
) -> None:
    """The driver read it as JSON, and raised for all of them."""
    holder = Holder('a', 'life of a', this_process())
    rows.run(
        f"""INSERT INTO {rows.tables.execution} (key, state, fence, result, expires_at)
            VALUES ('bad', 'done', 1, repeat('9', 5000)::jsonb, 'infinity')"""
    )
    with rows.sessions.session() as connection:
        found = ExecutionStore(connection, rows.tables).begin_many(['good', 'bad'], holder)
    assert [row.began for row in found] == [True, False]
    with pytest.raises(JobSyncError, match='its result in the ledger cannot be read'):
        by_hand.begin(ledger, 'bad', 60)


def test_groups_come_to_their_keys_in_one_order(ledger: ClusterLedger, rows: Rows) -> None:
    """Or two transactions that meet at the same keys from both ends would wait for each other for
    ever.
    """
    rows.run(ORDER.format(execution=rows.tables.execution))
    keys = [f'k{number:02}' for number in range(20)]
    random.Random(7).shuffle(keys)
    assert keys != sorted(keys)
    holder = Holder('a', 'life of a', this_process())
    with rows.sessions.session() as connection:
        begun = ExecutionStore(connection, rows.tables).begin_many(keys, holder)
    fences = dict(rows.run(f'SELECT key, fence FROM {rows.tables.execution}'))
    assert [row.fence for row in begun] == [fences[key] for key in keys]
    with rows.sessions.session() as connection:
        completions = [Completion(key, fences[key], None, 60) for key in keys]
        assert ExecutionStore(connection, rows.tables).finish_many(completions) == [True] * len(
            keys
        )
    for (transaction,) in rows.run('SELECT DISTINCT transaction FROM seen'):
        seen = [
            key
            for (key,) in rows.run(
                'SELECT key FROM seen WHERE transaction = %s ORDER BY number', transaction
            )
        ]
        assert seen == sorted(keys)


def test_groups_that_meet_at_the_same_keys_from_both_ends_do_not_wait_for_each_other_in_a_ring(
    rows: Rows,
) -> None:
    holders = [Holder(name, f'life of {name}', this_process()) for name in 'ab']
    for name in 'ab':
        rows.node(name)
    keys = [f'k{number}' for number in range(60)]
    connections = [connect(rows.config) for _ in holders]

    def begin(place: int, round_: int) -> None:
        mine = [f'{round_} {key}' for key in (keys if place else reversed(keys))]
        ExecutionStore(connections[place], rows.tables).begin_many(mine, holders[place])

    with ThreadPoolExecutor(2) as pool:
        for round_ in range(15):
            for future in [pool.submit(begin, place, round_) for place in range(2)]:
                future.result(30)
    assert rows.value(
        f"SELECT count(*) FROM {rows.tables.execution} WHERE state = 'running'"
    ) == 15 * len(keys)
    for connection in connections:
        connection.close()
