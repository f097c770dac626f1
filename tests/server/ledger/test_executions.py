"""The ledger for operators, against a real PostgreSQL: what is found, freed, forgotten and deleted,
and that nobody waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import DuplicateExecution, ExecutionRunning, Fenced
from jobsync_core.executions import ExecutionFilter, Executions, NoSuchExecution
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.once import once
from jobsync_core.store import ledger as ledger_store
from tests.support.ledgers import MakeLedger, state_of
from tests.support.rows import Rows
from tests.support.waiting import eventually


@pytest.fixture
def executions(config: CoordinationConfig, rows: Rows) -> Iterator[Executions]:
    with Executions(config) as made:
        yield made


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows are many."""
    monkeypatch.setattr(ledger_store, 'LOOKED_AT', 3)
    monkeypatch.setattr(ledger_store, 'CHANGED', 3)


def keys(executions: Executions, *which: ExecutionFilter, **options: Any) -> list[str]:
    return [each['key'] for each in executions.find(*which, **options)]


def some(rows: Rows) -> None:
    """One row of each kind, and some that are done; the node `a` lives."""
    rows.node('a')
    for key, state, node, age in (
        ('shop.charge:1', 'done', 'a', 100),
        ('shop.charge:2', 'failed', 'b', 50),
        ('shop.charge:3', 'running', 'a', 10),
        ('shop.charge:4', 'running', 'gone', 5000),
        ('shop.mail:1', 'done', 'a', 3),
        ('shop.mail:10%', 'failed', 'a', 4000),
    ):
        put(rows, key, state, node, age)


def put(rows: Rows, key: str, state: str, node: str = 'a', age: float = 0.0) -> None:
    rows.run(
        f'INSERT INTO {rows.tables.execution} (key, state, node, incarnation, host, pid, fence, '
        'attempts, started_at, finished_at) '
        "VALUES (%s, %s, %s, 'life of ' || %s, 'here', 7, 5, 2, "
        'now() - make_interval(secs => %s + 60), '
        "CASE WHEN %s <> 'running' THEN now() - make_interval(secs => %s) END)",
        key, state, node, node, age, state, age,
    )  # fmt: skip


def lose(rows: Rows, node: str) -> None:
    rows.run(f'DELETE FROM {rows.tables.node} WHERE name = %s', node)


class TestFind:
    def test_what_runs_on_a_node_that_is_gone_is_lost(
        self, rows: Rows, executions: Executions
    ) -> None:
        some(rows)
        found = {each['key']: each['state'] for each in executions.find()}
        assert found == {
            'shop.charge:1': 'done',
            'shop.charge:2': 'failed',
            'shop.charge:3': 'running',
            'shop.charge:4': 'lost',
            'shop.mail:1': 'done',
            'shop.mail:10%': 'failed',
        }

    @pytest.mark.parametrize(
        ('which', 'expected'),
        [
            (ExecutionFilter(state='lost'), ['shop.charge:4']),
            (ExecutionFilter(state='running'), ['shop.charge:3']),
            (
                ExecutionFilter(state=['lost', 'failed']),
                ['shop.charge:2', 'shop.charge:4', 'shop.mail:10%'],
            ),
            (ExecutionFilter(function='shop.mail'), ['shop.mail:1', 'shop.mail:10%']),
            (ExecutionFilter(function='shop'), []),
            (ExecutionFilter(key='%:1'), ['shop.charge:1', 'shop.mail:1']),
            (ExecutionFilter(key=r'shop.mail:10\%'), ['shop.mail:10%']),
            (ExecutionFilter(key='shop.charge:_', state='done'), ['shop.charge:1']),
            (ExecutionFilter(key='shop.mail:1', function='shop.charge'), []),
            (ExecutionFilter(node='b'), ['shop.charge:2']),
            # the end of the attempt counts, or its begin while it has none
            (ExecutionFilter(older_than=3600), ['shop.charge:4', 'shop.mail:10%']),
            (ExecutionFilter(older_than=60, state='running'), ['shop.charge:3']),
        ],
    )
    def test_a_filter_means_all_that_is_given(
        self, rows: Rows, executions: Executions, which: ExecutionFilter, expected: list[str]
    ) -> None:
        some(rows)
        assert keys(executions, which) == expected
        assert executions.count(which) == len(expected)

    @pytest.mark.usefixtures('small_slices')
    @pytest.mark.parametrize('number', [0, 1, 2, 3, 4, 6, 7])
    def test_a_table_of_many_slices_is_read_to_its_end(
        self, rows: Rows, executions: Executions, number: int
    ) -> None:
        for each in range(number):
            put(rows, f'k{each}', 'done')
        put(rows, 'z', 'failed')
        every = [f'k{each}' for each in range(number)] + ['z']
        assert keys(executions) == every
        assert keys(executions, ExecutionFilter(state='failed')) == ['z']
        assert executions.count(ExecutionFilter(key='k%')) == number
        assert keys(executions, limit=2) == every[:2]
        assert keys(executions, limit=2, after='k0') == [key for key in every if key > 'k0'][:2]

    @pytest.mark.parametrize('after', ['a\0', '\ud800'])
    def test_a_place_to_go_on_from_that_can_be_no_key(
        self, executions: Executions, after: str
    ) -> None:
        with pytest.raises(ValueError, match='after'):
            executions.find(after=after)

    def test_keys_come_in_the_order_of_their_code_points(
        self, rows: Rows, executions: Executions
    ) -> None:
        every = sorted(['a', 'B', 'ä', 'a:', '\ud7ff', '\ue000', '\U0010ffff'])
        for key in every:
            put(rows, key, 'done')
        assert keys(executions) == every
        for key in every:
            assert keys(executions, ExecutionFilter(key=f'{key}%'))[0] == key

    def test_a_time_that_python_has_not_is_none_and_spoils_no_other_row(
        self, rows: Rows, executions: Executions
    ) -> None:
        some(rows)
        for key, time in (('shop.charge:1', '11111-11-11'), ('shop.charge:2', '-infinity')):
            rows.run(
                f'UPDATE {rows.tables.execution} SET started_at = %s WHERE key = %s', time, key
            )
        found = {each['key']: each['started_at'] for each in executions.find()}
        assert len(found) == 6
        assert [key for key, time in found.items() if time is None] == [
            'shop.charge:1',
            'shop.charge:2',
        ]


class TestShow:
    def test_all_that_is_known(self, rows: Rows, executions: Executions) -> None:
        some(rows)
        rows.run(f"UPDATE {rows.tables.execution} SET result = '[1]', error = 'no'")
        found = executions.show('shop.charge:2')
        assert found['started_at'] is not None and found['finished_at'] is not None
        assert (found['finished_at'] - found['started_at']).total_seconds() == 60
        for name, value in (
            ('state', 'failed'), ('node', 'b'), ('host', 'here'), ('pid', 7), ('fence', 5),
            ('attempts', 2), ('result', '[1]'), ('error', 'no'), ('silent_sec', None),
        ):  # fmt: skip
            assert found[name] == value, name  # type: ignore[literal-required]

    def test_the_silence_of_a_node_that_runs_one(self, rows: Rows, executions: Executions) -> None:
        rows.node('quiet', age=30)
        put(rows, 'k', 'running', 'quiet')
        silent = executions.show('k')['silent_sec']
        assert silent is not None and 30 <= silent < 300

    def test_what_is_not_there(self, executions: Executions) -> None:
        with pytest.raises(NoSuchExecution, match="no key 'k'"):
            executions.show('k')


class TestRetry:
    def test_a_lost_key_is_free_and_its_late_holder_is_fenced(
        self, rows: Rows, executions: Executions, make_ledger: MakeLedger
    ) -> None:
        late = once(make_ledger('late'), 'k')
        late.__enter__()
        lose(rows, 'late')
        found = executions.retry('k')
        assert (found['state'], found['attempts']) == ('failed', 1)
        assert 'operator' in str(found['error']) and found['expires_at'] is not None
        with pytest.raises(Fenced):
            late.__exit__(None, None, None)
        with once(make_ledger('b'), 'k') as execution:
            assert execution.attempts == 2
        assert state_of(rows, 'k') == 'done'

    def test_a_failed_key_is_free_already(self, rows: Rows, executions: Executions) -> None:
        some(rows)
        before = executions.show('shop.charge:2')
        assert executions.retry('shop.charge:2') == before

    @pytest.mark.parametrize(
        ('key', 'error'),
        [
            ('shop.charge:1', DuplicateExecution),
            ('shop.charge:3', ExecutionRunning),
            ('shop.charge:9', NoSuchExecution),
        ],
    )
    def test_others_are_refused(
        self, rows: Rows, executions: Executions, key: str, error: type[Exception]
    ) -> None:
        some(rows)
        before = list(executions.find())
        with pytest.raises(error, match=key):
            executions.retry(key)
        assert list(executions.find()) == before


class TestForget:
    @pytest.mark.parametrize('key', ['shop.charge:1', 'shop.charge:2', 'shop.charge:4'])
    def test_a_key_at_which_nobody_is_runs_again(
        self, rows: Rows, executions: Executions, make_ledger: MakeLedger, key: str
    ) -> None:
        some(rows)
        was = executions.forget(key)
        assert was['key'] == key and state_of(rows, key) is None
        with once(make_ledger('b'), key) as execution:
            assert execution.attempts == 1 and execution.fence > was['fence']

    def test_what_runs_stays(self, ledger: ClusterLedger, executions: Executions) -> None:
        with once(ledger, 'k'):
            with pytest.raises(ExecutionRunning, match='on a, process'):
                executions.forget('k')
        assert executions.show('k')['state'] == 'done'

    def test_what_is_not_there(self, executions: Executions) -> None:
        with pytest.raises(NoSuchExecution):
            executions.forget('k')

    def test_a_row_that_somebody_has_locked_is_not_waited_for(
        self, rows: Rows, executions: Executions, own: Any
    ) -> None:
        some(rows)
        with own.cursor() as cursor:
            cursor.execute(f'SELECT FROM {rows.tables.execution} FOR UPDATE')
        for act in (executions.forget, executions.retry):
            with pytest.raises(ExecutionRunning, match='at this very moment'):
                act('shop.charge:4')
        assert executions.purge(ExecutionFilter()) == 0
        own.rollback()
        assert executions.purge(ExecutionFilter()) == 5

    @pytest.mark.parametrize('key', ['shop.charge:1', 'shop.charge:4'])
    def test_another_attempt_than_the_one_that_was_seen_stays(self, rows: Rows, key: str) -> None:
        some(rows)
        with rows.sessions.session() as connection:
            store = ledger_store.LedgerStore(connection, rows.tables)
            assert not store.forget(key, 4)
            assert not store.free(key, 4, 'lost', 60)
        assert state_of(rows, key) in ('done', 'running')


class TestPurge:
    def test_all_but_what_a_live_node_is_at(self, rows: Rows, executions: Executions) -> None:
        some(rows)
        assert executions.purge(ExecutionFilter()) == 5
        assert keys(executions) == ['shop.charge:3']

    @pytest.mark.usefixtures('small_slices')
    def test_a_filter_in_many_slices(self, rows: Rows, executions: Executions) -> None:
        for number in range(10):
            put(rows, f'k{number}', 'done' if number % 2 else 'failed')
        assert executions.purge(ExecutionFilter(state='done')) == 5
        assert keys(executions) == ['k0', 'k2', 'k4', 'k6', 'k8']
        assert executions.purge(ExecutionFilter(key='k_')) == 5

    def test_what_runs_is_never_meant(self, executions: Executions) -> None:
        for state in ('running', ('lost', 'running')):
            with pytest.raises(ValueError, match='running'):
                executions.purge(ExecutionFilter(state=state))

    def test_a_key_that_another_node_takes_over_meanwhile_stays(
        self, rows: Rows, executions: Executions, own: Any
    ) -> None:
        """The statement sees the node table as it was when it began, and the row as it has become:
        the node that took the key over is not in the one, and is in the other.
        """
        put(rows, 'k', 'running', 'gone')
        with own.cursor() as cursor:
            cursor.execute('SELECT pg_advisory_lock(7)')
        purging = threading.Thread(target=_purge_and_pause, args=(rows,))
        purging.start()
        eventually(lambda: rows.waiting() == 1)
        rows.node('new')
        rows.run(
            f"UPDATE {rows.tables.execution} SET node = 'new', incarnation = 'life of new', "
            'fence = fence + 1'
        )
        own.close()
        purging.join()
        assert [each['state'] for each in executions.find()] == ['running']


def _purge_and_pause(rows: Rows) -> None:
    """The statement, which waits after it has begun for whoever holds a lock."""
    sql = rows.tables.sql('ledger.purge', chosen='(SELECT pg_advisory_lock(7) IS NOT NULL)')
    with rows.sessions.session() as connection, connection.cursor() as cursor:
        cursor.execute(sql, {'first': '', 'end': None, 'after': '', 'rows': 10})


class TestCost:
    """However large the table is, a statement reads a slice of it, and by the primary key."""

    SLICE = 50

    @pytest.mark.parametrize('statement', ['page', 'count', 'purge'])
    @pytest.mark.parametrize('analyzed', [True, False])
    def test_a_statement_looks_at_a_slice(self, rows: Rows, statement: str, analyzed: bool) -> None:
        rows.node('a')
        rows.run(
            f'INSERT INTO {rows.tables.execution} (key, state, node, incarnation, fence) '
            "SELECT 'k' || n, CASE n %% 3 WHEN 0 THEN 'done' WHEN 1 THEN 'failed' ELSE 'running' "
            "END, 'gone', 'x', 1 FROM generate_series(1, 3000) AS n"
        )
        if analyzed:
            rows.run(f'ANALYZE {rows.tables.execution}')
        settings, _, select = rows.tables.sql(f'ledger.{statement}').partition(';')
        parameters = {
            'first': 'k', 'end': 'l', 'after': 'k2', 'rows': self.SLICE, 'limit': 10_000,
            'states': ['failed', 'lost'], 'pattern': 'k%', 'node': 'gone', 'age': 0,
        }  # fmt: skip
        with rows.sessions.session() as connection, connection.cursor() as cursor:
            cursor.execute(f'{settings}; EXPLAIN (ANALYZE, FORMAT JSON) {select}', parameters)
            plan = cursor.fetchall()[0][0][0]['Plan']
        found = [
            node for node in every_node(plan) if node.get('Relation Name', '').endswith('execution')
        ]
        assert found
        for node in found:
            assert node['Node Type'] != 'Seq Scan', node
            read = node['Actual Rows'] + node.get('Rows Removed by Filter', 0)
            assert read * node['Actual Loops'] <= self.SLICE, node


def every_node(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for each in plan.get('Plans', ()):
        yield from every_node(each)
