"""Attempts that failed or were lost are filed by the statement that ends them; an attempt that
completes its key costs nothing for that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.executions import ExecutionFilter, Executions
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.once import once
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
