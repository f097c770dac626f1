"""Receiving from Redis: a message is recorded as unacknowledged in the moment in which it leaves
its list, or kept until it can be.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
from collections.abc import Iterator
from functools import partial
from queue import Empty
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.asynchronous import Hub
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.transport import virtual
from redis.connection import Connection as RedisConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from jobsync_celery.redis.carried_over import CarriedOver
from jobsync_celery.redis.channel import receive_atomically
from tests.support.brokers import RedisServer
from tests.support.waiting import eventually

_QUEUE = 'work'
_disconnect: Any = RedisConnection.disconnect
_PREFIXES = pytest.mark.parametrize('prefix', ['', 'shop:'])


class _Broken(ConnectionError):
    """The connection breaks while a message is received."""


class _Desk:
    """A connection, a consumer, and what it has received."""

    def __init__(
        self,
        server: RedisServer,
        space: str,
        prefix: str = '',
        url: str | None = None,
        hub: Any = None,
        carried: CarriedOver | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        _DESKS.append(self)
        self.server, self.space = server, space
        self.carried = carried or CarriedOver()
        self.events: list[int] = []
        self.received: list[Any] = []
        self.client = server.client(space)
        self.connection = receive_atomically(
            Connection(
                url or server.url(space),
                transport_options={'global_keyprefix': prefix, **(more or {})},
            ),
            self.carried,
            hub,
        )
        self.queue = Queue(_QUEUE)(self.connection.default_channel)
        self.queue.declare()
        self.consumer = self.connection.Consumer(
            [self.queue], callbacks=[lambda body, message: self.received.append(message)]
        )
        self.consumer.qos(prefetch_count=100)
        self.prefix = prefix
        self.channel: Any = self.connection.default_channel
        self.connection_poller: Any = self.connection.transport.cycle
        self._hub = hub
        if hub is not None:
            self.connection.register_with_event_loop(hub)
            self._loop = hub.create_loop()

    def close(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a test may have broken it
            self.connection.release()
        self.client.close()
        if self._hub is not None:
            self._loop.close()
            self._hub.close()

    @property
    def readers(self) -> set[int]:
        """What the event loop reads of this desk's listener."""
        listener = self.channel.empty.listener
        return {listener.number} & set(self._hub.readers) if listener is not None else set()

    def turn(self) -> bool:
        """One turn of the event loop, which waits for a moment at most."""
        self._hub.call_later(0.02, lambda: None)
        next(self._loop)
        return False

    def receives(self, number: int) -> bool:
        """Whether this message is the last one received, after one turn of the event loop."""
        self.turn()
        return bool(self.received) and self.received[-1].payload['number'] == number

    def wait(self) -> None:
        """Until the queues are known to be empty."""
        eventually(
            lambda: (
                self.turn()
                or (
                    self.channel.empty.known
                    and self.channel.empty.listener is not None
                    and not self.channel._in_poll
                )
            )
        )

    def publish(self, number: int, priority: int = 0) -> None:
        self.connection.Producer().publish(
            {'number': number}, routing_key=_QUEUE, exchange='', priority=priority, retry=False
        )

    def drain(self) -> bool:
        with contextlib.suppress(TimeoutError):
            self.connection.drain_events(timeout=0.05)
        return False

    def unacked(self) -> int:
        return int(self.client.hlen(f'{self.prefix}unacked'))

    def waiting(self) -> int:
        return sum(self.client.llen(key) for key in self.client.keys(f'{self.prefix}{_QUEUE}*'))


_DESKS: list[_Desk] = []


@pytest.fixture
def space(redis_server: RedisServer) -> Iterator[str]:
    name = redis_server.new_space()
    yield name
    while _DESKS:
        _DESKS.pop().close()
    redis_server.drop_space(name)


def _readable(sock: Any) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def _without_tracking(server: RedisServer, space: str) -> str:
    with contextlib.closing(server.client()) as client:
        client.execute_command(
            'ACL', 'SETUSER', 'deaf', 'on', '>secret', '~*', '&*', '+@all', '-client|tracking'
        )
    return server.url(space).replace('redis://', 'redis://deaf:secret@')


def _break_append(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise _Broken

    monkeypatch.setattr('kombu.transport.redis.QoS.append', fail)
    monkeypatch.setattr(virtual.QoS, 'append', fail)


@_PREFIXES
def test_what_waits_is_recorded_when_it_is_taken(
    redis_server: RedisServer, space: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = _Desk(redis_server, space, prefix)
    for number in range(3):
        desk.publish(number)
    desk.consumer.consume()
    _break_append(monkeypatch)
    with pytest.raises(_Broken):
        eventually(desk.drain)  # the answer has come, and nothing after it
    assert (desk.waiting(), desk.unacked(), desk.carried.unrecorded) == (2, 1, {})
    monkeypatch.undo()
    (tag,) = desk.client.hkeys(f'{prefix}unacked')
    desk.connection.default_channel.qos.restore_by_tag(tag)
    assert (desk.waiting(), desk.unacked()) == (3, 0)


@_PREFIXES
def test_everything_arrives_once_by_priority_and_is_acknowledged(
    redis_server: RedisServer, space: str, prefix: str
) -> None:
    desk = _Desk(redis_server, space, prefix)
    for number in range(10):
        desk.publish(number, priority=9 if number < 5 else 0)
    desk.consumer.consume()
    eventually(lambda: desk.drain() or len(desk.received) == 10)
    desk.publish(10)  # its queue is empty by now, and kombu waits for it
    eventually(lambda: desk.drain() or len(desk.received) == 11)
    assert [message.payload['number'] for message in desk.received] == [
        5,
        6,
        7,
        8,
        9,
        0,
        1,
        2,
        3,
        4,
        10,
    ]
    assert desk.unacked() == 11
    for message in desk.received:
        message.ack()
    assert (desk.waiting(), desk.unacked()) == (0, 0)


class TestWaiting:
    """On empty queues."""

    @pytest.fixture(autouse=True)
    def without_looking_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr('jobsync_celery.redis.empty_queues.LOOK_SEC', 1000.0)

    @_PREFIXES
    def test_the_next_message_is_heard_of_and_taken_by_the_script(
        self, redis_server: RedisServer, space: str, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            'kombu.transport.redis.Channel._brpop_start',
            lambda *args: pytest.fail('a pop that waits'),
        )
        desk = _Desk(redis_server, space, prefix, hub=Hub())
        desk.consumer.consume()
        for number in range(5):
            desk.wait()
            desk.publish(number, priority=3 * (number % 2))
            eventually(partial(desk.receives, number))
        assert [message.payload['number'] for message in desk.received] == list(range(5))
        assert (desk.waiting(), desk.unacked()) == (0, 5)
        number = desk.channel.empty.listener.number
        assert desk.readers == {number}
        desk.connection.release()
        assert not desk.readers and number not in desk.connection_poller._fd_to_chan

    def test_a_message_that_comes_between_the_look_and_its_answer_is_not_missed(
        self, redis_server: RedisServer, space: str
    ) -> None:
        desk = _Desk(redis_server, space, hub=Hub())
        desk.consumer.consume()
        desk.wait()
        channel = desk.channel
        channel.empty.look_at = 0.0
        channel._brpop_start()
        eventually(lambda: _readable(channel.client.connection._sock))
        desk.publish(1)
        # The change is heard of before the answer, "nothing", is read.
        eventually(lambda: _readable(channel.empty.listener.socket))
        with contextlib.suppress(Empty):
            channel.empty.listener.hear()
        with contextlib.suppress(Empty):
            channel._brpop_read()
        eventually(lambda: desk.turn() or desk.received)

    def test_a_listener_that_is_cut_is_a_broken_connection(
        self, redis_server: RedisServer, space: str
    ) -> None:
        desk = _Desk(redis_server, space, hub=Hub())
        desk.consumer.consume()
        desk.wait()
        desk.client.execute_command('CLIENT', 'KILL', 'TYPE', 'pubsub')
        with pytest.raises(ConnectionError):
            eventually(desk.turn)

    def test_a_connection_that_was_opened_anew_gets_another_listener(
        self, redis_server: RedisServer, space: str
    ) -> None:
        desk = _Desk(redis_server, space, hub=Hub())
        desk.consumer.consume()
        desk.wait()
        # Unknown to kombu, whose older versions poll no more once they know; but the new socket
        # need not get the number of the old one.
        desk.connection_poller._fd_to_chan.pop(desk.channel.client.connection._sock.fileno())
        _disconnect(desk.channel.client.connection)
        desk.channel.empty.look_at = 0.0
        eventually(
            lambda: (
                desk.turn()
                or desk.channel.empty.listener.belongs_to(desk.channel.client.connection)
            )
        )
        desk.wait()
        desk.publish(1)
        eventually(lambda: desk.turn() or desk.received)

    def test_without_tracking_it_goes_on_and_says_so(
        self, redis_server: RedisServer, space: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        desk = _Desk(redis_server, space, url=_without_tracking(redis_server, space), hub=Hub())
        desk.consumer.consume()
        eventually(lambda: desk.turn() or not desk.channel.empty.can_listen)
        assert 'allow CLIENT TRACKING' in caplog.text and 'secret' not in caplog.text
        eventually(lambda: desk.turn() or (desk.channel.empty.known and desk.channel._in_poll))
        desk.publish(1)
        eventually(lambda: desk.turn() or desk.received)

    def test_what_cannot_be_recorded_then_is_kept(
        self, redis_server: RedisServer, space: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk = _Desk(redis_server, space)  # no event loop, no listener
        desk.consumer.consume()
        channel = desk.channel
        eventually(lambda: desk.drain() or (channel.empty.known and channel._in_poll))
        _break_append(monkeypatch)
        desk.publish(1)
        with pytest.raises(_Broken):
            eventually(desk.drain)
        assert (desk.waiting(), desk.unacked(), len(desk.carried.unrecorded)) == (0, 0, 1)
        monkeypatch.undo()
        ((tag, message),) = desk.carried.unrecorded.items()
        desk.client.hsetnx('unacked', tag, message)
        channel.qos.restore_by_tag(tag)
        assert (desk.waiting(), desk.unacked()) == (1, 0)


class TestWithoutTheLoop:
    """A step of the worker drains the connection before the event loop runs, as mingle does, or
    while it stands still.
    """

    def test_a_change_is_heard_of_and_does_not_spin(
        self, redis_server: RedisServer, space: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk = _Desk(redis_server, space, hub=Hub())
        desk.consumer.consume()
        desk.wait()
        desk.client.hset('unrelated', 'field', '1')
        desk.publish(1)
        eventually(lambda: desk.drain() or desk.received)
        polls: list[object] = []
        poller = desk.connection_poller.poller

        def poll(timeout: float) -> Any:
            polls.append(timeout)
            return poller.poll(timeout)

        monkeypatch.setattr(
            desk.connection_poller,
            'poller',
            SimpleNamespace(poll=poll, register=poller.register, unregister=poller.unregister),
        )
        with contextlib.suppress(TimeoutError):
            desk.connection.drain_events(timeout=0.5)
        assert len(polls) < 20, 'the poller spins'

    def test_it_is_heard_while_there_is_no_room_for_a_message(
        self, redis_server: RedisServer, space: str
    ) -> None:
        desk = _Desk(redis_server, space, hub=Hub())
        desk.consumer.qos(prefetch_count=1)
        desk.consumer.consume()
        desk.publish(1)
        eventually(lambda: desk.turn() or desk.received)
        desk.received[0].ack()
        desk.wait()
        monkey = desk.channel.qos
        monkey.prefetch_count, monkey._dirty = 1, {'another'}  # what is delivered fills it
        monkey._delivered['another'] = desk.received[0]
        desk.publish(2)
        eventually(lambda: desk.turn() or desk.channel.empty.changes > 0)
        rings = desk.channel.empty.changes
        for _ in range(5):
            desk.turn()
        assert desk.channel.empty.changes == rings and len(desk.received) == 1


class TestWithoutAcknowledgement:
    """Replies to `inspect`, mingle's, and those of a user's own consumers."""

    @_PREFIXES
    @pytest.mark.parametrize('looped', [False, True])
    def test_what_nobody_acknowledges_is_not_recorded(
        self, redis_server: RedisServer, space: str, prefix: str, looped: bool
    ) -> None:
        desk = _Desk(redis_server, space, prefix, hub=Hub() if looped else None)
        desk.consumer.no_ack = True
        desk.consumer.consume()
        for number in range(20):
            desk.publish(number)
        eventually(lambda: (desk.turn() if looped else desk.drain()) or len(desk.received) == 20)
        assert (desk.waiting(), desk.unacked()) == (0, 0)
        # The same channel acknowledges what it consumes otherwise.
        desk.consumer.cancel()
        desk.consumer.no_ack = False
        desk.consumer.consume()
        desk.publish(20)
        eventually(lambda: (desk.turn() if looped else desk.drain()) or len(desk.received) == 21)
        assert desk.unacked() == 1

    def test_what_is_taken_for_good_is_not_recorded(
        self, redis_server: RedisServer, space: str
    ) -> None:
        desk = _Desk(redis_server, space)
        for number in range(2):
            desk.publish(number)
        assert desk.queue.get(no_ack=True) is not None
        assert desk.unacked() == 0
        assert desk.queue.get(no_ack=False) is not None
        assert desk.unacked() == 1

    def test_where_the_user_wants_no_records_there_are_none(
        self, redis_server: RedisServer, space: str
    ) -> None:
        desk = _Desk(redis_server, space, more={'ack_emulation': False})
        desk.consumer.consume()
        desk.publish(1)
        eventually(lambda: desk.drain() or desk.received)
        assert desk.unacked() == 0
        desk.received[0].ack()


class TestAcknowledging:
    """From the event loop, on the connection that polls, without waiting for the answer."""

    @pytest.fixture
    def desk(self, redis_server: RedisServer, space: str) -> _Desk:
        desk = _Desk(redis_server, space, 'shop:', hub=Hub())
        desk.consumer.consume()
        return desk

    @pytest.fixture
    def without_trips(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            'kombu.transport.redis.QoS._remove_from_indices',
            lambda *args: pytest.fail('a trip of its own'),
        )

    def _receive(self, desk: _Desk, count: int) -> None:
        for number in range(count):
            desk.publish(number)
        eventually(lambda: desk.turn() or len(desk.received) == count)
        assert desk.unacked() == count

    @pytest.mark.usefixtures('without_trips')
    @pytest.mark.parametrize('idle', [False, True])
    def test_it_takes_no_trip_of_its_own(self, desk: _Desk, idle: bool) -> None:
        self._receive(desk, 3)
        desk.wait()
        if not idle:
            desk.channel.empty.look_at = 0.0
            desk.channel._brpop_start()
        for message in desk.received:
            message.ack()
        assert desk.carried.acknowledged == {message.delivery_tag for message in desk.received}
        eventually(lambda: desk.unacked() == 0)
        eventually(lambda: desk.turn() or not desk.carried.acknowledged)
        desk.publish(7)
        eventually(lambda: desk.turn() or len(desk.received) == 4)
        desk.received[3].ack()
        eventually(lambda: desk.unacked() == 0)

    @pytest.mark.usefixtures('without_trips')
    def test_what_is_acknowledged_while_it_is_delivered_makes_room(self, desk: _Desk) -> None:
        desk.consumer.qos(prefetch_count=1)
        desk.consumer.callbacks.append(lambda body, message: message.ack())
        for number in range(5):
            desk.publish(number)
        eventually(lambda: desk.turn() or len(desk.received) == 5)
        assert [message.payload['number'] for message in desk.received] == list(range(5))
        eventually(lambda: desk.unacked() == 0)

    def test_answers_are_read_though_nothing_more_may_be_delivered(self, desk: _Desk) -> None:
        self._receive(desk, 3)
        desk.wait()
        desk.received.pop().ack()
        desk.consumer.qos(prefetch_count=1)
        desk.publish(7)
        desk.channel.empty.known = False
        desk.channel._brpop_start()
        assert None not in desk.channel.due
        eventually(lambda: desk.turn() or not desk.carried.acknowledged)
        assert (len(desk.received), desk.waiting(), desk.unacked()) == (2, 1, 2)

    def test_a_pop_that_waits_does_not_hold_it_up(
        self, redis_server: RedisServer, space: str
    ) -> None:
        desk = _Desk(redis_server, space)  # no event loop, no listener
        desk.consumer.consume()
        desk.publish(1)
        eventually(lambda: desk.drain() or desk.received)
        eventually(lambda: desk.drain() or (desk.channel.empty.known and desk.channel._in_poll))
        desk.received[0].ack()
        assert desk.unacked() == 0
        desk.publish(2)
        eventually(lambda: desk.drain() or len(desk.received) == 2)

    def test_a_pop_that_waits_begins_when_all_answers_are_read(
        self, redis_server: RedisServer, space: str
    ) -> None:
        desk = _Desk(redis_server, space)
        desk.publish(1)
        desk.consumer.consume()
        eventually(lambda: desk.drain() or desk.received)
        desk.channel._brpop_start()
        desk.received[0].ack()
        with contextlib.suppress(Empty):
            desk.channel._brpop_read()
        assert list(desk.channel.due) == [desk.received[0].delivery_tag]
        desk.channel._brpop_start()
        assert desk.channel._in_poll and not desk.channel.due

    def test_the_listener_begins_when_all_answers_are_read(
        self, redis_server: RedisServer, space: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        desk = _Desk(redis_server, space, url=_without_tracking(redis_server, space), hub=Hub())
        desk.publish(1)
        desk.consumer.consume()
        eventually(lambda: desk.turn() or desk.received)
        desk.channel._brpop_start()
        desk.received[0].ack()
        assert len(desk.channel.due) == 2
        eventually(lambda: desk.turn() or not desk.channel.empty.can_listen)
        assert 'allow CLIENT TRACKING' in caplog.text
        assert (desk.unacked(), desk.carried.acknowledged) == (0, set())

    def test_another_thread_waits_for_the_answer(self, desk: _Desk) -> None:
        self._receive(desk, 1)
        thread = Thread(target=desk.received[0].ack)
        thread.start()
        thread.join()
        assert (desk.unacked(), desk.carried.acknowledged, list(desk.channel.due)) == (0, set(), [])

    def test_a_connection_that_breaks_before_the_answer_does_not_bring_the_message_back(
        self, desk: _Desk
    ) -> None:
        self._receive(desk, 2)
        desk.wait()
        first, second = desk.received
        # What is sent now arrives nowhere.
        desk.channel.client.connection._sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(RedisConnectionError):
            first.ack()
        assert (desk.unacked(), desk.carried.acknowledged) == (2, {first.delivery_tag})
        successor = _Desk(desk.server, desk.space, 'shop:', hub=Hub(), carried=desk.carried)
        desk.connection.release()  # gives back what it holds
        assert desk.client.hkeys('shop:unacked') == [first.delivery_tag]
        successor.consumer.consume()
        eventually(lambda: successor.turn() or len(successor.received) == 1)
        assert successor.received[0].payload == second.payload
        eventually(lambda: successor.turn() or not successor.carried.acknowledged)
        assert (desk.waiting(), desk.unacked()) == (0, 1)

    def test_the_connection_is_not_checked_between_answers(self, desk: _Desk) -> None:
        self._receive(desk, 2)
        desk.wait()
        connection = desk.channel.client.connection
        for message in desk.received:
            connection.next_health_check = 0.0  # long ago
            message.ack()
        eventually(lambda: desk.turn() or not desk.carried.acknowledged)
        assert desk.unacked() == 0

    def test_what_redis_refuses_is_made_again(self, desk: _Desk) -> None:
        self._receive(desk, 2)
        desk.wait()
        desk.client.script_flush()
        for message in desk.received:
            message.ack()
        eventually(lambda: desk.turn() or not desk.carried.acknowledged)
        assert desk.unacked() == 0

    def test_a_channel_that_closes_has_acknowledged(self, desk: _Desk) -> None:
        self._receive(desk, 3)
        for message in desk.received:
            message.ack()
        desk.connection.release()
        assert (desk.waiting(), desk.unacked(), desk.carried.acknowledged) == (0, 0, set())

    def test_a_closed_channel_acknowledges_by_itself(self, desk: _Desk) -> None:
        self._receive(desk, 1)
        desk.channel.close()
        desk.received[0].ack()
        assert not desk.carried.acknowledged

    def test_credentials_are_renewed_between_answers(
        self, desk: _Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not hasattr(desk.channel, '_pending_reauth_token'):
            monkeypatch.setattr(
                'kombu.transport.redis.Channel._flush_brpop_reauth',
                lambda channel: None,
                raising=False,
            )
            monkeypatch.setattr(
                'kombu.transport.redis.Channel._pending_reauth_token',
                lambda *args: None,
                raising=False,
            )
        self._receive(desk, 2)
        desk.wait()
        for message in desk.received:
            message.ack()
        monkeypatch.setattr(desk.channel, '_pending_reauth_token', lambda connection: 'token')
        monkeypatch.setattr(
            'kombu.transport.redis.Channel._flush_brpop_reauth',
            lambda channel: desk.events.append(len(channel.due)),
        )
        desk.channel._flush_brpop_reauth()
        assert desk.events == [0]


def test_a_connection_is_cut_unless_an_answer_has_come(
    redis_server: RedisServer, space: str
) -> None:
    """The event loop may have had no time to read it."""
    desk = _Desk(redis_server, space)
    for number in range(2):
        desk.publish(number)
    desk.consumer.consume()
    eventually(lambda: desk.drain() or desk.received)
    desk.channel._brpop_start()
    eventually(lambda: _readable(desk.channel._socket))
    desk.carried.cut()
    eventually(lambda: desk.drain() or len(desk.received) == 2)
    desk.received.pop().ack()
    eventually(lambda: desk.drain() or not desk.channel.due)
    desk.carried.cut()
    with pytest.raises(RedisConnectionError):
        eventually(desk.drain)


@pytest.mark.parametrize('looped', [True, False])
def test_an_acknowledgement_that_redis_refuses_for_now_is_made_again(
    redis_server: RedisServer, space: str, looped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer() as own:
        assert isinstance(own, RedisServer)
        desk = _Desk(own, '1')
        desk.publish(1)
        desk.consumer.consume()
        eventually(lambda: desk.drain() or desk.received)
        desk.client.config_set('min-replicas-to-write', 1)
        if not looped:
            desk.channel._thread = 0  # as another thread, which waits for the answer
        desk.received[0].ack()
        eventually(lambda: desk.drain() or desk.channel._again)
        assert (
            'takes no acknowledgements for now' in caplog.text
            and 'a message can be lost' not in caplog.text
        )
        assert (desk.unacked(), len(desk.carried.acknowledged)) == (1, 1)
        desk.client.config_set('min-replicas-to-write', 0)
        eventually(lambda: desk.drain() or not desk.unacked())
        assert not desk.carried.acknowledged
        _DESKS.pop().close()


def test_a_get_records_too(
    redis_server: RedisServer, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = _Desk(redis_server, space)
    desk.publish(1)
    _break_append(monkeypatch)
    with pytest.raises(_Broken):
        desk.queue.get()
    assert (desk.waiting(), desk.unacked()) == (0, 1)


def test_without_scripts_it_goes_on_and_says_so(
    redis_server: RedisServer, space: str, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(redis_server.client()) as client:
        client.execute_command(
            'ACL', 'SETUSER', 'strict', 'on', '>secret', '~*', '&*', '+@all', '-@scripting'
        )
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
