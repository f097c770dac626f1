"""The keeper on a real server, with real nodes and a broker in memory."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, Job, JobSyncError
from jobsync_core.belonging import Belonging
from jobsync_core.store.queues import Orphan, QueueStore
from jobsync_core.store.tables import Tables
from jobsync_core.worker import keeper
from jobsync_core.worker.broker import Broker, Delivery
from jobsync_core.worker.keeper import Keeper
from jobsync_core.worker.plugin import Gate, PluginSettings
from jobsync_core.worker.routing import Verdict, unknown_queue

from ..waiting import eventually
from .cluster import query
from .proxy import Mode, Proxy

PARKED = 'parked'


@dataclass
class Item:
    """A message."""

    route: str | None
    home: str = 'home'
    task: str = 'known'


@dataclass
class Contents:
    """Queues, and what nodes hold unacknowledged."""

    queues: dict[str, list[Item]] = field(default_factory=dict)
    held: dict[str, list[Item]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, queue: str, *routes: str | None) -> None:
        with self.lock:
            self.queues.setdefault(queue, []).extend(Item(route) for route in routes)

    def routes(self, queue: str) -> list[str | None]:
        with self.lock:
            return sorted((item.route for item in self.queues.get(queue, [])), key=str)

    def size_of(self, queue: str) -> int:
        with self.lock:
            return len(self.queues.get(queue, []))

    def total(self) -> int:
        with self.lock:
            return sum(map(len, (*self.queues.values(), *self.held.values())))


class FakeDelivery:
    def __init__(self, contents: Contents, source: str, item: Item) -> None:
        self._contents, self._source, self._item = contents, source, item
        self.id, self.task, self.route, self.home = (
            f'id of {item.route}',
            item.task,
            item.route,
            item.home,
        )

    def forward(self, queue: str) -> None:
        with self._contents.lock:
            self._contents.queues.setdefault(queue, []).append(self._item)

    def requeue(self) -> None:
        with self._contents.lock:
            self._contents.queues.setdefault(self._source, []).insert(0, self._item)


class FakeBroker:
    """A connection to the broker.

    Args:
        broker: The broker.
        catches_strays: See Broker.
    """

    def __init__(self, contents: Contents, catches_strays: bool) -> None:
        self.contents = contents
        self.catches_strays = catches_strays
        self.restored: list[str] = []
        self.deleted: list[str] = []
        self.resets = 0
        self.marks: list[str] = []
        #: How many nodes each question was about.
        self.asked: list[int] = []
        #: Errors that the next calls raise.
        self.errors: list[Exception] = []
        self.on_restore: Callable[[str], object] = lambda node: None

    def mark(self, mark: str) -> None:
        self.marks.append(mark)

    def restore(self, node: str) -> int:
        if self.errors:
            raise self.errors.pop()
        self.restored.append(node)
        self.on_restore(node)
        with self.contents.lock:
            items = self.contents.held.pop(node, [])
            self.contents.queues.setdefault('home', []).extend(items)
            return len(items)

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        self.asked.append(len(queues))
        with self.contents.lock:
            return frozenset(
                node
                for node, queue in queues.items()
                if self.catches_strays
                or self.contents.queues.get(queue)
                or self.contents.held.get(node)
            )

    def size(self, queue: str) -> int:
        with self.contents.lock:
            return len(self.contents.queues.get(queue, ()))

    def take(self, queue: str) -> Delivery | None:
        with self.contents.lock:
            items = self.contents.queues.get(queue)
            return FakeDelivery(self.contents, queue, items.pop(0)) if items else None

    def delete(self, queue: str) -> bool:
        with self.contents.lock:
            if self.contents.queues.get(queue):
                return False
            self.contents.queues.pop(queue, None)
        self.deleted.append(queue)
        return True

    def reset(self) -> None:
        self.resets += 1


@dataclass
class Node:
    """A node with its keeper."""

    job: Job
    gate: Gate
    broker: FakeBroker
    keeper: Keeper
    leases: list[bool]
    changes: list[int]

    def sweep(self) -> None:
        """One sweep, with what comes before it in the keeper's thread."""
        self.keeper._version = self.job.token_version
        self.gate.owners.refresh()
        self.keeper._sweep()


class World:
    """Nodes on one database and one broker; `n1` has the queue `q.n1`."""

    def __init__(self, config: CoordinationConfig, stack: ExitStack) -> None:
        self.config = config
        self.contents = Contents()
        self.unknown = unknown_queue(config.appname)
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
    ) -> Node:
        """A node that has entered; its queue is recorded."""
        config = config or self.config
        job = Job(name, config, wait_on_enter=0)
        job.belonging = Belonging(kind)
        self._stack.enter_context(job)
        self.queue(name, kind)
        gate = Gate(PluginSettings(config=config), job)
        broker: Broker = FakeBroker(self.contents, catches_strays)
        assert isinstance(broker, FakeBroker)
        leases: list[bool] = []
        changes: list[int] = []
        keeper = Keeper(
            gate,
            broker,
            kind,
            f'q.{name}',
            PARKED,
            on_lease=leases.append,
            on_change=lambda: changes.append(gate.owners.version),
            tasks=lambda: frozenset(self.tasks.get(name, {'known'})),
        )
        if start:
            keeper.start()
        self._stack.callback(gate.owners._sessions.close_all)
        self._stack.callback(keeper.stop, 10)
        return Node(job, gate, broker, keeper, leases, changes)

    def queue(self, node: str, kind: str = 'celery', age: float | None = None) -> None:
        """Record a node's queue; of a node that is gone for so many seconds."""
        query(
            self.config,
            """INSERT INTO "{}queue" (name, node, kind, gone_at)
                              VALUES ('q.' || %s, %s, %s, now() - make_interval(secs => %s))
                              ON CONFLICT (name) DO UPDATE SET gone_at = excluded.gone_at""",
            (node, node, kind, age),
        )

    def recorded(self) -> list[str]:
        return [row[0] for row in query(self.config, 'SELECT name FROM "{}queue" ORDER BY 1')]

    def settle(self, *nodes: Node) -> None:
        eventually(
            lambda: (
                sum(len(node.job.my_tokens) for node in nodes) == self.config.total_tokens
                and all(node.job.my_tokens for node in nodes)
            ),
            30,
        )


@pytest.fixture
def world(config: CoordinationConfig) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(config, stack)


ROUTES = [f'order-{number}' for number in range(40)]


def test_an_owner_map_that_still_names_the_gone_node_ends_no_sweep(world: World) -> None:
    n1, n2 = world.node('n1', start=False), world.node('n2', start=False)
    world.settle(n1, n2)
    n1.gate.owners.reread()
    n2.job.__exit__(None, None, None)
    eventually(lambda: len(n1.job.my_tokens) == world.config.total_tokens)
    world.contents.put('q.n2', *ROUTES)
    taken: list[str] = []
    take = n1.broker.take

    def limited(queue: str) -> Delivery | None:
        taken.append(queue)
        assert len(taken) < 1000, 'a delivery is forwarded into the queue that it was taken from'
        return take(queue)

    n1.broker.take = limited  # type: ignore[method-assign]
    for _ in range(2):
        n1.keeper._sweep()
    assert world.contents.routes('q.n1') == sorted(ROUTES)
    assert not world.contents.routes('q.n2')


def test_letters_of_a_node_that_is_gone_go_to_their_present_owners(world: World) -> None:
    nodes = world.node('n1'), world.node('n2')
    world.settle(*nodes)
    world.contents.put('q.gone', *ROUTES)
    world.contents.held['gone'] = [Item('held-1'), Item('held-2')]
    world.queue('gone')
    eventually(lambda: not world.contents.queues['q.gone'] and not world.contents.held)
    eventually(
        lambda: len(world.contents.routes('q.n1') + world.contents.routes('q.n2')) == len(ROUTES)
    )
    for name, node in zip(('q.n1', 'q.n2'), nodes, strict=True):
        assert world.contents.routes(name) == sorted(
            route for route in ROUTES if node.job.owns(route)
        )
    assert world.contents.routes('home') == ['held-1', 'held-2'], 'they pass the gates again'
    eventually(lambda: sum(node.gate.counts.get('rescued', 0) for node in nodes) == len(ROUTES) + 2)


def test_a_node_that_dies_while_its_keeper_runs_is_swept_by_the_survivor(world: World) -> None:
    first, second = world.node('n1'), world.node('n2')
    world.settle(first, second)
    second.keeper.stop(10)
    world.contents.put('q.n2', *ROUTES)
    second.job.__exit__(None, None, None)
    eventually(lambda: world.contents.routes('q.n1') == sorted(ROUTES), 20)


def test_a_letter_without_a_route_goes_home(world: World) -> None:
    world.settle(world.node('n1'))
    world.contents.put('q.gone', None)
    world.queue('gone')
    eventually(lambda: world.contents.routes('home') == [None])


def test_queues_of_live_nodes_and_of_other_plugins_are_left_alone(world: World) -> None:
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


class TestParked:
    def test_it_is_released_by_a_plan(self, world: World) -> None:
        world.contents.put(PARKED, *ROUTES)
        first = world.node('n1')
        eventually(lambda: world.contents.routes('q.n1') == sorted(ROUTES))
        assert first.gate.counts['released'] == len(ROUTES)

    def test_it_is_released_when_something_was_parked_meanwhile_and_not_before(
        self, world: World
    ) -> None:
        first = world.node('n1')
        world.settle(first)
        eventually(lambda: first.gate.owners.version == first.job.token_version)
        world.contents.put(PARKED, 'a')
        first.keeper.parked_something()
        eventually(lambda: world.contents.routes('q.n1') == ['a'])
        world.contents.put(PARKED, 'b')
        first.job.wake()  # nobody tells of it: the next sweep sees that the queue has grown
        eventually(lambda: world.contents.routes('q.n1') == ['a', 'b'], 40)

    def test_as_long_as_nothing_changes_nothing_is_touched(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        find = first.gate.owners.find
        monkeypatch.setattr(
            first.gate.owners, 'find', lambda route: None if route.startswith('x') else find(route)
        )
        world.contents.put(PARKED, 'x1', 'x2')
        first.sweep()
        monkeypatch.setattr(
            first.broker, 'take', lambda queue: pytest.fail('a message is taken for nothing')
        )
        first.sweep()
        assert world.contents.routes(PARKED) == ['x1', 'x2']

    def test_one_pass_follows_another_after_a_rest_and_a_new_plan_at_once(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While a node that is gone is swept, sweeps follow each other closely, and each may park
        something.
        """
        first = world.node('n1', start=False)
        world.settle(first)
        monkeypatch.setattr(first.gate.owners, 'find', lambda route: None)
        taken: list[str] = []
        take = first.broker.take

        def noted(queue: str) -> Delivery | None:
            taken.append(queue)
            return take(queue)

        monkeypatch.setattr(first.broker, 'take', noted)
        for number in range(10):
            world.contents.put(PARKED, f'x{number}')
            first.keeper.parked_something()
            first.sweep()
        assert len(taken) == 1, 'the first pass looked at one message, and there was no second one'
        assert 0 < first.keeper._parking.pause <= 5
        first.keeper._parking._not_before = 0.0
        first.sweep()
        assert len(taken) == 11
        first.keeper._parking._released -= 1  # a plan
        first.sweep()
        assert len(taken) == 21

    def test_many_of_one_blocked_pin_are_in_nobody_s_way(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        find = first.gate.owners.find
        monkeypatch.setattr(
            first.gate.owners, 'find', lambda route: None if route.startswith('x') else find(route)
        )
        blocked = [f'x{number}' for number in range(2500)]
        world.contents.put(PARKED, *blocked, 'a')
        first.sweep()
        assert world.contents.routes('q.n1') == ['a']
        assert [item.route for item in world.contents.queues[PARKED]] == blocked, (
            'they keep their order'
        )

    def test_one_that_fails_harms_none_behind_it(
        self, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        forward = FakeDelivery.forward

        def fails(delivery: FakeDelivery, queue: str) -> None:
            if delivery.route == 'poison':
                raise ValueError('a header that the broker does not take')
            forward(delivery, queue)

        monkeypatch.setattr(FakeDelivery, 'forward', fails)
        world.contents.put(PARKED, 'a', 'poison', 'b')
        for _ in range(3):
            first.keeper.parked_something()
            first.sweep()
        assert world.contents.routes('q.n1') == ['a', 'b'] and world.contents.routes(PARKED) == [
            'poison'
        ]
        assert caplog.text.count('poison') == 1, 'it is named once'

    def test_after_an_error_of_the_broker_the_pass_is_made_again(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        world.contents.put(PARKED, *ROUTES)
        forward, trouble = FakeDelivery.forward, [ConnectionError()] * 3

        def fails(delivery: FakeDelivery, queue: str) -> None:
            if trouble:
                raise trouble.pop()
            forward(delivery, queue)

        monkeypatch.setattr(FakeDelivery, 'forward', fails)
        with pytest.raises(ConnectionError):
            first.sweep()
        assert world.contents.total() == len(ROUTES)
        first.sweep()
        assert world.contents.routes('q.n1') == sorted(ROUTES)

    def test_a_pass_ends_with_what_was_there_when_it_began(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        forward = FakeDelivery.forward

        def breeds(delivery: FakeDelivery, queue: str) -> None:
            forward(delivery, queue)
            world.contents.put(PARKED, f'{delivery.route}+')

        monkeypatch.setattr(FakeDelivery, 'forward', breeds)
        world.contents.put(PARKED, 'a', 'b')
        first.sweep()
        assert world.contents.routes('q.n1') == ['a', 'b'] and world.contents.routes(PARKED) == [
            'a+',
            'b+',
        ]

    def test_a_plan_that_comes_meanwhile_comes_first(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody has died, perhaps: his messages do not wait behind those that are parked."""
        first = world.node('n1', start=False)
        world.settle(first)
        take, taken = first.broker.take, itertools.count()

        def slow(queue: str) -> Delivery | None:
            if next(taken) == 3:
                first.keeper._version -= 1
            return take(queue)

        monkeypatch.setattr(first.broker, 'take', slow)
        world.contents.put(PARKED, *ROUTES)
        first.sweep()
        assert len(world.contents.routes('q.n1')) == 4
        first.sweep()
        assert world.contents.routes('q.n1') == sorted(ROUTES), 'the rest is not forgotten'


class TestUnknown:
    """Messages whose task nobody knew."""

    def put(self, world: World, queue: str, *tasks: str) -> None:
        world.contents.put(queue)
        world.contents.queues[queue].extend(Item(None, f'home of {task}', task) for task in tasks)

    def test_they_wait_until_a_node_comes_that_knows_them_and_then_go_to_their_own_queue(
        self, world: World
    ) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        self.put(world, world.unknown, 'new', 'gone', 'new')
        first.sweep()
        assert world.contents.size_of(world.unknown) == 3
        world.tasks['n2'] = {'known', 'new'}
        second = world.node('n2', start=False)
        world.settle(first, second)
        second.sweep()
        assert [item.task for item in world.contents.queues['home of new']] == ['new', 'new']
        assert [item.task for item in world.contents.queues[world.unknown]] == ['gone']
        assert second.gate.counts['known_again'] == 2

    def test_one_that_has_a_key_goes_past_its_queue_to_the_owner_of_its_key(
        self, world: World
    ) -> None:
        """In its own queue a node that does not know its task might take it again."""
        first = world.node('n1', start=False)
        world.settle(first)
        first.keeper._parking._route = lambda delivery: 'order-1'
        self.put(world, world.unknown, 'known')
        first.sweep()
        assert world.contents.size_of('q.n1') == 1 and not world.contents.size_of('home of known')

    def test_they_are_looked_at_when_the_tasks_of_a_node_change(self, world: World) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        self.put(world, world.unknown, 'new')
        first.sweep()
        assert world.contents.size_of(world.unknown) == 1
        world.tasks['n1'] = {'new'}
        first.sweep()
        assert world.contents.size_of('home of new') == 1

    def test_a_node_that_knows_none_of_them_looks_once(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        self.put(world, world.unknown, *['gone'] * 1500)
        taken: list[str] = []
        take = first.broker.take

        def noted(queue: str) -> Delivery | None:
            taken.append(queue)
            return take(queue)

        monkeypatch.setattr(first.broker, 'take', noted)
        for _ in range(5):
            first.sweep()
        assert taken == [world.unknown] * 1500 and world.contents.size_of(world.unknown) == 1500

    def test_what_comes_back_at_once_does_not_circulate(self, world: World) -> None:
        """A node that does not know its task owns its key."""
        world.tasks['n1'] = {'new'}
        first = world.node('n1', start=False)
        world.settle(first)
        came = 0
        self.put(world, world.unknown, 'new')
        for _ in range(10):
            first.sweep()
            if world.contents.size_of('home of new'):
                came += 1
                world.contents.queues[world.unknown].append(
                    world.contents.queues['home of new'].pop()
                )
        assert came and first.keeper._parking._pause == 2.0 * 2**came, (
            'the time between two looks doubles with each of them'
        )

    def test_one_that_was_parked_leaves_those_that_have_an_owner_alone(self, world: World) -> None:
        """An earlier version parked them; brought home they would come back at once."""
        first = world.node('n1', start=False)
        world.settle(first)
        self.put(world, PARKED, 'gone', 'known', 'gone')
        world.contents.put(PARKED, 'a')
        first.sweep()
        assert (
            world.contents.size_of(world.unknown) == 2
            and world.contents.size_of('home of known') == 1
        )
        assert world.contents.routes('q.n1') == ['a']

    def test_what_nobody_owns_stays_in_its_order(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        find = first.gate.owners.find
        monkeypatch.setattr(
            first.gate.owners, 'find', lambda route: None if route.startswith('x') else find(route)
        )
        world.contents.put(PARKED, 'x2', 'a', 'x1', 'b', 'x3')
        first.keeper.start()
        eventually(lambda: world.contents.routes('q.n1') == ['a', 'b'])
        eventually(
            lambda: [item.route for item in world.contents.queues[PARKED]] == ['x2', 'x1', 'x3']
        )


class TestDeletion:
    def test_an_old_orphan_is_deleted_and_forgotten_where_the_broker_keeps_strays(
        self, world: World
    ) -> None:
        first = world.node('n1', catches_strays=True)
        world.queue('gone', age=60)
        eventually(lambda: world.recorded() == ['q.n1'])
        assert first.broker.deleted == ['q.gone']

    def test_a_young_orphan_is_kept(self, world: World) -> None:
        first = world.node('n1', catches_strays=True)
        world.queue('young', age=1)
        world.queue('old', age=60)
        eventually(lambda: 'q.old' not in world.recorded())
        assert 'q.young' in world.recorded()
        assert first.broker.deleted == ['q.old']

    def test_where_publishing_makes_it_anew_it_is_kept_for_an_hour(self, world: World) -> None:
        first = world.node('n1')
        world.queue('gone', age=3000)
        world.queue('older', age=4000)
        eventually(lambda: 'q.older' not in world.recorded())
        assert 'q.gone' in world.recorded()
        assert first.broker.deleted == ['q.older']

    def test_one_that_cannot_be_deleted_keeps_nobody_from_the_others(
        self, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = world.node('n1', catches_strays=True, start=False)
        world.settle(first)
        delete = first.broker.delete

        def refused(queue: str) -> bool:
            if queue == 'q.bad':
                raise ConnectionError('540 NOT_IMPLEMENTED')
            return delete(queue)

        monkeypatch.setattr(first.broker, 'delete', refused)
        for name in ('a', 'bad', 'c'):
            world.queue(name, age=60)
        world.contents.put('q.a', 'a-1')
        world.contents.put('q.c', 'c-1')
        first.sweep()
        first.keeper._rescue._old_at = 0.0
        first.sweep()
        assert world.contents.routes('q.n1') == ['a-1', 'c-1']
        assert world.recorded() == ['q.bad', 'q.n1']
        assert caplog.text.count('cannot be swept now') == 1

    def test_one_that_the_broker_does_not_delete_is_not_forgotten(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = world.node('n1', catches_strays=True, start=False)
        asked = threading.Event()
        monkeypatch.setattr(first.broker, 'delete', lambda queue: asked.set())
        world.queue('gone', age=60)
        first.keeper.start()
        assert asked.wait(20)
        first.keeper.stop(10)
        assert 'q.gone' in world.recorded()


class TestLease:
    def test_a_lost_lease_is_told_and_its_return_too(
        self,
        config: CoordinationConfig,
        make_config: Callable[..., CoordinationConfig],
        world: World,
    ) -> None:
        with Proxy(config.host, int(config.port)) as proxy, ExitStack() as stack:
            behind = World(config, stack).node(
                'n1', config=make_config(host=proxy.host, port=proxy.port, connect_timeout_sec=1)
            )
            eventually(lambda: behind.changes)
            assert behind.leases == []
            answers = [ConnectionError('broker away')]

            def told(leased: bool) -> None:
                behind.leases.append(leased)
                if leased and answers:
                    raise answers.pop()

            behind.keeper._on_lease = told
            proxy.switch(Mode.HOLD)
            eventually(lambda: behind.leases == [False], 30)
            # What happens to a node that is away for long.
            query(config, 'DELETE FROM "{}queue"')
            proxy.switch(Mode.PASS)
            eventually(lambda: behind.leases == [False, True, True], 30)
            assert world.recorded() == ['q.n1']

    @pytest.mark.parametrize('during', ['restore', 'release'])
    def test_a_sweep_that_the_network_strands_does_not_keep_it_back(
        self,
        config: CoordinationConfig,
        make_config: Callable[..., CoordinationConfig],
        during: str,
        monkeypatch: pytest.MonkeyPatch,
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
                world.contents.put(PARKED, 'a')
                refresh, answers = behind.gate.owners.refresh, itertools.count()

                def stranded() -> bool:
                    if next(answers):  # the first is the answer to the plan, before the sweep
                        proxy.switch(Mode.HOLD)
                    return refresh()

                monkeypatch.setattr(behind.gate.owners, 'refresh', stranded)
            behind.keeper.start()
            eventually(lambda: behind.leases == [False], 30)
            proxy.switch(Mode.PASS)
            behind.broker.on_restore = lambda node: None
            monkeypatch.undo()
            eventually(lambda: behind.leases == [False, True], 30)

    def test_an_owner_s_queue_is_found_when_it_is_recorded_late(self, world: World) -> None:
        first, second = world.node('n1', start=False), world.node('n2', start=False)
        world.settle(first, second)
        theirs = next(route for route in ROUTES if second.job.owns(route))
        query(world.config, """DELETE FROM "{}queue" WHERE node = 'n2'""")
        first.gate.owners.reread()
        assert first.gate.decide(theirs, 0).verdict is Verdict.PARK
        world.contents.put(PARKED, theirs)
        first.sweep()
        assert world.contents.routes(PARKED) == [theirs]
        world.queue('n2')
        eventually(lambda: first.gate.decide(theirs, 0).verdict is Verdict.FORWARD)

        def handed_out() -> bool:
            first.sweep()  # one that comes soon after another leaves the parked messages alone
            return world.contents.routes('q.n2') == [theirs]

        eventually(handed_out)

    def test_a_plan_is_told_when_the_map_shows_it(self, world: World) -> None:
        first = world.node('n1')
        eventually(lambda: first.changes)
        second = world.node('n2')
        world.settle(first, second)
        eventually(lambda: first.changes[-1] == first.job.token_version)


def test_the_mark_of_the_broker_is_written_again(world: World) -> None:
    first = world.node('n1', start=False)
    first.job.belonging = Belonging('celery', 'mark-1')
    first.keeper.start()
    eventually(lambda: first.broker.marks == ['mark-1'])


class TestTrouble:
    def test_an_error_of_the_broker_is_tried_again_on_another_connection(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = world.node('n1', start=False)
        first.broker.errors = [ConnectionError('broker away'), OSError('still away')]
        world.contents.put('q.gone', 'a')
        world.queue('gone')
        first.keeper.start()
        eventually(lambda: world.contents.routes('q.n1') == ['a'], 20)
        assert first.broker.resets == 2
        assert caplog.text.count('cannot be swept now') == 1, (
            'a failure that is repeated is said once'
        )

    def test_a_callback_that_raises_ends_nothing(self, world: World) -> None:
        first = world.node('n1', start=False)

        def broken() -> None:
            raise RuntimeError('mine')

        first.keeper._on_change = broken
        world.contents.put('q.gone', 'a')
        world.queue('gone')
        first.keeper.start()
        eventually(lambda: world.contents.routes('q.n1') == ['a'], 20)

    def test_a_crash_while_letters_move_loses_none(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = world.node('n1', start=False)
        forward, failed = FakeDelivery.forward, threading.Event()

        def fails_once(delivery: FakeDelivery, queue: str) -> None:
            if not failed.is_set() and delivery.route == ROUTES[5]:
                failed.set()
                raise ConnectionError
            forward(delivery, queue)

        monkeypatch.setattr(FakeDelivery, 'forward', fails_once)
        world.contents.put('q.gone', *ROUTES)
        world.queue('gone')
        first.keeper.start()
        eventually(lambda: world.contents.routes('q.n1') == sorted(ROUTES), 20)
        assert failed.is_set()


class TestMany:
    """What many nodes that are gone cost."""

    def test_of_those_that_left_nothing_the_broker_is_asked_once_and_only_by_the_leader(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = world.node('n1', start=False), world.node('n2', start=False)
        world.settle(first, second)
        for number in range(300):
            world.queue(f'old-{number}', age=100)
        held: list[str] = []
        hold = QueueStore.hold

        def noted(store: QueueStore, node: str) -> bool:
            held.append(node)
            return hold(store, node)

        monkeypatch.setattr(QueueStore, 'hold', noted)
        leader, other = (first, second) if first.job.am_i_leader() else (second, first)
        leader.sweep()
        other.sweep()
        assert leader.broker.asked == [300] and not other.broker.asked
        assert not held, 'no transaction for any of them'
        leader.sweep()
        assert leader.broker.asked == [300], 'and not at every sweep'

    def test_what_was_left_last_comes_back_first(self, world: World) -> None:
        first = world.node('n1', start=False)
        world.settle(first)
        for number in range(20):
            world.queue(f'old-{number}', age=100 + number)
            world.contents.held[f'old-{number}'] = [Item(f'o{number}')]
        world.queue('fresh')
        world.contents.held['fresh'] = [Item('f')]
        first.sweep()
        assert first.broker.restored == ['fresh', *(f'old-{number}' for number in range(20))]


class TestHold:
    def test_two_keepers_do_not_sweep_one_node_at_once(self, world: World) -> None:
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
            first.keeper.start()
            assert inside.wait(20)
            second.keeper.start()
            eventually(lambda: 'gone2' in second.broker.restored, 20)
            assert 'gone' not in second.broker.restored
        finally:
            go.set()
        eventually(lambda: world.contents.routes('home') == ['a', 'b'], 20)

    def test_a_new_life_waits_until_its_former_one_is_swept(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
            first.keeper.start()
            assert inside.wait(20)
            second = world.node('n2', start=False)
            world.contents.held['n2'] = [Item('a')]
            asked: list[bool] = []

            def counted(*arguments: Any) -> bool:
                asked.append(hold(*arguments))
                return asked[-1]

            hold = QueueStore.hold
            monkeypatch.setattr(QueueStore, 'hold', counted)
            thread = threading.Thread(target=lambda: done.append(second.keeper.reclaim()))
            thread.start()
            eventually(lambda: len(asked) > 2)
            assert not any(asked)
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
            WHERE application_name LIKE 'jobsync keeper%%' AND locktype IN ('advisory', 'relation')
                GROUP BY 1""",
            )
        )
        world.queue('gone')
        first.keeper._rescue.sweep_one(Orphan('q.gone', 'gone', 0.0))
        assert locked == [('advisory', 1)]

    def test_a_new_life_does_not_wait_for_ever(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = world.node('n1', start=False)
        monkeypatch.setattr(keeper, '_RECLAIM_SEC', 0.3)
        with first.keeper._sessions.session() as connection:
            assert QueueStore(connection, Tables(world.config.appname)).hold('n1')
            with pytest.raises(JobSyncError, match="earlier life of 'n1'"):
                first.keeper.reclaim()
            first.keeper.stop(10)
            assert first.keeper.reclaim() == 0, 'a worker that is told to stop does'
        assert first.broker.restored == []

    def test_a_node_that_has_come_back_is_not_swept(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It came back between the look at the table and the lock."""
        first, second = world.node('n1', start=False), world.node('n2', start=False)
        world.settle(first, second)
        world.contents.put('q.n2', 'a')
        for action in (first.keeper._rescue.sweep_one, first.keeper._rescue.delete_one):
            action(Orphan('q.n2', 'n2', 60.0))
        assert (first.broker.restored, first.broker.deleted, world.contents.routes('q.n2')) == (
            [],
            [],
            ['a'],
        )
