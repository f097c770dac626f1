"""How the plugin's own queues and exchanges are declared at RabbitMQ, and deleted.

Node queues hang on an exchange of their own, whose alternate exchange leads to the parked queue. So
a message for a node's queue that has just been deleted is parked by RabbitMQ itself. Dramatiq
publishes to the default exchange, which would lose it, or, with confirms, would declare the dead
node's queue again and leave the message there.
"""

from __future__ import annotations

import threading
from typing import Any

from dramatiq.brokers.rabbitmq import DEAD_MESSAGE_TTL
from dramatiq.common import xq_name
from pika.exceptions import ChannelClosedByBroker

from jobsync_core.logs import get_logger
from jobsync_core.worker import consumer_timeout
from jobsync_core.worker.presence import presence_queue
from jobsync_core.worker.returns import limit_of
from jobsync_core.worker.routing import old_parked_queue, parked_queue, unknown_queue

from .rabbit_errors import BROKEN, is_absent

__all__ = ['RabbitDeclarations']

logger = get_logger(__name__)

_PRECONDITION_FAILED = 406
_TYPE, _PRIORITIES = 'x-queue-type', 'x-max-priority'
#: Arguments that not every type of queue takes.
_OPTIONAL = frozenset({_PRIORITIES, consumer_timeout.ARGUMENT})
#: Arguments of the user's own queue that a node's queue has not: a length is one of the home queue
#: alone, and what waits for a node that is gone must not expire with its queue.
_NOT_KEPT = frozenset(
    {'x-expires', 'x-max-length', 'x-max-length-bytes', 'x-overflow', 'x-single-active-consumer'}
)


class RabbitDeclarations:
    """Declares and deletes on the connection that Dramatiq's broker keeps for each thread.

    Args:
        native: The RabbitmqBroker.
        appname: The cluster.

    Attributes:
        exchange: Where the cluster's own queues hang.
    """

    def __init__(self, native: Any, appname: str) -> None:
        self._native = native
        self._appname = appname
        self.exchange = f'jobsync.{appname}'
        self._parked, self._unknown = old_parked_queue(appname), unknown_queue(appname)
        self._state = threading.local()
        #: Queues of which it was said that they are not as configured.
        self._told: set[str] = set()

    def channel(self) -> Any:
        """This thread's channel; the exchanges and the parked queue are there.

        Raises whatever pika raises.
        """
        channel = self._native.channel
        if getattr(self._state, 'channel', None) is not channel:
            unrouted = f'{self.exchange}.unrouted'
            channel.exchange_declare(unrouted, 'fanout', durable=True)
            channel.exchange_declare(
                self.exchange, 'direct', durable=True, arguments={'alternate-exchange': unrouted}
            )
            self._declare_shared(self._parked)
            self._declare_shared(self._unknown)
            channel.queue_bind(self._parked, unrouted)
            self._state.channel = channel
        return channel

    def forget(self) -> None:
        """This thread knows of nothing that is there."""
        self._state.channel = None

    def declare_node(self, home: str, queue: str) -> None:
        """Declare a node's queue for a home queue, the parked one beside it, and all that they hang
        on.

        Args:
            home: The home queue.
            queue: The node's queue.

        Raises whatever pika raises.
        """
        try:
            self._declare_node(home, queue)
        except BROKEN:
            # The connection was idle, or broke together with that of the consumer.
            del self._native.connection
            self._declare_node(home, queue)
        self._native.queues_pending.discard(queue)  # Dramatiq would declare it in its own way

    def _declare_node(self, home: str, queue: str) -> None:
        self._declare_dead_letters(home)
        self.channel()
        # What is so of the user's own queue is so of a node's, its dead letters among it; a
        # subclass may say it.
        theirs = self._native._build_queue_arguments(home)
        kept = {name: value for name, value in theirs.items() if name not in _NOT_KEPT}
        if kept.get('x-dead-letter-strategy') == 'at-least-once':
            kept['x-overflow'] = 'reject-publish'  # RabbitMQ wants both
        self._make(queue, {consumer_timeout.ARGUMENT: consumer_timeout.LONGEST_MS, **kept})
        self._make(parked_queue(home, self._appname), kept)
        for each in (queue, parked_queue(home, self._appname)):
            self._native.channel.queue_bind(each, self.exchange, each)

    def _declare_dead_letters(self, home: str) -> None:
        """What is rejected in a node's queue goes there, perhaps before anybody consumes the home
        queue.
        """
        try:
            self._native._declare_xq_queue(home)
        except ChannelClosedByBroker as error:
            del self._native.channel
            if error.reply_code != _PRECONDITION_FAILED:  # it is there with other arguments
                raise

    def _declare_shared(self, queue: str) -> None:
        # What cannot be decoded is rejected: it goes to one queue of dead letters, as Dramatiq's
        # own do, for as long.
        dead = xq_name(self._parked)
        self._make(dead, {'x-message-ttl': DEAD_MESSAGE_TTL})
        arguments = {'x-dead-letter-exchange': '', 'x-dead-letter-routing-key': dead}
        theirs = self._native._build_queue_arguments(queue)
        self._make(
            queue, {**arguments, **{name: theirs[name] for name in (_TYPE,) if name in theirs}}
        )
        self._native.channel.queue_bind(queue, self.exchange, queue)

    def _make(self, queue: str, arguments: dict[str, Any]) -> None:
        """Make a queue. One that is there with other arguments is used as it is, and what a type
        of queue does not have is left out; RabbitMQ may choose the type.
        """
        while True:
            try:
                self._try_to_make(queue, arguments)
                return
            except ChannelClosedByBroker as error:
                if error.reply_code != _PRECONDITION_FAILED:
                    raise
                text = error.reply_text
                refused = {name for name in _OPTIONAL if f"invalid arg '{name}'" in text}
                if not refused & set(arguments):
                    if self.count(queue) is None:
                        raise
                    self._tell(queue, 'is there with other arguments, and is used as it is', text)
                    return
            if _PRIORITIES in refused:
                self._tell(queue, 'is made without priorities', text)
            arguments = {name: value for name, value in arguments.items() if name not in refused}

    def _try_to_make(self, queue: str, arguments: dict[str, Any]) -> None:
        # A refusal closes the channel, with all that was taken by it.
        channel = self._native.connection.channel()
        channel.queue_declare(queue, durable=True, arguments=arguments)
        channel.close()

    def _tell(self, queue: str, what: str, text: str) -> None:
        if queue not in self._told:
            self._told.add(queue)
            logger.warning('queue=%s %s: RabbitMQ says %s', queue, what, text)

    def counts(self, home: str) -> bool:
        """Whether a home queue is known to count what comes back to it, and so are those that stand
        for it.
        """
        return self._native._build_queue_arguments(home).get(_TYPE) == 'quorum'  # type: ignore[no-any-return]

    def limit_of(self, home: str) -> int | None:
        """How often a message may come back to a home queue: see `jobsync_core.worker.returns`."""
        properties = getattr(self._native.connection, '_impl', None)
        version = (getattr(properties, 'server_properties', None) or {}).get('version')
        return limit_of(self._native._build_queue_arguments(home), version)

    def count(self, queue: str) -> tuple[int, int] | None:
        """How many messages wait in a queue, and how many consumers it has; None where there is
        none.

        Raises whatever pika raises, for one too that is there and cannot be asked now.
        """
        try:
            found = self._native.channel.queue_declare(queue, passive=True).method
        except ChannelClosedByBroker as error:
            del self._native.channel
            if is_absent(error):
                return None
            raise
        return int(found.message_count), int(found.consumer_count)

    def delete(self, queue: str) -> bool:
        """Delete a queue of the cluster if it is empty, and nobody consumes it or has anything of
        it in hand; whether it is gone.

        RabbitMQ deletes no quorum queue on these conditions. So the queue is taken off its exchange
        first: what is sent to it from then on is parked. One that stays is hung up again: its node
        may have come back meanwhile, and would get nothing any more.

        Raises whatever pika raises.
        """
        if self._has_present(queue):
            return False
        # Not the thread's own: the answer that there is no such queue closes it.
        channel = self._native.connection.channel()
        try:
            if not _is_idle(channel, queue):
                return False
            channel.queue_unbind(queue, self.exchange, queue)
            if not _is_idle(channel, queue) or not _gives_none(channel, queue):
                channel.queue_bind(queue, self.exchange, queue)
                return False
            channel.queue_delete(queue)
            channel.queue_delete(presence_queue(queue))
        except ChannelClosedByBroker as error:
            if not is_absent(error):
                raise
        finally:
            if channel.is_open:
                channel.close()
        return True

    def _has_present(self, queue: str) -> bool:
        """Whether somebody may have taken messages from a queue and not acknowledged them."""
        found = self.count(presence_queue(queue))
        return found is not None and bool(found[1])


def _is_idle(channel: Any, queue: str) -> bool:
    found = channel.queue_declare(queue, passive=True).method
    return not found.message_count and not found.consumer_count


def _gives_none(channel: Any, queue: str) -> bool:
    """Whether nothing is in a queue, by itself: a quorum queue without a leader counts as empty,
    but does not answer this.
    """
    method, _, _ = channel.basic_get(queue)
    if method is None:
        return True
    channel.basic_nack(method.delivery_tag)
    return False
