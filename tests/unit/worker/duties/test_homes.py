"""Home queues that are added and dropped while a worker runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.duties.homes import Homes
from jobsync_core.worker.queue_groups import divided, whole_groups
from jobsync_core.worker.routing import node_queue
from tests.support.fake_registry import Time


class Stage:
    """A node `n1` that consumes `mail`, and what happens to it."""

    def __init__(self, homes: tuple[str, ...] = ('mail',), **groups: tuple[str, ...]) -> None:
        self.time = Time()
        self.log: list[object] = []
        self.held: set[str] = set()
        self.on_ready: Callable[[str], object] = lambda queue: None
        self.homes = Homes(
            homes,
            name_of=lambda home: node_queue(home, 'shop_', 'n1'),
            groups=lambda homes: whole_groups(groups, homes),
            record=lambda home, queue: self.log.append(f'record {home}'),
            declare=lambda home, queue: self.log.append(f'declare {home}'),
            enroll=lambda names: self.log.append(('enroll', *names)),
            holds=lambda home: home in self.held,
            retire=lambda queues: self.log.append(('retire all but', *queues)),
            problem=lambda homes: divided(groups, homes),
        )

    def ready(self, queue: str) -> None:
        self.log.append(f'consume {queue}')
        self.on_ready(queue)

    def done(self, queue: str) -> None:
        self.log.append(f'stop {queue}')

    def run(self) -> list[object]:
        """Run it, and a moment later once more; what happened."""
        self.log.clear()
        self.time.run(self.homes)
        self.time.now += 0.25
        self.time.run(self.homes)
        return self.log


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_as_long_as_nothing_is_asked_for_it_is_not_due(stage: Stage) -> None:
    assert not stage.time.run(stage.homes)
    assert stage.homes.queues == {'mail': 'mail.jobsync.shop_.n1'}


def test_a_queue_is_recorded_and_made_before_it_is_consumed_and_owned_after_that(
    stage: Stage,
) -> None:
    stage.homes.add('gpu', stage.ready)
    assert stage.homes.wanted == {'mail', 'gpu'}
    assert stage.run() == [
        'record gpu',
        'declare gpu',
        'consume gpu.jobsync.shop_.n1',
        ('enroll', 'gpu', 'mail'),
    ]
    assert stage.homes.queues['gpu'] == 'gpu.jobsync.shop_.n1'
    assert stage.run() == []


def test_a_queue_is_consumed_until_all_of_it_is_given_away(stage: Stage) -> None:
    stage.held = {'mail'}
    stage.homes.drop('mail', stage.done)
    assert stage.run() == [('enroll',)] and 'mail' in stage.homes.queues
    assert stage.run() == [], 'it holds something still'
    stage.held.clear()
    assert stage.run() == ['stop mail.jobsync.shop_.n1', ('retire all but',)]
    assert stage.homes.queues == {} and stage.run() == []


def test_what_is_dropped_and_added_again_goes_on(stage: Stage) -> None:
    stage.held = {'mail'}
    stage.homes.drop('mail', stage.done)
    stage.run()
    stage.homes.add('mail', stage.ready)
    assert stage.run() == [
        'record mail',
        'declare mail',
        'consume mail.jobsync.shop_.n1',
        ('enroll', 'mail'),
    ]
    stage.held.clear()
    assert stage.run() == [] and 'mail' in stage.homes.queues


def test_one_that_is_dropped_while_it_is_added_ends(stage: Stage) -> None:
    stage.on_ready = lambda queue: stage.homes.drop('gpu', stage.done)
    stage.homes.add('gpu', stage.ready)
    assert stage.run() == [
        'record gpu',
        'declare gpu',
        'consume gpu.jobsync.shop_.n1',
        'stop gpu.jobsync.shop_.n1',
        ('retire all but', 'mail.jobsync.shop_.n1'),
    ]
    assert stage.homes.wanted == {'mail'} == {*stage.homes.queues}


def test_one_that_is_dropped_before_its_turn_comes_is_not_begun(stage: Stage) -> None:
    stage.on_ready = lambda queue: stage.homes.drop('web', stage.done)
    stage.homes.add('gpu', stage.ready)
    stage.homes.add('web', stage.ready)
    assert 'consume web.jobsync.shop_.n1' not in stage.run()
    assert {*stage.homes.queues} == {'mail', 'gpu'}


def test_one_that_is_added_again_as_it_ends_is_there(stage: Stage) -> None:
    def done(queue: str) -> None:
        stage.log.append('stop')
        stage.homes.add('mail', stage.ready)

    stage.homes.drop('mail', done)
    assert stage.run() == [
        ('enroll',),
        'stop',
        'record mail',
        'declare mail',
        'consume mail.jobsync.shop_.n1',
        ('enroll', 'mail'),
    ]
    assert {*stage.homes.queues} == {'mail'}


def test_what_fails_is_done_again(stage: Stage) -> None:
    def fails(queue: str) -> None:
        raise ConnectionError

    stage.on_ready = fails
    stage.homes.add('gpu', stage.ready)
    with pytest.raises(ConnectionError):
        stage.time.run(stage.homes)
    stage.on_ready = lambda queue: None
    assert stage.run()[-1] == ('enroll', 'gpu', 'mail')


def test_without_a_lease_it_waits(stage: Stage) -> None:
    stage.homes.add('gpu', stage.ready)
    stage.time.leased = False
    assert stage.run() == []


def test_a_part_of_a_group_owns_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(('high', 'low'), fast=('high', 'low'))
    stage.homes.drop('high', stage.done)
    found: Any = stage.run()
    assert found[0] == ('enroll',)
    assert "consumes 'low' and not 'high'" in caplog.text
    stage.homes.add('high', stage.ready)
    assert stage.run()[-1] == ('enroll', 'fast')


def test_a_name_that_cannot_be_is_refused_at_once(stage: Stage) -> None:
    with pytest.raises(ConfigurationError):
        stage.homes.add('h' * 240, stage.ready)
    assert stage.homes.wanted == {'mail'}


def test_one_that_makes_trouble_holds_up_no_other_and_is_not_owned(stage: Stage) -> None:
    def refuse(queue: str) -> None:
        raise OSError('access refused')

    def run() -> list[object]:
        stage.log.clear()
        with pytest.raises(OSError, match='access refused'):
            stage.time.run(stage.homes)
        return stage.log

    stage.homes.add('closed', refuse)
    stage.homes.add('gpu', stage.ready)
    stage.homes.drop('mail', stage.done)
    assert run() == [
        'record closed',
        'declare closed',
        'record gpu',
        'declare gpu',
        'consume gpu.jobsync.shop_.n1',
        ('enroll', 'gpu'),
        'stop mail.jobsync.shop_.n1',
        ('retire all but', 'closed.jobsync.shop_.n1', 'gpu.jobsync.shop_.n1'),
    ]
    assert run() == ['record closed', 'declare closed']
    stage.homes.drop('closed', stage.done)
    assert stage.run()[:1] == ['stop closed.jobsync.shop_.n1']
