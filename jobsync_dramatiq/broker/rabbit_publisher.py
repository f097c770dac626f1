"""How messages get into queues at RabbitMQ, and how the plugin's own queues and exchanges are
declared.

Node queues hang on an exchange of their own, whose alternate exchange leads to the parked queue. So
a message for a node's queue that has just been deleted is parked by RabbitMQ itself. Dramatiq
publishes to the default exchange, which would lose it, or, with confirms, would declare the dead
node's queue again and leave the message there.
"""

from __future__ import annotations

import threading
from typing import Any

import pika
from dramatiq import Message
from dramatiq.brokers.rabbitmq import DEAD_MESSAGE_TTL
from dramatiq.common import q_name, xq_name
from dramatiq.errors import ConnectionClosed
from pika.exceptions import UnroutableError

from jobsync_core.logs import get_logger
from jobsync_core.worker.routing import WAITS, parked_queue, unknown_queue

from ..incoming import priority_of
from .copies import copy_for, dead_letters, home_of
from .interface import Origins
from .rabbit_errors import BROKEN

__all__ = ['RabbitPublisher']

logger = get_logger(__name__)

#: Attempts to publish: a connection that was idle for long is found to be broken only at its next
#: use.
_ATTEMPTS = 3
_ACCESS_REFUSED = 403


class RabbitPublisher:
    """Publishes and declares, on the connection that Dramatiq's broker keeps for each thread.

    Args:
        native: The RabbitmqBroker.
        appname: The cluster.
        origins: What this process knows of actors.
    """

    def __init__(self, native: Any, appname: str, origins: Origins) -> None:
        self._native = native
        self._appname = appname
        self._origins = origins
        self._exchange = f'jobsync.{appname}'
        self._parked, self._unknown = parked_queue(appname), unknown_queue(appname)
        self._state = threading.local()
        #: Dead letters that this user may not write to.
        self._refused: set[str] = set()

    def publish(self, message: Any, queue: str, route: str | None, hops: int) -> None:
        """Publish a copy of a message to a queue; with confirms it returns when RabbitMQ has it.

        Raises:
            ConnectionClosed: It is not known to be there.
        """
        own = queue.startswith(f'{self._exchange}.')
        copy = copy_for(queue, message, route, hops)
        if getattr(message, 'redelivered', False):
            copy.options.setdefault(WAITS, 1)  # RabbitMQ does not say of a copy that it came before
        self._publish(self._exchange if own else '', queue, copy)

    def bury(self, message: Any) -> None:
        """Put a message that came from a node's queue among the dead letters of its home queue.

        Raises:
            ConnectionClosed: It is not known to be there.
        """
        home = home_of(message)
        self._publish('', xq_name(home), copy_for(home, message, None))

    def set_aside(self, channel: Any, queue: str, tag: int, data: bytes, reason: str) -> None:
        """Put what no worker can have among the dead letters, as it is. From the user's own queue
        RabbitMQ does so itself.
        """
        dead, own = dead_letters(queue, data, self._appname, self._origins), xq_name(self._parked)
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
                    # Asks RabbitMQ only where the queue was missed before.
                    self._native._ensure_queue(q_name(queue))
                    channel = self._native.channel
                channel.basic_publish(
                    exchange,
                    queue,
                    data,
                    mandatory=self._native.confirm_delivery,
                    properties=pika.BasicProperties(delivery_mode=2, priority=priority),
                )
                return
            except UnroutableError as error:
                # The queue was deleted, or never made. declare_queue would have this worker consume
                # it.
                broken, self._state.channel = error, None
                if not exchange:
                    self.miss(queue)
            except BROKEN as error:
                broken = error
                self.reset()
                if getattr(error, 'reply_code', None) == _ACCESS_REFUSED:
                    break
        raise ConnectionClosed(broken) from broken

    def miss(self, queue: str) -> None:
        """This queue is not there: Dramatiq declares it before it is used next."""
        self._native.queues_pending.add(q_name(queue))

    def reset(self) -> None:
        """Drop this thread's connection; the next use opens another."""
        del self._native.connection

    def _declared(self) -> Any:
        """This thread's channel; the exchanges and the parked queue are there."""
        channel = self._native.channel
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

    def declare_node(self, queue: str) -> None:
        """Declare a node's queue, and all that it hangs on.

        Raises whatever pika raises.
        """
        try:
            self._declare_queue(self._declared(), queue)
        except BROKEN:
            # As in _publish_raw: the connection was idle, or broke together with that of the
            # consumer.
            self.reset()
            self._declare_queue(self._declared(), queue)
        self._native.queues_pending.discard(queue)  # Dramatiq would declare it in its own way

    def _declare_queue(self, channel: Any, queue: str) -> None:
        # What cannot be decoded is rejected: it goes to one queue of dead letters, as Dramatiq's
        # own do, for as long.
        dead = xq_name(self._parked)
        channel.queue_declare(dead, durable=True, arguments={'x-message-ttl': DEAD_MESSAGE_TTL})
        arguments: dict[str, Any] = {
            'x-dead-letter-exchange': '',
            'x-dead-letter-routing-key': dead,
        }
        if self._native.max_priority and queue not in (self._parked, self._unknown):
            arguments['x-max-priority'] = self._native.max_priority
        channel.queue_declare(queue, durable=True, arguments=arguments)
        channel.queue_bind(queue, self._exchange, queue)
