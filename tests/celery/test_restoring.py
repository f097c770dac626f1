"""Giving back on Redis: what kombu would lose comes back, readable as before; what nobody can read
is set aside once.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from kombu.connection import Connection
from kombu.entity import Exchange, Queue

from jobsync_celery import JobSync
from jobsync_celery.application import Application
from jobsync_celery.broker.broker import CeleryBroker
from jobsync_celery.incoming import read_record
from jobsync_celery.redis.carried_over import CarriedOver
from jobsync_celery.redis.channel import receive_atomically
from jobsync_celery.redis.keys import node_options
from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.incoming import Refused
from tests.support.brokers import RedisServer
from tests.support.waiting import eventually

_QUEUE, _NODE = 'celery', 'n1'
_UNACKED = node_options('shop_', _NODE)['unacked_key']
_BODY = 'W1s1XSwge30sIHt9XQ=='  # [[5], {}, {}]
_INFO = {'exchange': '', 'routing_key': _QUEUE}


def _message(**fields: Any) -> dict[str, Any]:
    properties = {
        'delivery_tag': 'tag',
        'delivery_info': _INFO,
        'body_encoding': 'base64',
        **fields.pop('properties', {}),
    }
    return {
        'body': _BODY,
        'content-type': 'application/json',
        'content-encoding': 'utf-8',
        'headers': {'task': 'plain', 'id': 'm1'},
        'properties': {name: value for name, value in properties.items() if value != 'none'},
        **fields,
    }


_ODD = {
    'as kombu writes it': _message(),
    'headers: null': _message(headers=None),
    'delivery_info: null': _message(properties={'delivery_info': None}),
    'headers is a list': _message(headers=[1]),
    'headers is a text': _message(headers='x'),
    'no delivery_info': _message(properties={'delivery_info': 'none'}),
    'delivery_info: 5': _message(properties={'delivery_info': 5}),
    'endless priority': _message(properties={'priority': float('inf')}),
    'priority: text': _message(properties={'priority': 'x'}),
}
#: What a Lua script reads, and Python does not.
_UNREADABLE = (
    b'{"properties": {"delivery_tag": "bad"}, "headers": {"x": 1%s}}' % (b'0' * 5_000),
    (
        b'{"properties": {"delivery_tag": "bad"}, "headers": {"at": {"__type__": "datetime", '
        b'"__value__": "x"}}}'
    ),
)


@pytest.fixture
def space(redis_server: RedisServer) -> Iterator[str]:
    name = redis_server.new_space()
    yield name
    redis_server.drop_space(name)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as found:
        yield found


def _broker(
    server: RedisServer, space: str, stack: contextlib.ExitStack, prefix: str = '', **options: Any
) -> CeleryBroker:
    app = Celery(
        'restoring',
        broker=server.url(space),
        set_as_current=False,
        broker_transport_options={'global_keyprefix': prefix, **options},
    )
    broker = JobSync(
        app, config=CoordinationConfig(appname='shop_'), route_producers=False
    ).evacuable()
    stack.callback(broker.close)
    return broker


def _taken(
    server: RedisServer,
    space: str,
    stack: contextlib.ExitStack,
    prefix: str = '',
    until: Callable[[], bool] = lambda: True,
) -> list[Any]:
    """What a node has taken and not acknowledged."""
    connection = receive_atomically(
        Connection(
            server.url(space),
            transport_options={**node_options('shop_', _NODE), 'global_keyprefix': prefix},
        ),
        CarriedOver(),
    )
    stack.callback(connection.release)
    received: list[Any] = []
    consumer = connection.Consumer(
        [Queue(_QUEUE)],
        on_message=received.append,
        on_decode_error=lambda message, error: received.append(message),
    )
    consumer.consume()

    def drain() -> bool:
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.05)
        return bool(received) and until()

    eventually(drain)
    return received


def _by_node_that_died(broker: CeleryBroker, message: Any) -> None:
    assert broker.restore(_NODE) == 1


def _by_rejecting(broker: CeleryBroker, message: Any) -> None:
    message.reject(requeue=True)


def _by_closing(broker: CeleryBroker, message: Any) -> None:
    message.channel.close()


@pytest.mark.parametrize('prefix', ['', 'shop:'])
@pytest.mark.parametrize('restore', [_by_node_that_died, _by_rejecting, _by_closing])
@pytest.mark.parametrize('name', _ODD)
def test_what_is_given_back_is_read_as_before(
    redis_server: RedisServer,
    space: str,
    stack: contextlib.ExitStack,
    prefix: str,
    restore: Callable[[CeleryBroker, Any], None],
    name: str,
) -> None:
    broker = _broker(redis_server, space, stack, prefix)
    client = stack.enter_context(contextlib.closing(redis_server.client(space)))
    client.lpush(f'{prefix}{_QUEUE}', json.dumps(_ODD[name]))
    (message,) = _taken(redis_server, space, stack, prefix)
    assert client.hlen(f'{prefix}{_UNACKED}') == 1
    restore(broker, message)
    assert not client.exists(f'{prefix}{_UNACKED}', f'{prefix}{_UNACKED}_index')
    expected = _ODD[name]['headers'] or {}
    if not isinstance(expected, dict):
        assert (
            json.loads(client.rpop(f'{prefix}{_QUEUE}'))['headers'] == expected
        )  # of which kombu cannot make a message
        return
    connection = stack.enter_context(
        Connection(redis_server.url(space), transport_options={'global_keyprefix': prefix})
    )
    again = Queue(_QUEUE)(connection.default_channel).get(no_ack=True)
    assert again is not None
    assert (again.body, again.delivery_tag) == (message.body, message.delivery_tag)
    assert again.headers == {**expected, 'redelivered': True}
    assert (again.delivery_info['exchange'], again.delivery_info['redelivered']) == ('', True)


@pytest.mark.parametrize('entry', _UNREADABLE, ids=['a number', 'a time'])
def test_what_cannot_be_read_is_set_aside_once(
    redis_server: RedisServer,
    space: str,
    stack: contextlib.ExitStack,
    caplog: pytest.LogCaptureFixture,
    entry: bytes,
) -> None:
    broker = _broker(redis_server, space, stack)
    client = stack.enter_context(contextlib.closing(redis_server.client(space)))
    client.lpush(_QUEUE, entry)
    client.lpush(_QUEUE, json.dumps(_message()))
    (message,) = _taken(
        redis_server, space, stack, until=lambda: bool(client.hkeys(_UNACKED) == ['tag'])
    )
    assert client.zrange(f'{_UNACKED}_index', 0, -1) == ['tag']
    message.ack()
    assert [record.levelname for record in caplog.records] == [
        'ERROR'
    ] and 'what is no message' in caplog.text
    # The same by a duty's way of taking.
    caplog.clear()
    application = Application.of(broker._app)
    assert application is not None
    broker = application.broker(
        receiving=lambda connection: receive_atomically(connection, CarriedOver())
    )
    stack.callback(broker.close)
    client.lpush(_QUEUE, entry)
    client.lpush(_QUEUE, json.dumps(_message()))
    delivery = broker.take(_QUEUE)
    assert delivery is not None and delivery.id == 'm1'
    assert client.hkeys('unacked') == ['tag']
    assert [record.levelname for record in caplog.records] == ['ERROR']


@pytest.mark.parametrize(
    'record',
    [
        b'[' + _UNREADABLE[0] + b', "", "celery"]',
        b'not json',
        b'5',
        b'[]',
        b'[5, "", "celery"]',
        b'[{}, "", "celery"]',
        json.dumps([_message(), 5, 'celery']).encode(),
    ],
)
def test_a_record_that_cannot_be_read_goes_and_keeps_nobody_waiting(
    redis_server: RedisServer,
    space: str,
    stack: contextlib.ExitStack,
    caplog: pytest.LogCaptureFixture,
    record: bytes,
) -> None:
    broker = _broker(redis_server, space, stack)
    client = stack.enter_context(contextlib.closing(redis_server.client(space)))
    client.hset(_UNACKED, b'\xff', record)
    client.hset(_UNACKED, 'tag', json.dumps([_message(), '', _QUEUE]))
    client.zadd('unacked_index', {'old': 1, 'tag': 2})
    client.hset('unacked', mapping={'old': record, 'tag': json.dumps([_message(), '', _QUEUE])})
    assert broker.left({'jobsync.shop_.n1': _NODE}) == {'jobsync.shop_.n1'}
    with caplog.at_level(logging.WARNING):
        assert broker.restore(_NODE) == 2
        assert broker.restore(_NODE) == 0
        assert broker.restore_shared({'visibility_timeout': 10}) == 2
        assert broker.restore_shared({'visibility_timeout': 10}) == 0
    assert [entry.levelname for entry in caplog.records] == ['ERROR', 'ERROR']
    assert broker.left({'jobsync.shop_.n1': _NODE}) == frozenset()
    assert client.llen(_QUEUE) == 2 and not client.exists('unacked')


@pytest.mark.parametrize('prefix', ['', 'shop:', '{jobs}:'])
def test_what_a_plain_worker_had_taken_comes_back_under_the_prefix(
    redis_server: RedisServer, space: str, stack: contextlib.ExitStack, prefix: str
) -> None:
    broker = _broker(redis_server, space, stack, prefix)
    options = {'global_keyprefix': prefix, 'visibility_timeout': 1}
    # It is killed: nothing of it is called any more, so that it gives nothing back.
    plain = Connection(redis_server.url(space), transport_options=options)
    channel: Any = stack.enter_context(plain).channel()
    stack.callback(channel.qos._delivered.clear)
    client = stack.enter_context(contextlib.closing(redis_server.client(space)))
    client.lpush(f'{prefix}{_QUEUE}', json.dumps(_message()))
    assert Queue(_QUEUE)(channel).get() is not None
    assert client.hlen(f'{prefix}unacked') == 1 and not client.exists(f'{prefix}{_QUEUE}')
    eventually(lambda: broker.restore_shared(options) == 1)
    assert client.llen(f'{prefix}{_QUEUE}') == 1
    assert not client.exists(f'{prefix}unacked', f'{prefix}unacked_index')
    assert all(key.startswith(prefix) for key in client.scan_iter())


def test_an_evacuation_records_what_it_takes_though_the_app_wants_no_records(
    redis_server: RedisServer, space: str, stack: contextlib.ExitStack
) -> None:
    broker = _broker(redis_server, space, stack, ack_emulation=False)
    client = stack.enter_context(contextlib.closing(redis_server.client(space)))
    client.lpush(_QUEUE, json.dumps(_message()))
    delivery = broker.take(_QUEUE)
    assert delivery is not None and client.hkeys('unacked') == ['tag']
    delivery.forward('large')
    assert client.llen('large') == 1 and not client.exists('unacked', _QUEUE)


def test_where_bindings_are_gone_the_routing_key_names_the_queue(
    redis_server: RedisServer,
    space: str,
    stack: contextlib.ExitStack,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Somebody's eviction policy took them; kombu loses the message, or puts it where nobody
    looks.
    """
    broker = _broker(redis_server, space, stack)
    client = stack.enter_context(contextlib.closing(redis_server.client(space)))
    client.hset(_UNACKED, 'tag', json.dumps([_message(), 'celery', _QUEUE]))
    broker.restore(_NODE)
    assert client.llen(_QUEUE) == 1
    assert 'its bindings are not in Redis any more' in caplog.text
    with Connection(redis_server.url(space)) as connection:
        Queue('large', Exchange('celery', type='direct'), routing_key=_QUEUE)(
            connection.default_channel
        ).declare()
    client.hset(_UNACKED, 'tag', json.dumps([_message(), 'celery', _QUEUE]))
    broker.restore(_NODE)
    assert client.llen('large') == 1


def test_who_lost_messages_names_them() -> None:
    records = [
        json.dumps([_message(headers=headers), '', _QUEUE]) for headers in ({'id': 'm1'}, None, [1])
    ]
    assert CarriedOver(dict(zip('abc', records, strict=True))).ids() == ['m1', 'None', 'None']


def test_a_record_of_kombus_own_is_read() -> None:
    assert read_record(json.dumps([_message(), None, None])) == (_message(), '', '')
    assert isinstance(read_record(b'\xff'), Refused)
