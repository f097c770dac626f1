"""Results that come after the commit which completes their key: a duplicate waits for them, or
learns that they are lost; it never takes None for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
from collections.abc import Callable, Generator
from typing import Any

import psycopg2
import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import (
    CompletedAlready,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    ResultLost,
)
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.execution import Execution, current_execution
from jobsync_core.ledger.functions import returns_nothing
from jobsync_core.ledger.keys import Former
from jobsync_core.ledger.once import exactly_once, once
from jobsync_core.ledger.results import read_result
from jobsync_core.ledger.state import Unsettled
from jobsync_core.store.completions import LOST, PENDING
from jobsync_core.store.transactions import TransactionConnection
from tests.support.ledger_process import connect
from tests.support.ledgers import MakeLedger, effects, insert, state_of
from tests.support.rows import Rows
from tests.support.waiting import eventually


@pytest.fixture
def other(make_ledger: MakeLedger) -> ClusterLedger:
    """The ledger of another node, on the same machine."""
    return make_ledger('b')


def by_block(execution: Execution, config: CoordinationConfig) -> None:
    with execution.transaction() as connection:
        insert(connection)


def by_complete(execution: Execution, config: CoordinationConfig) -> None:
    with contextlib.closing(connect(config)) as connection:
        connection.autocommit = False
        insert(connection)
        with connection.cursor() as cursor:
            execution.complete(cursor)
        connection.commit()


WAYS = pytest.mark.parametrize('commit', [by_block, by_complete])
Commit = Callable[[Execution, CoordinationConfig], None]


def paying(ledger: ClusterLedger, commit: Callable[[], object], **options: Any) -> Any:
    """A function whose effect is committed before it has its result."""

    @exactly_once(
        key='{key}', scope='', ledger=lambda: ledger, **{'on_duplicate': 'result', **options}
    )
    def pay(key: str) -> Any:
        return commit()

    return pay


def stored(rows: Rows) -> str | None:
    """The only result in the ledger, as it stands there."""
    found: str | None = rows.value(f'SELECT result::text FROM {rows.tables.execution}')
    return found


def left_behind(ledger: ClusterLedger, config: CoordinationConfig, commit: Commit) -> None:
    """An attempt whose process dies between its commit and its end, of which nothing is known any
    more.
    """
    mine = Unsettled('k', 60, awaits_result=True)
    ledger.begin(mine)
    commit(Execution(ledger, mine), config)


class TestBeforeTheResult:
    @WAYS
    def test_a_duplicate_finds_the_key_running_until_the_result_is_there(
        self,
        ledger: ClusterLedger,
        other: ClusterLedger,
        rows: Rows,
        config: CoordinationConfig,
        commit: Commit,
    ) -> None:
        met: list[object] = []

        def work() -> str:
            commit(current_execution(), config)
            for duplicate in (second, third, fourth):
                try:
                    met.append(duplicate('k'))
                except ExecutionRunning as error:
                    met.append(error.key)
            return 'paid'

        first = paying(ledger, work)
        second = paying(other, work)
        third = paying(other, work, on_duplicate='raise', on_running='raise')
        fourth = paying(other, work, on_running='skip')
        assert first('k') == 'paid'
        assert met == ['k', 'k', None]  # skipped, as it asks for
        assert (second('k'), first('k'), effects(rows)) == ('paid', 'paid', 1)

    def test_a_result_goes_to_the_attempt_that_it_is_of(
        self, ledger: ClusterLedger, other: ClusterLedger, rows: Rows, config: CoordinationConfig
    ) -> None:
        def work() -> str:
            by_block(current_execution(), config)
            # Somebody deletes the key, and another attempt is as far as this one.
            rows.run(f'DELETE FROM {rows.tables.execution}')
            left_behind(other, config, by_block)
            return 'paid'

        assert paying(ledger, work)('k') == 'paid'
        kept = stored(rows)
        assert kept is not None and json.loads(kept) == json.loads(PENDING)

    def test_so_it_does_where_many_begin_at_once(
        self, ledger: ClusterLedger, other: ClusterLedger, config: CoordinationConfig
    ) -> None:
        met: list[type[Exception]] = []
        barrier = threading.Barrier(12)

        def begin(key: str) -> None:
            barrier.wait(60)
            try:
                with once(other, key):
                    pass
            except (ExecutionRunning, DuplicateExecution) as error:
                met.append(type(error))

        keys = [f'k{number}' for number in range(12)]
        with contextlib.ExitStack() as blocks:
            for key in keys:
                by_block(blocks.enter_context(once(ledger, key)), config)
            threads = [threading.Thread(target=begin, args=(key,)) for key in keys]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert met == [ExecutionRunning] * 12

    def test_the_result_of_a_block_may_come_after_its_transaction(
        self, ledger: ClusterLedger, other: ClusterLedger, config: CoordinationConfig
    ) -> None:
        with once(ledger, 'k') as execution:
            by_block(execution, config)
            with pytest.raises(ExecutionRunning), once(other, 'k'):
                pass
            execution.result = 'late'
        with pytest.raises(DuplicateExecution) as caught, once(other, 'k'):
            pass
        assert (type(caught.value), caught.value.result) == (DuplicateExecution, 'late')

    def test_a_result_that_the_commit_carries_is_there_at_once(
        self, ledger: ClusterLedger, other: ClusterLedger, config: CoordinationConfig
    ) -> None:
        def work() -> str:
            current_execution().result = 'paid'
            by_block(current_execution(), config)
            return str(paying(other, work)('k'))

        assert paying(ledger, work)('k') == 'paid'

    def test_a_coroutine_s_result_too(
        self, ledger: ClusterLedger, other: ClusterLedger, rows: Rows, config: CoordinationConfig
    ) -> None:
        def duplicate() -> None:
            with pytest.raises(ExecutionRunning), once(other, 'k'):
                pass

        @exactly_once(key='{key}', scope='', ledger=lambda: ledger)
        async def pay(key: str) -> str:
            await asyncio.to_thread(by_block, current_execution(), config)
            await asyncio.to_thread(duplicate)
            return 'paid'

        assert asyncio.run(pay('k')) == 'paid'
        assert stored(rows) == '"paid"'

    def test_under_a_former_key_it_counts_too(
        self, ledger: ClusterLedger, other: ClusterLedger, rows: Rows, config: CoordinationConfig
    ) -> None:
        now = Unsettled('new:k', 60, former=(Former('', 'k', False),))
        left_behind(ledger, config, by_block)
        with pytest.raises(ExecutionRunning):
            other.begin(now)
        other.leave(now)
        rows.run(f'DELETE FROM {rows.tables.node} WHERE name = %s', 'a')
        with pytest.raises(ResultLost):
            other.begin(now)


class TestEveryEnd:
    @WAYS
    @pytest.mark.parametrize('error', [ValueError, SystemExit, KeyboardInterrupt])
    def test_an_attempt_that_raises_after_its_commit_has_lost_its_result(
        self,
        ledger: ClusterLedger,
        other: ClusterLedger,
        rows: Rows,
        config: CoordinationConfig,
        commit: Commit,
        error: type[BaseException],
    ) -> None:
        def work() -> str:
            commit(current_execution(), config)
            raise error

        with pytest.raises(error):
            paying(ledger, work)('k')
        assert (state_of(rows, 'k'), stored(rows), ledger.unsettled) == ('done', LOST, 0)
        with pytest.raises(ResultLost):
            paying(other, work)('k')
        assert paying(other, work, on_duplicate='skip')('k') is None

    @WAYS
    def test_one_that_returns_none_has_none(
        self, ledger: ClusterLedger, rows: Rows, config: CoordinationConfig, commit: Commit
    ) -> None:
        pay = paying(ledger, lambda: commit(current_execution(), config))
        assert (pay('k'), stored(rows), pay('k')) == (None, None, None)

    def test_one_whose_transaction_is_rolled_back_and_made_again_has_its_result(
        self, ledger: ClusterLedger, rows: Rows, config: CoordinationConfig
    ) -> None:
        def work() -> str:
            with pytest.raises(ValueError), current_execution().transaction():
                raise ValueError
            by_block(current_execution(), config)
            return 'paid'

        assert paying(ledger, work)('k') == 'paid'
        assert (stored(rows), effects(rows)) == ('"paid"', 1)

    def test_one_that_ends_without_its_transaction_has_its_result(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        def work() -> str:
            with contextlib.suppress(ValueError), current_execution().transaction():
                raise ValueError
            return 'paid'

        assert paying(ledger, work)('k') == 'paid'
        assert stored(rows) == '"paid"'

    def test_a_generator_around_a_block_that_is_thrown_away_leaves_none(
        self, ledger: ClusterLedger, rows: Rows, config: CoordinationConfig
    ) -> None:
        def around() -> Generator[None, None, None]:
            with once(ledger, 'k') as execution:
                by_block(execution, config)
                yield

        suspended = around()
        next(suspended)
        assert stored(rows) == PENDING
        suspended.close()
        eventually(lambda: stored(rows) == LOST)
        assert state_of(rows, 'k') == 'done'

    @WAYS
    @pytest.mark.parametrize('result', [None, 'paid'])
    def test_what_the_database_cannot_take_at_the_end_it_takes_later(
        self,
        ledger: ClusterLedger,
        other: ClusterLedger,
        rows: Rows,
        config: CoordinationConfig,
        commit: Commit,
        result: str | None,
    ) -> None:
        locked = connect(config)
        locked.autocommit = False

        def work() -> str | None:
            commit(current_execution(), config)
            with locked.cursor() as cursor:
                cursor.execute(f'SELECT FROM {rows.tables.execution} FOR UPDATE')
            return result

        assert paying(ledger, work)('k') == result
        with pytest.raises(ExecutionRunning):
            paying(other, work)('k')
        locked.close()
        eventually(lambda: not ledger.unsettled)
        assert paying(other, work)('k') == result

    @pytest.mark.parametrize('early', [False, True], ids=['returned', 'in the second transaction'])
    def test_a_commit_whose_answer_is_lost_leaves_none(
        self,
        ledger: ClusterLedger,
        rows: Rows,
        config: CoordinationConfig,
        monkeypatch: pytest.MonkeyPatch,
        early: bool,
    ) -> None:
        commit, lost = TransactionConnection.commit, [None]

        def lose(connection: TransactionConnection) -> None:
            commit(connection)
            if lost:
                lost.pop()
                connection.close()
                raise psycopg2.OperationalError('server closed the connection unexpectedly')

        monkeypatch.setattr(TransactionConnection, 'commit', lose)

        def again() -> str:
            with pytest.raises(DatabaseUnavailable):
                by_block(current_execution(), config)
            if early:
                current_execution().result = 'paid'
            with pytest.raises(CompletedAlready):
                by_block(current_execution(), config)
            return 'paid'

        assert paying(ledger, again)('k') == 'paid'
        assert (stored(rows), effects(rows)) == ('"paid"', 1)

    def test_one_whose_commit_s_answer_is_lost_for_good_has_lost_its_result(
        self,
        ledger: ClusterLedger,
        rows: Rows,
        config: CoordinationConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        commit = TransactionConnection.commit

        def lose(connection: TransactionConnection) -> None:
            commit(connection)
            connection.close()
            raise psycopg2.OperationalError('server closed the connection unexpectedly')

        def again() -> str:
            with pytest.raises(DatabaseUnavailable):
                by_block(current_execution(), config)
            by_block(current_execution(), config)
            return 'not reached'

        def once_only() -> str:
            by_block(current_execution(), config)
            return 'not reached'

        monkeypatch.setattr(TransactionConnection, 'commit', lose)
        with pytest.raises(DatabaseUnavailable):
            paying(ledger, once_only)('first')
        with pytest.raises(ResultLost):
            paying(ledger, again)('second')
        for key in ('first', 'second'):
            with pytest.raises(ResultLost):
                paying(ledger, once_only)(key)
        assert effects(rows) == 2


class TestALostResult:
    @WAYS
    @pytest.mark.parametrize('how', ['its node', 'its process'])
    def test_of_an_attempt_that_died_the_result_is_lost_and_duplicates_are_told(
        self,
        ledger: ClusterLedger,
        other: ClusterLedger,
        rows: Rows,
        config: CoordinationConfig,
        commit: Commit,
        how: str,
    ) -> None:
        left_behind(ledger, config, commit)
        with pytest.raises(ExecutionRunning), once(other, 'k'):
            pass
        if how == 'its node':
            rows.run(f'DELETE FROM {rows.tables.node} WHERE name = %s', 'a')
        else:
            rows.run(f"UPDATE {rows.tables.execution} SET started = 'long ago'")
        for option in ('result', 'raise'):
            with pytest.raises(ResultLost, match='not known') as caught:
                paying(other, lambda: None, on_duplicate=option)('k')
            assert (caught.value.key, caught.value.result) == ('k', None)
        assert paying(other, lambda: None, on_duplicate='skip')('k') is None
        assert effects(rows) == 1

    def test_whoever_knows_that_tells_other_machines(
        self, ledger: ClusterLedger, other: ClusterLedger, rows: Rows, config: CoordinationConfig
    ) -> None:
        """A child of a worker that lives: only its own machine knows that it is dead."""
        left_behind(ledger, config, by_block)
        rows.run(f"UPDATE {rows.tables.execution} SET started = 'long ago'")
        with pytest.raises(ResultLost), once(other, 'k'):
            pass
        assert stored(rows) == LOST and read_result('k', LOST) is None
        rows.run(f"UPDATE {rows.tables.execution} SET boot_id = 'of another machine'")
        with pytest.raises(ResultLost), once(other, 'k'):
            pass


class Callable_:
    def __call__(self) -> None: ...


class TestFunctionsWithoutResult:
    def test_their_commit_is_all_and_nothing_is_recorded_at_their_end(
        self, ledger: ClusterLedger, other: ClusterLedger, rows: Rows, config: CoordinationConfig
    ) -> None:
        @exactly_once(key='{key}', scope='', ledger=lambda: ledger)
        def pay(key: str) -> None:
            by_block(current_execution(), config)
            with pytest.raises(DuplicateExecution), once(other, 'k'):
                pass
            place.append(rows.value(f'SELECT ctid FROM {rows.tables.execution}'))

        place: list[str] = []
        pay('k')
        assert rows.value(f'SELECT ctid FROM {rows.tables.execution}') == place[0]
        assert effects(rows) == 1

    def test_so_do_those_whose_results_are_not_stored(
        self, ledger: ClusterLedger, other: ClusterLedger, config: CoordinationConfig
    ) -> None:
        def work() -> str:
            by_block(current_execution(), config)
            with pytest.raises(DuplicateExecution), once(other, 'k'):
                pass
            return 'paid'

        pay = paying(ledger, work, store_result=False, on_duplicate='skip')
        assert (pay('k'), pay('k')) == ('paid', None)

    def test_they_are_known_by_their_code(self) -> None:
        def nothing(value: Any) -> None:
            if value:
                with contextlib.suppress(ValueError):
                    return
            for _ in range(3):
                try:
                    print(value)
                finally:
                    print()

        async def nothing_later(value: Any) -> None:
            await value

        def ends(value: Any) -> None:
            raise ValueError

        for function in (nothing, nothing_later, ends, functools.partial(nothing, 1)):
            assert returns_nothing(function), function

        def value(value: Any) -> Any:
            return value

        def sometimes(value: Any) -> Any:
            if value:
                return 1
            return None

        def by_operator(value: Any) -> Any:
            return value and None

        def either(value: Any) -> Any:
            return None if value else value

        def protected(value: Any) -> Any:
            with contextlib.suppress(ValueError):
                return value
            return None

        async def later(value: Any) -> Any:
            return await value

        def set_apart(value: Any) -> None:
            current_execution().result = value

        def replaced(value: Any) -> None:
            raise value.replace(value)

        for function in (value, sometimes, by_operator, either, protected, later, set_apart):
            assert not returns_nothing(function), function
        for unknown in (replaced, print, Callable_(), functools.lru_cache(nothing)):
            assert not returns_nothing(unknown), unknown
