"""Receiving from Redis: a message is recorded as unacknowledged in the moment in which it leaves its list, or kept until it can be."""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.transport import virtual

from jobsync_celery.receive import Unrecorded, receive_atomically

from ..brokers import RedisServer
from ..waiting import eventually

_QUEUE = 'work'
_PREFIXES = pytest.mark.parametrize('prefix', ['', 'shop:'])


class _Broken(ConnectionError):
    """The connection breaks while a message is received."""


class _Desk:
    """A connection, a consumer, and what it has received."""

    def __init__(self, server: RedisServer, space: str, prefix: str = '', url: str | None = None) -> None:
        self.unrecorded: Unrecorded = {}
        self.received: list[Any] = []
        self.client = server.client(space)
        self.connection = receive_atomically(
            Connection(url or server.url(space), transport_options={'global_keyprefix': prefix}), self.unrecorded)
        self.queue = Queue(_QUEUE)(self.connection.default_channel)
        self.queue.declare()
        self.consumer = self.connection.Consumer([self.queue], callbacks=[lambda body, message: self.received.append(message)])
        self.consumer.qos(prefetch_count=100)
        self.prefix = prefix

    def publish(self, number: int, priority: int = 0) -> None:
        self.connection.Producer().publish({'number': number}, routing_key=_QUEUE, exchange='', priority=priority, retry=False)

    def drain(self) -> bool:
        with contextlib.suppress(TimeoutError):
            self.connection.drain_events(timeout=0.05)
        return False

    def unacked(self) -> int:
        return int(self.client.hlen(f'{self.prefix}unacked'))

    def waiting(self) -> int:
        return sum(self.client.llen(key) for key in self.client.keys(f'{self.prefix}{_QUEUE}*'))


@pytest.fixture
def space(redis_server: RedisServer) -> Iterator[str]:
    name = redis_server.new_space()
    yield name
    redis_server.drop_space(name)


def _break_append(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise _Broken

    monkeypatch.setattr('kombu.transport.redis.QoS.append', fail)
    monkeypatch.setattr(virtual.QoS, 'append', fail)


@_PREFIXES
def test_what_waits_is_recorded_when_it_is_taken(
    redis_server: RedisServer, space: str, prefix: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = _Desk(redis_server, space, prefix)
    for number in range(3):
        desk.publish(number)
    desk.consumer.consume()
    _break_append(monkeypatch)
    with pytest.raises(_Broken):
        eventually(desk.drain)  # the answer has come, and nothing after it
    assert (desk.waiting(), desk.unacked(), desk.unrecorded) == (2, 1, {})
    monkeypatch.undo()
    (tag,) = desk.client.hkeys(f'{prefix}unacked')
    desk.connection.default_channel.qos.restore_by_tag(tag)
    assert (desk.waiting(), desk.unacked()) == (3, 0)


@_PREFIXES
def test_everything_arrives_once_by_priority_and_is_acknowledged(redis_server: RedisServer, space: str, prefix: str) -> None:
    desk = _Desk(redis_server, space, prefix)
    for number in range(10):
        desk.publish(number, priority=9 if number < 5 else 0)
    desk.consumer.consume()
    eventually(lambda: desk.drain() or len(desk.received) == 10)
    desk.publish(10)  # its queue is empty by now, and kombu waits for it
    eventually(lambda: desk.drain() or len(desk.received) == 11)
    assert [message.payload['number'] for message in desk.received] == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 10]
    assert desk.unacked() == 11
    for message in desk.received:
        message.ack()
    assert (desk.waiting(), desk.unacked()) == (0, 0)


def test_what_an_idle_worker_got_and_could_not_record_is_kept(
    redis_server: RedisServer, space: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = _Desk(redis_server, space)
    desk.consumer.consume()
    channel: Any = desk.connection.default_channel
    eventually(lambda: desk.drain() or (channel._empty and channel._in_poll))
    _break_append(monkeypatch)
    desk.publish(1)
    with pytest.raises(_Broken):
        eventually(desk.drain)
    assert (desk.waiting(), desk.unacked(), len(desk.unrecorded)) == (0, 0, 1)
    monkeypatch.undo()
    ((tag, message),) = desk.unrecorded.items()
    desk.client.hsetnx('unacked', tag, message)
    channel.qos.restore_by_tag(tag)
    assert (desk.waiting(), desk.unacked()) == (1, 0)


def test_a_get_records_too(redis_server: RedisServer, space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = _Desk(redis_server, space)
    desk.publish(1)
    _break_append(monkeypatch)
    with pytest.raises(_Broken):
        desk.queue.get()
    assert (desk.waiting(), desk.unacked()) == (0, 1)


def test_without_scripts_it_goes_on_and_says_so(
    redis_server: RedisServer, space: str, caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.closing(redis_server.client()) as client:
        client.execute_command('ACL', 'SETUSER', 'strict', 'on', '>secret', '~*', '&*', '+@all', '-@scripting')
    url = redis_server.url(space).replace('redis://', 'redis://strict:secret@')
    with caplog.at_level(logging.WARNING):
        desk = _Desk(redis_server, space, url=url)
    assert 'Redis refuses scripts' in caplog.text and 'secret' not in caplog.text
    desk.publish(1)
    desk.consumer.consume()
    eventually(lambda: desk.drain() or desk.received)
    assert (desk.waiting(), desk.unacked()) == (0, 1)


def test_scripts_that_redis_forgot_are_loaded_again(redis_server: RedisServer, space: str) -> None:
    desk = _Desk(redis_server, space)
    desk.client.execute_command('SCRIPT', 'FLUSH')
    desk.publish(1)
    desk.consumer.consume()
    eventually(lambda: desk.drain() or desk.received)
    desk.client.execute_command('SCRIPT', 'FLUSH')
    desk.publish(2)
    message = eventually(desk.queue.get)
    assert message is not None and message.payload == {'number': 2}


def test_a_channel_closes_without_its_server(redis_server: RedisServer) -> None:
    server = RedisServer()
    with server:
        desk = _Desk(server, '1')
        desk.publish(1)
        desk.consumer.consume()
        eventually(lambda: desk.drain() or desk.received)
        channel: Any = desk.connection.default_channel
        server.kill()
        channel.connection.client = None  # what kombu does before the second of two closings
        channel.close()
        assert channel.closed
