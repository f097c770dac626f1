"""Attempts that failed or were lost are filed by the statement that ends them; an attempt that
completes its key costs nothing for that.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.executions import ExecutionFilter, Executions
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.once import once
from jobsync_core.process import this_process
from jobsync_core.store.completions import Completion
from jobsync_core.store.executions import ExecutionStore, Holder, Row
from tests.support import attempts as by_hand
from tests.support.ledgers import MakeLedger, insert, state_of
from tests.support.rows import Rows


@pytest.fixture
def executions(config: CoordinationConfig, rows: Rows) -> Iterator[Executions]:
    with Executions(config) as made:
        yield made


def fail(ledger: ClusterLedger, key: str = 'k', text: str = 'no') -> None:
    with pytest.raises(ValueError, match=text), once(ledger, key):
        raise ValueError(text)


def outcomes(executions: Executions, key: str = 'k') -> list[tuple[int, str, str | None]]:
    return [
        (each['number'], each['outcome'], each['node']) for each in executions.show(key)['history']
    ]


def lose(rows: Rows, node: str) -> None:
    rows.run(f'DELETE FROM {rows.tables.node} WHERE name = %s', node)


def number_filed(rows: Rows) -> int:
    return int(rows.value(f'SELECT count(*) FROM {rows.tables.attempt}'))


class TestWhatIsFiled:
    def test_an_attempt_that_raised(
        self, rows: Rows, make_ledger: MakeLedger, executions: Executions
    ) -> None:
        fail(make_ledger('a'), text='first')
        fail(make_ledger('b'), text='second')
        with once(make_ledger('c'), 'k'):
            pass
        found = executions.show('k')
        assert (found['state'], found['attempts'], found['node']) == ('done', 3, 'c')
        first, second = found['history']
        assert (first['number'], first['outcome'], first['node']) == (1, 'failed', 'a')
        assert (first['error'], first['pid']) == ('ValueError: first', os.getpid())
        assert (second['number'], second['error']) == (2, 'ValueError: second')
        assert first['fence'] < second['fence'] < found['fence']
        assert first['started_at'] is not None and first['ended_at'] is not None
        assert second['started_at'] is not None and found['started_at'] is not None
        assert first['started_at'] <= first['ended_at'] <= second['started_at']

    @pytest.mark.parametrize(
        'how', ['node row deleted', 'new incarnation', 'process known dead', 'released', 'retried']
    )
    def test_an_attempt_that_was_lost(
        self, make_ledger: MakeLedger, rows: Rows, executions: Executions, how: str
    ) -> None:
        first, second = make_ledger('a'), make_ledger('b')
        lost = by_hand.begin(first, 'k', 60)
        if how == 'node row deleted':
            lose(rows, 'a')
        elif how == 'new incarnation':
            rows.run(f"UPDATE {rows.tables.node} SET incarnation = 'another life' WHERE name = 'a'")
        elif how == 'process known dead':
            child = subprocess.Popen([sys.executable, '-c', ''])
            child.wait()
            rows.run(f"UPDATE {rows.tables.execution} SET pid = %s, started = '1'", child.pid)
        elif how == 'released':
            assert first.release(os.getpid()) == 1
        else:
            lose(rows, 'a')
            executions.retry('k')
        assert by_hand.begin(second, 'k', 60).attempts == 2
        assert outcomes(executions) == [(1, 'lost', 'a')]
        (attempt,) = executions.show('k')['history']
        assert attempt['fence'] == lost.fence and attempt['error']
        assert attempt['ended_at'] is not None

    def test_several_keys_that_are_taken_over_at_once(
        self, rows: Rows, make_ledger: MakeLedger, executions: Executions
    ) -> None:
        first = make_ledger('a')
        for key in ('one', 'two'):
            by_hand.begin(first, key, 60)
        by_hand.begin(first, 'three', 60)
        assert first.release(os.getpid()) == 3
        for key in ('one', 'two', 'three'):
            assert outcomes(executions, key) == [(1, 'lost', 'a')]

    def test_an_end_that_is_recorded_twice_is_filed_once(
        self, rows: Rows, make_ledger: MakeLedger, executions: Executions
    ) -> None:
        ledger = make_ledger('a')
        mine = by_hand.begin(ledger, 'k', 60)
        for _ in range(2):
            assert ledger._calls.settle('k', mine.fence, 'no', 60) == 'failed'
        assert outcomes(executions) == [(1, 'failed', 'a')]

    def test_what_another_attempt_holds_is_not_filed(
        self, rows: Rows, make_ledger: MakeLedger, executions: Executions
    ) -> None:
        ledger = make_ledger('a')
        mine = by_hand.begin(ledger, 'k', 60)
        assert ledger._calls.settle('k', mine.fence - 1, 'no', 60) is None
        assert number_filed(rows) == 0

    def test_the_last_hundred_of_a_key_are_kept(
        self, rows: Rows, make_ledger: MakeLedger, executions: Executions
    ) -> None:
        ledger = make_ledger('a')
        fail(ledger, 'other')
        for _ in range(103):
            fail(ledger)
        assert [number for number, _, _ in outcomes(executions)] == list(range(4, 104))
        assert number_filed(rows) == 101


def begin_at_most(ledger: ClusterLedger, node: str, max_lost: int | None, key: str = 'k') -> Row:
    """A begin as this node makes it, in a process of its own, which does not end the attempt."""
    process = dataclasses.replace(this_process(), pid=next(_PIDS), host='elsewhere')
    holder = Holder(node, f'life of {node}', process)
    return ledger._calls.begin(key, holder, max_lost)


def lost(rows: Rows, key: str = 'k') -> tuple[str, int]:
    found = rows.run(f'SELECT state, lost FROM {rows.tables.execution} WHERE key = %s', key)
    return str(found[0][0]), int(found[0][1])


_PIDS = itertools.count(2**22)


class TestWhatIsCounted:
    def lose_one(self, rows: Rows, ledger: ClusterLedger, node: str, how: str) -> None:
        """An attempt that runs is lost."""
        if how == 'node':
            lose(rows, node)
            rows.node(node)
            rows.run(f"UPDATE {rows.tables.execution} SET incarnation = 'a former one'")
        elif how == 'process known dead':
            child = subprocess.Popen([sys.executable, '-c', ''])
            child.wait()
            dead = dataclasses.replace(this_process(), pid=child.pid, started='1')
            rows.run(
                f'UPDATE {rows.tables.execution} SET pid = %s, started = %s, host = %s, '
                'boot_id = %s, pid_namespace = %s',
                *(dead.pid, dead.started, dead.host, dead.boot_id, dead.pid_namespace),
            )
        else:
            pid = rows.value(f'SELECT pid FROM {rows.tables.execution}')
            assert ledger.release(int(pid)) == 1

    @pytest.mark.parametrize('how', ['node', 'process known dead', 'released'])
    def test_each_lost_attempt_once_and_the_key_is_dead_after_the_last(
        self, rows: Rows, make_ledger: MakeLedger, executions: Executions, how: str
    ) -> None:
        ledger = make_ledger('a')
        for number in range(1, 4):
            row = begin_at_most(ledger, 'a', 3)
            assert (row.began, row.dead, row.attempts) == (True, False, number)
            assert lost(rows) == ('running', number - 1)
            self.lose_one(rows, ledger, 'a', how)
        for _ in range(3):
            row = begin_at_most(ledger, 'a', 3)
            assert (row.began, row.dead, row.lost) == (False, True, 3)
            assert lost(rows) == ('dead', 3)
        assert outcomes(executions) == [(n, 'lost', 'a') for n in (1, 2, 3)]

    @pytest.mark.parametrize('how', ['node', 'process known dead', 'released'])
    def test_without_a_limit_nothing_dies(
        self, rows: Rows, make_ledger: MakeLedger, how: str
    ) -> None:
        ledger = make_ledger('a')
        for number in range(1, 7):
            row = begin_at_most(ledger, 'a', None)
            assert (row.began, row.dead, row.attempts) == (True, False, number)
            self.lose_one(rows, ledger, 'a', how)

    def test_attempts_that_raise_are_not_counted(self, rows: Rows, make_ledger: MakeLedger) -> None:
        ledger = make_ledger('a')
        for _ in range(5):
            row = begin_at_most(ledger, 'a', 1)
            assert row.began
            assert ledger._calls.settle('k', row.fence, 'no', 60) == 'failed'
        assert lost(rows) == ('failed', 0)

    def test_what_was_lost_stays_counted_where_another_attempt_raises(
        self, rows: Rows, make_ledger: MakeLedger
    ) -> None:
        ledger = make_ledger('a')
        begin_at_most(ledger, 'a', 2)
        self.lose_one(rows, ledger, 'a', 'node')
        row = begin_at_most(ledger, 'a', 2)
        assert ledger._calls.settle('k', row.fence, 'no', 60) == 'failed'
        assert begin_at_most(ledger, 'a', 2).began
        self.lose_one(rows, ledger, 'a', 'node')
        assert begin_at_most(ledger, 'a', 2).dead

    def test_a_begin_whose_answer_was_lost_is_no_lost_attempt(
        self, rows: Rows, make_ledger: MakeLedger, executions: Executions
    ) -> None:
        ledger = make_ledger('a')
        holder = Holder('a', 'life of a', this_process())
        for number in range(1, 4):
            row = ledger._calls.begin('k', holder, 1)
            assert (row.began, row.attempts) == (True, number)
        assert lost(rows) == ('running', 0)
        assert outcomes(executions) == []

    def test_a_completion_begins_the_count_anew(self, rows: Rows, make_ledger: MakeLedger) -> None:
        ledger = make_ledger('a')
        begin_at_most(ledger, 'a', 2)
        self.lose_one(rows, ledger, 'a', 'node')
        row = begin_at_most(ledger, 'a', 2)
        assert ledger._calls.finish(Completion('k', row.fence, None, 60))
        rows.run(f"UPDATE {rows.tables.execution} SET expires_at = now() - interval '1 second'")
        assert begin_at_most(ledger, 'a', 2).began
        assert lost(rows) == ('running', 0)

    def test_an_attempt_that_lives_against_all_appearances_completes_no_dead_key(
        self, rows: Rows, make_ledger: MakeLedger
    ) -> None:
        ledger = make_ledger('a')
        row = begin_at_most(ledger, 'a', 1)
        self.lose_one(rows, ledger, 'a', 'node')
        assert begin_at_most(ledger, 'a', 1).dead
        assert not ledger._calls.finish(Completion('k', row.fence, None, 60))
        assert ledger._calls.settle('k', row.fence, 'no', 60) is None
        assert lost(rows) == ('dead', 1)

    @pytest.mark.parametrize('later', [None, 9])
    def test_a_dead_key_stays_dead_for_who_allows_more(
        self, rows: Rows, make_ledger: MakeLedger, later: int | None
    ) -> None:
        ledger = make_ledger('a')
        begin_at_most(ledger, 'a', 1)
        self.lose_one(rows, ledger, 'a', 'node')
        assert begin_at_most(ledger, 'a', 1).dead
        row = begin_at_most(ledger, 'a', later)
        assert (row.began, row.dead) == (False, True)
        assert lost(rows) == ('dead', 1)

    def test_an_attempt_that_has_taken_over_is_not_buried_for_the_one_before(
        self, rows: Rows, make_ledger: MakeLedger
    ) -> None:
        ledger = make_ledger('a')
        seen = begin_at_most(ledger, 'a', 5)
        self.lose_one(rows, ledger, 'a', 'node')
        now = begin_at_most(ledger, 'a', 5)
        with rows.sessions.session() as connection:
            store = ExecutionStore(connection, rows.tables)
            assert not store.bury('k', Holder('b', 'life of b', this_process()), seen.fence)
        assert lost(rows) == ('running', 1)
        assert ledger._calls.settle('k', now.fence, 'no', 60) == 'failed'

    def test_many_who_come_at_once_bury_once(
        self, rows: Rows, make_ledger: MakeLedger, executions: Executions
    ) -> None:
        ledgers = [make_ledger(name) for name in 'abcd']
        for number in range(5):
            key = f'k{number}'
            begin_at_most(ledgers[0], 'a', 1, key)
            rows.run(f"UPDATE {rows.tables.execution} SET incarnation = 'a former one'")
            with ThreadPoolExecutor(4) as pool:
                found = list(
                    pool.map(
                        lambda place, key=key: begin_at_most(ledgers[place], 'abcd'[place], 1, key),
                        range(4),
                    )
                )
            assert not any(row.began for row in found)
            assert begin_at_most(ledgers[0], 'a', 1, key).dead
            assert lost(rows, key) == ('dead', 1)
            assert outcomes(executions, key) == [(1, 'lost', 'a')]

    def test_to_a_process_of_an_earlier_version_a_dead_key_runs_elsewhere(
        self, rows: Rows, make_ledger: MakeLedger
    ) -> None:
        ledger = make_ledger('a')
        old = (
            'SELECT began, state, free, attempts FROM '
            f"{rows.tables.begin_execution}('k', 'a', 'life of a', 'h', 'b', 'n', 1, 's')"
        )
        begin_at_most(ledger, 'a', 2)
        self.lose_one(rows, ledger, 'a', 'node')
        assert rows.run(old) == [(True, 'running', True, 2)]
        assert lost(rows) == ('running', 1)
        self.lose_one(rows, ledger, 'a', 'node')
        assert begin_at_most(ledger, 'a', 2).dead
        lose(rows, 'a')
        rows.node('a')
        assert rows.run(old) == [(False, 'dead', False, 2)]


class TestTheUsualWay:
    @pytest.mark.parametrize('how', ['alone', 'in a transaction', 'with others'])
    def test_an_attempt_that_completes_does_not_even_open_the_table(
        self, rows: Rows, ledger: ClusterLedger, own: Any, how: str
    ) -> None:
        """Somebody has locked it whole, and nobody notices."""
        fail(ledger, 'failed before')
        with own.cursor() as cursor:
            cursor.execute(f'LOCK TABLE {rows.tables.attempt} IN ACCESS EXCLUSIVE MODE')
        for key in ('new', 'failed before'):
            with once(ledger, key) as execution:
                if how == 'in a transaction':
                    with execution.transaction() as connection:
                        insert(connection, key)
                elif how == 'with others':
                    with once(ledger, f'within {key}'):
                        pass
            assert state_of(rows, key) == 'done'

    def test_nothing_is_filed(self, rows: Rows, ledger: ClusterLedger) -> None:
        for key in ('one', 'two'):
            with once(ledger, key):
                pass
        assert number_filed(rows) == 0


class TestWhatGoes:
    def test_the_attempts_of_a_key_that_is_forgotten(
        self, rows: Rows, ledger: ClusterLedger, executions: Executions
    ) -> None:
        for key in ('k', 'other'):
            fail(ledger, key)
            fail(ledger, key)
        executions.forget('k')
        assert rows.run(f'SELECT DISTINCT key FROM {rows.tables.attempt}') == [('other',)]

    def test_the_attempts_of_keys_that_are_purged(
        self, rows: Rows, ledger: ClusterLedger, executions: Executions
    ) -> None:
        for key in ('f:1', 'f:2', 'g:1'):
            fail(ledger, key)
        with once(ledger, 'f:3'):
            assert executions.purge(ExecutionFilter(function='f')) == 2
        assert rows.run(f'SELECT key FROM {rows.tables.attempt}') == [('g:1',)]
