"""The duties of nodes on a real server, with real nodes and a broker in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.belonging import Belonging
from jobsync_core.worker.duties.node import NodeDuties
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.routing import parked_queue, unknown_queue
from jobsync_core.worker.settings import PluginSettings
from tests.support.cluster import query
from tests.support.fake_broker import Contents, FakeBroker, Item
from tests.support.homes import fixed_homes
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

ROUTES = [f'order-{number}' for number in range(40)]


@dataclass
class Node:
    """A node with its duties."""

    job: Job
    gate: Gate
    broker: FakeBroker
    duties: NodeDuties
    leases: list[bool]
    changes: list[int]


class World:
    """Nodes on one database and one broker; all consume the home queue `home`, for which `n1` has
    the queue `q.n1`."""

    def __init__(self, config: CoordinationConfig, stack: ExitStack) -> None:
        self.config = config
        self.contents = Contents()
        self.unknown = unknown_queue(config.appname)
        self.parked = parked_queue('home', config.appname)
        #: What nodes know, other than the task that all know.
        self.tasks: dict[str, set[str]] = {}
        self._stack = stack

    def node(
        self,
        name: str,
        catches_strays: bool = False,
        start: bool = True,
        kind: str = 'celery',
        config: CoordinationConfig | None = None,
        on_lease: Callable[[bool], object] = lambda leased: None,
        on_change: Callable[[], object] = lambda: None,
    ) -> Node:
        """A node that has entered; its queue is recorded."""
        config = config or self.config
        job = Job(name, config, wait_on_enter=0, groups=['home'])
        job.belonging = Belonging(kind)
        self._stack.enter_context(job)
        self.queue(name, kind)
        gate = Gate(PluginSettings(config=config), job)
        broker = FakeBroker(self.contents, catches_strays)
        leases: list[bool] = []
        changes: list[int] = []

        def leased(lease: bool) -> None:
            leases.append(lease)
            on_lease(lease)

        def changed() -> None:
            changes.append(gate.owners.version)
            on_change()

        duties = NodeDuties(
            gate,
            broker,
            kind,
            fixed_homes(job, ['home'], lambda home: f'q.{name}'),
            on_lease=leased,
            on_change=changed,
            tasks=lambda: frozenset(self.tasks.get(name, {'known'})),
        )
        if start:
            duties.start()
        self._stack.callback(duties.stop, 10)
        return Node(job, gate, broker, duties, leases, changes)

    def queue(self, node: str, kind: str = 'celery', age: float | None = None) -> None:
        """Record a node's queue; of a node that is gone for so many seconds."""
        query(
            self.config,
            """INSERT INTO "{}node_queue" (name, home, node, kind, gone_at)
               VALUES ('q.' || %s, 'home', %s, %s, now() - make_interval(secs => %s))
               ON CONFLICT (node, home) DO UPDATE SET gone_at = excluded.gone_at""",
            (node, node, kind, age),
        )

    def recorded(self) -> list[str]:
        return [
            row[0]
            for row in query(
                self.config, """SELECT name FROM "{}node_queue" WHERE home <> '' ORDER BY 1"""
            )
        ]

    def settle(self, *nodes: Node) -> None:
        eventually(
            lambda: (
                sum(len(node.job.my_tokens) for node in nodes) == self.config.total_tokens
                and all(node.job.my_tokens for node in nodes)
                and all(
                    sum(node.job.owns(route, 'home') for node in nodes) == 1 for route in ROUTES
                )
            ),
            30,
        )


@pytest.fixture
def world(config: CoordinationConfig) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(config, stack)


class TestRescue:
    def test_messages_of_a_node_that_is_gone_go_to_their_present_owners(self, world: World) -> None:
        nodes = world.node('n1'), world.node('n2')
        world.settle(*nodes)
        world.contents.put('q.gone', *ROUTES)
        world.contents.held['gone'] = [Item('held-1'), Item('held-2')]
        world.queue('gone')
        eventually(lambda: not world.contents.queues['q.gone'] and not world.contents.held)
        eventually(lambda: world.contents.size('q.n1') + world.contents.size('q.n2') == len(ROUTES))
        for name, node in zip(('q.n1', 'q.n2'), nodes, strict=True):
            assert world.contents.routes(name) == sorted(
                route for route in ROUTES if node.job.owns(route, 'home')
            )
        assert world.contents.routes('home') == ['held-1', 'held-2'], 'they pass the gates again'
        eventually(
            lambda: sum(node.gate.counts.get('rescued', 0) for node in nodes) == len(ROUTES) + 2
        )

    def test_a_node_that_dies_while_its_duties_run_is_swept_by_the_survivor(
        self, world: World
    ) -> None:
        first, second = world.node('n1'), world.node('n2')
        world.settle(first, second)
        second.duties.stop(10)
        world.contents.put('q.n2', *ROUTES)
        second.job.__exit__(None, None, None)
        eventually(lambda: world.contents.routes('q.n1') == sorted(ROUTES), 20)

    def test_queues_of_live_nodes_and_of_other_plugins_are_left_alone(self, world: World) -> None:
        first, second = world.node('n1'), world.node('n2', start=False)
        world.settle(first, second)
        world.queue('other', 'dramatiq')
        world.contents.put('q.n2', 'a')
        world.contents.put('q.other', 'b')
        world.contents.put('q.gone', 'c')
        world.queue('gone')
        eventually(lambda: 'c' in world.contents.routes('q.n1') + world.contents.routes('q.n2'))
        assert 'a' in world.contents.routes('q.n2')
        assert world.contents.routes('q.other') == ['b']

    def test_what_was_left_last_comes_back_first(self, world: World) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        for number in range(20):
            world.queue(f'old-{number}', age=100 + number)
            world.contents.held[f'old-{number}'] = [Item(f'o{number}')]
        world.queue('fresh')
        world.contents.held['fresh'] = [Item('f')]
        first.duties.start()
        eventually(lambda: not world.contents.held)
        assert first.broker.restored == ['fresh', *(f'old-{number}' for number in range(20))]


class TestParked:
    def test_it_is_released_by_a_plan(self, world: World) -> None:
        world.contents.put(world.parked, *ROUTES)
        first = world.node('n1')
        eventually(lambda: world.contents.routes('q.n1') == sorted(ROUTES))
        assert first.gate.counts['released'] == len(ROUTES)

    def test_it_is_released_when_something_was_parked_meanwhile_or_was_seen(
        self, world: World
    ) -> None:
        first = world.node('n1')
        world.settle(first)
        eventually(lambda: first.gate.owners.version == first.job.token_version)
        world.contents.put(world.parked, 'a')
        first.duties.parked_something('home')
        eventually(lambda: world.contents.routes('q.n1') == ['a'])
        world.contents.put(world.parked, 'b')
        # nobody tells of it: the next look sees that the queue has grown
        eventually(lambda: world.contents.routes('q.n1') == ['a', 'b'], 40)

    def test_an_owner_s_queue_is_found_when_it_is_recorded_late(self, world: World) -> None:
        first, second = world.node('n1', start=False), world.node('n2', start=False)
        world.settle(first, second)
        theirs = next(route for route in ROUTES if second.job.owns(route, 'home'))
        query(world.config, """DELETE FROM "{}node_queue" WHERE node = 'n2'""")
        first.gate.owners.reread()
        here = first.gate.here(theirs, 'home')
        assert (here.owner, here.queue) == ('n2', None)
        world.contents.put(world.parked, theirs)
        first.duties.start()
        eventually(lambda: first.broker.taken)
        assert world.contents.routes(world.parked) == [theirs]
        world.queue('n2')
        eventually(lambda: first.gate.here(theirs, 'home').queue == 'q.n2')
        eventually(lambda: world.contents.routes('q.n2') == [theirs], 30)


def test_messages_of_a_task_that_nobody_knew_wait_for_a_node_that_does(world: World) -> None:
    world.contents.put_of(world.unknown, 'new', 'gone', 'new')
    first = world.node('n1')
    world.settle(first)
    eventually(lambda: first.broker.taken)
    world.tasks['n2'] = {'known', 'new'}
    second = world.node('n2')
    eventually(lambda: world.contents.tasks('home of new') == ['new', 'new'], 30)
    eventually(lambda: second.gate.counts.get('known_again') == 2)
    assert world.contents.tasks(world.unknown) == ['gone']


class TestDeletion:
    def test_an_old_orphan_is_deleted_and_forgotten_where_the_broker_keeps_strays(
        self, world: World
    ) -> None:
        first = world.node('n1', catches_strays=True)
        world.queue('young', age=1)
        world.queue('gone', age=60)
        eventually(lambda: 'q.gone' not in world.recorded())
        assert world.recorded() == ['q.n1', 'q.young']
        assert first.broker.deleted == ['q.gone']

    def test_where_publishing_makes_it_anew_it_is_kept_for_an_hour(self, world: World) -> None:
        first = world.node('n1')
        world.queue('gone', age=3000)
        world.queue('older', age=4000)
        eventually(lambda: 'q.older' not in world.recorded())
        assert 'q.gone' in world.recorded()
        assert first.broker.deleted == ['q.older']


class TestLease:
    def test_a_lost_lease_is_told_and_its_return_too(
        self,
        config: CoordinationConfig,
        make_config: Callable[..., CoordinationConfig],
        world: World,
    ) -> None:
        answers = [ConnectionError('broker away')]

        def told(leased: bool) -> None:
            if leased and answers:
                raise answers.pop()

        with Proxy(config.host, int(config.port)) as proxy, ExitStack() as stack:
            behind = World(config, stack).node(
                'n1',
                config=make_config(host=proxy.host, port=proxy.port, connect_timeout_sec=1),
                on_lease=told,
            )
            eventually(lambda: behind.changes)
            assert behind.leases == []
            proxy.switch(Mode.HOLD)
            eventually(lambda: behind.leases == [False], 30)
            # What happens to a node that is away for long.
            query(config, 'DELETE FROM "{}node_queue"')
            proxy.switch(Mode.PASS)
            eventually(lambda: behind.leases == [False, True, True], 30)
            assert world.recorded() == ['q.n1']

    @pytest.mark.parametrize('during', ['restore', 'release'])
    def test_a_sweep_that_the_network_strands_does_not_keep_it_back(
        self,
        config: CoordinationConfig,
        make_config: Callable[..., CoordinationConfig],
        during: str,
    ) -> None:
        with Proxy(config.host, int(config.port)) as proxy, ExitStack() as stack:
            world = World(config, stack)
            behind = world.node(
                'n1',
                config=make_config(host=proxy.host, port=proxy.port, connect_timeout_sec=1),
                start=False,
            )
            world.settle(behind)
            if during == 'restore':
                world.queue('gone')
                world.contents.held['gone'] = [Item('a')]
                behind.broker.on_restore = lambda node: proxy.switch(Mode.HOLD)
            else:
                world.contents.put(world.parked, 'a')
                behind.broker.on_take = lambda queue: proxy.switch(Mode.HOLD)
            behind.duties.start()
            eventually(lambda: behind.leases == [False], 30)
            behind.broker.on_restore = behind.broker.on_take = lambda name: None
            proxy.switch(Mode.PASS)
            eventually(lambda: behind.leases == [False, True], 30)

    def test_a_plan_is_told_when_the_map_shows_it(self, world: World) -> None:
        first = world.node('n1')
        eventually(lambda: first.changes)
        second = world.node('n2')
        world.settle(first, second)
        eventually(lambda: first.changes[-1] == first.job.token_version)


def test_the_mark_of_the_broker_is_written_again(world: World) -> None:
    first = world.node('n1', start=False)
    first.job.belonging = Belonging('celery', 'mark-1')
    first.duties.start()
    eventually(lambda: first.broker.marks == ['mark-1'])


class TestTrouble:
    def test_an_error_of_the_broker_is_tried_again_on_another_connection(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = world.node('n1', start=False)
        first.broker.errors = [ConnectionError('broker away'), OSError('still away')]
        world.contents.put('q.gone', 'a')
        world.queue('gone')
        first.duties.start()
        eventually(lambda: world.contents.routes('q.n1') == ['a'], 20)
        assert first.broker.resets == 2
        assert caplog.text.count('cannot be swept now') == 1, (
            'a failure that is repeated is said once'
        )

    def test_a_callback_that_raises_ends_nothing(self, world: World) -> None:
        def broken() -> None:
            raise RuntimeError('mine')

        first = world.node('n1', start=False, on_change=broken)
        world.contents.put('q.gone', 'a')
        world.queue('gone')
        first.duties.start()
        eventually(lambda: world.contents.routes('q.n1') == ['a'], 20)

    def test_a_crash_while_messages_move_loses_none(self, world: World) -> None:
        first = world.node('n1', start=False)
        failed = threading.Event()

        def fails_once(item: Item) -> None:
            if not failed.is_set() and item.route == ROUTES[5]:
                failed.set()
                raise ConnectionError

        world.contents.on_forward = fails_once
        world.contents.put('q.gone', *ROUTES)
        world.queue('gone')
        first.duties.start()
        eventually(lambda: world.contents.routes('q.n1') == sorted(ROUTES), 20)
        assert failed.is_set()


class TestHold:
    def test_two_nodes_do_not_sweep_one_at_once(self, world: World) -> None:
        first, second = world.node('n1', start=False), world.node('n2', start=False)
        world.settle(first, second)
        inside, go = threading.Event(), threading.Event()

        def stay(node: str) -> None:
            if node == 'gone':
                inside.set()
                go.wait(30)

        first.broker.on_restore = stay
        world.queue('gone')
        world.queue('gone2')
        world.contents.held['gone'] = [Item('a')]
        world.contents.held['gone2'] = [Item('b')]
        try:
            first.duties.start()
            assert inside.wait(20)
            second.duties.start()
            eventually(lambda: 'gone2' in second.broker.restored, 20)
            assert 'gone' not in second.broker.restored
        finally:
            go.set()
        eventually(lambda: world.contents.routes('home') == ['a', 'b'], 20)

    def test_a_new_life_waits_until_its_former_one_is_swept(self, world: World) -> None:
        first = world.node('n1', start=False)
        inside, go = threading.Event(), threading.Event()

        def stay(node: str) -> None:
            inside.set()
            go.wait(30)

        first.broker.on_restore = stay
        world.queue('n2')
        world.contents.held['n2'] = [Item('b')]
        done: list[Any] = []
        try:
            first.duties.start()
            assert inside.wait(20)
            second = world.node('n2', start=False)
            world.contents.held['n2'] = [Item('a')]
            thread = threading.Thread(target=lambda: done.append(second.duties.restore_former()))
            thread.start()
            thread.join(0.5)
            assert (done, second.broker.restored) == ([], [])
        finally:
            go.set()
        thread.join(30)
        assert len(done) == 1 and second.broker.restored == ['n2']
        assert world.contents.routes('home') == ['a']

    def test_a_sweep_locks_no_table_while_the_broker_works(self, world: World) -> None:
        first = world.node('n1', start=False)
        locked: list[tuple[Any, ...]] = []
        first.broker.on_restore = lambda node: locked.extend(
            query(
                world.config,
                """
            SELECT locktype, count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
            WHERE application_name LIKE 'jobsync duties%%' AND locktype IN ('advisory', 'relation')
                GROUP BY 1""",
            )
        )
        world.queue('gone')
        world.contents.held['gone'] = [Item('a')]
        first.duties.start()
        eventually(lambda: first.broker.restored)
        eventually(lambda: locked == [('advisory', 1)])
