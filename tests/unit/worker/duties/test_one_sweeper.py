"""Many nodes beside what others left: the leader sweeps, at a cost that does not grow with the
nodes, and where it does not, another one does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from jobsync_core.worker.duties.drained import Drained
from jobsync_core.worker.duties.duty import Duty, Moment, Pace, turn_of
from jobsync_core.worker.duties.leftovers import Leftovers
from jobsync_core.worker.duties.mark import BrokerMark
from jobsync_core.worker.duties.parked import Parked
from jobsync_core.worker.duties.rescue import Rescue
from jobsync_core.worker.duties.unknown import UnknownTasks
from jobsync_core.worker.passage import Passage
from jobsync_core.worker.sweeping import Sweeping
from tests.support.fake_broker import Contents, FakeBroker
from tests.support.fake_registry import FakeOwners, FakeRegistry, Time, never

#: The defaults of a cluster.
_INTERVAL = 30.0
_STEP = 0.25


@pytest.fixture(autouse=True)
def _same_chances() -> Iterator[None]:
    state = random.getstate()
    random.seed(7)
    yield
    random.setstate(state)


def parked_of(home: str) -> str:
    return f'{home}.parked'


class Node:
    """A node of a fleet, with all duties that look at what others left."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.name = name
        self.broker = broker = FakeBroker(fleet.contents, fleet.catches_strays)
        passage = Passage(broker, name)
        registry, owners, now = fleet.registry, fleet.owners, fleet.time
        #: What a stuck node does: nothing.
        self.stuck = False

        def count(event: str, number: int) -> None:
            fleet.rescued_by[name] = fleet.rescued_by.get(name, 0) + number

        def no_tasks() -> frozenset[str]:
            return frozenset()

        sweeping = Sweeping(
            name,
            broker,
            passage,
            registry,
            owners,
            parked_of,
            count=count,
            stray=lambda home: None,
            now=now,
        )
        self.duties: list[Duty] = [
            Rescue(registry, sweeping, _INTERVAL, now),
            Leftovers(broker, registry, sweeping, _INTERVAL, now),
            Drained(name, registry, sweeping, _INTERVAL, count, now),
            Parked(
                broker,
                passage,
                registry,
                owners,
                lambda: frozenset({'home'}),
                parked_of,
                'unknown',
                interval=_INTERVAL,
                tasks=no_tasks,
                count=count,
                now=now,
            ),
            UnknownTasks(
                broker,
                passage,
                registry,
                owners,
                parked_of,
                'unknown',
                interval=_INTERVAL,
                tasks=no_tasks,
                route=lambda delivery: None,
                count=count,
                now=now,
            ),
            BrokerMark(lambda: 'mark', broker.mark),
        ]


class Fleet:
    """Nodes at one broker, by one clock; the first that is not gone leads."""

    def __init__(self, nodes: int, catches_strays: bool = False) -> None:
        self.time = Time()
        self.catches_strays = catches_strays
        self.contents = Contents()
        self.registry, self.owners = FakeRegistry(), FakeOwners()
        self.rescued_by: dict[str, int] = {}
        self.nodes = [Node(self, f'n{number + 1}') for number in range(nodes)]

    def left(self, number: int, age: float) -> None:
        """So many nodes have been gone for so many seconds."""
        self.registry.gone.update({f'gone-{each}': age + each for each in range(number)})

    def plan(self) -> None:
        self.time.version += 1
        self.owners.version += 1

    def pass_time(self, seconds: float, until: Callable[[], bool] = never) -> float:
        """Let time pass; after how many seconds something was so."""
        began = self.time.now
        while self.time.now - began < seconds and not until():
            for number, node in enumerate(self.nodes):
                moment = Moment(
                    self.time.now, True, self.time.version, number == 0, len(self.nodes)
                )
                for duty in node.duties:
                    if not node.stuck and duty.due(moment) <= 0:
                        duty.run(moment, never)
            self.time.now += _STEP
            for gone in self.registry.gone:
                self.registry.gone[gone] += _STEP
        return self.time.now - began

    @property
    def questions(self) -> int:
        """How often the broker was asked."""
        return sum(node.broker.questions for node in self.nodes)


class TestCost:
    @pytest.mark.parametrize('nodes', [3, 30])
    @pytest.mark.parametrize('left', [0, 300, 500])
    def test_it_is_the_same_for_many_nodes_and_for_many_queues(self, nodes: int, left: int) -> None:
        fleet = Fleet(nodes)
        fleet.left(left, age=60)
        fleet.pass_time(60)
        before = fleet.registry.transactions, fleet.questions
        fleet.pass_time(600)
        transactions = (fleet.registry.transactions - before[0]) / 10
        questions = (fleet.questions - before[1]) / 10
        # On Redis a question takes one command, and one for a hundred queues.
        assert transactions <= 60 and questions <= 200, (transactions, questions)

    def test_deleting_many_takes_few_transactions(self) -> None:
        fleet = Fleet(3, catches_strays=True)
        fleet.left(500, age=60)
        took = fleet.pass_time(600, lambda: not fleet.registry.gone)
        assert took < 330 and fleet.registry.transactions / (took / 60) <= 60
        assert sum(len(node.broker.deleted) for node in fleet.nodes) == 500

    def test_those_that_are_in_use_still_keep_no_others_from_being_deleted(self) -> None:
        fleet = Fleet(1, catches_strays=True)
        fleet.left(200, age=60)  # the newest come first
        fleet.nodes[0].broker.in_use = {f'q.gone-{each}' for each in range(120)}
        fleet.pass_time(10 * _INTERVAL, lambda: len(fleet.registry.gone) == 120)
        assert len(fleet.registry.gone) == 120
        fleet.nodes[0].broker.in_use.clear()
        fleet.pass_time(10 * _INTERVAL, lambda: not fleet.registry.gone)
        assert not fleet.registry.gone


class TestRescue:
    def test_the_leader_brings_back_what_was_left_just_now_at_once(self) -> None:
        fleet = Fleet(5)
        fleet.pass_time(30)
        fleet.contents.put('q.gone-0', *map(str, range(10)))
        fleet.left(1, age=0)
        fleet.plan()
        assert fleet.pass_time(5, lambda: not fleet.contents.size('q.gone-0')) <= _STEP
        assert fleet.rescued_by == {'n1': 10}
        fleet.contents.put('q.gone-0', 'late')
        assert fleet.pass_time(5, lambda: not fleet.contents.size('q.gone-0')) <= 1

    @pytest.mark.parametrize('nodes', [2, 3, 10, 50])
    def test_another_node_does_where_the_leader_is_stuck(self, nodes: int) -> None:
        fleet = Fleet(nodes)
        fleet.pass_time(30)
        fleet.nodes[0].stuck = True
        fleet.contents.put('q.gone-0', *map(str, range(10)))
        fleet.left(1, age=0)
        fleet.plan()
        assert fleet.pass_time(30, lambda: not fleet.contents.size('q.gone-0')) <= 6
        assert fleet.rescued_by and 'n1' not in fleet.rescued_by

    def test_what_comes_late_is_brought_back_without_the_leader_too(self) -> None:
        fleet = Fleet(3)
        fleet.left(1, age=300)
        fleet.pass_time(60)
        fleet.nodes[0].stuck = True
        fleet.contents.put('q.gone-0', 'late')
        assert fleet.pass_time(600, lambda: not fleet.contents.size('q.gone-0')) <= 4 * _INTERVAL

    def test_a_queue_with_which_the_leader_is_stuck_holds_up_no_other(self) -> None:
        fleet = Fleet(3)
        fleet.pass_time(30)
        fleet.nodes[0].stuck = True
        fleet.registry.busy = {'gone-0'}  # which the leader holds
        for each in range(5):
            fleet.contents.put(f'q.gone-{each}', f'k{each}')
        fleet.left(5, age=0)
        fleet.plan()
        fleet.pass_time(30, lambda: fleet.contents.size('q.n1') == 4)
        assert fleet.contents.order('q.gone-0') == ['k0'] and fleet.contents.size('q.n1') == 4
        fleet.registry.busy = set()  # its connection is cut
        assert fleet.pass_time(60, lambda: not fleet.contents.size('q.gone-0')) <= 4 * _INTERVAL

    def test_a_new_leader_goes_on_at_once_where_the_old_one_died(self) -> None:
        fleet = Fleet(4)
        fleet.pass_time(30)
        fleet.contents.put('q.gone-0', 'a', 'b')
        fleet.left(1, age=100)  # the dead leader was at it
        del fleet.nodes[0]
        assert fleet.pass_time(30, lambda: not fleet.contents.size('q.gone-0')) <= _STEP
        assert fleet.rescued_by == {'n2': 2}


class TestPace:
    def test_what_all_followers_do_is_the_same_however_many_they_are(self) -> None:
        for nodes in (2, 5, 100):
            moment = Moment(0, True, 1, False, nodes)
            assert turn_of(moment, 2, 5, lambda: 0.5) == 10 * (nodes - 1)
        assert turn_of(Moment(0, True, 1, True, 100), 2, 5, lambda: 0.5) == 2

    def test_a_plan_never_puts_a_look_off(self) -> None:
        pace = Pace(chance=lambda: 0.5)
        pace.begin(Moment(0, True, 1, False, 100))
        pace.rest(0.01)
        for version in range(2, 20):
            assert pace.due(Moment(1, True, version, False, 100)) <= 0
