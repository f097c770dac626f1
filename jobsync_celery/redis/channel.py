"""Receiving from Redis without a moment in which a message exists in nobody's records.

kombu takes a message off its list first and records it as unacknowledged in a second trip: what is
in between when the worker, the connection or Redis itself is killed is lost. Here one script does
both; one trip less for each message is a welcome effect. A script cannot wait, and kombu's blocking
BRPOP takes while it waits: so on empty queues a listener tells of the next message
(empty_queues.py). Where Redis refuses a part of this, kombu's way is the fallback, and a warning
says so; what that brings and cannot be recorded any more is kept until there is a connection again.

An acknowledgement goes out on the same connection, ahead of the next look, and is not waited for,
as with AMQP; one that was not confirmed when the connection broke is made again.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections import deque
from queue import Empty
from threading import get_ident
from time import monotonic, time
from typing import Any

from kombu.connection import Connection
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from redis import Redis
from redis.exceptions import NoScriptError, RedisError, ResponseError

from jobsync_core import clock
from jobsync_core.worker.incoming import Refused

from ..incoming import read_raw
from ..logs import get_logger
from .carried_over import CarriedOver
from .client import is_redis, with_channel
from .empty_queues import LOOK_SEC, EmptyQueues
from .keys import record_keys
from .qos import RecordedQoS, UndecodedMessage
from .restoring import RestoringChannel
from .scripts import ACKNOWLEDGE, ELSEWHERE, FOR_NOW, TAKE, says

__all__ = ['receive_atomically']

logger = get_logger(__name__)
# kombu has no types.
plain_qos: Any = virtual.QoS
_execute: Any = Redis.execute_command


class _Channel(RestoringChannel):
    QoS = RecordedQoS
    Message = UndecodedMessage
    #: Outlives the channel.
    carried: CarriedOver
    #: What the answers that have not been read yet are for, in their order: a delivery tag, or None
    #: for the look at the queues.
    due: deque[str | bytes | None]
    #: Delivery tag of the message that the script has recorded and that is being delivered.
    recorded: str | None = None
    _script: str | None = None
    _acknowledge = ''
    # The connection and the thread that poll.
    _socket: Any = None
    _thread = 0
    #: kombu's event loop, to hear of changes; None: this channel does not wait.
    hub: Any = None
    # Until when Redis is not asked in kombu's way, as it takes no writes for now.
    _rest_until = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.due = deque()
        self.empty = EmptyQueues(self.hub)
        self._without_ack: set[str] = set()
        # Acknowledgements that Redis has refused for now, and when they are made again.
        self._again: set[str | bytes] = set()
        self._again_at = 0.0
        super().__init__(*args, **kwargs)
        if self.ack_emulation:
            self._load()  # else the user wants no records at all

    def _load(self) -> None:
        try:
            with self.conn_or_acquire() as client:
                self._script, self._acknowledge = (
                    bytes_to_str(client.script_load(text)) for text in (TAKE, ACKNOWLEDGE)
                )
        except ResponseError as error:
            self._without(error)

    def _without(self, error: Exception) -> None:
        self._script = None
        logger.warning(
            'JobSync: Redis refuses scripts, so a message can be lost when Redis or this worker '
            'is killed just '
            'while it is received; allow EVALSHA and SCRIPT LOAD: %s',
            error,
        )

    def _wait(self) -> None:
        """The queues are empty: hear of it when that changes."""
        self.empty.nothing(monotonic())
        connection = self.client.connection
        if self.empty.wants_listener(connection):
            self.empty.close()
            self._read_due()
            self.empty.listen(
                connection,
                lambda: self.pool.connection_class(**self.pool.connection_kwargs),
                self.connection.cycle,
            )

    def _arguments(self, queues: list[str]) -> list[Any]:
        lists = [
            (self._q_for_pri(queue, priority), queue)
            for priority in self.priority_steps
            for queue in queues
        ]
        keys = record_keys(self, *(key for key, _ in lists))
        told = [part for _, queue in lists for part in (queue, int(queue not in self._without_ack))]
        return [self._script, len(keys), *keys, time(), *told]

    def basic_consume(self, queue: str, no_ack: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Consume; what a consumer does not acknowledge is not recorded."""
        (self._without_ack.add if no_ack else self._without_ack.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """Take one message; as above."""
        before = queue in self._without_ack
        (self._without_ack.add if no_ack else self._without_ack.discard)(queue)
        try:
            return super().basic_get(queue, no_ack, **kwargs)
        finally:
            (self._without_ack.add if before else self._without_ack.discard)(queue)

    def _brpop_start(self, timeout: int | None = None) -> None:
        connection = self.client.connection
        self._thread = get_ident()
        if connection._sock is not self._socket:
            self._socket = connection._sock
            self.carried.cut = self._cut
            for tag in list(self.carried.acknowledged):  # what the last connection did not confirm
                self.acknowledge(tag)
        elif self.due and not plain_qos.can_consume(self.qos):
            return
        self._acknowledge_again()
        if self._script is None or self.empty.nobody_tells():
            if monotonic() < self._rest_until:
                return
            self._read_due()
            self.carried.asked_at = clock.now()
            super()._brpop_start(*(() if timeout is None else (timeout,)))
            return
        if self.empty.is_waiting(monotonic()):
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        self.empty.asked()
        self._send(None, *self._arguments(queues))

    def _cut(self) -> None:
        sock, poller = self._socket, select.poll()
        with contextlib.suppress(OSError, ValueError):  # it is closed
            poller.register(sock, select.POLLIN)
            if poller.poll(0):
                return  # an answer has come that nobody has read yet
            # Those that wait in the pool are as old; the consumer restores over them.
            self.pool.disconnect()
            sock.shutdown(socket.SHUT_RDWR)

    def acknowledge(self, tag: str | bytes) -> None:
        """Acknowledge; from the thread that polls without waiting for the answer."""
        connection = getattr(
            self.__dict__.get('client'), 'connection', None
        )  # none before the first poll, and after the close
        polls = (
            self._socket is not None
            and getattr(connection, '_sock', None) is self._socket
            and get_ident() == self._thread
        )
        waits = self._in_poll and None not in self.due
        if self._script is None or waits or not polls:
            try:
                self.qos.remove(tag)
            except ResponseError as error:
                if not says(error, FOR_NOW):
                    raise
                self._acknowledge_later(tag, error)
            return
        self._send(tag, self._acknowledge, 2, *record_keys(self), tag)

    def _send(self, what: str | bytes | None, *arguments: Any) -> None:
        # redis-py's own check of the connection reads an answer: not while others are due.
        check = not self.due
        if not self.due:
            self.carried.asked_at = clock.now()
        self.due.append(what)
        self.client.connection.send_command('EVALSHA', *arguments, check_health=check)

    def _brpop_read(self, **options: Any) -> Any:
        if not self.due:
            try:
                found = super()._brpop_read(**options)
            except ResponseError as error:
                if not says(error, FOR_NOW):
                    raise
                self._rest_until = monotonic() + LOOK_SEC
                raise Empty from None
            finally:
                self.carried.asked_at = None
            self.empty.found()
            return found
        asked, reply = None in self.due, None
        tag: str | bytes | None = ''
        try:
            while self.due and tag is not None:
                tag = self.due[0]
                reply = self._read_reply()
            if not asked:
                raise Empty
            self._in_poll = None  # so that what is delivered can be acknowledged
            if not reply:
                self._wait()
                raise Empty
            self.empty.found()
            self._queue_cycle.rotate(bytes_to_str(reply[0]))
            self._deliver(reply)
            return True
        finally:
            if asked:
                self._in_poll = None
                self._flush_brpop_reauth()

    def _read_reply(self) -> Any:
        """Read the answer that is due first: what the script took, or None."""
        connection, tag = self.client.connection, self.due[0]
        try:
            reply = self.client.parse_response(connection, 'EVALSHA')
            self.carried.asked_at = clock.now() if len(self.due) > 1 else None
        except self.connection_errors:
            connection.disconnect()
            raise
        except ResponseError as error:
            self.due.popleft()
            self.carried.asked_at = None
            self._refused(tag, error)
            return None
        self.due.popleft()
        if tag is None:
            return reply
        self.carried.acknowledged.discard(tag)
        return None

    def _refused(self, tag: str | bytes | None, error: ResponseError) -> None:
        unknown = isinstance(error, NoScriptError)  # somebody has emptied Redis' cache
        if unknown:
            self._load()
        if says(error, ELSEWHERE):
            # a broken connection: another one may lead to the server that takes writes now
            raise error
        if tag is not None:
            if says(error, FOR_NOW):
                self._acknowledge_later(tag, error)
            else:
                self.qos.remove(tag)
            return
        if says(error, FOR_NOW):
            self._wait()
        elif not unknown:
            self._without(error)
        raise Empty

    def _acknowledge_later(self, tag: str | bytes, error: ResponseError) -> None:
        """It stays among those that are not confirmed, so that it is not restored meanwhile."""
        if not self._again:
            logger.warning(
                'JobSync: Redis takes no acknowledgements for now; they are made again: %s', error
            )
        self._again.add(tag)
        self._again_at = monotonic() + LOOK_SEC

    def _acknowledge_again(self) -> None:
        if self._again and monotonic() >= self._again_at:
            tags, self._again = self._again, set()
            for tag in tags:
                self.acknowledge(tag)

    def _read_due(self) -> None:
        while self.due:
            self._read_reply()

    def _on_connection_disconnect(self, connection: Any) -> None:
        if connection is getattr(self.__dict__.get('client'), 'connection', None):
            self.due.clear()
            self.carried.asked_at = None
        super()._on_connection_disconnect(connection)

    def _flush_brpop_reauth(self) -> None:
        # A newer kombu renews its credentials while the connection is idle, and reads the answer.
        renew = getattr(super(), '_flush_brpop_reauth', None)
        if renew is None:
            return
        try:
            if (
                self.due
                and not self._in_poll
                and self._pending_reauth_token(self.client.connection) is not None
            ):
                self._read_due()
        except (RedisError, OSError) as error:  # the next poll connects anew
            logger.debug('acknowledgements before the credentials: %r', error)
            return
        renew()

    def _deliver(self, reply: Any) -> None:
        queue, message, recorded = bytes_to_str(reply[0]), read_raw(reply[1]), reply[2]
        if isinstance(message, Refused):
            self._tell_refused(queue, message)
            if recorded is not None:
                self.carried.acknowledged.add(recorded)
                self.acknowledge(recorded)
            return
        self.recorded = message['properties']['delivery_tag'] if recorded is not None else None
        try:
            self.connection._deliver(message, queue)
        finally:
            self.recorded = None

    @staticmethod
    def _tell_refused(queue: str, message: Refused) -> None:
        # It is off its list by now, and Redis has no dead letters.
        logger.error(
            'queue=%s: what is no message was taken off it, and is dropped: %s',
            queue,
            message.reason,
        )

    def _get(self, queue: str) -> Any:
        # What a duty takes.
        if self._script is None:
            return super()._get(queue)
        while True:
            with self.conn_or_acquire() as client:
                try:
                    reply = _execute(
                        client, 'EVALSHA', *self._arguments([queue])
                    )  # the keys have their prefix already
                except NoScriptError:
                    self._load()
                    raise Empty from None
            if not reply:
                raise Empty
            message, recorded = read_raw(reply[1]), reply[2]
            if not isinstance(message, Refused):
                self.recorded = (
                    message['properties']['delivery_tag'] if recorded is not None else None
                )
                return message
            self._tell_refused(queue, message)
            if recorded is not None:
                self.qos.remove(recorded)

    def close(self) -> None:
        """Close the channel, whatever has become of its connection."""
        try:
            if self._in_poll:
                self._brpop_read()
        except (Empty, RedisError, OSError) as error:
            logger.debug('the last reply of a channel: %r', error)
        try:
            self._read_due()
        except (Empty, RedisError, OSError) as error:
            logger.debug('the last acknowledgements of a channel: %r', error)
        self.empty.close()
        super().close()


def receive_atomically(connection: Connection, carried: CarriedOver, hub: Any = None) -> Connection:
    """Let a connection that has not been opened yet receive without losing; other brokers than
    Redis are left as they are.

    Args:
        connection: A Celery app's connection.
        carried: Keeps what breaks off with a connection.
        hub: kombu's event loop, where the connection is to wait for messages.
    """
    plain = connection.get_transport_cls()
    if is_redis(plain):
        receiving = with_channel(plain, _Channel, carried=carried, hub=hub)
        vars(connection).update(
            get_transport_cls=lambda: receiving
        )  # transport_cls is what its URL says, and shown
    return connection
