"""The consumer of one queue at RabbitMQ, over a connection of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event
from typing import Any

import pika
from dramatiq import Message
from dramatiq.broker import MessageProxy
from pika.exceptions import AMQPChannelError, ChannelClosedByBroker

from jobsync_core.logs import get_logger
from jobsync_core.worker.consumer_timeout import REMEDY, is_timeout
from jobsync_core.worker.incoming import Refused
from jobsync_core.worker.presence import ARGUMENTS, presence_queue

from ..incoming import read_message
from .rabbit_errors import translated
from .rabbit_publisher import RabbitPublisher, RawDelivery

__all__ = ['RabbitQueueConsumer']

logger = get_logger(__name__)

_ACCESS_REFUSED, _NOT_FOUND = 403, 404
#: Seconds between two looks while messages wait.
_LOOK_SEC = 0.05


class _Tagged(MessageProxy):
    """A message with what RabbitMQ calls it; `redelivered` is Dramatiq's name."""

    def __init__(self, message: Message[Any], raw: RawDelivery, redelivered: bool) -> None:
        super().__init__(message)
        self.raw = raw
        self.redelivered = redelivered


class RabbitQueueConsumer:
    """A QueueConsumer.

    Args:
        publisher: Publishes what is set aside.
        parameters: Of the connection.
        queue: The queue, which is there.
        prefetch: How many messages may be taken and not done.
        timeout: Longest wait for a message, in seconds.

    Raises:
        ConnectionClosed: RabbitMQ cannot be asked.
    """

    def __init__(
        self, publisher: RabbitPublisher, parameters: Any, queue: str, prefetch: int, timeout: float
    ) -> None:
        self._publisher = publisher
        self.queue = queue
        self._timeout = timeout
        self._own = publisher.is_own(queue)
        #: What was handed out and is not done: tags of a connection that is gone mean nothing.
        self._tags: set[int] = set()
        self._unseen = False
        with translated():
            self.connection: Any = pika.BlockingConnection(parameters)
            try:
                self._channel: Any = self.connection.channel()
                self._channel.basic_qos(prefetch_count=prefetch)
                if self._own:
                    self._announce()
            except BaseException:
                self.close([])
                raise
        self._consume()

    def _announce(self) -> None:
        """Show for as long as the channel lives that what comes by it may be in hand, also while it
        does not consume: see `jobsync_core.worker.presence`.
        """
        name = presence_queue(self.queue)
        try:
            with self.connection.channel() as channel:
                channel.queue_declare(name, durable=True, arguments=ARGUMENTS)
        except ChannelClosedByBroker as error:
            if error.reply_code == _NOT_FOUND:
                # It is on a server of the cluster that is down, and nobody deletes the queue of the
                # node for as long. That one may be on several.
                logger.warning('RabbitMQ cannot use the queue %s now: %s', name, error.reply_text)
                return
            if error.reply_code != _ACCESS_REFUSED:
                raise
            logger.warning(
                'RabbitMQ refuses the queue %s (%s): should this worker be cut off from the '
                'database for long and then die, what it was running is lost. Let the user '
                'configure, write and read names as the documentation says',
                name,
                error.reply_text,
            )
            return
        self._channel.add_on_cancel_callback(self._lose_presence)
        self._channel.basic_consume(name, lambda *message: None, auto_ack=True)

    def _lose_presence(self, frame: Any) -> None:
        self._unseen = True

    def _check_presence(self) -> None:
        if self._unseen:
            raise AMQPChannelError(f'RabbitMQ has deleted {presence_queue(self.queue)}')

    def _consume(self) -> None:
        with translated():
            self._deliveries: Any = self._channel.consume(
                self.queue, inactivity_timeout=self._timeout
            )

    def next(self, patient: bool) -> Any:
        """The next message that can be read."""
        if not patient:
            self.idle(_LOOK_SEC)
            if not self._channel.get_waiting_message_count():
                return None
        with translated():
            self._check_presence()
            try:
                method, properties, body = next(self._deliveries)
            except StopIteration:
                raise AMQPChannelError(
                    'RabbitMQ has ended the consumer: its queue was deleted, or its server is '
                    'stopping'
                ) from None
            except ChannelClosedByBroker as error:
                if error.reply_code == _NOT_FOUND:
                    self._publisher.miss(self.queue)  # the next consumer declares it
                self._tell_of_timeout(error)
                raise
        if method is None:
            return None
        raw = RawDelivery.of(self.queue, method, properties, body)
        with translated():  # it may ask RabbitMQ
            worn_out = self._publisher.is_worn_out(raw)
        if worn_out:
            logger.warning(
                'queue=%s: a message has come back too often for its queue, and goes to the dead '
                'letters, as it would without being passed on',
                self.queue,
            )
            with translated():
                self._channel.basic_nack(raw.tag, requeue=False)
            return None
        found = read_message(body)
        if isinstance(found, Refused):
            with translated():
                self._publisher.set_aside(self._channel, self.queue, raw.tag, body, found.reason)
            return None
        self._tags.add(raw.tag)
        return _Tagged(found, raw, method.redelivered)

    def idle(self, seconds: float) -> None:
        """Wait: actors that end meanwhile acknowledge by this connection."""
        with translated():
            if self._channel.is_open:
                self.connection.process_data_events(time_limit=seconds)
            self._check_presence()
            if not self._channel.is_open:
                reason = self._channel._closing_reason
                self._tell_of_timeout(reason)
                raise AMQPChannelError(f'the channel is closed: {reason}')

    def _tell_of_timeout(self, reason: object) -> None:
        code, text = getattr(reason, 'reply_code', None), getattr(reason, 'reply_text', None)
        if is_timeout(code, text):
            logger.warning(
                'queue=%s: an actor or a delay outlasted the consumer_timeout of RabbitMQ, which '
                'delivers its message again. The actor goes on; without exactly_once it runs '
                'twice. To prevent it, %s',
                self.queue,
                REMEDY,
            )

    def ack(self, message: Any) -> None:
        """Acknowledge a message."""
        self._settle(message, self._channel.basic_ack)

    def nack(self, message: Any) -> None:
        """Put a message among the dead letters: from the user's own queue RabbitMQ does so."""
        if self._own:
            self._publisher.bury(message)
            self.ack(message)
        else:
            self._settle(message, partial(self._channel.basic_nack, requeue=False))

    def requeue(self, message: Any, begun: bool = False) -> None:
        """Requeue a message. RabbitMQ says of each that it came before."""
        if self._claim(message):
            if self._publisher.requeues_anew(message.raw):
                self._tell(message, self._channel.basic_ack)
            else:
                self._tell(message, partial(self._channel.basic_nack, requeue=True))

    def pause(self) -> None:
        """Have RabbitMQ send no more; what was sent and not handed out goes back."""
        with translated():
            sent = []
            while self._channel.get_waiting_message_count():
                method, properties, body = next(self._deliveries)
                sent.append(RawDelivery.of(self.queue, method, properties, body))
            self._channel.cancel()
            for raw in sent:
                if self._publisher.requeues_anew(raw):
                    self._channel.basic_ack(raw.tag)
                else:
                    self._channel.basic_nack(raw.tag, requeue=True)

    def resume(self) -> None:
        """Have RabbitMQ send messages again."""
        self._consume()

    def close(self, waiting: list[Any]) -> None:
        """Close the connection, by which all that is not acknowledged goes back. A connection that
        is gone has put it back.
        """
        if not self.connection.is_open:
            return
        with translated():
            # Closing does not wait for acknowledgements of other threads; they come in order, and
            # this comes last.
            settled = Event()
            self.connection.add_callback_threadsafe(settled.set)
            while not settled.is_set():
                self.connection.sleep(0)
            self.connection.close()

    def _settle(self, message: Any, how: Callable[[int], object]) -> None:
        if self._claim(message):
            self._tell(message, how)

    def _claim(self, message: Any) -> bool:
        """Whether no other thread has just settled a message."""
        try:
            self._tags.remove(message.raw.tag)
        except KeyError:
            return False
        return True

    def _tell(self, message: Any, how: Callable[[int], object]) -> None:
        try:
            self.connection.add_callback_threadsafe(partial(how, message.raw.tag))
        # Whatever is wrong with the connection. The worker would try for ever; exactly_once tells
        # the next delivery from the first.
        except Exception as error:
            logger.warning(
                'id=%s: RabbitMQ delivers it again, since the connection that took it is gone: %s',
                message.message_id,
                error,
            )
