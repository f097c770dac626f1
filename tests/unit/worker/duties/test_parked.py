"""Parked messages, and those of tasks that nobody knew."""

from __future__ import annotations

import itertools

import pytest

from jobsync_core.worker.duties.parked import Parked
from jobsync_core.worker.duties.unknown import UnknownTasks
from jobsync_core.worker.owners import Place
from jobsync_core.worker.passage import Passage
from tests.support.fake_broker import Contents, FakeBroker, Item
from tests.support.fake_registry import FakeOwners, FakeRegistry, Time

ROUTES = [f'order-{number}' for number in range(40)]
PARKED, UNKNOWN = 'home.parked', 'unknown'


def parked_of(home: str) -> str:
    return f'{home}.parked'


class Stage:
    """A node `n1` that consumes the queue `home`, knows one task, `known`, and owns whatever does
    not begin with `x`.
    """

    def __init__(self) -> None:
        self.time = Time()
        self.contents = Contents()
        self.broker = FakeBroker(self.contents)
        self.registry, self.owners = FakeRegistry(), FakeOwners()
        self.tasks, self.homes = {'known'}, {'home'}
        self.consumers = 0
        self.counts: dict[str, int] = {}
        passage = Passage(self.broker, 'n1')
        self.parked = Parked(
            self.broker,
            passage,
            self.registry,
            self.owners,
            lambda: frozenset(self.homes),
            parked_of,
            UNKNOWN,
            interval=30,
            tasks=lambda: frozenset(self.tasks),
            count=self.count,
            consumers=lambda home: self.consumers,
            now=self.time,
        )
        self.unknown = UnknownTasks(
            self.broker,
            passage,
            self.registry,
            self.owners,
            parked_of,
            UNKNOWN,
            interval=30,
            tasks=lambda: frozenset(self.tasks),
            route=lambda delivery: 'order-1' if delivery.task == 'keyed' else None,
            count=self.count,
            now=self.time,
        )

    def count(self, event: str, number: int) -> None:
        self.counts[event] = self.counts.get(event, 0) + number

    def plan(self) -> None:
        self.time.version += 1
        self.owners.version += 1


@pytest.fixture
def stage() -> Stage:
    return Stage()


class TestParked:
    def test_a_plan_hands_them_out(self, stage: Stage) -> None:
        stage.contents.put(PARKED, *ROUTES)
        assert stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ROUTES and stage.counts == {'released': 40}

    def test_where_the_broker_counts_what_is_given_back_what_stays_is_published_again(
        self, stage: Stage
    ) -> None:
        stage.broker.requeue_is_free = False
        routes = ['x-1', 'a', 'x-2', 'x-3']
        stage.contents.put(PARKED, *routes)
        stage.time.run(stage.parked)
        assert stage.contents.order(PARKED) == ['x-1', 'x-2', 'x-3']
        assert stage.contents.requeued == 0

    def test_without_a_lease_nothing_is_looked_at(self, stage: Stage) -> None:
        stage.time.leased = False
        stage.parked.note('home')
        assert not stage.time.run(stage.parked)

    def test_as_long_as_nothing_changes_nothing_is_touched(self, stage: Stage) -> None:
        stage.contents.put(PARKED, 'x1', 'x2')
        stage.time.run(stage.parked)
        stage.broker.taken.clear()
        for _ in range(5):
            stage.time.now += 100
            assert stage.time.run(stage.parked)
        assert stage.broker.taken == [] and stage.contents.order(PARKED) == ['x1', 'x2']

    def test_one_pass_follows_another_after_a_rest_and_a_new_plan_at_once(
        self, stage: Stage
    ) -> None:
        """While a node that is gone is swept, each sweep may park something."""
        for number in range(10):
            stage.contents.put(PARKED, f'x{number}')
            stage.parked.note('home')
            stage.time.run(stage.parked)
            stage.time.now += 0.5
        assert len(stage.broker.taken) == 1, 'there was no second pass'
        assert stage.parked.due(stage.time.moment) == 0.0, 'five seconds after the first'
        stage.time.run(stage.parked)
        assert len(stage.broker.taken) == 11
        stage.plan()
        stage.time.run(stage.parked)
        assert len(stage.broker.taken) == 21

    def test_what_producers_park_in_vain_is_passed_over_less_and_less_until_a_plan_comes(
        self, stage: Stage
    ) -> None:
        """No node matches its pin: the number rises, and nothing can go."""
        passes, began = [], stage.time.now
        while stage.time.now < began + 400:
            before = len(stage.broker.taken)
            stage.contents.put(PARKED, 'x1')
            stage.time.run(stage.parked)
            if len(stage.broker.taken) > before:
                passes.append(stage.time.now - began)
            stage.time.now += 1
        rests = [after - before for before, after in itertools.pairwise(passes)]
        assert len(passes) < 14 and rests[0] <= 8 and max(rests) <= 62, rests
        assert rests == sorted(rests)
        stage.plan()
        stage.contents.put(PARKED, 'a')
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['a'], 'at once'
        stage.contents.put(PARKED, 'b')  # whoever sent it had not heard of the plan
        stage.time.now += 7.5
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['a', 'b'], 'the rest is the shortest again'
        for _ in range(2):
            stage.contents.put(PARKED, 'x2')
            stage.time.now += 7.5
            stage.time.run(stage.parked)
        stage.contents.put(PARKED, 'c')
        stage.time.now += 12.5
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['a', 'b', 'c'], 'and grows from there'

    def test_the_few_that_consume_a_queue_hand_out_what_is_parked_of_it_as_soon_in_a_large_cluster(
        self, stage: Stage
    ) -> None:
        stage.time.nodes, stage.time.leads, stage.consumers = 200, False, 1
        stage.time.run(stage.parked)
        for _ in range(20):
            stage.contents.put(PARKED, 'a')
            stage.plan()
            assert stage.parked.due(stage.time.moment) <= 2.0, 'a second on average'
            stage.time.now += 2.0
            stage.time.run(stage.parked)
            assert stage.contents.order(PARKED) == []

    def test_the_rest_is_as_long_as_the_pass_took_ten_times(self, stage: Stage) -> None:
        def slow(queue: str) -> None:
            stage.time.now += 2

        stage.broker.on_take = slow
        stage.contents.put(PARKED, 'x1')
        stage.time.run(stage.parked)
        stage.parked.note('home')
        assert stage.parked.due(stage.time.moment) == min(2.0, 20.0)
        stage.time.now += 19
        stage.time.run(stage.parked)
        assert len(stage.broker.taken) == 1
        stage.time.now += 1
        stage.time.run(stage.parked)
        assert len(stage.broker.taken) == 2

    def test_while_another_node_is_at_it_nobody_asks_in_a_loop(self, stage: Stage) -> None:
        stage.registry.busy = {PARKED}
        stage.contents.put(PARKED, 'a')
        stage.parked.note('home')
        stage.time.run(stage.parked)
        assert stage.parked.due(stage.time.moment) == 1.0
        stage.registry.busy = set()
        stage.time.now += 1
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['a']

    def test_many_of_one_blocked_pin_are_in_nobody_s_way(self, stage: Stage) -> None:
        blocked = [f'x{number}' for number in range(2500)]
        stage.contents.put(PARKED, *blocked, 'a')
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['a']
        assert stage.contents.order(PARKED) == blocked, 'they keep their order'

    def test_what_nobody_owns_stays_in_its_order(self, stage: Stage) -> None:
        stage.contents.put(PARKED, 'x2', 'a', 'x1', 'b', 'x3')
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['a', 'b']
        assert stage.contents.order(PARKED) == ['x2', 'x1', 'x3']

    def test_one_that_fails_harms_none_behind_it(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fails(item: Item) -> None:
            if item.route == 'poison':
                raise ValueError('a header that the broker does not take')

        stage.contents.on_forward = fails
        stage.contents.put(PARKED, 'a', 'poison', 'b')
        for _ in range(3):
            stage.parked.note('home')
            stage.time.run(stage.parked)
            stage.time.now += 5
        assert stage.contents.order('q.n1') == ['a', 'b']
        assert stage.contents.order(PARKED) == ['poison']
        assert caplog.text.count('poison') == 1, 'it is named once'

    def test_after_an_error_of_the_broker_the_pass_is_made_again(self, stage: Stage) -> None:
        trouble = [ConnectionError()] * 3

        def fails(item: Item) -> None:
            if trouble:
                raise trouble.pop()

        stage.contents.put(PARKED, *ROUTES)
        stage.contents.on_forward = fails
        with pytest.raises(ConnectionError):
            stage.time.run(stage.parked)
        assert stage.contents.total() == len(ROUTES)
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ROUTES

    def test_few_that_could_not_be_sent_are_tried_again_without_another_plan(
        self, stage: Stage
    ) -> None:
        """Fewer than tell that it is the broker that fails."""
        trouble = [ConnectionError()] * 2

        def fails(item: Item) -> None:
            if trouble:
                raise trouble.pop()

        stage.contents.on_forward = fails
        stage.contents.put(PARKED, 'a', 'b')
        stage.time.run(stage.parked)
        assert stage.contents.order(PARKED) == ['a', 'b']
        stage.time.now += 5
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['a', 'b']

    def test_one_that_can_never_be_sent_is_tried_less_and_less(self, stage: Stage) -> None:
        tries: list[float] = []

        def fails(item: Item) -> None:
            tries.append(stage.time.now)
            raise ValueError('a header that the broker does not take')

        stage.contents.on_forward = fails
        stage.contents.put(PARKED, 'poison')
        for _ in range(400):
            stage.time.run(stage.parked)
            stage.time.now += 1
        rests = [after - before for before, after in itertools.pairwise(tries)]
        assert rests[0] <= 7 and 60 <= max(rests) <= 62 and rests == sorted(rests), rests

    def test_a_pass_ends_with_what_was_there_when_it_began(self, stage: Stage) -> None:
        stage.contents.on_forward = lambda item: stage.contents.put(PARKED, f'{item.route}+')
        stage.contents.put(PARKED, 'a', 'b')
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['a', 'b']
        assert stage.contents.order(PARKED) == ['a+', 'b+']

    def test_a_plan_that_comes_meanwhile_comes_first_and_the_rest_is_not_forgotten(
        self, stage: Stage
    ) -> None:
        """Somebody has died, perhaps: his messages do not wait behind those that are parked."""
        looks = itertools.count()
        stage.contents.put(PARKED, *ROUTES)
        stage.time.run(stage.parked, lambda: next(looks) == 6)
        assert stage.contents.size('q.n1') == 4
        stage.plan()
        stage.time.run(stage.parked)
        assert stage.contents.size('q.n1') == len(ROUTES)

    @pytest.mark.parametrize('why', ['failed', 'stopped'])
    def test_a_pass_that_came_to_no_end_is_made_again_though_their_number_is_the_same(
        self, stage: Stage, why: str
    ) -> None:
        stage.contents.put(PARKED, 'x1')
        stage.time.run(stage.parked)
        stage.owners.places['x1'] = Place('n1', 'q.n1')  # its owner's queue was recorded late
        stage.parked.note('home')
        stage.time.now += 5
        if why == 'failed':
            stage.broker.on_take = lambda queue: 1 / 0
            with pytest.raises(ZeroDivisionError):
                stage.time.run(stage.parked)
            stage.broker.on_take = lambda queue: None
        else:
            stage.time.run(stage.parked, lambda: True)
        stage.time.now += 5
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['x1']

    def test_a_node_looks_after_the_queues_that_it_consumes_and_after_those_of_the_old_layout(
        self, stage: Stage
    ) -> None:
        stage.homes = {'home', 'mail'}
        for queue in (PARKED, 'mail.parked', '.parked', 'other.parked'):
            stage.contents.put(queue, queue)
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['.parked', PARKED, 'mail.parked']
        assert sorted(stage.registry.held_by_me) == ['', PARKED, 'mail.parked']

    def test_one_that_another_node_is_at_holds_up_no_other(self, stage: Stage) -> None:
        stage.homes, stage.registry.busy = {'home', 'mail'}, {PARKED}
        stage.contents.put(PARKED, 'a')
        stage.contents.put('mail.parked', 'b')
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['b']

    def test_what_was_parked_of_a_queue_that_is_dropped_is_no_reason_to_run(
        self, stage: Stage
    ) -> None:
        stage.time.run(stage.parked)
        stage.parked.note('home')
        stage.homes = set()
        assert stage.parked.due(stage.time.moment) == 2.0

    def test_what_nobody_consumes_goes_home_unless_this_node_is_about_to(
        self, stage: Stage
    ) -> None:
        """At home it would take it again, and park it, for ever."""
        stage.owners.deserted = {'home', 'home of new'}
        stage.contents.put(PARKED, 'a')
        stage.contents.queues['.parked'] = [Item('b', 'home of new')]
        stage.time.run(stage.parked)
        assert stage.contents.order(PARKED) == ['a']
        assert stage.contents.order('home of new') == ['b']
        stage.owners.deserted.clear()
        stage.plan()
        stage.time.run(stage.parked)
        assert stage.contents.order('q.n1') == ['a']

    def test_one_of_an_unknown_task_leaves_those_that_have_an_owner_alone(
        self, stage: Stage
    ) -> None:
        """An earlier version parked them; brought home they would come back at once."""
        stage.contents.put_of(PARKED, 'gone', 'known', 'gone')
        stage.contents.put(PARKED, 'a')
        stage.time.run(stage.parked)
        assert stage.contents.size(UNKNOWN) == 2 and stage.contents.size('home of known') == 1
        assert stage.contents.order('q.n1') == ['a']


class TestUnknown:
    def test_they_wait_until_the_node_knows_their_task_and_then_go_home(self, stage: Stage) -> None:
        stage.contents.put_of(UNKNOWN, 'new', 'gone', 'new')
        stage.time.run(stage.unknown)
        assert stage.contents.size(UNKNOWN) == 3
        stage.tasks = {'new'}
        stage.time.now += 2
        stage.time.run(stage.unknown)
        assert stage.contents.tasks('home of new') == ['new', 'new']
        assert stage.contents.tasks(UNKNOWN) == ['gone'] and stage.counts == {'known_again': 2}

    def test_one_that_has_a_key_goes_past_its_queue_to_the_owner_of_its_key(
        self, stage: Stage
    ) -> None:
        """In its own queue a node that does not know its task might take it again."""
        stage.tasks = {'keyed'}
        stage.contents.put_of(UNKNOWN, 'keyed')
        stage.time.run(stage.unknown)
        assert stage.contents.size('q.n1') == 1 and not stage.contents.size('home of keyed')

    def test_one_that_could_not_be_sent_is_tried_again(self, stage: Stage) -> None:
        trouble = [ConnectionError()]

        def fails(item: Item) -> None:
            if trouble:
                raise trouble.pop()

        stage.tasks, stage.contents.on_forward = {'new'}, fails
        stage.contents.put_of(UNKNOWN, 'new')
        for _ in range(3):
            stage.time.run(stage.unknown)
            stage.time.now += 5
        assert stage.contents.tasks('home of new') == ['new']

    def test_a_node_that_knows_none_of_them_passes_once(self, stage: Stage) -> None:
        stage.contents.put_of(UNKNOWN, *['gone'] * 1500)
        for _ in range(5):
            stage.time.run(stage.unknown)
            stage.time.now += 5
        assert stage.broker.taken == [UNKNOWN] * 1500 and stage.contents.size(UNKNOWN) == 1500

    def test_what_comes_back_at_once_does_not_circulate(self, stage: Stage) -> None:
        """A node that does not know its task owns its key."""
        stage.tasks = {'new'}
        stage.contents.put_of(UNKNOWN, 'new')
        came = []
        for second in range(200):
            stage.time.now += 1
            stage.time.run(stage.unknown)
            if stage.contents.size('home of new'):
                came.append(second)
                stage.contents.put_of(UNKNOWN, stage.contents.queues['home of new'].pop().task)
        pauses = [after - before for before, after in itertools.pairwise(came)]
        assert pauses == [4, 8, 16, 32, 60, 60], 'they are longer each time'

    def test_another_plan_is_a_reason_to_look(self, stage: Stage) -> None:
        stage.contents.put_of(UNKNOWN, 'gone')
        stage.time.run(stage.unknown)
        stage.plan()
        stage.time.run(stage.unknown)
        assert len(stage.broker.taken) == 2
