"""Rescue, leftovers and drained nodes: what is in the queues of others, each queue on its own."""

from __future__ import annotations

from typing import Any

import pytest

from jobsync_core.errors import DatabaseUnavailable
from jobsync_core.worker.duties.drained import Drained
from jobsync_core.worker.duties.leftovers import Leftovers
from jobsync_core.worker.duties.rescue import Rescue
from jobsync_core.worker.owners import Place
from jobsync_core.worker.passage import Passage
from jobsync_core.worker.sweeping import Sweeping
from tests.support.fake_broker import Contents, FakeBroker, Item
from tests.support.fake_registry import FakeOwners, FakeRegistry, Time

ROUTES = [f'order-{number}' for number in range(40)]


class Stage:
    """A node `n1` that leads, and what others have left."""

    def __init__(self, catches_strays: bool = False) -> None:
        self.time = Time(leads=True)
        self.contents = Contents()
        self.broker = FakeBroker(self.contents, catches_strays)
        self.registry, self.owners = FakeRegistry(), FakeOwners()
        self.counts: dict[str, int] = {}
        self.strays = 0
        self.sweeping = Sweeping(
            'n1',
            self.broker,
            Passage(self.broker, 'n1'),
            self.registry,
            self.owners,
            lambda home: f'{home}.parked',
            count=self.count,
            stray=self.stray,
            now=self.time,
        )
        self.rescue = Rescue(self.registry, self.sweeping, 30, self.time)
        self.leftovers = Leftovers(self.broker, self.registry, self.sweeping, 30, self.time)
        self.drained = Drained('n1', self.registry, self.sweeping, 30, self.count, self.time)

    def count(self, event: str, number: int) -> None:
        self.counts[event] = self.counts.get(event, 0) + number

    def stray(self, home: str) -> None:
        self.strays += 1

    def refuse(self, *names: str) -> None:
        """The broker answers nothing about these nodes and queues."""

        def refused(name: str) -> None:
            if name in names:
                raise ConnectionError('540 NOT_IMPLEMENTED')

        self.broker.on_restore = self.broker.on_delete = refused


@pytest.fixture
def stage() -> Stage:
    return Stage()


class TestRescue:
    def test_what_a_node_held_is_restored_and_its_queue_goes_to_the_owners(
        self, stage: Stage
    ) -> None:
        stage.contents.held['gone'] = [Item('held')]
        stage.contents.put('q.gone', 'a', 'x-nobody', None)
        stage.registry.gone = {'gone': 1.0}
        assert stage.time.run(stage.rescue)
        assert stage.contents.routes('home') == [None, 'held'], 'they pass the gates again'
        assert stage.contents.routes('q.n1') == ['a']
        assert stage.contents.routes('home.parked') == ['x-nobody'] and stage.strays == 1
        assert stage.counts == {'rescued': 4}

    def test_it_is_due_after_each_plan_and_soon_after_it_found_something(
        self, stage: Stage
    ) -> None:
        assert stage.time.run(stage.rescue)
        assert stage.rescue.due(stage.time.moment) == 3.0
        stage.time.version += 1
        stage.registry.gone = {'gone': 1.0}
        assert stage.time.run(stage.rescue)
        assert stage.rescue.due(stage.time.moment) == 0.5

    def test_without_a_lease_it_is_not_due(self, stage: Stage) -> None:
        stage.time.leased = False
        assert not stage.time.run(stage.rescue)

    def test_what_failed_is_due_still(self, stage: Stage) -> None:
        stage.broker.left = lambda queues: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        stage.registry.gone = {'gone': 1.0}
        with pytest.raises(ZeroDivisionError):
            stage.time.run(stage.rescue)
        assert stage.rescue.due(stage.time.moment) <= 0

    def test_a_map_that_still_names_the_gone_node_ends_no_sweep(self, stage: Stage) -> None:
        stage.contents.put('q.gone', *ROUTES)
        stage.owners.places = dict.fromkeys(ROUTES, Place('gone', 'q.gone'))
        stage.owners.on_reread = stage.owners.places.clear
        stage.registry.gone = {'gone': 1.0}
        stage.time.run(stage.rescue)
        assert stage.broker.taken == ['q.gone'], (
            'none is sent into the queue that it was taken from'
        )
        stage.time.now += 1
        stage.time.run(stage.rescue)
        assert stage.contents.routes('q.n1') == sorted(ROUTES)

    def test_what_another_node_sweeps_and_a_node_that_has_come_back_are_left_alone(
        self, stage: Stage
    ) -> None:
        for node in ('busy', 'back'):
            stage.contents.put(f'q.{node}', node)
        stage.registry.gone = {'busy': 1.0, 'back': 2.0}
        stage.registry.busy, stage.registry.back = {'busy'}, {'back'}
        stage.time.run(stage.rescue)
        assert stage.broker.restored == [] and stage.broker.taken == []

    def test_one_that_makes_trouble_holds_up_no_other_and_is_left_aside_longer_each_time(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        for age, node in enumerate(('a', 'bad', 'c')):
            stage.contents.put(f'q.{node}', node)
            stage.registry.gone[node] = float(age)
        stage.refuse('bad')
        stage.time.run(stage.rescue)
        assert stage.contents.routes('q.n1') == ['a', 'c'] and stage.broker.resets == 1
        tries = []
        for _ in range(20):
            stage.time.now += 0.5
            before = stage.broker.resets
            stage.time.run(stage.rescue)
            tries.append(stage.broker.resets - before)
        assert [number for number, tried in enumerate(tries, 1) if tried] == [2, 6, 14]
        assert caplog.text.count('cannot be swept now') == 1

    def test_where_all_fail_it_is_the_broker(self, stage: Stage) -> None:
        nodes = [f'g{number}' for number in range(9)]
        stage.registry.gone = {node: float(number) for number, node in enumerate(nodes)}
        for node in nodes:
            stage.contents.put(f'q.{node}', node)
        tried: list[str] = []

        def refuse(name: str) -> None:
            tried.append(name)
            raise ConnectionError('the broker is away')

        stage.broker.on_restore = stage.broker.on_size = refuse
        with pytest.raises(ConnectionError):
            stage.time.run(stage.rescue)
        assert tried == [*nodes[:3], '.parked']

    def test_where_many_fail_and_the_broker_answers_the_others_go_on(self, stage: Stage) -> None:
        nodes = [f'g{number}' for number in range(9)]
        stage.registry.gone = {node: float(number) for number, node in enumerate(nodes)}
        for node in nodes:
            stage.contents.put(f'q.{node}', node)
        stage.refuse(*nodes[:7])
        stage.time.run(stage.rescue)
        assert stage.contents.routes('q.n1') == nodes[7:]

    def test_where_the_database_fails_nobody_goes_on(self, stage: Stage) -> None:
        nodes = [f'g{number}' for number in range(9)]
        stage.registry.gone = {node: float(number) for number, node in enumerate(nodes)}
        for node in nodes:
            stage.contents.put(f'q.{node}', node)

        def away(name: str) -> None:
            raise DatabaseUnavailable('away')

        stage.broker.on_restore = away
        with pytest.raises(DatabaseUnavailable):
            stage.time.run(stage.rescue)
        assert stage.broker.restored == nodes[:3]

    def test_it_stops_where_something_has_changed(self, stage: Stage) -> None:
        stage.contents.put('q.gone', *ROUTES)
        stage.registry.gone = {'gone': 1.0}
        stage.time.run(stage.rescue, lambda: len(stage.broker.taken) == 4)
        assert stage.contents.size('q.n1') == 4 and stage.contents.total() == len(ROUTES)

    def test_a_queue_that_its_node_has_left_alone_is_emptied_and_what_the_node_holds_is_its_own(
        self, stage: Stage
    ) -> None:
        stage.contents.put('q.n2', 'a')
        stage.contents.held['n2'] = [Item('held')]
        stage.registry.gone, stage.registry.retired = {'n2': 1.0}, {'n2'}
        stage.time.run(stage.rescue)
        assert stage.contents.routes('q.n1') == ['a'] and stage.contents.held

    def test_what_belongs_to_a_queue_that_nobody_consumes_goes_home(self, stage: Stage) -> None:
        stage.contents.put('q.gone', *ROUTES)
        stage.registry.gone, stage.owners.deserted = {'gone': 1.0}, {'home'}
        stage.time.run(stage.rescue)
        assert stage.contents.order('home') == ROUTES and not stage.strays


class TestLeftovers:
    def test_what_is_parked_of_a_queue_that_nobody_consumes_goes_home(self, stage: Stage) -> None:
        stage.contents.put('home.parked', *ROUTES)
        stage.registry.gone = {'old': 60.0}
        stage.time.run(stage.leftovers)
        assert stage.contents.size('home.parked') == len(ROUTES), 'its members look after it'
        stage.owners.deserted = {'home'}
        stage.time.now += 30
        stage.time.run(stage.leftovers)
        assert stage.contents.order('home') == ROUTES and stage.counts == {'sent_home': 40}
        assert 'home.parked' in stage.registry.held_by_me

    def test_only_the_leader_looks_once_in_a_while_and_asks_the_broker_once(
        self, stage: Stage
    ) -> None:
        stage.registry.gone = {f'old-{number}': 100.0 for number in range(300)}
        stage.time.leads = False
        assert not stage.time.run(stage.leftovers)
        stage.time.leads = True
        assert stage.time.run(stage.leftovers) and not stage.time.run(stage.leftovers)
        assert stage.broker.asked == [300]
        assert not stage.registry.held_by_me, 'no transaction for any of them'
        stage.time.now += 30
        assert stage.time.run(stage.leftovers)

    def test_what_was_cut_off_by_a_plan_goes_on_in_the_next_turn(self, stage: Stage) -> None:
        stage.registry.gone = {'old': 100.0}
        assert stage.time.run(stage.leftovers, lambda: True)
        assert stage.time.run(stage.leftovers) and not stage.time.run(stage.leftovers)

    def test_what_came_late_is_brought_back_and_the_empty_queue_deleted_and_forgotten(self) -> None:
        stage = Stage(catches_strays=True)
        stage.contents.put('q.old', 'late')
        stage.registry.gone = {'old': 60.0, 'young': 1.0}
        stage.time.run(stage.leftovers)
        assert stage.contents.routes('q.n1') == ['late'] and stage.broker.deleted == ['q.old']
        assert stage.registry.gone == {'young': 1.0}

    def test_where_publishing_makes_it_anew_it_is_kept_for_an_hour(self, stage: Stage) -> None:
        stage.registry.gone = {'old': 3000.0, 'older': 4000.0}
        stage.time.run(stage.leftovers)
        assert stage.broker.deleted == ['q.older'] and 'old' in stage.registry.gone

    def test_one_that_the_broker_does_not_delete_is_not_forgotten(self) -> None:
        stage = Stage(catches_strays=True)
        stage.registry.gone = {'gone': 60.0}
        stage.broker.on_delete = lambda queue: stage.contents.put(queue, 'new')
        stage.time.run(stage.leftovers)
        assert stage.registry.gone and not stage.broker.deleted

    def test_one_that_cannot_be_deleted_keeps_nobody_from_the_others(self) -> None:
        stage = Stage(catches_strays=True)
        stage.refuse('q.b')
        stage.registry.gone = {'a': 60.0, 'b': 61.0, 'c': 62.0}
        stage.time.run(stage.leftovers)
        assert stage.broker.deleted == ['q.a', 'q.c'] and list(stage.registry.gone) == ['b']

    def test_a_queue_that_made_trouble_or_whose_node_has_come_back_is_not_deleted(self) -> None:
        stage = Stage(catches_strays=True)
        stage.refuse('bad')
        stage.contents.put('q.bad', 'a')
        stage.registry.gone = {'bad': 60.0, 'back': 61.0}
        stage.registry.back = {'back'}
        stage.time.run(stage.leftovers)
        assert stage.broker.deleted == []

    def test_a_run_deletes_some_in_four_transactions_and_the_next_one_others(self) -> None:
        stage = Stage(catches_strays=True)
        stage.registry.gone = {f'old-{number}': 60.0 + number for number in range(120)}
        stage.time.run(stage.leftovers)
        assert len(stage.broker.deleted) == 50 and stage.registry.transactions == 4

    def test_what_another_node_holds_is_not_deleted(self) -> None:
        stage = Stage(catches_strays=True)
        stage.registry.gone, stage.registry.busy = {'a': 60.0, 'busy': 61.0}, {'busy'}
        stage.time.run(stage.leftovers)
        assert stage.broker.deleted == ['q.a']

    def test_what_comes_between_the_look_and_the_hold_is_not_deleted(self) -> None:
        stage = Stage()
        stage.registry.gone = {'a': 4000.0}
        stage.registry.on_hold = lambda: stage.contents.put('q.a', 'late')
        stage.broker.on_delete = lambda queue: stage.contents.queues.clear()
        stage.time.run(stage.leftovers)
        assert stage.broker.deleted == [] and stage.contents.routes('q.a') == ['late']

    def test_where_the_broker_fails_in_the_middle_what_is_deleted_is_forgotten(self) -> None:
        stage = Stage(catches_strays=True)
        stage.refuse('q.b', 'q.c', 'q.d', '.parked')
        stage.broker.on_size = stage.broker.on_delete
        stage.registry.gone = {node: 60.0 + age for age, node in enumerate('abcde')}
        with pytest.raises(ConnectionError):
            stage.time.run(stage.leftovers)
        assert list(stage.registry.gone) == ['b', 'c', 'd', 'e']


def test_what_waits_for_a_drained_node_is_passed_on(stage: Stage) -> None:
    stage.registry.drained = ['away']
    stage.contents.put('q.away', *ROUTES)
    stage.contents.held['away'] = [Item('held')]
    assert stage.time.run(stage.drained) and stage.drained.due(stage.time.moment) == 5.0
    assert stage.contents.routes('q.n1') == sorted(ROUTES) and stage.counts == {'rescued': 40}
    assert stage.contents.held, 'what it has in hand is its own: it lives'


def test_a_message_that_cannot_go_on_harms_none_behind_it(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(item: Any) -> None:
        if item.route == 'poison':
            raise ValueError('a header that the broker does not take')

    stage.contents.on_forward = fails
    stage.contents.put('q.gone', 'a', 'poison', 'b')
    stage.registry.gone = {'gone': 1.0}
    for _ in range(3):
        stage.time.run(stage.rescue)
        stage.time.now += 1
    assert stage.contents.routes('q.n1') == ['a', 'b']
    assert stage.contents.routes('q.gone') == ['poison']
    assert caplog.text.count('poison') == 1, 'it is named once'
