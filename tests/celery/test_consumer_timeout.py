"""Real workers at a RabbitMQ that lets nobody keep a message for longer than some seconds
(`consumer_timeout`): tasks that take longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig
from tests.support.brokers import RabbitServer, RedisServer
from tests.support.impatience import outlast

from .test_trouble import Stage


@pytest.fixture
def make_stage(
    config: CoordinationConfig,
    impatient_rabbitmq: RabbitServer,
    redis_server: RedisServer,
    tmp_path: Path,
) -> Iterator[Callable[..., Stage]]:
    with contextlib.ExitStack() as stack:

        def make(**settings: object) -> Stage:
            stage = Stage(config, impatient_rabbitmq, redis_server, tmp_path, **settings)
            stack.callback(stage.close)
            return stage

        yield make


def test_a_task_in_the_queue_of_its_node_may_take_as_long_as_it_needs(
    make_stage: Callable[..., Stage],
) -> None:
    stage = make_stage(route_producers=True)
    stage.start('-c', '2')
    stage.module.once.delay(1, 'go')
    stage.wait_notes(['began 1'])
    (place,) = stage.broker.depths(stage.space)
    assert '.jobsync.' in place, place
    outlast(stage.broker.url(stage.space))
    (stage.place / 'go').touch()
    stage.check_nothing_lost()
    assert stage.notes() == {'began 1': 1, 'ran 1': 1}
    assert 'consumer_timeout' not in stage.log


@pytest.mark.parametrize('pool', ['prefork', 'threads', 'solo'])
def test_a_task_in_a_queue_of_the_users_own_is_delivered_again_and_completes_once(
    make_stage: Callable[..., Stage], pool: str
) -> None:
    stage = make_stage()
    stage.start('-P', pool, '-c', '2')
    result = stage.module.once.delay(1, 'go')
    stage.wait_notes(['began 1'])
    outlast(stage.broker.url(stage.space))
    if pool != 'solo':  # its event loop stands still
        stage.wait(lambda: 'consumer_timeout' in stage.log)
        stage.module.keyed.delay(2)
        stage.wait_notes(['ran 2'])  # it consumes again
    (stage.place / 'go').touch()
    stage.wait_notes(['ran 1'])
    stage.check_nothing_lost()
    stage.wait(lambda: stage.state(result.id) == 'SUCCESS')
    assert stage.notes()['ran 1'] == 1
    assert 'set_policy' in stage.log
    assert stage.end() == 0
