"""PostgreSQL's answers to a node's requests: each carried out wholly or not at all, and harmless
when it comes late.
"""

from __future__ import annotations

import dataclasses
import datetime
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobsync_core.assignment import round as leader
from jobsync_core.assignment.hashing import task_to_token
from jobsync_core.assignment.model import Segment
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.config import CoordinationConfig
from jobsync_core.embedded.postgres import EmbeddedPostgres
from jobsync_core.errors import DatabaseUnavailable, LockNotAvailable
from jobsync_core.process import Process
from jobsync_core.protocol.exclusions import Exclusions
from jobsync_core.protocol.messages.handover import (
    Give,
    GiveReply,
    Lives,
    LivesReply,
    Refresh,
    RefreshReply,
    Take,
    TakeReply,
)
from jobsync_core.protocol.messages.leadership import (
    DEATHS,
    Evict,
    EvictReply,
    Lead,
    Observe,
    ObserveReply,
    RoundReply,
    StepDown,
)
from jobsync_core.protocol.messages.membership import (
    Activate,
    ActivateReply,
    Beat,
    Drain,
    HeartbeatReply,
    Join,
    JoinReply,
    Leave,
    Mismatch,
    Occupied,
)
from jobsync_core.protocol.messages.signs import Sign
from jobsync_core.store import leading
from jobsync_core.store.cluster import ClusterStore
from jobsync_core.store.connection import Connection
from jobsync_core.store.locks import LockStore
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.status import StatusStore
from jobsync_core.store.tasks import TaskStore
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

TODAY = datetime.date(2024, 5, 6)
NAMES = ['a', 'ü\'"\\', '%s %(x)s {}', '日本 x', 'B']
PROCESS = Process('here', 'boot', 'ns', 7, '99')


def plain(reply: Any) -> Any:
    """A reply without what it tells of the database's history and of times, which TestHistory looks
    at.
    """
    if isinstance(reply, HeartbeatReply):
        return dataclasses.replace(reply, history='', settled=True, ages=(), since=0)
    return dataclasses.replace(reply, history='') if isinstance(reply, RefreshReply) else reply


class Store:
    """One cluster as its nodes see it, all through one connection."""

    def __init__(self, config: CoordinationConfig, rows: Rows) -> None:
        self.config, self.rows, self.tables = config, rows, rows.tables
        self.control = ClusterStore(config, rows.tables, TODAY)
        self.connection = Connection.open(config, 'test')
        self.numbers: Counter[str] = Counter()

    def ask(self, request: Any) -> Any:
        return self.control.handle(self.connection, request)

    def join(
        self,
        name: str,
        *,
        active: bool = True,
        life: str | None = None,
        weight: float = 1.0,
        **more: Any,
    ) -> Any:
        return plain(
            self.ask(Join(name, life or f'life of {name}', PROCESS, weight, active, **more))
        )

    def beat(self, name: str, life: str | None = None) -> Any:
        self.numbers[name] += 2
        return plain(self.ask(Beat(name, life or f'life of {name}', 0, self.numbers[name])))

    def refresh(self, name: str, life: str | None = None) -> Any:
        return plain(self.ask(Refresh(name, life or f'life of {name}')))

    def lead(self, name: str, *dead: Sign, reason: str = 'test') -> Any:
        return self.ask(Lead(name, f'life of {name}', dead, reason))

    def evict(self, name: str, *dead: Sign) -> Any:
        return self.ask(Evict(name, f'life of {name}', dead))

    def by_age(self) -> list[str]:
        """Names of the nodes, oldest first."""
        return [
            name
            for (name,) in self.rows.run(
                f'SELECT name FROM {self.tables.node} ORDER BY created_on, name'
            )
        ]

    def sign(self, name: str) -> Sign:
        return next(
            Sign(m.name, m.incarnation, m.beat)
            for m in self.ask(Observe()).members
            if m.name == name
        )

    def give(
        self,
        name: str,
        *,
        life: str | None = None,
        version: int | None = None,
        ranges: Any = None,
        promised: Any = (),
    ) -> Any:
        seen = self.refresh(name)
        moving = tuple((s.lo, s.hi) for s in seen.segments if s.moving)
        return self.ask(
            Give(
                name,
                life or f'life of {name}',
                moving if ranges is None else ranges,
                seen.version if version is None else version,
                promised,
            )
        )

    def settle(self) -> None:
        """Plan and hand over until nothing is moving."""
        leader = self.ask(Observe()).members[0].name
        self.lead(leader)
        for member in self.ask(Observe()).members:
            self.give(member.name)

    def owned(self) -> dict[str | None, int]:
        return {
            node: int(count)
            for node, count in self.rows.run(
                f'SELECT node, sum(upper(tokens) - lower(tokens)) FROM {self.tables.assignment} '
                'GROUP BY node'
            )
        }

    def assignment(self) -> list[Segment]:
        with self.rows.sessions.session() as connection:
            return StatusStore(connection, self.tables).assignment()

    def version(self) -> int:
        return int(self.rows.value(f'SELECT version FROM {self.tables.cluster}'))


@pytest.fixture
def make_store(make_config: Callable[..., CoordinationConfig]) -> Iterator[Callable[..., Store]]:
    opened: list[Store] = []
    contexts = []

    def make(**settings: Any) -> Store:
        config = make_config(
            **{
                'heartbeat_interval_sec': 5,
                'heartbeat_timeout_sec': 15,
                'total_tokens': 1000,
                **settings,
            }
        )
        contexts.append(rows_of(config))
        opened.append(Store(config, contexts[-1].__enter__()))
        return opened[-1]

    yield make
    for store in opened:
        store.connection.close()
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    return make_store()


class TestJoin:
    @pytest.mark.parametrize('name', NAMES)
    def test_any_name_joins_once_and_again_after_a_lost_reply(
        self, store: Store, name: str
    ) -> None:
        assert store.join(name, active=False) == JoinReply(store.version())
        assert store.join(name, active=False) == JoinReply(store.version())
        (member,) = store.ask(Observe()).members
        assert (member.name, member.incarnation, member.state, member.beat) == (
            name,
            f'life of {name}',
            'joining',
            0,
        )
        assert store.beat(name) == HeartbeatReply(store.version(), 'joining', (), groups=())
        assert store.lead(name).led
        assert store.ask(Leave(name, f'life of {name}'))
        assert store.ask(Observe()).members == ()

    def test_a_name_in_use_is_told_with_its_process_and_replaced_only_if_it_looks_as_it_was_seen(
        self, store: Store
    ) -> None:
        store.join('a')
        assert store.join('a', life='second') == Occupied(Sign('a', 'life of a', 0), PROCESS)
        store.beat('a')
        assert store.join('a', life='second', replace=('life of a', 0)) == Occupied(
            Sign('a', 'life of a', 2), PROCESS
        )
        assert isinstance(store.join('a', life='second', replace=('life of a', 2)), JoinReply)
        assert store.beat('a') is None
        assert store.beat('a', 'second') is not None

    def test_nodes_are_ordered_by_joining_even_if_the_clock_was_set_back(
        self, store: Store
    ) -> None:
        store.join('z')
        store.rows.run(
            f"UPDATE {store.tables.node} SET created_on = created_on + interval '1 hour'"
        )
        store.join('m')
        store.join('a')
        assert [member.name for member in store.ask(Observe()).members] == ['z', 'm', 'a']
        assert [sign.name for sign in store.beat('a').older] == ['z', 'm']
        assert not store.lead('m').led

    def test_nodes_of_one_instant_are_ordered_by_name_as_python_orders(self, store: Store) -> None:
        names = ['b', 'B', 'a-1', 'a_1', 'Z', 'ä']
        for name in names:
            store.join(name)
        store.rows.run(f'UPDATE {store.tables.node} SET created_on = now()')
        members = store.ask(Observe()).members
        assert [member.name for member in members] == sorted(names)
        assert len({member.created_on for member in members}) == 1
        assert [sign.name for sign in store.beat('b').older] == sorted(names)[
            : sorted(names).index('b')
        ]

    def test_other_settings_than_the_live_clusters_are_refused(self, store: Store) -> None:
        store.join('a')
        other = ClusterStore(
            dataclasses.replace(store.config, total_tokens=500), store.tables, TODAY
        )
        request = Join('b', 'life of b', PROCESS, 1.0, True)
        assert other.handle(store.connection, request) == Mismatch(
            1000, 'double_sha256', (Sign('a', 'life of a', 0),)
        )
        assert [member.name for member in store.ask(Observe()).members] == ['a']

    def test_dead_nodes_are_reaped_first_unless_they_changed(self, store: Store) -> None:
        store.join('a')
        store.settle()
        other = ClusterStore(
            dataclasses.replace(store.config, total_tokens=500, hash_function='md5'),
            store.tables,
            TODAY,
        )
        dead = store.sign('a')
        store.beat('a')
        request = Join('b', 'life of b', PROCESS, 1.0, True, reap=(dead,))
        assert isinstance(other.handle(store.connection, request), Mismatch)
        before = store.version()
        assert isinstance(
            other.handle(store.connection, dataclasses.replace(request, reap=(store.sign('a'),))),
            JoinReply,
        )
        assert store.rows.run(
            f'SELECT total_tokens, hash_function FROM {store.tables.cluster}'
        ) == [(500, 'md5')]
        assert store.assignment() == []
        assert store.version() > before
        assert isinstance(
            other.handle(store.connection, Lead('b', 'life of b', (), 'test')), RoundReply
        )
        assert store.owned() == {'b': 500}

    def test_a_cluster_whose_rows_were_deleted_forms_again(self, store: Store) -> None:
        store.join('a')
        store.rows.run(f'DELETE FROM {store.tables.cluster}')
        assert store.beat('a') is None
        assert store.ask(Observe()) is None
        assert store.lead('a') is None
        store.rows.run(f'DELETE FROM {store.tables.node}')
        assert isinstance(store.join('a'), JoinReply)
        assert store.lead('a').led
        assert store.owned() == {'a': 1000}

    def test_first_nodes_with_different_settings_at_once_form_one_cluster(
        self, store: Store
    ) -> None:
        barrier, replies = threading.Barrier(6), []

        def join(number: int) -> None:
            config = dataclasses.replace(store.config, total_tokens=100 + number % 2)
            connection = Connection.open(config, f'n{number}')
            barrier.wait()
            replies.append(
                ClusterStore(config, store.tables, TODAY).handle(
                    connection, Join(f'n{number}', str(number), PROCESS, 1.0, True)
                )
            )
            connection.close()

        threads = [threading.Thread(target=join, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert (
            sorted(type(reply).__name__ for reply in replies)
            == ['JoinReply'] * 3 + ['Mismatch'] * 3
        )
        members = store.ask(Observe()).members
        assert len({member.created_on for member in members}) == 3


class TestHeartbeat:
    def test_it_counts_and_tells_the_older_nodes(self, store: Store) -> None:
        for name in 'abc':
            store.join(name)
        store.beat('a')
        assert store.beat('c') == HeartbeatReply(
            store.version(),
            'active',
            (Sign('a', 'life of a', 2), Sign('b', 'life of b', 0)),
            groups=(),
        )
        assert store.beat('c', 'a former life') is None
        assert store.beat('nobody') is None

    def test_what_it_reads_grows_neither_with_the_nodes_nor_with_kept_row_versions(
        self, store: Store
    ) -> None:
        for name in 'abcdef':
            store.join(name)
        store.rows.run(
            f"""INSERT INTO {store.tables.node} (name, created_on, incarnation, state, lease_sec)
                SELECT 'n' || n, clock_timestamp() + n * interval '1 microsecond', n::text,
                    'active', 1
                FROM generate_series(1, 300) AS n"""
        )
        store.join('youngest')
        store.beat('youngest')
        with store.rows.sessions.session() as reader, reader.cursor() as cursor:
            cursor.execute(f'SELECT count(*) FROM {store.tables.node}')
            for _ in range(30):
                store.connection.execute(f'UPDATE {store.tables.node} SET beat = beat + 1')
            looks = (
                'SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relid '
                '= %s::regclass'
            )
            store.connection.execute('BEGIN')
            (before,) = store.connection.execute(looks, (store.tables.node,))
            beaten = store.ask(Beat('youngest', 'life of youngest'))
            (after,) = store.connection.execute(looks, (store.tables.node,))
            store.connection.execute('ROLLBACK')
        assert [sign.name for sign in beaten.older] == list('abcd'), 'four of 306'
        assert after[0] == before[0], 'the table was read as a whole'
        assert after[1] - before[1] <= 5 * 31

    def test_it_tells_how_long_ago_the_older_ones_beat_and_where_to_begin_the_next_time(
        self, store: Store
    ) -> None:
        for name in 'abc':
            store.join(name)
        store.rows.run(
            f"UPDATE {store.tables.node} SET last_heartbeat = clock_timestamp() - interval '3 "
            "seconds' WHERE name = 'a'"
        )
        first = store.ask(Beat('c', 'life of c'))
        assert 3 <= first.ages[0] < 13 and 0 <= first.ages[1] < 10
        assert store.ask(Beat('c', 'life of c', first.since)).older == first.older
        store.ask(Leave('a', 'life of a'))
        second = store.ask(Beat('c', 'life of c', first.since))
        assert [sign.name for sign in second.older] == ['b'] and second.since > first.since
        assert store.ask(Beat('c', 'life of c', second.since)).older == second.older
        assert store.ask(Beat('b', 'life of b')).since == second.since, (
            'the oldest begins with itself'
        )

    def test_a_node_that_steps_down_is_the_youngest_from_then_on(self, store: Store) -> None:
        for name in 'abc':
            store.join(name)
        assert store.ask(StepDown('a', 'life of a')) is True
        assert store.ask(StepDown('a', 'a former life')) is None
        assert [member.name for member in store.ask(Observe()).members] == ['b', 'c', 'a']
        assert [sign.name for sign in store.beat('a').older] == ['b', 'c']
        assert not store.lead('a').led and store.lead('b').led

    def test_it_waits_for_no_lock_of_the_cluster(self, store: Store) -> None:
        store.join('a')
        with store.rows.sessions.session() as connection, connection.cursor() as cursor:
            cursor.execute('SELECT pg_advisory_xact_lock(%s, %s)', store.tables.advisory)
            cursor.execute(f'SELECT FROM {store.tables.cluster} FOR UPDATE')
            assert store.beat('a') is not None
            assert store.refresh('a') is not None
            assert store.ask(Observe()) is not None


class TestRefresh:
    def test_it_shows_what_names_me_and_what_is_on_its_way(self, store: Store) -> None:
        store.join('a')
        store.join('b')
        store.rows.own(0, 10, 'a', moving_to='b')
        store.rows.own(10, 20, 'a', moving=True, blocked=True)
        store.rows.own(20, 30, 'b')
        assert store.refresh('a') == RefreshReply(
            store.version(),
            'active',
            (Segment(0, 10, 'a', True, 'b', False, 1), Segment(10, 20, 'a', True, None, True, 1)),
            False,
            0,
        )
        assert store.refresh('b') == RefreshReply(
            store.version(), 'active', (Segment(20, 30, 'b', version=1),), False, 10
        )
        assert store.refresh('a', 'a former life') is None

    @pytest.mark.parametrize(
        'change', ['join', 'leave', 'lock', 'clear', 'drain', 'activate', 'weight', 'rejoin']
    )
    def test_every_change_that_matters_to_a_plan_shows_until_the_next_plan(
        self, store: Store, change: str
    ) -> None:
        store.join('a')
        store.join('b')
        store.join('c', active=False)
        with store.rows.sessions.session() as connection:
            LockStore(connection, store.tables).register([('old', ('%',), None, None, None)], 'x')
        store.lead('a')
        assert store.refresh('a').planned and not store.ask(Observe()).stale
        if change == 'join':
            store.join('d')
        elif change == 'leave':
            store.ask(Leave('b', 'life of b'))
        elif change == 'lock':
            with store.rows.sessions.session() as connection:
                LockStore(connection, store.tables).register([('t', ('a',), None, None, None)], 'x')
        elif change == 'clear':
            with store.rows.sessions.session() as connection:
                LockStore(connection, store.tables).clear_all()
        elif change == 'drain':
            store.ask(Drain('b', 'life of b', True))
        elif change == 'activate':
            store.join('d', active=False)
            store.lead('a')
            store.ask(Activate('d', 'life of d', 1))
        elif change == 'weight':
            store.rows.run(f"UPDATE {store.tables.node} SET weight = 2.5 WHERE name = 'b'")
        else:
            store.join('b', life='second', replace=('life of b', 0))
        assert not store.refresh('a').planned and store.ask(Observe()).stale
        store.lead('a')
        assert store.refresh('a').planned and not store.ask(Observe()).stale

    def test_heartbeats_and_hand_overs_need_no_new_plan(self, store: Store) -> None:
        store.join('a')
        store.lead('a')
        store.join('b')
        store.lead('a')
        store.beat('b')
        store.give('a')
        assert store.refresh('a').planned and not store.ask(Observe()).stale


class TestTake:
    def test_what_others_did_or_do_today_on_these_tokens_is_told(self, store: Store) -> None:
        def token(text: str) -> int:
            return task_to_token(text, 1000, 'double_sha256')

        for name in 'ab':
            store.join(name)
        store.rows.own(0, 1000, 'b')
        texts = (
            'audited',
            'audited without token',
            'claimed by b',
            'of nobody alive',
            'of another day',
        )
        with store.rows.sessions.session() as connection:
            TaskStore(connection, store.tables).claim(
                'b', 'life of b', TODAY, [('claimed by b', token('claimed by b'))]
            )
            TaskStore(connection, store.tables).audit(
                'gone', TODAY, [('audited', token('audited'))]
            )
            TaskStore(connection, store.tables).audit(
                'a', TODAY + datetime.timedelta(1), [('of another day', token('of another day'))]
            )
        store.rows.run(
            f"INSERT INTO {store.tables.audit} (node, task_id, date) VALUES ('a', 'audited "
            "without token', %s)",
            TODAY,
        )
        store.rows.run(
            f'INSERT INTO {store.tables.claim} (node, task_id, date, token, incarnation) VALUES '
            "('b', 'of nobody alive', %s, %s, 'old')",
            TODAY,
            token('of nobody alive'),
        )
        ranges = tuple((token(text), token(text) + 1) for text in texts)

        def keys(*found: str) -> array[int]:
            return Exclusions(1000).keys_of((token(text), text) for text in found)

        assert store.ask(Take('a', ranges)) == TakeReply(), 'first the missing token is written'
        ranges = TokenSet(ranges).ranges
        assert store.ask(Take('a', ranges)) == TakeReply(
            ranges, keys('audited', 'audited without token', 'claimed by b'), holders=('life of b',)
        )
        assert store.ask(Take('b', ranges)) == TakeReply(
            ranges, keys('audited', 'audited without token')
        )
        alone = ((token('audited'), token('audited') + 1),)
        assert store.ask(Take('a', alone)) == TakeReply(alone, keys('audited'))
        assert store.ask(Take('a', ())) == TakeReply(())
        assert ClusterStore(store.config, store.tables, None).handle(
            store.connection, Take('a', ranges)
        ) == TakeReply(ranges)

    def test_it_comes_in_pieces_of_about_as_many_rows_as_asked_for(self, store: Store) -> None:
        for name in 'ab':
            store.join(name)
        store.rows.own(0, 1000, 'b')
        placed = [
            (text, task_to_token(text, 1000, 'double_sha256')) for text in map(str, range(400))
        ]
        with store.rows.sessions.session() as connection:
            TaskStore(connection, store.tables).audit('gone', TODAY, placed[:300])
            TaskStore(connection, store.tables).claim('b', 'life of b', TODAY, placed[300:])
        mine = ((0, 300), (301, 302), (500, 1000))
        exclusions, ranges, pieces = Exclusions(1000), TokenSet(mine), 0
        while ranges:
            reply = store.ask(Take('a', ranges.ranges, limit=20))
            assert reply.ranges[0][0] == ranges.ranges[0][0] and len(reply.keys) <= 60, (
                'the piece begins with the first token'
            )
            exclusions.replace(reply.ranges, reply.keys)
            ranges -= TokenSet(reply.ranges)
            pieces += 1
        assert pieces > 10
        assert [
            text
            for text, token in placed
            if exclusions.excludes(token, text) != (token in TokenSet(mine))
        ] == []

    def test_a_token_with_more_tasks_than_that_comes_in_parts(
        self, make_config: Callable[..., CoordinationConfig]
    ) -> None:
        config = make_config(total_tokens=1)
        with rows_of(config) as rows:
            rows.node('a')
            with rows.sessions.session() as connection:
                TaskStore(connection, rows.tables).audit(
                    'gone', TODAY, [(str(number), 0) for number in range(95)]
                )
            control, exclusions, line = (
                ClusterStore(config, rows.tables, TODAY),
                Exclusions(1),
                Connection.open(config, 'a'),
            )
            after, answers = None, list[Any]()
            try:
                while not answers or answers[-1].ranges == ():
                    reply: Any = control.handle(line, Take('a', ((0, 1),), 10, after))
                    exclusions.add(reply.keys)
                    answers.append(reply)
                    after = reply.after
            finally:
                line.close()
        assert len(answers) == 10 and answers[-1].ranges == ((0, 1),)
        assert all(
            exclusions.excludes(0, str(number)) for number in range(95)
        ) and not exclusions.excludes(0, '95')

    def test_what_was_promised_is_told_apart(self, store: Store) -> None:
        for name in 'ab':
            store.join(name)
        store.rows.run(
            f'INSERT INTO {store.tables.claim} (node, task_id, date, token, incarnation, promised) '
            "VALUES ('b', 'x', %s, 7, 'life of b', true)",
            TODAY,
        )
        reply = store.ask(Take('a', ((0, 10),)))
        assert (reply.promised, reply.holders) == ((7,), ('life of b',))

    def test_lives_that_are_over_are_named(self, store: Store) -> None:
        store.join('a')
        assert store.ask(Lives(('life of a', 'a former one'))) == LivesReply(('a former one',))


class TestGive:
    @pytest.fixture
    def moving(self, store: Store) -> Store:
        """a has tokens for b, tokens for nobody, tokens that it keeps; c has tokens for b."""
        for name in 'abc':
            store.join(name)
        store.rows.own(0, 10, 'a', moving_to='b')
        store.rows.own(10, 20, 'a')
        store.rows.own(20, 30, 'a', moving=True, blocked=True)
        store.rows.own(30, 40, 'a', moving=True)
        store.rows.own(40, 50, 'c', moving_to='b')
        return store

    def test_only_moving_rows_of_mine_with_a_receiver_or_blocked_go(self, moving: Store) -> None:
        before = moving.version()
        assert moving.give('a', ranges=((0, 1000),)) == GiveReply(20)
        assert moving.version() == before + 1
        assert moving.assignment() == [
            Segment(0, 10, 'b', version=before + 1),
            Segment(10, 20, 'a', version=1),
            Segment(20, 30, None, blocked=True, version=before + 1),
            Segment(30, 40, 'a', True, version=1),
            Segment(40, 50, 'c', True, 'b', version=1),
        ]

    @pytest.mark.parametrize(
        'late',
        [
            {'life': 'a former life'},
            {'version': 0},
            {'ranges': ((0, 9), (11, 30)), 'version': 0},
            {'ranges': ()},
            {'ranges': ((1, 10),), 'version': 0},
            {'ranges': ((10, 20),)},
            {'ranges': ((30, 1000),)},
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, moving: Store, late: dict[str, Any]) -> None:
        before, version = moving.assignment(), moving.version()
        assert moving.give('a', **late) in (GiveReply(0), None)
        assert (moving.give('a', **late) is None) == ('life' in late)
        assert (moving.assignment(), moving.version()) == (before, version)

    def test_a_row_of_which_a_part_is_in_use_is_cut(self, moving: Store) -> None:
        before = moving.version()
        assert moving.give('a', ranges=((0, 3), (5, 10), (12, 14))) == GiveReply(8)
        assert moving.assignment()[:4] == [
            Segment(0, 3, 'b', version=before + 1),
            Segment(3, 5, 'a', True, 'b', version=1),
            Segment(5, 10, 'b', version=before + 1),
            Segment(10, 20, 'a', version=1),
        ]
        assert moving.give('a', ranges=((3, 5),)) == GiveReply(2)

    def test_adjacent_ranges_cover_a_row(self, moving: Store) -> None:
        assert moving.give('a', ranges=((0, 4), (4, 10))) == GiveReply(10)

    def test_a_give_that_is_repeated_changes_nothing_more(self, moving: Store) -> None:
        assert moving.give('a', ranges=((0, 1000),), version=1) == GiveReply(20)
        after, version = moving.assignment(), moving.version()
        assert moving.give('a', ranges=((0, 1000),), version=1) == GiveReply(0)
        assert (moving.assignment(), moving.version()) == (after, version)

    def test_a_receiver_that_has_gone_gets_nothing(self, moving: Store) -> None:
        moving.ask(Leave('b', 'life of b'))
        assert moving.give('a', ranges=((0, 10),)) == GiveReply(0)

    def test_the_new_owners_are_told_and_all_where_there_are_too_many(self, moving: Store) -> None:
        moving.connection.listen(moving.tables.channel)
        moving.give('a')
        eventually(lambda: moving.connection.notifies() == ['give b'])
        moving.rows.run(f'DELETE FROM {moving.tables.assignment}')
        for number in range(50):
            moving.join(f'{number}' + 'x' * 190)
            moving.rows.own(number, number + 1, 'a', moving_to=f'{number}' + 'x' * 190)
        eventually(lambda: len(moving.connection.notifies()) > 0)
        assert moving.give('a') == GiveReply(50)
        eventually(lambda: moving.connection.notifies()[-1:] == ['give'])

    def test_promises_become_claims_of_mine_in_the_same_transaction(self, moving: Store) -> None:
        moving.rows.run(
            f"INSERT INTO {moving.tables.audit} (node, task_id, date) VALUES ('c', 'done', %s)",
            TODAY,
        )
        for task, node, life in (('of the dead', 'b', 'old'), ('of the living', 'c', 'life of c')):
            moving.rows.run(
                f'INSERT INTO {moving.tables.claim} (node, task_id, date, token, incarnation) '
                'VALUES (%s, %s, %s, 2, %s)',
                node,
                task,
                TODAY,
                life,
            )
        promised = (
            ('mine', 1),
            ('mine', 1),
            ('done', 2),
            ('of the dead', 2),
            ('of the living', 2),
            ('not my token', 45),
        )
        assert moving.give('a', ranges=((0, 10),), promised=promised) == GiveReply(10)
        assert sorted(
            moving.rows.run(f'SELECT task_id, node, incarnation, token FROM {moving.tables.claim}')
        ) == [
            ('mine', 'a', 'life of a', 1),
            ('of the dead', 'a', 'life of a', 2),
            ('of the living', 'c', 'life of c', 2),
        ]

    def test_promises_of_an_evicted_life_are_no_claims(self, moving: Store) -> None:
        assert moving.give('a', life='a former life', promised=(('mine', 1),)) is None
        assert moving.rows.run(f'SELECT * FROM {moving.tables.claim}') == []


class TestLife:
    def test_activation_needs_the_minimum_of_nodes_that_are_not_dead(self, store: Store) -> None:
        store.join('a', active=False)
        store.join('b', active=False)
        dead = store.sign('b')
        assert store.ask(Activate('a', 'life of a', 2, (dead,))) == ActivateReply(False, 1)
        assert store.refresh('a').state == 'joining'
        store.beat('b')
        assert store.ask(Activate('a', 'life of a', 2, (dead,))) == ActivateReply(True, 2)
        assert store.ask(Activate('a', 'life of a', 2, (dead,))) == ActivateReply(True, 2)
        assert store.refresh('a').state == 'active'
        assert store.ask(Activate('a', 'a former life', 1)) is None

    def test_a_cluster_that_has_formed_is_formed_when_a_fast_node_is_done_and_has_left(
        self, store: Store
    ) -> None:
        store.join('a', active=False)
        store.join('b', active=False)
        assert store.ask(Activate('a', 'life of a', 2)) == ActivateReply(True, 2)
        store.lead('a')  # the first plan includes b, whose grace period ends a moment later
        assert store.refresh('b').state == 'active'
        store.ask(Leave('a', 'life of a'))
        assert store.ask(Activate('b', 'life of b', 2)) == ActivateReply(True, 1)
        store.join('c', active=False)
        assert store.ask(Activate('c', 'life of c', 3)) == ActivateReply(False, 2)

    def test_old_nodes_whose_rows_were_locked_follow_who_joined_when_it_takes_part(
        self, store: Store
    ) -> None:
        store.join('old')
        store.rows.run(f"UPDATE {store.tables.node} SET groups = NULL WHERE name = 'old'")
        with store.rows.sessions.session() as holder, holder.cursor() as cursor:
            cursor.execute(f'SELECT FROM {store.tables.node} FOR UPDATE')
            store.join('new', active=False)
        assert store.by_age() == ['old', 'new']
        store.ask(Activate('new', 'life of new', 1))
        assert store.by_age() == ['new', 'old']
        age = f"SELECT created_on FROM {store.tables.node} WHERE name = 'old'"
        before = store.rows.run(age)
        store.ask(Activate('new', 'life of new', 1))
        assert store.rows.run(age) == before, 'it follows already'

    def test_draining_is_set_and_cleared_for_this_life_only(self, store: Store) -> None:
        store.join('a')
        assert store.ask(Drain('a', 'life of a', True)) is True
        assert store.beat('a').state == 'draining'
        assert store.ask(Drain('a', 'a former life', False)) is None
        assert store.ask(Drain('a', 'life of a', False)) is True
        assert store.beat('a').state == 'active'

    @pytest.mark.parametrize('before', [False, True])
    def test_what_a_user_drains_does_not_take_part_again_by_itself(
        self, store: Store, before: bool
    ) -> None:
        store.join('a')
        if before:
            assert store.ask(Drain('a', 'life of a', True, by_itself=True)) is True
        assert store.ask(Drain('a', 'life of a', True)) is True
        assert store.ask(Drain('a', 'life of a', True, by_itself=True)) is True
        assert store.ask(Drain('a', 'life of a', False, by_itself=True)) is False
        assert (store.beat('a').state, store.beat('a').held) == ('draining', True)
        assert store.ask(Drain('a', 'life of a', False)) is True
        assert store.ask(Drain('a', 'life of a', True, by_itself=True)) is True
        assert (store.beat('a').state, store.beat('a').held) == ('draining', False)
        assert store.ask(Drain('a', 'life of a', False, by_itself=True)) is True
        assert store.beat('a').state == 'active'

    def test_leaving_takes_this_life_only_and_tells_the_others(self, store: Store) -> None:
        store.join('a')
        store.lead('a')
        store.connection.listen(store.tables.channel)
        assert store.ask(Leave('a', 'a former life')) is True
        assert store.beat('a') is not None
        assert store.ask(Leave('a', 'life of a')) is True
        assert store.beat('a') is None
        assert store.owned() == {None: 1000}
        eventually(lambda: store.connection.notifies() == ['leave a'])

    def test_many_nodes_leave_at_once_with_tokens_on_their_way_between_them(
        self, store: Store
    ) -> None:
        names = [f'n{number}' for number in range(8)]
        for name in names:
            store.join(name)
        for lo in range(0, 1000, 10):
            store.rows.own(
                lo, lo + 10, names[lo // 10 % 8], moving_to=names[(lo // 10 + lo // 80 + 1) % 8]
            )
        barrier, replies = threading.Barrier(8), []

        def leave(name: str) -> None:
            connection = Connection.open(store.config, name)
            barrier.wait()
            replies.append(
                ClusterStore(store.config, store.tables, TODAY).handle(
                    connection, Leave(name, f'life of {name}')
                )
            )
            connection.close()

        threads = [threading.Thread(target=leave, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert replies == [True] * 8
        assert store.owned() == {None: 1000}


class TestLead:
    def test_the_first_plan_gives_everything_away_and_is_recorded(self, store: Store) -> None:
        for name in 'abc':
            store.join(name, active=False)
        store.ask(Activate('b', 'life of b', 1))
        led = store.lead('a', reason='because')
        assert led == RoundReply(True, store.version(), 1000)
        assert {member.state for member in store.ask(Observe()).members} == {'active'}
        assert sorted(store.owned().values()) == [333, 333, 334]
        (row,) = store.rows.run(
            'SELECT trigger_reason, leader_node, nodes_before, nodes_after, tokens_moved, '
            f'duration_ms >= 0 FROM {store.tables.rebalance}'
        )
        assert row == ('because', 'a', 0, 3, 1000, True)

    def test_nothing_is_written_when_nothing_changed(self, store: Store) -> None:
        def tables() -> list[Any]:
            return [
                store.rows.run(f'SELECT xmin::text, * FROM {table} ORDER BY 2')
                for table in (
                    store.tables.cluster,
                    store.tables.assignment,
                    store.tables.rebalance,
                    store.tables.lock,
                )
            ]

        store.join('a')
        store.join('b')
        store.lead('a')
        before = tables()
        for _ in range(3):
            assert store.lead('a') == RoundReply(True, store.version())
        store.beat('b')
        assert store.lead('a') == RoundReply(True, store.version())
        assert tables() == before

    def test_only_the_difference_is_written(self, store: Store) -> None:
        def written() -> dict[int, Any]:
            rows = store.rows.run(
                'SELECT xmin::text, lower(tokens), upper(tokens), node FROM '
                f'{store.tables.assignment}'
            )
            return {row[1]: row for row in rows}

        for name in 'abcdefgh':
            store.join(name)
        store.lead('a')
        before = written()
        with store.rows.sessions.session() as connection:
            LockStore(connection, store.tables).register([('t', ('a', 'b'), None, None, None)], 'x')
        store.lead('a')
        after = written()
        assert sum(before.get(lo) == row for lo, row in after.items()) >= len(before) - 2

    def test_a_row_that_is_split_keeps_the_time_since_when_its_node_owns_it(
        self, store: Store
    ) -> None:
        store.join('a')
        store.lead('a')
        since = store.rows.value(f'SELECT assigned_at FROM {store.tables.assignment}')
        store.join('b')
        store.lead('a')
        assert store.rows.run(
            f'SELECT DISTINCT assigned_at FROM {store.tables.assignment} WHERE node = %s', 'a'
        ) == [(since,)]
        assert len(store.assignment()) > 1
        store.give('a')
        assert (
            store.rows.value(
                f"SELECT min(assigned_at) FROM {store.tables.assignment} WHERE node = 'b'"
            )
            > since
        )

    def test_tokens_of_a_live_node_only_move_when_it_gives_them(self, store: Store) -> None:
        store.join('a')
        store.lead('a')
        store.join('b')
        assert store.lead('a').moved == 500
        assert store.owned() == {'a': 1000}
        assert store.refresh('b').incoming == 500
        store.give('a')
        assert store.owned() == {'a': 500, 'b': 500}

    def test_only_the_eldest_of_those_not_seen_dead_leads(self, store: Store) -> None:
        for name in 'abc':
            store.join(name)
        version = store.version()
        assert store.lead('b') == RoundReply(False, version)
        assert store.lead('c', store.sign('a')) == RoundReply(False, version)
        assert store.assignment() == []
        assert store.ask(Lead('a', 'a former life', (), 'test')) is None
        assert (
            store.evict('c', store.sign('a'))
            == store.evict('b', store.sign('c'))
            == EvictReply(False)
        )
        assert store.ask(Evict('b', 'a former life', (store.sign('a'),))) is None
        assert store.evict('b', store.sign('a')) == EvictReply(True, ('a',))
        assert store.lead('b').led
        assert store.owned() == {'b': 500, 'c': 500}

    def test_a_node_that_showed_life_meanwhile_is_not_evicted(self, store: Store) -> None:
        for name in 'abc':
            store.join(name)
        store.settle()
        seen = store.sign('a'), store.sign('c')
        store.beat('c')
        assert store.evict('b', *seen) == EvictReply(True, ('a',))
        assert store.lead('b').led
        assert set(store.owned()) == {'b', 'c'}
        store.join('a', life='second')
        assert store.evict('b', seen[0]) == EvictReply(True, ())
        assert [member.name for member in store.ask(Observe()).members] == ['b', 'c', 'a']

    def test_the_tokens_of_the_dead_are_owned_again_by_the_next_round(self, store: Store) -> None:
        for name in 'abcd':
            store.join(name)
        store.settle()
        assert store.evict('a', store.sign('b'), store.sign('d')) == EvictReply(True, ('b', 'd'))
        assert set(store.owned()) == {'a', 'c', None}
        assert store.lead('a', reason=DEATHS).moved == 500
        assert store.owned() == {'a': 500, 'c': 500}
        (row,) = store.rows.run(
            f'SELECT nodes_before, nodes_after, tokens_moved FROM {store.tables.rebalance} ORDER '
            'BY id DESC LIMIT 1'
        )
        assert row == (4, 2, 500)

    def test_a_life_that_was_evicted_and_joins_again_is_planned_for(self, store: Store) -> None:
        """Its answers were lost for a timeout, and it goes on asking under the same life."""
        store.join('a')
        store.join('b')
        store.settle()
        assert store.evict('a', store.sign('b')) == EvictReply(True, ('b',))
        store.join('b')
        assert store.ask(Observe()).stale and not store.refresh('b').planned
        store.settle()
        assert store.owned() == {'a': 500, 'b': 500}

    def test_locks_move_tokens_and_an_expired_one_no_longer(self, store: Store) -> None:
        for name in 'ab':
            store.join(name)
        store.settle()
        token = task_to_token('t', 1000, 'double_sha256')
        owner = next(s.node for s in store.assignment() if s.lo <= token < s.hi)
        other = 'b' if owner == 'a' else 'a'
        with store.rows.sessions.session() as connection:
            LockStore(connection, store.tables).register(
                [('t', (other,), None, 1.0, None), ('u', ('nobody',), None, None, None)], 'x'
            )
        assert 0 < store.ask(Observe()).next_expiry <= 86400
        assert store.lead('a').blocked == 1
        store.give(str(owner))
        assert next(s.node for s in store.assignment() if s.lo <= token < s.hi) == other
        store.rows.run(
            f"UPDATE {store.tables.lock} SET expires_at = now() - interval '1 second' WHERE "
            "task_id = 't'"
        )
        assert store.ask(Observe()).next_expiry < 0
        version = store.version()
        assert store.lead('a').version == version + 1
        assert store.rows.run(f'SELECT task_id FROM {store.tables.lock}') == [('u',)]
        assert store.ask(Observe()).next_expiry is None

    @pytest.mark.parametrize('moment', ['infinity', '-infinity'])
    def test_a_lock_that_somebody_made_endless_stops_no_look(
        self, store: Store, moment: str
    ) -> None:
        store.join('a')
        store.rows.run(
            f"""INSERT INTO {store.tables.lock} (task_id, node_patterns, expires_at) VALUES ('t',
                '["a"]', '{moment}')"""
        )
        assert store.ask(Observe()).next_expiry is None

    def test_locks_that_somebody_wrote_by_hand_and_that_make_no_sense_are_reported_and_ignored(
        self, store: Store
    ) -> None:
        store.join('a')
        for task, patterns in (
            ('empty', '[]'),
            ('number', '[5]'),
            ('object', '{"a": 1}'),
            ('x' * 2001, '["a"]'),
            ('good', '"nobody"'),
        ):
            store.rows.run(
                f'INSERT INTO {store.tables.lock} (task_id, node_patterns) VALUES (%s, %s)',
                task,
                patterns,
            )
        led = store.lead('a')
        assert led.led and led.blocked == 1
        assert len(led.conflicts) == 4

    def test_a_node_that_changes_its_state_while_the_plan_is_made_is_planned_again(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in 'ab':
            store.join(name)
        store.lead('a')
        store.join('c', active=False)
        store.lead('a')
        decide = leader.decide

        def interrupted(*args: Any) -> Any:
            decision = decide(*args)
            other = Connection.open(store.config, 'c')
            ClusterStore(store.config, store.tables, TODAY).handle(
                other, Activate('c', 'life of c', 1)
            )
            other.close()
            return decision

        monkeypatch.setattr(leading, 'decide', interrupted)
        store.join('d')
        assert store.lead('a').version == store.version()
        monkeypatch.undo()
        # The first plan was not written at all: it knew nothing of c's activation.
        assert not store.ask(Observe()).stale
        assert {segment.moving_to for segment in store.assignment() if segment.moving} >= {'c', 'd'}
        store.settle()
        assert store.owned() == dict.fromkeys('abcd', 250)
        assert not store.ask(Observe()).stale

    def test_an_error_in_the_middle_leaves_nothing_behind(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in 'ab':
            store.join(name)
        monkeypatch.setattr(leading, 'decide', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.lead('a')
        monkeypatch.undo()
        assert store.assignment() == [] and store.connection.idle
        assert store.ask(Observe()).stale
        assert store.lead('a').moved == 1000

    def test_two_leaders_at_once_do_no_harm(self, store: Store) -> None:
        for name in 'abcd':
            store.join(name)
        barrier, replies = threading.Barrier(2), []
        requests = [
            Lead('a', 'life of a', (), 'one'),
            Lead('b', 'life of b', (store.sign('a'),), 'two'),
        ]

        def lead(request: Lead) -> None:
            connection = Connection.open(store.config, request.name)
            barrier.wait()
            replies.append(
                ClusterStore(store.config, store.tables, TODAY).handle(connection, request)
            )
            connection.close()

        threads = [threading.Thread(target=lead, args=(request,)) for request in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(replies) == 2
        store.lead('b')
        segments = store.assignment()
        assert [s.lo for s in segments[1:]] == [s.hi for s in segments[:-1]]
        assert (segments[0].lo, segments[-1].hi) == (0, 1000)


class TestStuck:
    def test_a_stuck_session_holds_nobody_up_for_longer_than_the_lock_timeout(
        self, make_store: Callable[..., Store]
    ) -> None:
        store = make_store(heartbeat_interval_sec=0.2, heartbeat_timeout_sec=1.0)
        store.join('a')
        store.lead('a')
        sessions = Sessions(store.config, 'test stuck')
        with sessions.session(limited=False) as connection, connection.cursor() as cursor:
            cursor.execute('SET LOCAL idle_in_transaction_session_timeout = 0')
            cursor.execute('SELECT pg_advisory_xact_lock(%s, %s)', store.tables.advisory)
            for request in (
                Lead('a', 'life of a', (), 'test'),
                Evict('a', 'life of a', (Sign('x', 'y', 1),)),
                Leave('a', 'life of a'),
                Give('a', 'life of a', ((0, 1),), 1),
            ):
                began = time.monotonic()
                with pytest.raises(LockNotAvailable):
                    store.ask(request)
                assert time.monotonic() - began < 5
                assert store.connection.idle
                assert store.beat('a') is not None
        sessions.close_all()
        assert store.lead('a').led

    def test_a_leader_that_stops_in_the_middle_is_thrown_out_by_the_server(
        self, make_store: Callable[..., Store]
    ) -> None:
        store = make_store(heartbeat_interval_sec=0.2, heartbeat_timeout_sec=1.0)
        store.join('a')
        stopped = Connection.open(store.config, 'stopped')
        stopped.execute(
            f'BEGIN; {stopped.local_limits}; SELECT pg_advisory_xact_lock(%s, %s)',
            store.tables.advisory,
        )

        def leads() -> bool:
            try:
                return bool(store.lead('a').led)
            except LockNotAvailable:
                return False

        eventually(leads)
        with pytest.raises(DatabaseUnavailable):
            stopped.execute('COMMIT')

    def test_a_server_that_restarts_is_database_unavailable(
        self, own_server: EmbeddedPostgres
    ) -> None:
        with rows_of(own_server.config('postgres')) as rows:
            store = Store(own_server.config('postgres'), rows)
            store.join('a')
            own_server.restart()
            with pytest.raises(DatabaseUnavailable):
                store.beat('a')
            store.connection = Connection.open(store.config, 'test')
            assert store.beat('a') is not None
            store.connection.close()


class TestCost:
    def test_each_look_is_one_statement_and_each_change_one_round_trip(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.join('a')
        store.lead('a')
        sent: list[str] = []
        execute = Connection.execute

        def counted(self: Connection, sql: str, *args: Any, **kwargs: Any) -> Any:
            sent.append(sql)
            return execute(self, sql, *args, **kwargs)

        monkeypatch.setattr(Connection, 'execute', counted)
        for look in (
            Beat('a', 'life of a'),
            Refresh('a', 'life of a'),
            Observe(),
            Take('a', ((0, 1000),)),
            Activate('a', 'life of a', 1),
            Drain('a', 'life of a', True),
        ):
            sent.clear()
            store.ask(look)
            assert len(sent) == 1
            assert ';' not in sent[0] and 'BEGIN' not in sent[0]
        for change in (
            Give('a', 'life of a', ((0, 1000),), 9, (('t', 1),)),
            Leave('a', 'life of a'),
        ):
            sent.clear()
            store.ask(change)
            assert len(sent) == 1

    def test_a_plan_of_many_locks_and_ranges_is_quick(
        self, make_store: Callable[..., Store]
    ) -> None:
        store = make_store(total_tokens=1_000_000)
        names = [f'n{number:02}' for number in range(50)]
        for name in names:
            store.join(name)
        with store.rows.sessions.session() as connection:
            LockStore(connection, store.tables).register(
                [(f't{n}', (f'n{n % 50:02}',), None, None, None) for n in range(10_000)], 'x'
            )
        began = time.monotonic()
        led = store.lead('n00')
        first = time.monotonic() - began
        assert led.led and led.blocked == 0
        began = time.monotonic()
        store.evict('n00', store.sign('n07'))
        store.lead('n00')
        second = time.monotonic() - began
        print(
            f'10,000 locks: {first:.3f} s at first, {second:.3f} s for an eviction, '
            f'{len(store.assignment())} rows'
        )
        assert first < 5 and second < 5


class TestUnknown:
    def test_what_is_no_request_is_refused(self, store: Store) -> None:
        with pytest.raises(TypeError, match='ObserveReply'):
            store.ask(ObserveReply((), 0, False, None))
