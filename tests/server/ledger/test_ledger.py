"""The ledger on PostgreSQL: one attempt at a time, one completion, and nothing that stays taken."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import logging
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.embedded.postgres import EmbeddedPostgres
from jobsync_core.errors import (
    ClaimLost,
    ConfigurationError,
    DatabaseRefused,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    Fenced,
    NotCommitted,
)
from jobsync_core.ledger import batch as group_commit
from jobsync_core.ledger.attempt import Attempt
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.execution import Execution, current_execution
from jobsync_core.ledger.once import exactly_once, once
from jobsync_core.store.executions import ExecutionStore, Row
from jobsync_core.store.sessions import Sessions
from tests.support import attempts as by_hand
from tests.support.ledger_process import connect
from tests.support.ledgers import MakeLedger, effects, insert, ledgers_of, state_of
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually


def forget_node(rows: Rows, node: str) -> None:
    rows.run(f'DELETE FROM {rows.tables.node} WHERE name = %s', node)


class TestCompletion:
    def test_a_completed_key_is_a_duplicate_everywhere_and_has_its_result(
        self, make_ledger: MakeLedger
    ) -> None:
        first, second = make_ledger('a'), make_ledger('b')
        value = {'text': 'é"\\u0000 日本', 'numbers': [1, 2.5, None, True]}
        with once(first, 'k') as execution:
            execution.result = value
        for ledger in (first, second):
            with pytest.raises(DuplicateExecution) as caught:
                by_hand.begin(ledger, 'k', 60)
            assert vars(caught.value)['result'] == value

    def test_results_come_back_as_they_were(self, make_ledger: MakeLedger) -> None:
        ledger = make_ledger()
        for number, value in enumerate(
            (
                1e22,
                -0.0,
                [0.0, -0.0, 5e-324],
                (1, (2, [3, (4,)])),
                {1: 'x', '1': 'y'},
                {'deep': ({'$tuple': [None]},)},
                '\ud800',
                'a\0b',
                {'\0': 1},
                10**4000,
                2**64,
                -1.7976931348623157e308,
                '\\u0000',
                {'é"\\': '日本'},
                [True, 1, 1.0],
            )
        ):
            with once(ledger, f'k{number}') as execution:
                execution.result = value
            with pytest.raises(DuplicateExecution) as caught:
                by_hand.begin(ledger, f'k{number}', 60)
            assert repr(vars(caught.value)['result']) == repr(value)

    def test_of_many_concurrent_beginners_exactly_one_runs(self, make_ledger: MakeLedger) -> None:
        ledgers = [make_ledger(name) for name in 'abc'] * 2
        ran: list[str] = []
        refused: list[type[Exception]] = []
        barrier = threading.Barrier(len(ledgers))

        def deliver(ledger: ClusterLedger) -> None:
            for number in range(40):
                barrier.wait(30)
                try:
                    with once(ledger, f'k{number}'):
                        ran.append(f'k{number}')
                except (DuplicateExecution, ExecutionRunning) as error:
                    refused.append(type(error))

        threads = [threading.Thread(target=deliver, args=(ledger,)) for ledger in ledgers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(ran) == sorted(f'k{number}' for number in range(40))
        assert len(refused) == 40 * 5

    def test_a_failed_key_may_run_again_at_once_by_anybody(
        self, make_ledger: MakeLedger, rows: Rows
    ) -> None:
        first, second = make_ledger('a'), make_ledger('b')
        with pytest.raises(ValueError, match='nul'), once(first, 'k') as execution:
            raise ValueError('nul \0 and \ud800 are no text')
        assert state_of(rows, 'k') == 'failed'
        with once(second, 'k') as again:
            assert (again.attempts, again.fence > execution.fence) == (2, True)
        assert state_of(rows, 'k') == 'done'

    def test_after_its_retention_a_key_runs_again_with_a_greater_fence(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        with once(ledger, 'k', retention=3600) as first:
            pass
        with pytest.raises(DuplicateExecution):
            by_hand.begin(ledger, 'k', 60)
        seconds = rows.value(
            f'SELECT extract(epoch FROM expires_at - finished_at) FROM {rows.tables.execution}'
        )
        assert float(seconds) == pytest.approx(3600, abs=1)
        rows.run(f"UPDATE {rows.tables.execution} SET expires_at = now() - interval '1 second'")
        with once(ledger, 'k') as second:
            assert (second.fence > first.fence, second.attempts) == (True, 1)

    def test_fences_rise_even_across_the_deletion_of_the_row(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        with once(ledger, 'k') as first:
            pass
        rows.run(f'DELETE FROM {rows.tables.execution}')
        with once(ledger, 'k') as second:
            pass
        assert second.fence > first.fence

    def test_a_result_that_the_database_cannot_store_does_not_prevent_the_completion(
        self,
        postgres: EmbeddedPostgres,
        config: CoordinationConfig,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        name = f'{config.dbname}_latin'
        admin = connect(config)
        with admin.cursor() as cursor:
            cursor.execute(
                f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' "
                "LC_CTYPE 'C'"
            )
        try:
            with (
                rows_of(dataclasses.replace(config, dbname=name)) as rows,
                ledgers_of(rows) as make,
                caplog.at_level(logging.WARNING),
            ):
                with once(make(), 'k') as execution:
                    execution.result = '日本'
                assert rows.run(f'SELECT state, result FROM {rows.tables.execution}') == [
                    ('done', None)
                ]
            assert 'completed without its result' in caplog.text
        finally:
            with admin.cursor() as cursor:
                cursor.execute(f'DROP DATABASE {name} WITH (FORCE)')
            admin.close()


class TestTakingOver:
    def test_a_key_of_a_live_node_is_running(self, make_ledger: MakeLedger) -> None:
        first, second = make_ledger('a'), make_ledger('b')
        by_hand.begin(first, 'k', 60)
        for ledger in (first, second):
            with pytest.raises(ExecutionRunning):
                by_hand.begin(ledger, 'k', 60)

    @pytest.mark.parametrize(
        'how', ['node row deleted', 'new incarnation', 'process known dead', 'released']
    )
    def test_a_key_of_a_dead_holder_is_taken_over_and_its_fence_raised(
        self, make_ledger: MakeLedger, rows: Rows, how: str
    ) -> None:
        first, second = make_ledger('a'), make_ledger('b')
        lost = by_hand.begin(first, 'k', 60)
        if how == 'node row deleted':
            forget_node(rows, 'a')
        elif how == 'new incarnation':
            rows.run(f"UPDATE {rows.tables.node} SET incarnation = 'another life' WHERE name = 'a'")
        elif how == 'process known dead':
            child = subprocess.Popen([sys.executable, '-c', ''])
            child.wait()
            rows.run(f"UPDATE {rows.tables.execution} SET pid = %s, started = '1'", child.pid)
        else:
            assert first.release(os.getpid() + 1) == 0
            assert first.release(os.getpid()) == 1
        taken = by_hand.begin(second, 'k', 60)
        assert taken.fence > lost.fence and taken.attempts == 2
        with pytest.raises(Fenced):
            by_hand.finish(lost)
        by_hand.finish(taken)
        assert taken.completed and not lost.completed
        assert rows.run(f'SELECT state, fence, node FROM {rows.tables.execution}') == [
            ('done', taken.fence, 'b')
        ]

    def test_an_evicted_node_begins_nothing(self, make_ledger: MakeLedger, rows: Rows) -> None:
        ledger = make_ledger('a')
        forget_node(rows, 'a')
        with pytest.raises(ClaimLost, match='not registered'):
            by_hand.begin(ledger, 'k', 60)
        assert state_of(rows, 'k') is None
        rows.node('a', incarnation='another life')
        with pytest.raises(ClaimLost, match='not registered'):
            by_hand.begin(ledger, 'k', 60)
        forget_node(rows, 'a')
        rows.node('a')
        assert by_hand.begin(ledger, 'k', 60).attempts == 1

    def test_a_released_attempt_can_no_longer_complete(
        self, make_ledger: MakeLedger, rows: Rows
    ) -> None:
        ledger = make_ledger('a')
        lost = by_hand.begin(ledger, 'k', 60)
        ledger.release(os.getpid())
        with pytest.raises(Fenced):
            by_hand.finish(lost)
        assert state_of(rows, 'k') == 'failed'

    def test_of_two_that_see_the_same_dead_process_one_takes_over(
        self, make_ledger: MakeLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second, third = make_ledger('a'), make_ledger('b'), make_ledger('c')
        by_hand.begin(first, 'k', 60)
        rows.run(f"UPDATE {rows.tables.execution} SET started = '1'")
        take_over = ExecutionStore.take_over
        taken: list[Execution] = []

        def late(*args: Any) -> tuple[int, int] | None:
            monkeypatch.undo()
            taken.append(by_hand.begin(third, 'k', 60))
            return take_over(*args)

        monkeypatch.setattr(ExecutionStore, 'take_over', late)
        with pytest.raises(ExecutionRunning):
            by_hand.begin(second, 'k', 60)
        by_hand.finish(taken[0])
        assert (taken[0].attempts, state_of(rows, 'k')) == (2, 'done')

    @pytest.mark.parametrize('state', [None, 'failed', 'done'])
    def test_a_race_that_was_lost_is_looked_at_again(
        self, make_ledger: MakeLedger, monkeypatch: pytest.MonkeyPatch, state: str | None
    ) -> None:
        begin = ExecutionStore.begin

        def lose(*args: Any) -> Row:
            monkeypatch.setattr(ExecutionStore, 'begin', begin)
            return Row(False, True, state, state is not None, 1, 1, None, None)

        ledger = make_ledger('a')
        monkeypatch.setattr(ExecutionStore, 'begin', lose)
        assert by_hand.begin(ledger, 'k', 60).attempts == 1

    def test_an_end_that_is_late_changes_nothing(
        self, make_ledger: MakeLedger, rows: Rows, own: Any
    ) -> None:
        first, second = make_ledger('a'), make_ledger('b')
        lost = by_hand.begin(first, 'k', 60)
        forget_node(rows, 'a')
        taken = by_hand.begin(second, 'k', 60)
        with pytest.raises(Fenced), lost.transaction() as connection:
            insert(connection)
        insert(own)
        with pytest.raises(Fenced), own.cursor() as cursor:
            lost.complete(cursor)
        own.rollback()
        by_hand.fail(lost, ValueError('late'))
        assert (effects(rows), state_of(rows, 'k')) == (0, 'running')
        with taken.transaction() as connection:
            insert(connection)
        by_hand.finish(taken)
        assert (effects(rows), state_of(rows, 'k')) == (1, 'done')

    def test_a_forked_child_is_recorded_as_itself_and_leaves_the_parents_connection_alone(
        self, make_ledger: MakeLedger, rows: Rows
    ) -> None:
        rows.node('parent')
        other = make_ledger('b')
        fields = {
            item.name: getattr(rows.config, item.name) for item in dataclasses.fields(rows.config)
        }
        done = subprocess.run(
            [sys.executable, '-c', _FORKING],
            input=json.dumps(fields, default=dict),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=Path(__file__).parents[3],
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        found = {
            key: (pid, state)
            for key, pid, state in rows.run(f'SELECT key, pid, state FROM {rows.tables.execution}')
        }
        assert found == {
            'parent': (told['parent'], 'done'),
            'child': (told['child'], 'done'),
            'after': (told['parent'], 'done'),
            'lost': (told['child'], 'failed'),
        }
        assert told['running'] == 'ExecutionRunning' and told['released'] == 1
        assert by_hand.begin(other, 'lost', 60).attempts == 2


_FORKING = """
import json, os, sys
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ExecutionRunning
from jobsync_core.ledger.current import current_ledger, set_current_ledger
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.once import once
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.schema import Tables

config = CoordinationConfig(**json.load(sys.stdin))
sessions, tables = Sessions(config, 'parent'), Tables(config.appname)
ledger = ClusterLedger(sessions, tables, 'parent', lambda: 'life of parent')
set_current_ledger(ledger)
with once(ledger, 'parent'):
    pass
go_on, begun = os.pipe(), os.pipe()
child = os.fork()
if not child:
    with once(current_ledger(), 'child'):
        pass
    lost = once(current_ledger(), 'lost')
    lost.__enter__()
    os.write(begun[1], b'.')
    os.read(go_on[0], 1)
    os._exit(0)
os.read(begun[0], 1)
try:
    with once(ledger, 'lost'):
        running = 'begun'
except ExecutionRunning as error:
    running = type(error).__name__
os.kill(child, 9)
os.waitpid(child, 0)
released = ledger.release(child)
with once(ledger, 'after'):
    pass
print(json.dumps({'parent': os.getpid(), 'child': child, 'running': running, 'released': released}))
"""


class TestTransaction:
    def test_effect_and_completion_come_together(self, ledger: ClusterLedger, rows: Rows) -> None:
        with once(ledger, 'k') as execution:
            with execution.transaction() as connection:
                insert(connection)
                execution.result = 'stored'
                assert (effects(rows), state_of(rows, 'k')) == (0, 'running')
            assert (effects(rows), state_of(rows, 'k'), execution.completed) == (1, 'done', True)
        with pytest.raises(DuplicateExecution) as caught:
            by_hand.begin(ledger, 'k', 60)
        assert vars(caught.value)['result'] == 'stored'

    def test_an_exception_undoes_both_and_frees_the_key(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        def attempt() -> None:
            with once(ledger, 'k') as execution, execution.transaction() as connection:
                insert(connection)
                raise ValueError('x')

        with pytest.raises(ValueError, match='x'):
            attempt()
        assert (effects(rows), state_of(rows, 'k')) == (0, 'failed')

    def test_an_exception_after_the_commit_leaves_the_key_done(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        def attempt() -> None:
            with once(ledger, 'k') as execution:
                with execution.transaction() as connection:
                    insert(connection)
                raise ValueError('x')

        with pytest.raises(ValueError, match='x'):
            attempt()
        assert (effects(rows), state_of(rows, 'k')) == (1, 'done')

    def test_a_transaction_that_a_stuck_server_does_not_begin_in_time_is_the_database_s_fault(
        self, ledger: ClusterLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stuck(store: ExecutionStore) -> Any:
            with store.connection.cursor() as cursor:
                cursor.execute("SET LOCAL statement_timeout = '50ms'; SELECT pg_sleep(30)")

        monkeypatch.setattr(ExecutionStore, 'begin_transaction', stuck)

        def attempt() -> None:
            with once(ledger, 'k') as execution, execution.transaction() as connection:
                insert(connection)

        with pytest.raises(DatabaseUnavailable, match='could not be begun in time'):
            attempt()
        monkeypatch.undo()
        attempt()
        assert (effects(rows), state_of(rows, 'k')) == (1, 'done')

    def test_savepoints_are_allowed(self, ledger: ClusterLedger, rows: Rows) -> None:
        with once(ledger, 'k') as execution, execution.transaction() as connection:
            insert(connection)
            with connection.cursor() as cursor:
                cursor.execute('SAVEPOINT here')
                insert(connection)
                cursor.execute('ROLLBACK TO SAVEPOINT here')
        assert (effects(rows), state_of(rows, 'k')) == (1, 'done')

    def test_it_can_be_used_once(self, ledger: ClusterLedger) -> None:
        with once(ledger, 'k') as execution:
            with execution.transaction():
                pass
            with (
                pytest.raises(ConfigurationError, match='completed already'),
                execution.transaction(),
            ):
                pytest.fail('a second transaction began')

    def test_the_connection_comes_back_as_it_was(self, ledger: ClusterLedger) -> None:
        def limits() -> list[tuple[Any, ...]]:
            with ledger._sessions.session() as connection, connection.cursor() as cursor:
                assert connection.autocommit is False
                cursor.execute(
                    "SELECT name, setting FROM pg_settings WHERE name ~ 'timeout' ORDER BY name"
                )
                return list(cursor.fetchall())

        before = limits()
        with once(ledger, 'k') as execution, execution.transaction():
            pass
        assert limits() == before

    def test_work_may_take_longer_than_the_limits_of_short_calls(
        self, make_config: Callable[..., CoordinationConfig], rows: Rows
    ) -> None:
        config = make_config(heartbeat_interval_sec=0.05, heartbeat_timeout_sec=0.2)
        rows.node('slow')
        ledger = ClusterLedger(
            Sessions(config, 'slow'), rows.tables, 'slow', lambda: 'life of slow'
        )
        with (
            once(ledger, 'k') as execution,
            execution.transaction() as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute('SELECT pg_sleep(1.5)')
        assert state_of(rows, 'k') == 'done'
        ledger._sessions.close_all()


class TestCompleteInTheUsersTransaction:
    def test_effect_and_completion_come_together(
        self, ledger: ClusterLedger, rows: Rows, own: Any
    ) -> None:
        with once(ledger, 'k') as execution:
            insert(own)
            with own.cursor() as cursor:
                execution.complete(cursor, result=[1])
            assert (effects(rows), state_of(rows, 'k')) == (0, 'running')
            own.commit()
        assert (effects(rows), state_of(rows, 'k')) == (1, 'done')
        with pytest.raises(DuplicateExecution) as caught:
            by_hand.begin(ledger, 'k', 60)
        assert vars(caught.value)['result'] == [1]

    def test_types_of_frameworks_come_back(self, ledger: ClusterLedger, own: Any) -> None:
        result = {
            'at': datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.timezone.utc),
            'price': Decimal('1.10'),
            'ids': [uuid.UUID(int=7)],
            'data': b'\0\xff',
        }
        with once(ledger, 'k') as execution:
            execution.complete(own, result=result)
            own.commit()
        with pytest.raises(DuplicateExecution) as caught:
            by_hand.begin(ledger, 'k', 60)
        assert vars(caught.value)['result'] == result

    def test_a_connection_without_execute_will_do(
        self, ledger: ClusterLedger, rows: Rows, own: Any
    ) -> None:
        with once(ledger, 'k') as execution:
            execution.complete(own)
            own.commit()
        assert state_of(rows, 'k') == 'done'

    def test_what_cannot_execute_is_refused(self, ledger: ClusterLedger) -> None:
        execution = by_hand.begin(ledger, 'k', 60)
        with pytest.raises(ConfigurationError, match='has no execute'):
            execution.complete(5)
        with pytest.raises(ConfigurationError, match='is no JSON'):
            execution.complete(5, result=object())

    def test_an_exception_after_a_rollback_frees_the_key(
        self, ledger: ClusterLedger, rows: Rows, own: Any
    ) -> None:
        def attempt() -> None:
            with once(ledger, 'k') as execution:
                execution.complete(own)
                own.rollback()
                raise ValueError('x')

        with pytest.raises(ValueError, match='x'):
            attempt()
        assert state_of(rows, 'k') == 'failed'

    def test_a_rollback_that_the_function_hides_is_no_completion(
        self, ledger: ClusterLedger, rows: Rows, own: Any
    ) -> None:
        def attempt() -> None:
            with once(ledger, 'k') as execution:
                insert(own)
                execution.complete(own)
                own.rollback()

        with pytest.raises(NotCommitted, match='was rolled back'):
            attempt()
        assert (effects(rows), state_of(rows, 'k')) == (0, 'failed')

    def test_a_repeated_transaction_can_complete_again(
        self, ledger: ClusterLedger, rows: Rows, own: Any
    ) -> None:
        with once(ledger, 'k') as execution:
            for end in (own.rollback, own.commit):
                insert(own)
                execution.complete(own)
                end()
        assert (effects(rows), state_of(rows, 'k')) == (1, 'done')

    @pytest.mark.parametrize(('end', 'state'), [('commit', 'done'), ('rollback', 'failed')])
    def test_a_transaction_that_is_open_when_the_block_ends_is_no_success_and_decides_when_it_ends(
        self, make_ledger: MakeLedger, rows: Rows, own: Any, end: str, state: str
    ) -> None:
        ledger, other = make_ledger('a'), make_ledger('b')
        with pytest.raises(NotCommitted, match='still open'), once(ledger, 'k') as execution:
            execution.complete(own)
        for beginner in (ledger, other):
            with pytest.raises(ExecutionRunning):
                by_hand.begin(beginner, 'k', 60)
        getattr(own, end)()
        eventually(lambda: state_of(rows, 'k') == state)

    def test_an_exception_out_of_a_transaction_around_the_function_frees_the_key(
        self, ledger: ClusterLedger, rows: Rows, own: Any
    ) -> None:
        def attempt() -> None:
            with once(ledger, 'k') as execution:
                execution.complete(own)
                raise ValueError('x')

        with pytest.raises(ValueError, match='x'):
            attempt()
        own.rollback()
        eventually(lambda: state_of(rows, 'k') == 'failed')

    def test_a_result_that_is_known_after_the_commit_is_added(
        self, ledger: ClusterLedger, own: Any
    ) -> None:
        @exactly_once(key='{number}', scope='test', on_duplicate='result')
        def function(number: int) -> str:
            current_execution().complete(own)
            own.commit()
            return 'known later'

        assert (function(1), function(1)) == ('known later', 'known later')


class TestDecorator:
    def test_options_on_a_real_ledger(self, make_ledger: MakeLedger, ledger: ClusterLedger) -> None:
        calls: list[int] = []

        def body(number: int) -> Any:
            calls.append(number)
            return number, number

        skip = exactly_once(key='{number}', scope='')(body)
        result = exactly_once(key='{number}', scope='', on_duplicate='result')(body)
        refuse = exactly_once(key='{number}', scope='', on_duplicate='raise', on_running='raise')(
            body
        )
        skip_running = exactly_once(key='{number}', scope='', on_running='skip')(body)
        assert skip(1) == (1, 1)
        assert (skip(1), result(1), calls) == (None, (1, 1), [1])
        with pytest.raises(DuplicateExecution):
            refuse(1)
        by_hand.begin(make_ledger('b'), '2', 60)
        with pytest.raises(ExecutionRunning):
            refuse(2)
        assert (skip_running(2), calls) == (None, [1])

    def test_async_functions_and_methods(self, ledger: ClusterLedger, rows: Rows) -> None:
        class Shop:
            @exactly_once(key='order:{number}', scope='', on_duplicate='result')
            async def sell(self, number: int) -> str:
                await asyncio.sleep(0)
                return f'{current_execution().key} sold'

        async def main() -> list[Any]:
            shop = Shop()
            return [
                *await asyncio.gather(*(shop.sell(number) for number in range(8))),
                await shop.sell(3),
            ]

        assert asyncio.run(main()) == [
            *(f'order:{number} sold' for number in range(8)),
            'order:3 sold',
        ]
        assert rows.run(f'SELECT state, count(*) FROM {rows.tables.execution} GROUP BY 1') == [
            ('done', 8)
        ]

    def test_a_cancelled_async_call_frees_its_key(self, ledger: ClusterLedger, rows: Rows) -> None:
        @exactly_once(key='k', scope='')
        async def function() -> None:
            started.set()
            await asyncio.Event().wait()

        started = asyncio.Event()

        async def main() -> None:
            task = asyncio.create_task(function())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert state_of(rows, 'k') == 'failed'

    def test_an_abandoned_attempt_frees_its_key(self, make_ledger: MakeLedger, rows: Rows) -> None:
        first, second = make_ledger('a'), make_ledger('b')
        by_hand.abandon(by_hand.begin(first, 'k', 60))
        eventually(lambda: state_of(rows, 'k') == 'failed')
        assert by_hand.begin(second, 'k', 60).attempts == 2


class TestTogether:
    """What threads ask for at the same time goes in one transaction."""

    def test_each_gets_what_it_would_have_got_alone(
        self, make_ledger: MakeLedger, rows: Rows
    ) -> None:
        me, other = make_ledger('a'), make_ledger('b')
        with once(other, 'done') as execution:
            execution.result = 'kept'
        by_hand.fail(by_hand.begin(me, 'failed', 60), ValueError('x'))
        by_hand.begin(other, 'elsewhere', 60)
        lost = by_hand.begin(make_ledger('c'), 'orphan', 60)
        forget_node(rows, 'c')
        dead = by_hand.begin(other, 'dead', 60)
        child = subprocess.Popen([sys.executable, '-c', ''])
        child.wait()
        rows.run(
            f"UPDATE {rows.tables.execution} SET pid = %s, started = '1' WHERE key = 'dead'",
            child.pid,
        )
        found = begin_together(
            me, ['new', 'done', 'failed', 'elsewhere', 'orphan', 'dead', 'also new']
        )
        assert {
            key: type(outcome) for key, outcome in found.items() if isinstance(outcome, Exception)
        } == {'done': DuplicateExecution, 'elsewhere': ExecutionRunning}
        assert vars(found['done'])['result'] == 'kept'
        began = {key: outcome for key, outcome in found.items() if isinstance(outcome, Execution)}
        assert {key: execution.attempts for key, execution in began.items()} == {
            'new': 1,
            'failed': 2,
            'orphan': 2,
            'dead': 2,
            'also new': 1,
        }
        assert began['orphan'].fence > lost.fence and began['dead'].fence > dead.fence
        owned = rows.run(
            f"SELECT key, fence FROM {rows.tables.execution} WHERE state = 'running' AND node = "
            "'a' AND key <> 'gate'"
        )
        assert dict(owned) == {key: execution.fence for key, execution in began.items()}

    def test_completions_have_their_own_results_and_only_the_one_without_its_key_is_fenced(
        self, make_ledger: MakeLedger, rows: Rows
    ) -> None:
        me, other = make_ledger('a'), make_ledger('b')
        attempts = {
            key: by_hand.begin(me, key, 60 if key == 'short' else 3600)
            for key in ('one', 'short', 'taken', 'none')
        }
        for key, result in (('one', [1, 'é']), ('short', '"2"'), ('taken', 3)):
            attempts[key].result = result
        rows.run(f"UPDATE {rows.tables.execution} SET started = '1' WHERE key = 'taken'")
        taken = by_hand.begin(other, 'taken', 60)
        found = call_together(
            me, list(attempts), 'finish', lambda key: by_hand.finish(attempts[key])
        )
        assert {key: type(outcome) for key, outcome in found.items() if outcome is not None} == {
            'taken': Fenced
        }
        stored = rows.run(
            'SELECT key, state, result, round(extract(epoch FROM expires_at - finished_at)) FROM '
            f'{rows.tables.execution} ORDER BY key'
        )
        assert [row for row in stored if row[0] in attempts] == [
            ('none', 'done', None, 3600),
            ('one', 'done', [1, 'é'], 3600),
            ('short', 'done', '"2"', 60),
            ('taken', 'running', None, None),
        ]
        by_hand.finish(taken)

    def test_a_key_that_another_transaction_holds_does_not_hold_up_the_others(
        self, config: CoordinationConfig, own: Any
    ) -> None:
        # A call of its own may wait for a lock for longer than this test does.
        patient = dataclasses.replace(config, heartbeat_timeout_sec=120)
        began: list[str] = []
        with rows_of(patient) as rows, ledgers_of(rows) as make:
            me, attempt = make('a'), by_hand.begin(make('b'), 'held', 60)
            with own.cursor() as cursor:
                attempt.complete(cursor)
            forget_node(
                rows, 'b'
            )  # so that the key may be taken, were it not for the open transaction

            def begin(key: str) -> None:
                by_hand.begin(me, key, 60)
                began.append(key)
                if len(began) == 3:
                    own.commit()  # only now does the held key go on

            found = call_together(me, ['held', 'x', 'y', 'z'], 'begin', begin)
        assert sorted(began) == ['x', 'y', 'z']
        assert {key: type(outcome) for key, outcome in found.items() if outcome is not None} == {
            'held': DuplicateExecution
        }

    def test_groups_of_several_nodes_with_the_same_keys_run_each_once(
        self, make_ledger: MakeLedger, rows: Rows
    ) -> None:
        ledgers = [make_ledger(name) for name in 'abc']
        ran: list[str] = []
        refused: list[type[Exception]] = []

        def deliver(ledger: ClusterLedger, numbers: Sequence[int]) -> None:
            for number in numbers:
                try:
                    with once(ledger, f'k{number}') as execution:
                        execution.result = number
                        ran.append(f'k{number}')
                except (DuplicateExecution, ExecutionRunning) as error:
                    refused.append(type(error))

        with ThreadPoolExecutor(18) as pool:
            # In different orders, so that the groups of two nodes meet at the same keys from both
            # ends.
            orders = [
                range(offset, 240, 6) if ledger is not ledgers[1] else range(239 - offset, -1, -6)
                for ledger in ledgers
                for offset in range(6)
            ]
            for future in [
                pool.submit(deliver, ledgers[place // 6], order)
                for place, order in enumerate(orders)
            ]:
                future.result(60)
        assert sorted(ran) == sorted(f'k{number}' for number in range(240))
        assert len(refused) == 2 * 240
        stored = rows.run(f"SELECT key, result FROM {rows.tables.execution} WHERE state = 'done'")
        assert dict(stored) == {f'k{number}': number for number in range(240)}

    def test_lost_replies_keep_no_key(
        self, make_ledger: MakeLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = make_ledger('a'), make_ledger('b')
        lose_replies(monkeypatch, 2, 'begin_many')
        found = begin_together(first, ['x', 'y', 'z'])
        assert [type(outcome) for outcome in found.values()] == [DatabaseUnavailable] * 3
        eventually(lambda: [state_of(rows, key) for key in 'xyz'] == ['failed'] * 3)
        assert by_hand.begin(second, 'x', 60).attempts == 2

    def test_a_time_limit_that_strikes_the_one_who_asks_for_all_loses_no_completion(
        self, make_ledger: MakeLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger = make_ledger('a')
        attempts = {key: by_hand.begin(ledger, key, 60) for key in 'xyz'}

        def strike(*args: Any) -> list[bool]:
            raise KeyboardInterrupt

        monkeypatch.setattr(ExecutionStore, 'finish_many', strike)
        found = call_together(
            ledger, list(attempts), 'finish', lambda key: by_hand.finish(attempts[key])
        )
        assert sorted(type(outcome).__name__ for outcome in found.values()) == [
            'DatabaseUnavailable'
        ] * 2 + ['KeyboardInterrupt']
        eventually(lambda: [state_of(rows, key) for key in 'xyz'] == ['done'] * 3)


def begin_together(ledger: ClusterLedger, keys: Sequence[str]) -> dict[str, Any]:
    return call_together(ledger, keys, 'begin', lambda key: by_hand.begin(ledger, key, 60))


def call_together(
    ledger: ClusterLedger, keys: Sequence[str], what: str, call: Callable[[str], Any]
) -> dict[str, Any]:
    """Let threads call at the same time, so that they go in one transaction; what each returned or
    raised.
    """
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(keys) + 1) as pool:
        original, many = getattr(ExecutionStore, what), getattr(ExecutionStore, f'{what}_many')
        gate, departed = threading.Event(), threading.Event()
        groups: list[int] = []

        def held(store: ExecutionStore, key: Any, *rest: Any) -> Any:
            if 'gate' in (key, getattr(key, 'key', '')):
                departed.set()
                assert gate.wait(30)
            return original(store, key, *rest)

        def counted(*args: Any) -> Any:
            groups.append(len(args[1]))
            return many(*args)

        before = by_hand.begin(ledger, 'gate', 60) if what == 'finish' else None
        patch.setattr(ExecutionStore, what, held)
        patch.setattr(ExecutionStore, f'{what}_many', counted)
        patch.setattr(group_commit, '_PATIENCE_SEC', 30.0)
        first = (
            pool.submit(by_hand.begin, ledger, 'gate')
            if before is None
            else pool.submit(by_hand.finish, before)
        )
        assert departed.wait(30)
        waiting = {key: pool.submit(call, key) for key in keys}
        group = getattr(ledger._calls, {'begin': '_begins', 'finish': '_finishes'}[what])[
            os.getpid()
        ]
        eventually(lambda: group.waiting == len(keys))
        gate.set()
        first.result(30)
        found = {key: future.exception(30) or future.result() for key, future in waiting.items()}
        assert set(groups) == {len(keys)}, 'they went together'
    return found


class TestTrouble:
    def test_a_completion_that_the_database_missed_is_recorded_when_it_is_back(
        self, own_server: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
    ) -> None:
        own_server.create_database('ledger')
        config = own_server.config(
            'ledger', heartbeat_interval_sec=0.2, heartbeat_timeout_sec=1, connect_timeout_sec=1
        )
        with rows_of(config) as rows, ledgers_of(rows) as make:
            ledger, other = make('a'), make('b')
            ran = []

            def attempt() -> None:
                with once(ledger, 'k') as execution:
                    execution.result = 'kept'
                    ran.append(1)
                    own_server.kill()

            with pytest.raises(DatabaseUnavailable, match='was executed'):
                attempt()
            with pytest.raises(DatabaseUnavailable):
                by_hand.begin(other, 'k', 60)
            with pytest.raises(ValueError, match='x'), caplog.at_level(logging.WARNING):
                fail_within(ledger)
            assert 'could not be recorded yet' in caplog.text
            own_server.start()
            rows.sessions.close_all()
            eventually(lambda: state_of(rows, 'k') == 'done', timeout=30)
            with pytest.raises(DuplicateExecution) as caught:
                by_hand.begin(make('c'), 'k', 60)
            assert (vars(caught.value)['result'], ran) == ('kept', [1])

    def test_connections_that_a_restart_broke_are_replaced_without_an_error(
        self, own_server: EmbeddedPostgres
    ) -> None:
        own_server.create_database('ledger')
        config = own_server.config('ledger', heartbeat_interval_sec=0.5, heartbeat_timeout_sec=5)
        with rows_of(config) as rows, ledgers_of(rows) as make:
            ledger = make('a')
            with once(ledger, 'k1'):
                own_server.restart()
            own_server.restart()
            with once(ledger, 'k2'):
                pass
            assert eventually(lambda: by_hand.begin(ledger, 'k3', 60)).attempts == 1

    def test_a_lost_reply_to_begin_is_found_again(
        self, make_ledger: MakeLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger = make_ledger('a')
        lose_replies(monkeypatch, 1)
        assert by_hand.begin(ledger, 'k', 60).attempts == 2
        ledger.close()

    def test_a_begin_whose_replies_are_all_lost_does_not_keep_the_key(
        self, make_ledger: MakeLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = make_ledger('a'), make_ledger('b')
        lose_replies(monkeypatch, 2)
        with pytest.raises(DatabaseUnavailable):
            by_hand.begin(first, 'k', 60)
        eventually(lambda: state_of(rows, 'k') == 'failed')
        assert by_hand.begin(second, 'k', 60).fence > 0

    def test_a_time_limit_that_strikes_within_finish_loses_nothing(
        self, ledger: ClusterLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish = ExecutionStore.finish
        strikes = [KeyboardInterrupt()]

        def struck(*args: Any, **kwargs: Any) -> bool:
            if strikes:
                raise strikes.pop()
            return finish(*args, **kwargs)

        monkeypatch.setattr(ExecutionStore, 'finish', struck)
        with pytest.raises(KeyboardInterrupt), once(ledger, 'k'):
            pass
        eventually(lambda: state_of(rows, 'k') == 'done')

    def test_a_missing_table_is_said_and_pauses(self, ledger: ClusterLedger, rows: Rows) -> None:
        rows.run(f'DROP TABLE {rows.tables.execution} CASCADE')
        with pytest.raises(DatabaseRefused, match=r'execution.* does not exist') as caught:
            by_hand.begin(ledger, 'k', 60)
        assert (vars(caught.value)['sqlstate'], vars(caught.value)['pause']) == ('42P01', True)


def fail_within(ledger: ClusterLedger) -> None:
    """The end of an attempt that began before the database went away."""
    attempt = Attempt(ledger, 'begun before', 60)
    attempt.unsettled.begin(1, 1)
    try:
        raise ValueError('x')
    except ValueError as error:
        attempt.fail(error)
        attempt.settle()
        raise


def lose_replies(monkeypatch: pytest.MonkeyPatch, count: int, what: str = 'begin') -> None:
    """Let the next `count` begins be executed and their replies be lost."""
    begin = getattr(ExecutionStore, what)
    left = [None] * count

    def lose(*args: Any, **kwargs: Any) -> Any:
        found = begin(*args, **kwargs)
        if left:
            left.pop()
            raise DatabaseUnavailable()
        return found

    monkeypatch.setattr(ExecutionStore, what, lose)
