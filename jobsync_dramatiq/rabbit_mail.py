"""RabbitMQ: node queues hang on an exchange of their own, whose alternate exchange leads to the parked queue.

So a message for a node's queue that has just been deleted is parked by RabbitMQ itself. Dramatiq publishes to the default exchange,
which would lose it, or, with confirms, would declare the dead node's queue again and leave the message there. Workers publish with
confirms, and acknowledge a message only after its copy is confirmed. What a lost connection had taken RabbitMQ gives back by itself.

A node's queue has no delay queue: what is delayed waits in the delay queue of its actor's own queue, and goes to whoever owns it then.
"""
from __future__ import annotations

import copy
import inspect
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pika
from dramatiq import Message
from dramatiq.brokers.rabbitmq import DEAD_MESSAGE_TTL
from dramatiq.common import q_name, xq_name
from dramatiq.errors import ConnectionClosed, DecodeError
from pika.exceptions import AMQPChannelError, AMQPConnectionError, ChannelClosedByBroker, UnroutableError

from jobsync_core.config import CoordinationConfig
from jobsync_core.keeper import Letter
from jobsync_core.logs import get_logger
from jobsync_core.routing import KEY, parked_queue

from .mail import Hold, home_of, wrapped

__all__ = ['RabbitMail']

logger = get_logger(__name__)

#: Attempts to publish: a connection that was idle for long is found to be broken only at its next use.
_ATTEMPTS = 3
#: Seconds for which RabbitMQ may refuse to take messages in before a publish fails.
_BLOCKED_SEC = 30.0
#: Seconds between two looks while messages wait.
_LOOK_SEC = 0.05
_BROKEN = (AMQPConnectionError, AMQPChannelError, OSError)
_ACCESS_REFUSED, _NOT_FOUND, _PRECONDITION_FAILED = 403, 404, 406


@contextmanager
def _translated() -> Iterator[None]:
    """What pika raises, as Dramatiq's consumers know it."""
    try:
        yield
    except (*_BROKEN, AssertionError) as error:
        raise ConnectionClosed(error) from error


class _Letter:
    def __init__(self, mail: RabbitMail, channel: Any, tag: int, message: Message[Any]) -> None:
        self._mail, self._channel, self._tag, self._message = mail, channel, tag, message
        self.route: str | None = message.options.get(KEY)
        self.home: str | None = home_of(message)

    def forward(self, queue: str) -> None:
        """See Letter. The acknowledgement fails if publishing had to change the connection: then the message comes again."""
        self._mail.send(self._message, queue, self.route)
        self._channel.basic_ack(self._tag)

    def put_back(self) -> None:
        """See Letter."""
        self._channel.basic_nack(self._tag, requeue=True)


class RabbitMail:
    """See BrokerMail. Each thread has a connection of its own, which the broker keeps.

    Args:
        broker: The RabbitmqBroker.
        config: The cluster.
    """

    catches_strays = True

    def __init__(self, broker: Any, config: CoordinationConfig) -> None:
        self.broker = broker
        self._exchange = f'jobsync.{config.appname}'
        self._parked = parked_queue(config.appname)
        # So that RabbitMQ takes back soon what a stopped or unreachable worker holds.
        self._heartbeat = max(2, math.ceil(config.heartbeat_timeout_sec))
        self._node_queue = ''
        self._state = threading.local()
        self._consumer_parameters = broker.parameters

    def join(self, node: str, queue: str) -> None:
        """See BrokerMail. From here on this process publishes with confirms, the worker's own retries and delays included."""
        self._node_queue = queue
        self.broker.parameters = _adjusted(self.broker.parameters, blocked_connection_timeout=_BLOCKED_SEC)
        self._consumer_parameters = _adjusted(self.broker.parameters, heartbeat=self._heartbeat)
        self.broker.confirm_delivery = True
        try:
            del self.broker.connection  # a channel that was opened before has no confirms
            self._declare_node()
        except _BROKEN as error:
            raise ConnectionClosed(RuntimeError(f'RabbitMQ at {_places(self.broker.parameters)} cannot be used: {error!r}')) from error

    def consume(self, queue: str, prefetch: int, timeout: int) -> Hold:
        """See BrokerMail."""
        try:
            with _translated():
                if queue == self._node_queue:
                    self._declare_node()
                else:
                    self.broker.declare_queue(queue, ensure=True)
        except ConnectionClosed:
            self.reset()  # the worker tries again in a moment, and would find the same broken connection
            raise
        # A consumer sends heartbeats while it waits; other connections lie idle, and keep RabbitMQ's slower ones.
        parameters, kind = self._consumer_parameters, self.broker.consumer_class
        given: Any = SimpleNamespace(parameters=parameters, queues_pending=self.broker.queues_pending)
        if 'parameters' in inspect.signature(kind).parameters:  # Dramatiq 1
            given = parameters
        return _RabbitHold(self, queue, kind(given, queue, prefetch, timeout), timeout / 1000)

    def send(self, message: Any, queue: str, route: str | None, hops: int = 0, source: Hold | None = None) -> None:
        """See BrokerMail."""
        own = queue.startswith(f'{self._exchange}.')
        self._publish(self._exchange if own else '', queue, wrapped(message, queue, route, hops))

    def bury(self, message: Any) -> None:
        """Put a message that came from a node's queue among the dead letters of its home queue.

        Raises:
            ConnectionClosed: It is not known to be there.
        """
        home = home_of(message)
        self._publish('', xq_name(home), wrapped(message, home, None))

    def tidy(self) -> None:
        """See BrokerMail."""

    def restore(self, node: str) -> int:
        """See Mail."""
        return 0

    def take(self, queue: str) -> Letter | None:
        """See Mail."""
        channel = self.broker.channel
        while True:
            try:
                method, _, body = channel.basic_get(queue)
            except ChannelClosedByBroker as error:
                self.reset()
                if error.reply_code == _NOT_FOUND:
                    return None
                raise
            if method is None:
                return None
            try:
                return _Letter(self, channel, method.delivery_tag, Message.decode(body))
            except DecodeError:
                logger.exception('queue=%s: a message cannot be decoded, and goes to %s', queue, xq_name(self._parked))
                channel.basic_nack(method.delivery_tag, requeue=False)

    def delete(self, queue: str) -> bool:
        """See Mail."""
        try:
            self.broker.channel.queue_delete(queue, if_unused=True, if_empty=True)
        except ChannelClosedByBroker as error:
            self.reset()
            if error.reply_code == _PRECONDITION_FAILED:
                return False
            raise
        return True

    def reset(self) -> None:
        """See Mail: this thread's connection."""
        del self.broker.connection

    def _publish(self, exchange: str, queue: str, message: Message[Any]) -> None:
        broken: Exception | None = None
        for _ in range(_ATTEMPTS):
            try:
                if exchange:
                    channel = self._declared()
                else:
                    self.broker._ensure_queue(q_name(queue))  # asks RabbitMQ only where the queue was missed before
                    channel = self.broker.channel
                channel.basic_publish(
                    exchange, queue, message.encode(), mandatory=self.broker.confirm_delivery,
                    properties=pika.BasicProperties(delivery_mode=2, priority=message.options.get('broker_priority')))
                return
            except UnroutableError as error:
                # The queue was deleted, or never made. declare_queue would have this worker consume it.
                broken, self._state.channel = error, None
                if not exchange:
                    self.broker.queues_pending.add(q_name(queue))
            except _BROKEN as error:
                broken = error
                self.reset()
                if getattr(error, 'reply_code', None) == _ACCESS_REFUSED:
                    break
        raise ConnectionClosed(broken) from broken

    def _declared(self) -> Any:
        """This thread's channel; the exchanges and the parked queue are there."""
        channel = self.broker.channel
        if getattr(self._state, 'channel', None) is not channel:
            unrouted = f'{self._exchange}.unrouted'
            channel.exchange_declare(unrouted, 'fanout', durable=True)
            channel.exchange_declare(self._exchange, 'direct', durable=True, arguments={'alternate-exchange': unrouted})
            self._declare_queue(channel, self._parked)
            channel.queue_bind(self._parked, unrouted)
            self._state.channel = channel
        return channel

    def _declare_node(self) -> None:
        try:
            self._declare_queue(self._declared(), self._node_queue)
        except _BROKEN:
            self.reset()  # as in _publish: the connection was idle, or broke together with that of the consumer
            self._declare_queue(self._declared(), self._node_queue)
        self.broker.queues_pending.discard(self._node_queue)  # Dramatiq would declare it in its own way

    def _declare_queue(self, channel: Any, queue: str) -> None:
        # What cannot be decoded is rejected: it goes to one queue of dead letters, as Dramatiq's own do, for as long.
        dead = xq_name(self._parked)
        channel.queue_declare(dead, durable=True, arguments={'x-message-ttl': DEAD_MESSAGE_TTL})
        arguments: dict[str, Any] = {'x-dead-letter-exchange': '', 'x-dead-letter-routing-key': dead}
        if self.broker.max_priority and queue != self._parked:
            arguments['x-max-priority'] = self.broker.max_priority
        channel.queue_declare(queue, durable=True, arguments=arguments)
        channel.queue_bind(queue, self._exchange, queue)


class _RabbitHold:
    """See Hold."""

    def __init__(self, mail: RabbitMail, queue: str, raw: Any, timeout: float) -> None:
        self._mail = mail
        self.queue = queue
        self._raw = raw
        self._timeout = timeout
        self._own = self.queue.startswith('jobsync.')

    def next(self, patient: bool) -> Any:
        """See Hold."""
        if not patient:
            self.idle(_LOOK_SEC)
            if not self._raw.channel.get_waiting_message_count():
                return None
        return next(self._raw)

    def idle(self, seconds: float) -> None:
        """See Hold: actors that end meanwhile acknowledge by this connection."""
        with _translated():
            if self._raw.channel.is_open:
                self._raw.connection.process_data_events(time_limit=seconds)
            if not self._raw.channel.is_open:
                raise AMQPChannelError('the channel is closed')

    def ack(self, message: Any) -> None:
        """See Hold."""
        self._settle(self._raw.ack, message)

    def nack(self, message: Any) -> None:
        """See Hold."""
        if self._own:
            self._mail.bury(message)
            self.ack(message)
        else:
            self._settle(self._raw.nack, message)

    def requeue(self, message: Any) -> None:
        """See Hold."""
        self._settle(self._put_back, message)

    def pause(self) -> None:
        """See Hold."""
        with _translated():
            self._raw.channel.cancel()

    def resume(self) -> None:
        """See Hold."""
        with _translated():
            self._raw.iterator = self._raw.channel.consume(self.queue, inactivity_timeout=self._timeout)

    def close(self, waiting: list[Any]) -> None:
        """See Hold: closing gives back."""
        self._raw.close()

    def _put_back(self, message: Any) -> None:
        tag = message._tag
        try:
            self._raw.known_tags.remove(tag)
        except KeyError:  # another thread has just acknowledged it
            return
        with _translated():
            self._raw.connection.add_callback_threadsafe(partial(self._raw.channel.basic_nack, tag, requeue=True))

    def _settle(self, how: Any, message: Any) -> None:
        try:
            how(message)
        except ConnectionClosed as error:
            # Of a connection that is gone: the worker would try for ever. exactly_once tells the next delivery from the first.
            logger.warning('id=%s: RabbitMQ delivers it again, since the connection that took it is gone: %s', message.message_id, error)


def _places(parameters: Any) -> str:
    return ', '.join(f'{each.host}:{each.port}' for each in (parameters if isinstance(parameters, list) else [parameters]))


def _adjusted(parameters: Any, **values: Any) -> Any:
    """Connection parameters with values that their maker did not set."""
    if isinstance(parameters, list):
        return [_adjusted(item, **values) for item in parameters]
    changed = copy.copy(parameters)
    for name, value in values.items():
        if getattr(changed, name) is None:
            setattr(changed, name, value)
    return changed
