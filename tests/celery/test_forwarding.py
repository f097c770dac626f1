"""Passing a message on over Redis: its copy is stored and the original is forgotten in one
transaction, or neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu.entity import Queue
from redis import Redis
from redis.exceptions import ResponseError

from jobsync_celery import JobSync
from jobsync_celery.application import Application
from jobsync_celery.broker.broker import CeleryDelivery
from jobsync_celery.gate.delivery import mark_redelivered, unstamped
from jobsync_celery.redis.keys import node_options
from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.routing import HOPS, KEY, REDELIVERED
from tests.support.brokers import RedisServer

_TARGET = 'jobsync.shop_.n2'


class _Desk:
    """A forwarder, and a message that the node n1 has taken off a queue and not acknowledged."""

    def __init__(
        self, server: RedisServer, space: str, stack: contextlib.ExitStack, prefix: str = ''
    ) -> None:
        self.app = Celery('passing', broker=server.url(space), set_as_current=False)
        self.app.conf.broker_transport_options = {'global_keyprefix': prefix}
        JobSync(self.app, config=CoordinationConfig(appname='shop_'), route_producers=False)
        application = Application.of(self.app)
        assert application is not None
        self.forwarder = application.forwarder()
        stack.callback(self.forwarder.close)
        self.connection = self.app.connection_for_write(
            transport_options=node_options('shop_', 'n1')
        )
        stack.callback(self.connection.release)
        self.client = server.client(space)
        stack.callback(self.client.close)
        self.prefix = prefix

    def take(self, body: Any = 7, **options: Any) -> Any:
        with self.app.connection_for_write() as connection:
            connection.Producer().publish(
                body, routing_key='celery', exchange='', retry=False, **options
            )
        message = Queue('celery')(self.connection.default_channel).get()
        assert message is not None and self.unacked() == 1
        return message

    def send(self, message: Any) -> None:
        self.forwarder.send(_TARGET, message, {**message.headers, KEY: 'k', HOPS: 1})

    def unacked(self) -> int:
        return int(self.client.hlen(f'{self.prefix}jobsync.shop_.n1.unacked'))

    def stored(self) -> Any:
        with self.app.connection_for_write() as connection:
            return Queue(_TARGET)(connection.default_channel).get(no_ack=True, accept=['json'])


@pytest.fixture
def space(redis_server: RedisServer) -> Iterator[str]:
    name = redis_server.new_space()
    yield name
    redis_server.drop_space(name)


@pytest.mark.parametrize('prefix', ['', 'shop:'])
def test_the_copy_is_stored_and_acknowledging_costs_nothing(
    redis_server: RedisServer, space: str, prefix: str
) -> None:
    with contextlib.ExitStack() as stack:
        desk = _Desk(redis_server, space, stack, prefix)
        message = desk.take()
        qos = message.channel.qos
        desk.send(message)
        assert desk.unacked() == 0
        before = desk.client.info()['total_commands_processed']
        message.ack()
        assert desk.client.info()['total_commands_processed'] == before + 1  # the one that asks
        assert message.acknowledged
        qos._flush()
        assert not qos._delivered
        assert desk.stored().payload == 7


def test_the_copy_is_the_message(redis_server: RedisServer, space: str) -> None:
    with contextlib.ExitStack() as stack:
        desk = _Desk(redis_server, space, stack)
        message = desk.take(
            {'text': 'ä' * 2000},
            headers={'mine': ['x']},
            compression='gzip',
            serializer='json',
            priority=6,
            expiration=60,
            correlation_id='c',
            reply_to='r',
            message_id='m',
            type='t',
        )
        desk.send(message)
        assert [key for key in desk.client.keys(f'{_TARGET}*') if 'binding' not in key] == [
            f'{_TARGET}\x06\x166'
        ]
        copy = desk.stored()
        assert copy.payload == {'text': 'ä' * 2000}
        assert copy.headers == {**message.headers, KEY: 'k', HOPS: 1} and copy.headers['mine'] == [
            'x'
        ]
        apart = ('delivery_tag', 'delivery_info')
        assert {name: value for name, value in copy.properties.items() if name not in apart} == {
            name: value for name, value in message.properties.items() if name not in apart
        }
        assert copy.delivery_tag != message.delivery_tag
        assert (copy.delivery_info['exchange'], copy.delivery_info['routing_key']) == ('', _TARGET)


@contextlib.contextmanager
def full(server: RedisServer) -> Iterator[None]:
    """Redis has no memory left for what would need more of it."""
    with contextlib.closing(server.client()) as client:
        client.config_set('maxmemory', 1)
        try:
            yield
        finally:
            client.config_set('maxmemory', 0)


def check_a_copy_that_is_refused_leaves_the_original(server: RedisServer, space: str) -> None:
    with contextlib.ExitStack() as stack:
        desk = _Desk(server, space, stack)
        message = desk.take()
        desk.forwarder._open()
        with full(server), pytest.raises(ResponseError):
            desk.send(message)
        assert desk.unacked() == 1 and not message.acknowledged
        desk.send(message)
        message.ack()
        assert desk.unacked() == 0
        assert desk.stored().payload == 7 and desk.stored() is None


def test_the_copy_of_a_redelivered_message_says_so(redis_server: RedisServer, space: str) -> None:
    with contextlib.ExitStack() as stack:
        desk = _Desk(redis_server, space, stack)
        message = desk.take()
        desk.send(message)
        first = desk.stored()
        mark_redelivered(first)
        assert not first.delivery_info.get('redelivered')
        desk.take().reject(requeue=True)
        again = Queue('celery')(desk.connection.default_channel).get()
        assert again is not None and again.delivery_info['redelivered']
        desk.send(again)
        copy = desk.stored()
        mark_redelivered(copy)
        assert copy.delivery_info['redelivered']
        assert REDELIVERED not in unstamped(copy)


def test_a_copy_that_is_refused_leaves_the_original(redis_server: RedisServer, space: str) -> None:
    check_a_copy_that_is_refused_leaves_the_original(redis_server, space)


def test_without_the_transaction_the_original_is_lost(
    redis_server: RedisServer, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Redis.pipeline
    monkeypatch.setattr(Redis, 'pipeline', lambda self, *args: pipeline(self, False))
    with pytest.raises(AssertionError):
        check_a_copy_that_is_refused_leaves_the_original(redis_server, space)


def test_where_the_original_is_elsewhere_it_is_acknowledged_there(
    redis_server: RedisServer, space: str
) -> None:
    other = redis_server.new_space()
    with contextlib.ExitStack() as stack:
        stack.callback(redis_server.drop_space, other)
        desk = _Desk(redis_server, space, stack)
        message = desk.take()
        desk.app.conf.broker_write_url = redis_server.url(other)
        desk.send(message)
        assert desk.unacked() == 1
        message.ack()
        assert desk.unacked() == 0
        assert desk.stored().payload == 7


def test_after_a_lost_connection_the_next_one_is_used(
    redis_server: RedisServer, space: str
) -> None:
    with contextlib.ExitStack() as stack:
        desk = _Desk(redis_server, space, stack)
        for number in range(2):
            message = desk.take(number)
            desk.send(message)
            message.ack()
            redis_server.drop_connections()
        assert [desk.stored().payload, desk.stored().payload] == [0, 1]


@pytest.mark.parametrize('stamp', [True, None, 'odd'])
def test_a_duty_passes_on_that_a_message_was_redelivered(stamp: object) -> None:
    sent: list[tuple[Any, dict[str, Any]]] = []
    broker: Any = SimpleNamespace(
        address_of=lambda message, queue: ('key', 'jobs'),
        forwarder=SimpleNamespace(
            send=lambda queue, message, headers: sent.append((message, headers))
        ),
    )
    message: Any = SimpleNamespace(
        headers={'id': 'm1', 'task': 'keyed', REDELIVERED: stamp},
        delivery_info={'redelivered': False},
        ack=lambda: None,
    )
    CeleryDelivery(broker, message, 'jobs.jobsync.shop_.parked').forward('jobs.jobsync.shop_.n1')
    ((copied, headers),) = sent
    assert copied.delivery_info['redelivered'] is (stamp is True) and REDELIVERED not in headers
