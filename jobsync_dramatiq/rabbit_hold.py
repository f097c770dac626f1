"""The consumer of one queue at RabbitMQ: Dramatiq's own, with another way of taking messages and of
giving them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.common import q_name
from dramatiq.errors import ConnectionClosed
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPChannelError, AMQPConnectionError, ChannelClosedByBroker

from jobsync_core.logs import get_logger
from jobsync_core.worker.incoming import Refused

from .incoming import read_message

if TYPE_CHECKING:
    from .rabbit_mail import RabbitMail

__all__ = ['BROKEN', 'RabbitHold', 'translated']

logger = get_logger(__name__)

#: What pika raises where a connection or a channel is of no use any more. The last comes from a
#: broker that accepts a connection and then says nothing; it is no AMQPConnectionError.
BROKEN = (AMQPConnectionError, AMQPChannelError, OSError, AMQPConnectorException)
_NOT_FOUND = 404
#: Seconds between two looks while messages wait.
_LOOK_SEC = 0.05


@contextmanager
def translated() -> Iterator[None]:
    """What pika raises, as Dramatiq's consumers know it."""
    try:
        yield
    except (*BROKEN, AssertionError) as error:
        raise ConnectionClosed(error) from error


class _Delivery(MessageProxy):
    """A message with what RabbitMQ calls it; Dramatiq's consumer acknowledges by that."""

    def __init__(self, message: Message[Any], tag: int, redelivered: bool) -> None:
        super().__init__(message)
        self._tag = tag
        self.redelivered = redelivered


class RabbitHold:
    """See Hold.

    Args:
        mail: The broker.
        queue: The queue.
        raw: Dramatiq's consumer of it: its connection, channel and known tags.
        timeout: Longest wait for a message, in seconds.
    """

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
        with translated():
            try:
                method, _, body = next(self._raw.iterator)
            except StopIteration:
                raise AMQPChannelError(
                    'RabbitMQ has ended the consumer: its queue was deleted, or its server is '
                    'stopping'
                ) from None
            except ChannelClosedByBroker as error:
                if error.reply_code == _NOT_FOUND:
                    self._mail.broker.queues_pending.add(
                        q_name(self.queue)
                    )  # the next consumer declares it
                raise
        if method is None:
            return None
        found = read_message(body)
        if isinstance(found, Refused):
            with translated():
                self._mail.set_aside(
                    self._raw.channel, self.queue, method.delivery_tag, body, found.reason
                )
            return None
        self._raw.known_tags.add(method.delivery_tag)
        return _Delivery(found, method.delivery_tag, method.redelivered)

    def idle(self, seconds: float) -> None:
        """See Hold: actors that end meanwhile acknowledge by this connection."""
        with translated():
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
        with translated():
            self._raw.channel.cancel()

    def resume(self) -> None:
        """See Hold."""
        with translated():
            self._raw.iterator = self._raw.channel.consume(
                self.queue, inactivity_timeout=self._timeout
            )

    def close(self, waiting: list[Any]) -> None:
        """See Hold: closing gives back. A connection that is gone has given back; Dramatiq 1 logs
        an error with a traceback for it.
        """
        if self._raw.connection.is_open:
            self._raw.close()

    def _put_back(self, message: Any) -> None:
        tag = message._tag
        try:
            self._raw.known_tags.remove(tag)
        except KeyError:  # another thread has just acknowledged it
            return
        with translated():
            self._raw.connection.add_callback_threadsafe(
                partial(self._raw.channel.basic_nack, tag, requeue=True)
            )

    def _settle(self, how: Any, message: Any) -> None:
        try:
            how(message)
        except ConnectionClosed as error:
            # Of a connection that is gone: the worker would try for ever. exactly_once tells the
            # next delivery from the first.
            logger.warning(
                'id=%s: RabbitMQ delivers it again, since the connection that took it is gone: %s',
                message.message_id,
                error,
            )
