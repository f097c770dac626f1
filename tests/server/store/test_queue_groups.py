"""The SQL of queue groups, on a real server: ids, members, plans, rows that are missing, and the
queues of nodes for each home queue.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from jobsync_core.assignment.groups import GROUP_SPAN, group_of
from jobsync_core.assignment.hashing import task_to_token
from jobsync_core.belonging import Belonging, Peer
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import JobSyncError
from jobsync_core.process import Process
from jobsync_core.protocol.messages.groups import Enroll
from jobsync_core.protocol.messages.handover import Give, Refresh
from jobsync_core.protocol.messages.leadership import Lead, Observe
from jobsync_core.protocol.messages.membership import Beat, Join, Leave
from jobsync_core.store import leading
from jobsync_core.store.cluster import ClusterStore
from jobsync_core.store.connection import Connection
from jobsync_core.store.locks import LockStore
from jobsync_core.store.queues import Division, Owners, QueueStore
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

PROCESS = Process('here', 'boot', 'ns', 7, '99')
TOTAL = 1000


class Store:
    """One cluster as its nodes see it, all through one connection; time passes as told."""

    def __init__(self, config: CoordinationConfig, rows: Rows) -> None:
        self.rows, self.tables = rows, rows.tables
        self.control = ClusterStore(config, rows.tables, None)
        self.connection = Connection.open(config, 'test')

    def ask(self, request: Any) -> Any:
        return self.control.handle(self.connection, request)

    def join(self, name: str, *groups: str, active: bool = True) -> dict[str, int]:
        reply = self.ask(
            Join(name, f'life of {name}', PROCESS, 1.0, active, groups=tuple(sorted(groups)))
        )
        return dict(reply.ids)

    def enroll(self, name: str, *groups: str) -> dict[str, int]:
        reply = self.ask(Enroll(name, f'life of {name}', tuple(sorted(groups))))
        return dict(reply.ids)

    def lead(self, name: str) -> Any:
        while True:
            led = self.ask(Lead(name, f'life of {name}', (), 'test'))
            if not led.more:
                return led

    def beat(self, name: str) -> Any:
        return self.ask(Beat(name, f'life of {name}'))

    def refresh(self, name: str) -> Any:
        return self.ask(Refresh(name, f'life of {name}'))

    def give(self, name: str) -> None:
        seen = self.refresh(name)
        moving = tuple((s.lo, s.hi) for s in seen.segments if s.moving)
        self.ask(Give(name, f'life of {name}', moving, seen.version))

    def held(self, name: str) -> dict[int, int]:
        """How many tokens of each group the node owns."""
        found: dict[int, int] = {}
        for row in self.refresh(name).segments:
            assert group_of(row.lo) == group_of(row.hi - 1)
            group = group_of(row.lo)
            found[group] = found.get(group, 0) + row.hi - row.lo
        return found

    def formed(self) -> list[str]:
        found = self.rows.run(f'SELECT name FROM {self.tables.queue_group} WHERE formed ORDER BY 1')
        return [name for (name,) in found]

    def value(self, sql: str) -> Any:
        ((found,),) = self.rows.run(sql)
        return found

    def lock(self, *rows: tuple[str, str, str]) -> None:
        """Task, the node that may have it, and the queue."""
        with self.rows.sessions.session() as connection:
            LockStore(connection, self.tables).register(
                [(task, (node,), None, None, queue) for task, node, queue in rows], 'x'
            )

    def owners(self) -> Owners:
        with self.rows.sessions.session() as connection:
            found = QueueStore(connection, self.tables).owners(-1)
        assert found is not None
        return found


@pytest.fixture
def store(config: CoordinationConfig) -> Iterator[Store]:
    config = dataclasses.replace(config, total_tokens=TOTAL)
    with rows_of(config) as rows:
        made = Store(config, rows)
        yield made
        made.connection.close()


class TestIds:
    def test_a_group_keeps_its_id_as_long_as_somebody_names_it(self, store: Store) -> None:
        assert store.join('a', 'mail', 'fast') == {'fast': 1, 'mail': 2}
        assert store.join('b', 'mail', 'slow') == {'mail': 2, 'slow': 3}
        assert store.join('c') == {}
        assert store.enroll('b', 'fast', 'new') == {'fast': 1, 'new': 4}
        assert store.enroll('a') == {}
        assert store.enroll('c', 'other') == {'other': 2}, 'nobody names mail and slow any more'
        assert store.join('a', 'mail') == {}, 'it is there already, with the groups of its row'
        assert store.enroll('a', 'mail') == {'mail': 3}

    def test_a_heartbeat_tells_what_the_row_names(self, store: Store) -> None:
        store.join('a', 'mail', 'fast')
        store.join('b')
        assert [store.beat(name).groups for name in 'ab'] == [('fast', 'mail'), ()]
        store.enroll('a', 'slow')
        assert store.beat('a').groups == ('slow',)

    def test_it_keeps_it_as_long_as_somebody_has_its_tokens(self, store: Store) -> None:
        store.join('a', 'mail')
        store.lead('a')
        assert store.formed() == ['mail'] and store.held('a') == {0: TOTAL, 1: TOTAL}
        assert store.enroll('a', 'fast') == {'fast': 2}
        seen = store.refresh('a')
        assert (seen.groups, dict(seen.ids)) == (('fast',), {'fast': 2, 'mail': 1})
        store.lead('a')
        store.give('a')
        assert store.held('a') == {0: TOTAL, 2: TOTAL}
        store.enroll('a', 'fast', 'third')  # its rows are nobody's, but they are there
        assert store.enroll('a', 'fast', 'third') == {'fast': 2, 'third': 3}
        store.lead('a')
        assert store.formed() == ['fast', 'third']
        assert store.enroll('a', 'fourth', 'fast', 'third')['fourth'] == 1

    def test_it_keeps_it_while_it_has_rows_or_may_miss_some(self, store: Store) -> None:
        store.join('a', 'fast', 'mail')
        store.lead('a')
        store.enroll('a')
        store.rows.run(f"UPDATE {store.tables.queue_group} SET formed = false WHERE name = 'fast'")
        store.rows.run(f'DELETE FROM ONLY {store.tables.ring} WHERE lower(tokens) >> 20 = 2')
        assert store.enroll('a', 'new') == {'new': 3}

    def test_there_are_as_many_as_the_number_line_has_room_for(self, store: Store) -> None:
        store.join('a')
        names = [f'g{number:04}' for number in range(2047)]
        assert store.enroll('a', *names)['g2046'] == 2047
        with pytest.raises(JobSyncError, match='at_most_2047_queue_groups'):
            store.enroll('a', *names, 'one more')
        assert len(store.refresh('a').groups) == 2047
        store.lead('a')
        assert store.held('a')[2047] == TOTAL
        assert max(row.hi for row in store.refresh('a').segments) == 2047 * GROUP_SPAN + TOTAL

    def test_the_first_node_of_an_empty_cluster_finds_no_group_formed(self, store: Store) -> None:
        store.join('a', 'mail')
        store.lead('a')
        store.ask(Leave('a', 'life of a'))
        store.join('b', 'mail', active=False)
        assert store.formed() == []
        assert store.value(f'SELECT count(*) FROM ONLY {store.tables.ring}') == 0


class TestPlans:
    def test_what_a_plan_depends_on(self, store: Store) -> None:
        store.join('a')
        store.lead('a')
        assert not store.ask(Observe()).stale and store.refresh('a').planned
        plain = store.value(f'SELECT planned FROM {store.tables.cluster}')
        store.enroll('a', 'mail')
        assert store.ask(Observe()).stale
        assert store.refresh('a').planned, 'one that knows of no groups is enough to enter'
        store.lead('a')
        assert not store.ask(Observe()).stale and store.refresh('a').planned
        store.enroll('a')
        store.lead('a')
        store.give('a')
        assert store.value(f'SELECT planned FROM {store.tables.cluster}') == plain, (
            'without groups it is that of earlier versions'
        )

    def test_members_are_told_with_the_ids_of_their_groups(self, store: Store) -> None:
        store.join('a', 'mail', 'fast')
        store.join('b', 'mail')
        assert [member.groups for member in store.ask(Observe()).members] == [(0, 1, 2), (0, 2)]

    def test_a_message_about_locks_names_the_group(self, store: Store) -> None:
        store.join('a', 'mail')
        store.join('b', 'mail')
        twins = _of_one_token()
        store.lock((twins[0], 'a', 'mail'), (twins[1], 'b', 'mail'))
        (conflict,) = store.lead('a').conflicts
        assert "of queue group 'mail'" in conflict

    def test_a_lock_on_a_queue_that_nobody_names_counts_nowhere(self, store: Store) -> None:
        store.join('a', 'mail')
        store.lock(('t', 'nobody', 'none'))
        assert store.lead('a').blocked == 0
        store.enroll('a', 'mail', 'none')
        assert store.lead('a').blocked == 1


def _of_one_token() -> tuple[str, str]:
    seen: dict[int, str] = {}
    for number in range(10_000):
        token = task_to_token(f't{number}', TOTAL, 'double_sha256')
        if token in seen:
            return seen[token], f't{number}'
        seen[token] = f't{number}'
    raise AssertionError


class TestMissingRows:
    def test_those_of_a_group_are_waited_for_and_those_that_go_later_as_well(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        times = [1000.0]
        monkeypatch.setattr(leading, 'time', SimpleNamespace(monotonic=lambda: times[0]))
        store.join('a', 'mail')
        store.lead('a')
        first = GROUP_SPAN
        store.rows.run(f'DELETE FROM {store.tables.ring} WHERE tokens @> {first}')
        store.rows.run(
            f'INSERT INTO {store.tables.ring} (tokens, node, version) '
            f"VALUES (int4range({first}, {first + 9}), 'a', 1)"
        )
        times[0] += 100
        assert store.ask(Observe()).stale
        version = store.lead('a').version
        assert store.held('a')[1] == 9
        times[0] += 0.6
        store.rows.run(f'DELETE FROM {store.tables.ring} WHERE tokens @> {first}')
        times[0] += 0.6
        assert store.lead('a').version == version + 1, 'nodes are told of these as well'
        assert 1 not in store.held('a')
        times[0] += 0.6
        assert store.lead('a').version == version + 1
        times[0] += 0.6
        store.lead('a')
        assert store.held('a') == {0: TOTAL, 1: TOTAL}

    def test_a_group_that_is_not_formed_has_none(self, store: Store) -> None:
        store.join('a')
        store.lead('a')
        store.enroll('a', 'mail')
        store.lead('a')
        assert store.held('a') == {0: TOTAL, 1: TOTAL}


class TestOwners:
    def test_rows_of_all_groups_are_told_and_what_no_node_may_have(self, store: Store) -> None:
        store.join('a', 'mail')
        with store.rows.sessions.session() as connection:
            LockStore(connection, store.tables).register([('t', ('x',), None, None, 'mail')], 'x')
        store.lead('a')
        found = store.owners()
        assert (found.groups, found.deserted) == ({'': 0, 'mail': 1}, frozenset())
        assert [row[2:] for row in found.rows] == [
            ('a', False),
            ('a', False),
            (None, True),
            ('a', False),
        ]
        assert sum(end - first for first, end, *_ in found.rows) == 2 * TOTAL

    def test_a_group_that_nobody_names_is_deserted_until_its_rows_go(self, store: Store) -> None:
        store.join('a', 'mail')
        store.lead('a')
        store.enroll('a')
        assert store.owners().deserted == {'mail'}
        store.lead('a')
        store.give('a')
        found = store.owners()
        assert found.deserted == {'mail'}
        assert {row[2:] for row in found.rows if row[0] >= GROUP_SPAN} == {(None, True)}
        store.join('b')
        store.lead('a')
        found = store.owners()
        assert (found.groups, found.deserted) == ({'': 0}, frozenset())
        assert all(row[1] <= TOTAL for row in found.rows)


SHOP = Belonging('celery', 'mark', 'redis://h/0', 'shop')


class TestNodeQueues:
    @pytest.fixture
    def queues(self, store: Store) -> Iterator[QueueStore]:
        with store.rows.sessions.session() as connection:
            yield QueueStore(connection, store.tables)

    def test_a_node_is_known_before_it_has_a_queue(self, store: Store, queues: QueueStore) -> None:
        store.join('a')
        assert queues.identify('a', SHOP) and not queues.identify('a', SHOP)
        assert queues.peers('b', 60) == [Peer('a', SHOP)]
        assert queues.known('celery') == []
        assert queues.orphans('celery', 60) == []
        queues.withdraw('a')
        assert queues.peers('b', 60) == [Peer('a', Belonging())]

    def test_each_home_queue_has_one_of_each_node(self, store: Store, queues: QueueStore) -> None:
        store.join('a', 'mail', 'fast')
        assert queues.identify('a', SHOP)
        assert queues.record('mail.a', 'a', 'mail', SHOP)
        assert queues.record('fast.a', 'a', 'fast', SHOP)
        assert not queues.record('fast.a', 'a', 'fast', SHOP)
        assert queues.record('old.b', 'b', '', SHOP)
        assert queues.record('mail.c', 'c', 'mail', SHOP)
        assert queues.peers('x', 60) == [Peer('a', SHOP)]
        assert queues.known('celery') == [
            ('fast.a', 'a', 'fast'),
            ('mail.a', 'a', 'mail'),
            ('mail.c', 'c', 'mail'),
            ('old.b', 'b', ''),
        ]
        assert queues.known('dramatiq') == []
        found = queues.owners(-1)
        assert found is not None
        assert found.queues == {('a', 'mail'): 'mail.a', ('a', 'fast'): 'fast.a'}
        assert sorted((row.queue, row.node, row.home) for row in queues.orphans('celery', 60)) == [
            ('mail.c', 'c', 'mail'),
            ('old.b', 'b', ''),
        ]
        assert [row.age > 0 for row in queues.orphans('celery', 60)] == [True, True]
        queues.withdraw_queue('fast.a', 'a')
        assert [row[0] for row in queues.known('celery')] == ['mail.a', 'mail.c', 'old.b']

    def test_with_its_last_queue_a_node_is_forgotten(
        self, store: Store, queues: QueueStore
    ) -> None:
        store.join('a')
        for node in ('a', 'gone'):
            queues.identify(node, SHOP)
            queues.record(f'mail.{node}', node, 'mail', SHOP)
            queues.record(f'fast.{node}', node, 'fast', SHOP)
        queues.forget(['mail.a'])
        queues.forget(['mail.gone'])
        count = f'SELECT node, count(*)::int FROM {store.tables.node_queue} GROUP BY 1 ORDER BY 1'
        assert _counted(queues, count) == [('a', 3), ('gone', 2)]
        queues.forget(['fast.gone'])
        assert _counted(queues, count) == [('a', 3)]

    def test_nodes_that_give_a_queue_different_groups_are_told_while_they_consume_it(
        self, store: Store, queues: QueueStore
    ) -> None:
        for node, group in (('a', 'fast'), ('b', 'mail'), ('gone', 'third'), ('older', '')):
            if node != 'gone':
                store.join(node)
            queues.record(f'mail.{node}', node, 'mail', SHOP, group)
            queues.record(f'same.{node}', node, 'same', SHOP, 'same')
        fast, mail = Division('mail', 'fast', ['a']), Division('mail', 'mail', ['b'])
        assert queues.divided() == [fast, mail]
        store.join('c')
        queues.record('mail.c', 'c', 'mail', SHOP, 'third')
        queues.retire('b', ['same.b'])
        assert queues.divided() == [fast, Division('mail', 'third', ['c'])]
        queues.retire('c', [])
        assert queues.divided() == []
        queues.record('mail.b', 'b', 'mail', SHOP, 'fast')
        assert queues.divided() == []

    def test_what_a_drained_node_has_is_told_when_it_owns_nothing_in_any_group(
        self, store: Store
    ) -> None:
        store.join('a', 'mail')
        store.join('b', 'mail')
        with store.rows.sessions.session() as connection:
            QueueStore(connection, store.tables).record('mail.a', 'a', 'mail', SHOP)
        store.lead('a')

        def told() -> list[str]:
            with store.rows.sessions.session() as connection:
                found = QueueStore(connection, store.tables).draining('celery', 'b')
            return [row.queue for row in found]

        store.rows.run(f"UPDATE {store.tables.node} SET state = 'draining' WHERE name = 'a'")
        assert told() == []
        store.rows.run(f"UPDATE {store.tables.assignment} SET node = 'b'")
        assert told() == [], 'it has tokens of mail'
        store.lead('a')
        store.give('a')
        eventually(lambda: told() == ['mail.a'])


def _counted(queues: QueueStore, sql: str) -> list[tuple[Any, ...]]:
    with queues.connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()
