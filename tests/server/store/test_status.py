"""What an operator is shown agrees with the tables; a drain is a request that nodes hear."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobsync_core.assignment.hashing import task_to_token
from jobsync_core.assignment.model import Segment
from jobsync_core.assignment.simulate import Move
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import JobSyncError
from jobsync_core.store.connection import Connection
from jobsync_core.store.locks import LockStore
from jobsync_core.store.status import StatusStore
from jobsync_core.store.tasks import TaskStore
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        yield found


def ask(rows: Rows, question: Callable[..., Any], *args: object) -> Any:
    with rows.sessions.session() as connection:
        return question(StatusStore(connection, rows.tables), *args)


def lock(rows: Rows, task_id: str, *patterns: str) -> None:
    with rows.sessions.session() as connection:
        LockStore(connection, rows.tables).register(
            [(task_id, patterns, 'why', None, None)], 'tester'
        )


def test_nodes_come_oldest_first_with_their_tokens_and_the_eldest_live_one_leads(
    rows: Rows,
) -> None:
    rows.node('silent', age=30)
    rows.node('second')
    rows.node('third', state='draining', weight=2)
    rows.own(0, 6_000, 'second')
    rows.own(6_000, 7_000, 'third', moving_to='second')
    rows.own(7_000, 10_000, None)
    found = ask(rows, StatusStore.nodes)
    assert [
        (node['name'], node['alive'], node['is_leader'], node['tokens'], node['leaving'])
        for node in found
    ] == [
        ('silent', False, False, 0, 0),
        ('second', True, True, 6_000, 0),
        ('third', True, False, 1_000, 1_000),
    ]
    assert (found[2]['state'], found[2]['weight']) == ('draining', 2)
    assert 30 <= found[0]['age_sec'] < 60


def test_a_nodes_own_timeout_decides_unless_one_is_given(rows: Rows) -> None:
    rows.node('a', age=rows.config.heartbeat_timeout_sec + 5)
    assert [node['alive'] for node in ask(rows, StatusStore.nodes)] == [False]
    assert [node['alive'] for node in ask(rows, StatusStore.nodes, 60.0)] == [True]


def test_the_assignment_comes_back_as_segments(rows: Rows) -> None:
    rows.node('a')
    rows.node('b')
    rows.own(5, 10_000, 'b')
    rows.own(0, 5, 'a', moving_to='b')
    assert ask(rows, StatusStore.assignment) == [
        Segment(0, 5, 'a', True, 'b', False, 1),
        Segment(5, 10_000, 'b', version=1),
    ]
    assert ask(rows, StatusStore.owner, 4) == 'a'
    assert ask(rows, StatusStore.owner, 10_000) is None


def test_rebalances_come_newest_first_up_to_the_limit(rows: Rows) -> None:
    for number in range(3):
        rows.rebalance('because', 'a', number)
    assert [row['tokens_moved'] for row in ask(rows, StatusStore.rebalances, 2)] == [2, 1]


def test_the_cluster_tells_its_settings(rows: Rows) -> None:
    found = ask(rows, StatusStore.cluster)
    assert (found['total_tokens'], found['hash_function']) == (
        rows.config.total_tokens,
        rows.config.hash_function,
    )


def listen(listener: Connection, heard: list[str]) -> bool:
    heard += listener.notifies()
    return bool(heard)


class TestExplain:
    def test_a_lock_a_pattern_and_a_successor(self, rows: Rows) -> None:
        rows.node('gpu-1')
        rows.node('gpu-2')
        rows.node('cpu')
        rows.own(0, 10_000, 'gpu-1')
        lock(rows, 't', 'gold-%', 'gpu-%')
        token = task_to_token('t', 10_000, 'double_sha256')
        found = ask(rows, StatusStore.explain, 't', token)
        assert (found['owner'], found['token'], found['pattern'], found['next']) == (
            'gpu-1',
            token,
            'gpu-%',
            'gpu-2',
        )
        assert found['lock']['reason'] == 'why'
        assert found['since'] is not None
        assert not found['blocked']

    def test_without_a_lock(self, rows: Rows) -> None:
        rows.node('a')
        rows.node('b')
        rows.own(0, 10_000, 'a')
        found = ask(rows, StatusStore.explain, 't', 7)
        assert (found['lock'], found['pattern'], found['owner'], found['next']) == (
            None,
            None,
            'a',
            'b',
        )

    def test_another_locked_task_on_the_token_is_named(self, rows: Rows) -> None:
        rows.node('a')
        rows.own(0, 10_000, 'a')
        lock(rows, 'pinned', 'a')
        assert ask(
            rows, StatusStore.explain, 'free', task_to_token('pinned', 10_000, 'double_sha256')
        )['others'] == ['pinned']

    def test_a_blocked_task_has_no_owner_and_nobody_next(self, rows: Rows) -> None:
        rows.node('a')
        lock(rows, 't', 'nowhere')
        token = task_to_token('t', 10_000, 'double_sha256')
        rows.own(token, token + 1, None, blocked=True)
        found = ask(rows, StatusStore.explain, 't', token)
        assert (
            found['owner'],
            found['blocked'],
            found['pattern'],
            found['next'],
            found['since'],
        ) == (None, True, None, None, None)
        assert ask(rows, StatusStore.blocked) == [
            {
                'lo': token,
                'hi': token + 1,
                'node': None,
                'locks': [{'task_id': 't', 'node_patterns': ['nowhere']}],
            }
        ]

    def test_before_the_first_plan(self, rows: Rows) -> None:
        assert ask(rows, StatusStore.explain, 't', 1)['owner'] is None
        assert ask(rows, StatusStore.blocked) == []


class TestDrain:
    def test_it_changes_the_state_and_tells_everybody(self, rows: Rows) -> None:
        rows.node('a')
        listener = Connection.open(rows.config, 'listener')
        heard: list[str] = []
        try:
            listener.listen(rows.tables.channel)
            assert ask(rows, StatusStore.set_drain, 'a', True) is True
            assert ask(rows, StatusStore.set_drain, 'a', True) is False
            eventually(lambda: listen(listener, heard))
        finally:
            listener.close()
        assert heard == ['drain a']
        assert rows.value(f'SELECT state FROM {rows.tables.node}') == 'draining'

    def test_undrain_takes_it_back(self, rows: Rows) -> None:
        rows.node('a', state='draining')
        assert ask(rows, StatusStore.set_drain, 'a', False) is True
        assert ask(rows, StatusStore.set_drain, 'a', False) is False
        assert rows.value(f'SELECT state FROM {rows.tables.node}') == 'active'

    def test_a_node_that_has_drained_itself_is_held(self, rows: Rows) -> None:
        rows.node('a', state='draining')
        assert ask(rows, StatusStore.set_drain, 'a', True) is True
        assert ask(rows, StatusStore.set_drain, 'a', True) is False
        assert rows.run(f'SELECT state, held FROM {rows.tables.node}') == [('draining', True)]
        assert ask(rows, StatusStore.set_drain, 'a', False) is True
        assert rows.run(f'SELECT state, held FROM {rows.tables.node}') == [('active', False)]

    def test_a_joining_node_is_refused(self, rows: Rows) -> None:
        rows.node('a', state='joining')
        with pytest.raises(JobSyncError, match='still joining'):
            ask(rows, StatusStore.set_drain, 'a', True)

    def test_an_unknown_name_is_told_the_known_ones(self, rows: Rows) -> None:
        rows.node('alpha')
        rows.node('beta')
        with pytest.raises(JobSyncError, match=r"'gamma'.*alpha, beta"):
            ask(rows, StatusStore.set_drain, 'gamma', True)
        with pytest.raises(JobSyncError, match=r"'gamma'.*alpha, beta"):
            ask(rows, StatusStore.plan_without, 'gamma')


class TestPlanWithout:
    def test_everything_goes_to_the_others_evenly_and_nothing_is_written(self, rows: Rows) -> None:
        for name in 'abc':
            rows.node(name)
        rows.own(0, 4_000, 'a')
        rows.own(4_000, 7_000, 'b')
        rows.own(7_000, 10_000, 'c')
        before = ask(rows, StatusStore.assignment)
        assert ask(rows, StatusStore.plan_without, 'a') == [
            Move('a', 'b', 2_000),
            Move('a', 'c', 2_000),
        ]
        assert ask(rows, StatusStore.assignment) == before
        assert rows.value(f"SELECT state FROM {rows.tables.node} WHERE name = 'a'") == 'active'

    def test_what_nobody_else_may_have_is_blocked(self, rows: Rows) -> None:
        rows.node('gpu')
        rows.node('cpu')
        rows.own(0, 5_000, 'gpu')
        rows.own(5_000, 10_000, 'cpu')
        task_id = next(
            str(n) for n in range(1_000) if task_to_token(n, 10_000, 'double_sha256') < 5_000
        )
        lock(rows, task_id, 'gpu')
        assert ask(rows, StatusStore.plan_without, 'gpu') == [
            Move('gpu', 'cpu', 4_999),
            Move('gpu', None, 1),
        ]

    def test_a_silent_node_receives_nothing(self, rows: Rows) -> None:
        rows.node('a')
        rows.node('b', age=60)
        rows.own(0, 10_000, 'a')
        assert ask(rows, StatusStore.plan_without, 'a') == [Move('a', None, 10_000)]


def test_what_was_done_with_a_task_is_told(rows: Rows) -> None:
    rows.node('a')
    rows.own(0, 10_000, 'a')
    today = datetime.date.today()
    with rows.sessions.session() as connection:
        TaskStore(connection, rows.tables).claim('a', 'life of a', today, [('t', 1)])
    found = ask(rows, StatusStore.explain, 't', 1)
    assert (found['claim']['node'], found['claim']['promised'], found['audit']) == (
        'a',
        False,
        None,
    )
    with rows.sessions.session() as connection:
        TaskStore(connection, rows.tables).audit('a', today, [('t', 1)])
    found = ask(rows, StatusStore.explain, 't', 1)
    assert found['claim'] is None and (
        found['audit']['node'],
        found['audit']['date'],
        found['audit']['counts'],
    ) == ('a', today, True)
    rows.run(f'UPDATE {rows.tables.cluster} SET epoch = epoch + 1')
    assert not ask(rows, StatusStore.explain, 't', 1)['audit']['counts']
