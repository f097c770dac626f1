"""The SQL of node queues and of owners, on a real server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.belonging import Belonging, Peer
from jobsync_core.errors import JobSyncError
from jobsync_core.store.queues import QueueStore
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from tests.support.cluster import query
from tests.support.waiting import eventually


@pytest.fixture
def sessions(config: CoordinationConfig) -> Iterator[Sessions]:
    create_schema(config)
    made = Sessions(config, 'test')
    yield made
    made.close_all()


@pytest.fixture
def tables(config: CoordinationConfig) -> Tables:
    return Tables(config.appname)


def rows(config: CoordinationConfig) -> list[tuple[Any, ...]]:
    return query(config, 'SELECT name, node, kind, gone_at IS NOT NULL FROM "{}queue" ORDER BY 1')


def record(sessions: Sessions, tables: Tables, *found: tuple[str, str, str]) -> None:
    with sessions.session() as connection:
        for name, node, kind in found:
            QueueStore(connection, tables).record(name, node, '', Belonging(kind))


YOUNG = 50.0


def orphans(
    sessions: Sessions, tables: Tables, kind: str = 'celery'
) -> list[tuple[str, str, float]]:
    """Those that are young, then those that are old."""
    with sessions.session() as connection:
        found = QueueStore(connection, tables).orphans(kind, YOUNG)
        return [
            (row.queue, row.node, row.age)
            for row in (*found, *QueueStore(connection, tables).old_orphans(kind, YOUNG))
        ]


def test_a_queue_is_recorded_once_and_belongs_to_its_last_node(
    config: CoordinationConfig, sessions: Sessions, tables: Tables
) -> None:
    record(
        sessions,
        tables,
        ('q1', 'n1', 'celery'),
        ('q1', 'n1', 'celery'),
        ('q2', 'n2', 'celery'),
        ('q2', 'n3', 'dramatiq'),
    )
    assert rows(config) == [('q1', 'n1', 'celery', False), ('q2', 'n3', 'dramatiq', False)]


def test_queues_of_nodes_that_are_gone_are_orphans_the_newest_first(
    config: CoordinationConfig, sessions: Sessions, tables: Tables
) -> None:
    with Job('n1', config, wait_on_enter=0):
        record(
            sessions,
            tables,
            ('q1', 'n1', 'celery'),
            ('b', 'gone', 'celery'),
            ('d', 'gone3', 'dramatiq'),
        )
        assert [row[:2] for row in orphans(sessions, tables)] == [('b', 'gone')]
        record(sessions, tables, ('a', 'gone2', 'celery'))
        found = orphans(sessions, tables)
        assert [row[:2] for row in found] == [('a', 'gone2'), ('b', 'gone')]
        assert 0 == found[0][2] <= found[1][2] < YOUNG
        query(
            config, """UPDATE "{}queue" SET gone_at = now() - interval '100 s' WHERE name = 'b'"""
        )
        record(sessions, tables, ('c', 'gone4', 'celery'))
        orphans(sessions, tables)
        assert [row[0] for row in orphans(sessions, tables)] == ['c', 'a', 'b'], (
            'the old ones come last'
        )
        query(config, """DELETE FROM "{}queue" WHERE name = 'c'""")
        assert rows(config) == [
            ('a', 'gone2', 'celery', True),
            ('b', 'gone', 'celery', True),
            ('d', 'gone3', 'dramatiq', False),
            ('q1', 'n1', 'celery', False),
        ]
        assert [row[0] for row in orphans(sessions, tables, 'dramatiq')] == ['d']
    assert 'q1' in [row[0] for row in orphans(sessions, tables)]


def test_the_age_of_an_orphan_is_counted_from_when_it_was_seen_first(
    config: CoordinationConfig, sessions: Sessions, tables: Tables
) -> None:
    record(sessions, tables, ('q', 'gone', 'celery'))
    assert orphans(sessions, tables)[0][2] == 0
    query(config, """UPDATE "{}queue" SET gone_at = now() - interval '100 s'""")
    assert 100 <= orphans(sessions, tables)[0][2] < 160


def test_a_node_that_comes_back_has_no_orphan_once_it_has_recorded_its_queue(
    config: CoordinationConfig, sessions: Sessions, tables: Tables
) -> None:
    record(sessions, tables, ('q', 'n1', 'celery'))
    assert orphans(sessions, tables)
    with Job('n1', config, wait_on_enter=0):
        assert orphans(sessions, tables), 'it may have other queues than before'
        record(sessions, tables, ('q', 'n1', 'celery'))
        assert orphans(sessions, tables) == []
        assert rows(config) == [('q', 'n1', 'celery', False)]


def test_an_orphan_is_forgotten_and_a_live_node_s_queue_is_not(
    config: CoordinationConfig, sessions: Sessions, tables: Tables
) -> None:
    with Job('n1', config, wait_on_enter=0):
        record(sessions, tables, ('q1', 'n1', 'celery'), ('q', 'gone', 'celery'))
        with sessions.session() as connection:
            QueueStore(connection, tables).forget(['q1'])
            QueueStore(connection, tables).forget(['q'])
            QueueStore(connection, tables).forget(['never'])
        assert [row[0] for row in rows(config)] == ['q1']


@pytest.mark.parametrize('noted', [False, True])
def test_the_queue_of_an_earlier_version_is_not_the_live_node_s_any_more(
    config: CoordinationConfig, sessions: Sessions, tables: Tables, noted: bool
) -> None:
    record(sessions, tables, ('old', 'n1', 'celery'))
    if noted:  # between the two lives of the node
        assert [row[:2] for row in orphans(sessions, tables)] == [('old', 'n1')]
    with Job('n1', config, wait_on_enter=0), sessions.session() as connection:
        QueueStore(connection, tables).retire('n1', ['mail.n1'])
        connection.commit()
        assert query(config, 'SELECT name FROM "{}queue" WHERE node = %s', ('n1',)) == []
        assert [row[:2] for row in orphans(sessions, tables)] == [('old', 'n1 (earlier version)')]
        assert QueueStore(connection, tables).left(['old']) == {'old'}
        QueueStore(connection, tables).forget(['old'])
    assert rows(config) == []


def test_who_is_gone(config: CoordinationConfig, sessions: Sessions, tables: Tables) -> None:
    with Job('n1', config, wait_on_enter=0), sessions.session() as connection:
        assert not QueueStore(connection, tables).is_gone('n1')
        assert QueueStore(connection, tables).is_gone('n2')


def test_live_peers_are_told_with_what_they_belong_to_and_dead_ones_are_not(
    config: CoordinationConfig, sessions: Sessions, tables: Tables
) -> None:
    shop = Belonging('celery', 'mark', 'redis://h/0', 'shop')
    with sessions.session() as connection:
        QueueStore(connection, tables).record('q2', 'gone', '', shop)
    with Job('n1', config, wait_on_enter=0), sessions.session() as connection:
        assert QueueStore(connection, tables).peers('n2', 60) == [Peer('n1', Belonging())]
        QueueStore(connection, tables).record('q1', 'n1', '', shop)
        assert QueueStore(connection, tables).peers('n2', 60) == [Peer('n1', shop)]
        assert QueueStore(connection, tables).peers('n1', 60) == []
        assert QueueStore(connection, tables).peers('n2', 0) == []


class TestHold:
    def test_one_holder_at_a_time_for_each_node(self, sessions: Sessions, tables: Tables) -> None:
        with sessions.session() as two:
            with sessions.session() as one:
                assert QueueStore(one, tables).hold('n1')
                assert not QueueStore(two, tables).hold('n1')
                assert QueueStore(two, tables).hold('n2')
            assert QueueStore(two, tables).hold('n1')

    def test_who_did_not_get_it_does_not_let_it_go(
        self, sessions: Sessions, tables: Tables
    ) -> None:
        with sessions.session() as one:
            assert QueueStore(one, tables).hold('n1')
            for _ in range(3):
                with sessions.session() as two:
                    assert not QueueStore(two, tables).hold('n1')

    def test_it_ends_with_an_error_in_the_block(self, sessions: Sessions, tables: Tables) -> None:
        with contextlib.suppress(ZeroDivisionError), sessions.session() as one:
            assert QueueStore(one, tables).hold('n1')
            raise ZeroDivisionError
        with sessions.session() as two:
            assert QueueStore(two, tables).hold('n1')

    def test_clusters_do_not_share_it(self, sessions: Sessions, tables: Tables) -> None:
        with sessions.session() as one, sessions.session() as two:
            assert QueueStore(one, tables).hold('n1')
            assert QueueStore(two, Tables('other_')).hold('n1')

    def test_it_is_not_ended_for_being_idle_nor_does_it_hold_back_vacuum(
        self, make_config: Callable[..., CoordinationConfig], tables: Tables
    ) -> None:
        hasty = make_config(
            connection_options={'options': '-c idle_in_transaction_session_timeout=100'},
            listen=False,
        )
        create_schema(hasty)
        sessions = Sessions(hasty, 'hasty')
        with sessions.session() as one:
            assert QueueStore(one, tables).hold('n1')
            idle = """SELECT backend_xmin, now() - state_change > interval '0.3s' FROM
                pg_stat_activity WHERE pid = %s"""
            eventually(lambda: query(hasty, idle, (one.info.backend_pid,)) == [(None, True)])
            assert QueueStore(one, tables).is_gone('n1')
        sessions.close_all()

    def test_it_goes_with_its_process(
        self, config: CoordinationConfig, sessions: Sessions, tables: Tables
    ) -> None:
        with contextlib.suppress(JobSyncError):
            with sessions.session() as one:
                assert QueueStore(one, tables).hold('n1')
                query(config, 'SELECT pg_terminate_backend(%s)', (one.info.backend_pid,))

                def free() -> bool:
                    with sessions.session() as two:
                        return QueueStore(two, tables).hold('n1')

                eventually(free)
            pytest.fail('the connection lives')


class TestOwners:
    def read(self, sessions: Sessions, tables: Tables, known: int = -1) -> Any:
        with sessions.session() as connection:
            return QueueStore(connection, tables).owners(known)

    def test_nothing_where_the_version_is_known(
        self, config: CoordinationConfig, sessions: Sessions, tables: Tables
    ) -> None:
        with Job('n1', config, wait_on_enter=0) as job:
            eventually(lambda: len(job.my_tokens) == config.total_tokens)
            version = self.read(sessions, tables).version
            assert self.read(sessions, tables, version) is None
            assert self.read(sessions, tables, version - 1).version == version

    def test_nobody_owns_an_empty_cluster(
        self, config: CoordinationConfig, sessions: Sessions, tables: Tables
    ) -> None:
        found = self.read(sessions, tables)
        assert found is None or found.rows in ((), ((0, config.total_tokens, None, False),))

    def test_a_moving_row_is_where_it_is_going_and_a_blocked_one_nobody_s(
        self, config: CoordinationConfig, sessions: Sessions, tables: Tables
    ) -> None:
        """Straight into the table, as a plan that is carried out would write it."""
        with (
            Job('n1', config, wait_on_enter=0) as first,
            Job('n2', config, wait_on_enter=0) as second,
        ):
            eventually(
                lambda: (
                    len(first.my_tokens) + len(second.my_tokens) == config.total_tokens
                    and second.my_tokens
                )
            )
            record(sessions, tables, ('q2', 'n2', 'celery'))
        with sessions.session() as connection, connection.cursor() as cursor:
            cursor.execute(f'DELETE FROM {tables.assignment}')
            cursor.execute(
                f'INSERT INTO {tables.node} (name, created_on, last_heartbeat, incarnation, '
                'lease_sec) '
                "VALUES ('n1', now(), now(), 'i1', 9), ('n2', now(), now(), 'i2', 9)"
            )
            for low, high, node, moving, moving_to, blocked in MOVING:
                cursor.execute(
                    f'INSERT INTO {tables.assignment} (tokens, node, moving, moving_to, blocked, '
                    'version, assigned_at) '
                    'VALUES (int4range(%s, %s), %s, %s, %s, %s, 1, now())',
                    (low, high, node, moving, moving_to, blocked),
                )
            found = QueueStore(connection, tables).owners(-1)
            assert found is not None and found.rows == (
                (0, 10, 'n1', False),
                (10, 20, 'n2', False),
                (20, 30, 'n1', False),
                (30, 40, None, True),
                (40, 50, None, False),
            )
            assert found.queues == {('n2', ''): 'q2'}
            assert (found.groups, found.deserted) == ({'': 0}, frozenset())
            connection.rollback()


#: low, high, node, moving, moving_to, blocked: at rest; on its way; on its way to nobody yet; taken
#: from its node; unowned.
MOVING = [
    (0, 10, 'n1', False, None, False),
    (10, 20, 'n1', True, 'n2', False),
    (20, 30, 'n1', True, None, False),
    (30, 40, 'n1', True, None, True),
    (40, 50, None, False, None, False),
]
