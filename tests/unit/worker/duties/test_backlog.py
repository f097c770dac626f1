"""The backlog moves with the tokens: what waits in a node's own queues is passed on to the owners
of today.
"""

from __future__ import annotations

from typing import Any

import pytest

from jobsync_core.errors import JobSyncError
from jobsync_core.worker.duties.backlog import Backlog
from jobsync_core.worker.owners import Place
from jobsync_core.worker.passage import Passage
from tests.support.fake_broker import Contents, FakeBroker
from tests.support.fake_registry import FakeOwners, Time


class Stage:
    """The node `n2`, whose queues are `q.n2` and `other.n2`; what it does not own is `n1`'s."""

    def __init__(self) -> None:
        self.time = Time()
        self.contents = Contents()
        self.broker = FakeBroker(self.contents)
        self.owners = FakeOwners()
        self.mine: set[str] = set()
        self.queues: tuple[str, ...] = ('q.n2', 'other.n2')
        self.counts: dict[str, int] = {}
        self.backlog = Backlog(
            'n2',
            self.broker,
            Passage(self.broker, 'n2'),
            lambda: self.queues,
            self.owners,
            owns=self.owns,
            count=self.count,
            now=self.time,
        )

    def owns(self, route: str, home: str) -> bool:
        if route == 'no key':
            raise JobSyncError(route)
        return route in self.mine

    def count(self, event: str, number: int) -> None:
        self.counts[event] = self.counts.get(event, 0) + number

    def run(self) -> bool:
        return self.time.run(self.backlog)


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_what_others_own_goes_to_them_in_order_and_the_rest_stays_in_order(stage: Stage) -> None:
    stage.mine = {'a', 'b', 'c'}
    stage.contents.put('q.n2', 'x1', 'a', '1', 'b', '2', None, '3', 'c', 'no key')
    stage.contents.put('other.n2', '4')
    assert stage.run()
    assert stage.contents.order('q.n1') == ['1', '2', '3', '4']
    assert stage.contents.order('q.n2') == ['x1', 'a', 'b', None, 'c', 'no key'], (
        'what nobody owns is for its consumer, as is what has no key'
    )
    assert stage.counts == {'forwarded': 4}


def test_what_the_map_gives_to_this_node_stays(stage: Stage) -> None:
    stage.owners.places['1'] = Place('n2', 'q.n2')
    stage.contents.put('q.n2', '1')
    stage.run()
    assert stage.contents.order('q.n2') == ['1']


def test_it_is_due_after_each_plan_and_once_more_a_second_later(stage: Stage) -> None:
    assert stage.run() and not stage.run()
    stage.time.now += 1
    assert stage.run() and not stage.run()
    stage.time.now += 3600
    assert not stage.run()
    stage.time.version += 1
    assert stage.run()
    stage.time.leased = False
    stage.time.version += 1
    assert not stage.run()


def test_it_takes_no_more_than_was_there_and_not_for_long(stage: Stage) -> None:
    def comes_back(item: Any) -> None:
        stage.contents.put('q.n2', '9')
        stage.time.now += 1

    stage.contents.on_forward = comes_back
    stage.contents.put('q.n2', *'123')
    stage.run()
    assert stage.contents.order('q.n1') == ['1', '2', '3']
    stage.contents.put('q.n2', *'123456789')
    stage.time.version += 1
    stage.run()
    assert stage.contents.size('q.n1') == 3 + 6


def test_more_than_one_look_can_pass_on_takes_several(stage: Stage) -> None:
    def takes_long(item: Any) -> None:
        stage.time.now += 1

    stage.contents.on_forward = takes_long
    stage.contents.put('q.n2', *map(str, range(30)))
    looks = 0
    while stage.run():
        looks += 1
        stage.time.now += 1
    assert stage.contents.size('q.n1') == 30 and 5 <= looks <= 7


def test_a_look_that_passes_on_nothing_is_not_repeated_for_ever(stage: Stage) -> None:
    stage.mine = {'a'}
    stage.contents.put('q.n2', *'a' * 30)

    def takes_long(queue: str) -> None:
        stage.time.now += 1

    stage.broker.on_take = takes_long
    assert stage.run()
    assert stage.run()
    stage.time.now += 3600
    assert not stage.run()


def test_each_queue_has_its_turn_however_long_the_others_take(stage: Stage) -> None:
    """All of them together take longer than a look may, and the first has more and more."""
    stage.queues = 'q.n2', 'other.n2', 'third.n2'

    def takes_long(item: Any) -> None:
        stage.time.now += 1
        if len(item.route) == 1:
            stage.contents.put('q.n2', '1')

    stage.contents.on_forward = takes_long
    stage.contents.put('q.n2', *'1' * 50)
    stage.contents.put('other.n2', *map(str, range(10, 19)))
    stage.contents.put('third.n2', *map(str, range(20, 24)))
    for _ in range(8):
        assert stage.run()
        stage.time.now += 1
    assert stage.contents.size('other.n2') == stage.contents.size('third.n2') == 0


def test_queues_that_take_long_and_have_nothing_to_pass_on_all_have_a_late_look(
    stage: Stage,
) -> None:
    stage.queues = 'q.n2', 'other.n2', 'third.n2'
    stage.mine = {'a'}
    looked: list[str] = []

    def takes_long(queue: str) -> None:
        stage.time.now += 6
        looked.append(queue)

    stage.broker.on_take = takes_long
    for queue in stage.queues:
        stage.contents.put(queue, 'a')
    while stage.run():
        stage.time.now += 1
        assert len(looked) < 10
    assert set(looked) == {*stage.queues} and len(looked) <= 2 * len(stage.queues)
    assert 'q.n2' in looked[1:], 'it was looked at at once, and by an older map more may have come'


def test_what_cannot_be_sent_stays(stage: Stage) -> None:
    def fails(item: Any) -> None:
        if item.route == '2':
            raise ConnectionError

    stage.contents.on_forward = fails
    stage.contents.put('q.n2', *'123')
    stage.run()
    assert stage.contents.order('q.n1') == ['1', '3'] and stage.contents.order('q.n2') == ['2']


def test_a_look_that_fails_again_and_again_is_made_until_it_succeeds(stage: Stage) -> None:
    """The broker is away for a while after a plan."""

    def fails(queue: str) -> None:
        raise ConnectionError

    works, stage.broker.on_size = stage.broker.on_size, fails
    for queue in stage.queues:
        stage.contents.put(queue, queue)
    for _ in range(4):
        with pytest.raises(ConnectionError):
            stage.run()
        stage.time.now += 1
    stage.broker.on_size = works
    assert stage.run()
    assert sorted(stage.contents.order('q.n1'), key=str) == ['other.n2', 'q.n2']
