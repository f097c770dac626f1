"""Real workers at a RabbitMQ that lets nobody keep a message for longer than some seconds
(`consumer_timeout`): tasks that take longer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pika
import pytest
from pika.exceptions import ChannelClosedByBroker

from jobsync_core import CoordinationConfig
from tests.support.brokers import BrokerUnavailable, RabbitServer, RedisServer
from tests.support.newer_rabbitmq import newer_rabbitmq

from .test_trouble import Stage


@pytest.fixture(scope='module')
def impatient() -> Iterator[RabbitServer]:
    try:
        server = RabbitServer(
            newer_rabbitmq(), {'consumer_timeout': 3000}, {'channel_tick_interval': 500}
        )
    except BrokerUnavailable as error:
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
def make_stage(
    config: CoordinationConfig, impatient: RabbitServer, redis_server: RedisServer, tmp_path: Path
) -> Iterator[Callable[..., Stage]]:
    with contextlib.ExitStack() as stack:

        def make(**settings: object) -> Stage:
            stage = Stage(config, impatient, redis_server, tmp_path, **settings)
            stack.callback(stage.close)
            return stage

        yield make


def outlast(stage: Stage) -> None:
    """Until RabbitMQ has lost its patience with whoever keeps a message from now on."""
    url = pika.URLParameters(stage.broker.url(stage.space))
    # Twice, since it looks at each channel at times of its own.
    for queue in ('kept', 'kept too'):
        with pika.BlockingConnection(url) as connection, contextlib.suppress(ChannelClosedByBroker):
            channel = connection.channel()
            channel.queue_declare(queue, auto_delete=True)
            channel.basic_publish('', queue, b'')
            for _ in channel.consume(queue, inactivity_timeout=0.2):
                pass


def test_a_task_in_the_queue_of_its_node_may_take_as_long_as_it_needs(
    make_stage: Callable[..., Stage],
) -> None:
    stage = make_stage(route_producers=True)
    stage.start('-c', '2')
    stage.module.once.delay(1, 'go')
    stage.wait_notes(['began 1'])
    (place,) = stage.broker.depths(stage.space)
    assert place.startswith('jobsync.'), place
    outlast(stage)
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
    outlast(stage)
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
