"""RabbitMQ: node queues hang on an exchange of their own, whose alternate exchange leads to the
parked queue.

So a message for a node's queue that has just been deleted is parked by RabbitMQ itself. Dramatiq
publishes to the default exchange, which would lose it, or, with confirms, would declare the dead
node's queue again and leave the message there. Workers publish with confirms, and acknowledge a
message only after its copy is confirmed. What a lost connection had taken RabbitMQ gives back by
itself.

A node's queue has no delay queue: what is delayed waits in the delay queue of its actor's own
queue, and goes to whoever owns it then.
"""

from __future__ import annotations

import copy
import inspect
import math
import threading
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pika
from dramatiq import Message
from dramatiq.brokers.rabbitmq import DEAD_MESSAGE_TTL
from dramatiq.common import q_name, xq_name
from dramatiq.errors import ConnectionClosed
from pika.exceptions import (
    AuthenticationError,
    ChannelClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    UnroutableError,
)

from jobsync_core.config import CoordinationConfig
from jobsync_core.logs import get_logger, shown
from jobsync_core.worker.broker import Delivery
from jobsync_core.worker.incoming import Refused
from jobsync_core.worker.routing import parked_queue, unknown_queue

from .errors import BrokerAway
from .incoming import priority_of, read_message
from .mail import Hold, dead_letters, home_of, place_of, wrapped
from .rabbit_hold import BROKEN, RabbitHold, translated

if TYPE_CHECKING:
    from .actors import Actors

__all__ = ['RabbitMail']

logger = get_logger(__name__)

#: Attempts to publish: a connection that was idle for long is found to be broken only at its next
#: use.
_ATTEMPTS = 3
#: Seconds for which RabbitMQ may refuse to take messages in before a publish fails.
_BLOCKED_SEC = 30.0
_ACCESS_REFUSED, _NOT_FOUND, _PRECONDITION_FAILED = 403, 404, 406


class _Letter:
    def __init__(self, mail: RabbitMail, channel: Any, tag: int, message: Message[Any]) -> None:
        self._mail, self._channel, self._tag, self.message = mail, channel, tag, message
        self.id, self.task = shown(message.message_id), message.actor_name
        self.route: str | None
        self.route, self.home = place_of(mail.actors, message)

    def forward(self, queue: str) -> None:
        """See Delivery. The acknowledgement fails if publishing had to change the connection: then
        the message comes again.
        """
        self._mail.send(self.message, queue, self.route)
        self._channel.basic_ack(self._tag)

    def requeue(self) -> None:
        """See Delivery."""
        self._channel.basic_nack(self._tag, requeue=True)


class RabbitMail:
    """See BrokerMail. Each thread has a connection of its own, which the broker keeps.

    Args:
        broker: The RabbitmqBroker.
        config: The cluster.
    """

    catches_strays = True
    kind = 'dramatiq'
    actors: Actors | None = None

    def __init__(self, broker: Any, config: CoordinationConfig) -> None:
        self.broker = broker
        self._appname = config.appname
        self._exchange = f'jobsync.{config.appname}'
        self._parked, self._unknown = parked_queue(config.appname), unknown_queue(config.appname)
        # So that RabbitMQ takes back soon what a stopped or unreachable worker holds.
        self._heartbeat = max(2, math.ceil(config.heartbeat_timeout_sec))
        self._node_queue = ''
        self._state = threading.local()
        #: Dead letters that this user may not write to.
        self._refused: set[str] = set()
        self._consumer_parameters = broker.parameters

    @property
    def place(self) -> str:
        """See BrokerMail."""
        return f'amqp://{_places(self.broker.parameters)}'

    def reach(self) -> None:
        """See BrokerMail."""
        try:
            _ = self.broker.connection
        except (
            AuthenticationError,
            ProbableAccessDeniedError,
            ProbableAuthenticationError,
        ) as error:
            raise ConnectionClosed(
                RuntimeError(f'RabbitMQ refuses its user at {self.place}: {error!r}')
            ) from error
        except BROKEN as error:
            raise BrokerAway(f'RabbitMQ cannot be reached at {self.place}: {error!r}') from error

    def identify(self, make: bool) -> str | None:
        """See BrokerMail: RabbitMQ tells its cluster's name with each connection."""
        known = (
            getattr(getattr(self.broker.connection, '_impl', None), 'server_properties', None) or {}
        )
        name = known.get('cluster_name')
        parameters = self.broker.parameters
        first = parameters[0] if isinstance(parameters, list) else parameters
        return f'{name} {first.virtual_host}' if name else ''

    def mark(self, mark: str) -> None:
        """See Mail."""

    def join(self, node: str, queue: str) -> None:
        """See BrokerMail. From here on this process publishes with confirms, the worker's own
        retries and delays included.
        """
        self._node_queue = queue
        self.broker.parameters = _adjusted(
            self.broker.parameters, blocked_connection_timeout=_BLOCKED_SEC
        )
        self._consumer_parameters = _adjusted(self.broker.parameters, heartbeat=self._heartbeat)
        self.broker.confirm_delivery = True
        try:
            del self.broker.connection  # a channel that was opened before has no confirms
            self._declare_node()
        except BROKEN as error:
            raise ConnectionClosed(
                RuntimeError(
                    f'RabbitMQ at {_places(self.broker.parameters)} cannot be used: {error!r}'
                )
            ) from error

    def consume(self, queue: str, prefetch: int, timeout: int) -> Hold:
        """See BrokerMail."""
        try:
            with translated():
                if queue == self._node_queue:
                    self._declare_node()
                else:
                    self.broker.declare_queue(queue, ensure=True)
        except ConnectionClosed:
            # the worker tries again in a moment, and would find the same broken connection
            self.reset()
            raise
        # A consumer sends heartbeats while it waits; other connections lie idle, and keep
        # RabbitMQ's slower ones.
        parameters, kind = self._consumer_parameters, self.broker.consumer_class
        given: Any = SimpleNamespace(
            parameters=parameters, queues_pending=self.broker.queues_pending
        )
        if 'parameters' in inspect.signature(kind).parameters:  # Dramatiq 1
            given = parameters
        with translated():
            return RabbitHold(self, queue, kind(given, queue, prefetch, timeout), timeout / 1000)

    def send(
        self, message: Any, queue: str, route: str | None, hops: int = 0, source: Hold | None = None
    ) -> None:
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

    def set_aside(self, channel: Any, queue: str, tag: int, data: bytes, reason: str) -> None:
        """Put what no worker can have among the dead letters, as it is. From the user's own queue
        RabbitMQ does so itself.
        """
        dead, own = dead_letters(queue, data, self._appname, self.actors), xq_name(self._parked)
        sends = queue.startswith('jobsync.') and dead not in (own, *self._refused)
        if sends:
            try:
                self._publish_raw('', dead, data)
            except ConnectionClosed as error:
                if getattr(error.__cause__, 'reply_code', None) != _ACCESS_REFUSED:
                    raise
                # What lies behind this message must not wait for a right that this user has not.
                self._refused.add(dead)
                logger.warning(
                    'queue=%s: this user may not write to %s, so that dead letters of it go to %s',
                    queue,
                    dead,
                    own,
                )
                sends = False
        logger.error(
            'queue=%s goes to %s: %s',
            queue,
            dead if sends or not queue.startswith('jobsync.') else own,
            reason,
        )
        if sends:
            channel.basic_ack(tag)
        else:
            channel.basic_nack(tag, requeue=False)

    def tidy(self) -> None:
        """See BrokerMail."""

    def restore(self, node: str) -> int:
        """See Mail."""
        return 0

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        """See Mail: the queues themselves say so, and are deleted when they are empty."""
        return frozenset(queues)

    def size(self, queue: str) -> int:
        """See Mail."""
        try:
            return int(self.broker.channel.queue_declare(queue, passive=True).method.message_count)
        except ChannelClosedByBroker as error:
            self.reset()
            if error.reply_code == _NOT_FOUND:
                return 0
            raise

    def take(self, queue: str) -> Delivery | None:
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
            message = read_message(body)
            if not isinstance(message, Refused):
                return _Letter(self, channel, method.delivery_tag, message)
            self.set_aside(channel, queue, method.delivery_tag, body, message.reason)

    def begin_evacuation(self) -> None:
        """See BrokerMail: a message is acknowledged when its copy is confirmed."""
        self.broker.confirm_delivery = True
        del self.broker.connection

    def places(self) -> Iterable[str]:
        """See Evacuable: AMQP cannot list queues; the table knows them."""
        return ()

    def close(self) -> None:
        """See Evacuable."""
        self.broker.close()

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
        self._publish_raw(exchange, queue, message.encode(), priority_of(message.options))

    def _publish_raw(
        self, exchange: str, queue: str, data: bytes, priority: int | None = None
    ) -> None:
        broken: Exception | None = None
        for _ in range(_ATTEMPTS):
            try:
                if exchange:
                    channel = self._declared()
                else:
                    self.broker._ensure_queue(
                        q_name(queue)
                    )  # asks RabbitMQ only where the queue was missed before
                    channel = self.broker.channel
                channel.basic_publish(
                    exchange,
                    queue,
                    data,
                    mandatory=self.broker.confirm_delivery,
                    properties=pika.BasicProperties(delivery_mode=2, priority=priority),
                )
                return
            except UnroutableError as error:
                # The queue was deleted, or never made. declare_queue would have this worker consume
                # it.
                broken, self._state.channel = error, None
                if not exchange:
                    self.broker.queues_pending.add(q_name(queue))
            except BROKEN as error:
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
            channel.exchange_declare(
                self._exchange, 'direct', durable=True, arguments={'alternate-exchange': unrouted}
            )
            self._declare_queue(channel, self._parked)
            self._declare_queue(channel, self._unknown)
            channel.queue_bind(self._parked, unrouted)
            self._state.channel = channel
        return channel

    def _declare_node(self) -> None:
        try:
            self._declare_queue(self._declared(), self._node_queue)
        except BROKEN:
            # as in _publish: the connection was idle, or broke together with that of the consumer
            self.reset()
            self._declare_queue(self._declared(), self._node_queue)
        self.broker.queues_pending.discard(
            self._node_queue
        )  # Dramatiq would declare it in its own way

    def _declare_queue(self, channel: Any, queue: str) -> None:
        # What cannot be decoded is rejected: it goes to one queue of dead letters, as Dramatiq's
        # own do, for as long.
        dead = xq_name(self._parked)
        channel.queue_declare(dead, durable=True, arguments={'x-message-ttl': DEAD_MESSAGE_TTL})
        arguments: dict[str, Any] = {
            'x-dead-letter-exchange': '',
            'x-dead-letter-routing-key': dead,
        }
        if self.broker.max_priority and queue not in (self._parked, self._unknown):
            arguments['x-max-priority'] = self.broker.max_priority
        channel.queue_declare(queue, durable=True, arguments=arguments)
        channel.queue_bind(queue, self._exchange, queue)


def _places(parameters: Any) -> str:
    return ', '.join(
        f'{each.host}:{each.port}'
        for each in (parameters if isinstance(parameters, list) else [parameters])
    )


def _adjusted(parameters: Any, **values: Any) -> Any:
    """Connection parameters with values that their maker did not set."""
    if isinstance(parameters, list):
        return [_adjusted(item, **values) for item in parameters]
    changed = copy.copy(parameters)
    for name, value in values.items():
        if getattr(changed, name) is None:
            setattr(changed, name, value)
    return changed
