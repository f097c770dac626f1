"""How messages get into queues at RabbitMQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pika
from dramatiq import Message
from dramatiq.common import q_name, xq_name
from dramatiq.errors import ConnectionClosed
from pika.exceptions import UnroutableError

from jobsync_core.logs import get_logger
from jobsync_core.worker.incoming import Refused
from jobsync_core.worker.returns import COUNT, earlier_returns, has_returned_too_often, returns_of
from jobsync_core.worker.routing import (
    RETURNS,
    WAITS,
    home_of_queue,
    is_of_cluster,
    old_parked_queue,
)

from ..incoming import priority_of, read_message
from .copies import copy_for, dead_letters, home_of
from .interface import Origins
from .rabbit_declaring import RabbitDeclarations
from .rabbit_errors import BROKEN

__all__ = ['RabbitPublisher', 'RawDelivery']

logger = get_logger(__name__)

#: Attempts to publish: a connection that was idle for long is found to be broken only at its next
#: use.
_ATTEMPTS = 3
_ACCESS_REFUSED = 403


@dataclass(frozen=True)
class RawDelivery:
    """A delivery as RabbitMQ sent it.

    Attributes:
        queue: Where it came from.
        tag: What its channel calls it.
        data: The message.
        priority: Its priority.
        counts: It comes from a queue that counts what comes back: a quorum queue.
        headers: What RabbitMQ and the plugin wrote on it.
        redelivered: Somebody had taken it before.
    """

    queue: str
    tag: int
    data: bytes
    priority: int | None
    counts: bool
    headers: Mapping[str, Any]
    redelivered: bool

    @classmethod
    def of(cls, queue: str, method: Any, properties: Any, data: bytes) -> RawDelivery:
        """Of what pika gives."""
        headers = properties.headers or {}
        counts = isinstance(headers.get(COUNT), int)
        redelivered = bool(method.redelivered)
        tag, priority = method.delivery_tag, properties.priority
        return cls(queue, tag, data, priority, counts, headers, redelivered)


class RabbitPublisher:
    """Publishes and declares, on the connection that Dramatiq's broker keeps for each thread.

    Args:
        native: The RabbitmqBroker.
        appname: The cluster.
        origins: What this process knows of actors.

    Attributes:
        queues: Declares and deletes the plugin's own queues.
    """

    def __init__(self, native: Any, appname: str, origins: Origins) -> None:
        self._native = native
        self._appname = appname
        self._origins = origins
        self._parked = old_parked_queue(appname)
        self.queues = RabbitDeclarations(native, appname)
        #: Dead letters that this user may not write to.
        self._refused: set[str] = set()

    def publish(
        self, message: Any, queue: str, route: str | None, hops: int, raw: RawDelivery | None = None
    ) -> None:
        """Publish a copy of a message to a queue; with confirms it returns when RabbitMQ has it.

        Raises:
            ConnectionClosed: It is not known to be there.
        """
        copy = copy_for(queue, message, route, hops)
        if getattr(message, 'redelivered', False):
            copy.options.setdefault(WAITS, 1)  # RabbitMQ does not say of a copy that it came before
        raw = raw or getattr(message, 'raw', None)
        returns = returns_of(raw.headers) if raw is not None else 0
        priority = priority_of(copy.options)
        self._publish_raw(self._exchange_of(queue), queue, copy.encode(), priority, returns)

    def publish_again(self, raw: RawDelivery) -> None:
        """Publish a message to the end of the queue that it came from, as it is.

        Raises:
            ConnectionClosed: It is not known to be there.
        """
        data = _come_before(raw.data) if raw.redelivered else raw.data
        exchange, returns = self._exchange_of(raw.queue), returns_of(raw.headers)
        self._publish_raw(exchange, raw.queue, data, raw.priority, returns)

    def requeues_anew(self, raw: RawDelivery) -> bool:
        """Where a queue counts what goes back, publish a message anew: at its limit the queue would
        drop it. Whether it is there, and is to be acknowledged.
        """
        if not (raw.counts or self.queues.counts(self._home_of(raw.queue))):
            return False
        try:
            self.publish_again(replace(raw, data=_come_before(raw.data)))
        except ConnectionClosed as error:
            logger.warning(
                'queue=%s: a message goes back, and that is counted: %s', raw.queue, error
            )
            return False
        return True

    def is_worn_out(self, raw: RawDelivery) -> bool:
        """Whether a message has come back to queues more often than its own one allows."""
        if not earlier_returns(raw.headers):
            return False
        return has_returned_too_often(raw.headers, self.queues.limit_of(self._home_of(raw.queue)))

    def _home_of(self, queue: str) -> str:
        return home_of_queue(queue, self._appname) or q_name(queue)

    def _exchange_of(self, queue: str) -> str:
        return self.queues.exchange if self.is_own(queue) else ''

    def is_own(self, queue: str) -> bool:
        """Whether a queue is one of the cluster's."""
        return is_of_cluster(queue, self._appname)

    def bury(self, message: Any) -> None:
        """Put a message that came from a node's queue among the dead letters of its home queue.

        Raises:
            ConnectionClosed: It is not known to be there.
        """
        home = home_of(message)
        self._publish('', xq_name(home), copy_for(home, message, None))

    def set_aside(self, channel: Any, queue: str, tag: int, data: bytes, reason: str) -> None:
        """Put what no worker can have among the dead letters, as it is. From the user's own queue,
        and from those that have its dead letters, RabbitMQ does so itself.
        """
        dead, own = dead_letters(queue, data, self._appname, self._origins), xq_name(self._parked)
        shared = home_of_queue(queue, self._appname) == ''
        sends = shared and dead not in (own, *self._refused)
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
        logger.error('queue=%s goes to %s: %s', queue, dead if sends or not shared else own, reason)
        if sends:
            channel.basic_ack(tag)
        else:
            channel.basic_nack(tag, requeue=False)

    def _publish(self, exchange: str, queue: str, message: Message[Any]) -> None:
        self._publish_raw(exchange, queue, message.encode(), priority_of(message.options))

    def _publish_raw(
        self, exchange: str, queue: str, data: bytes, priority: int | None = None, returns: int = 0
    ) -> None:
        broken: Exception | None = None
        for _ in range(_ATTEMPTS):
            try:
                if exchange:
                    channel = self.queues.channel()
                else:
                    # Asks RabbitMQ only where the queue was missed before.
                    self._native._ensure_queue(q_name(queue))
                    channel = self._native.channel
                channel.basic_publish(
                    exchange,
                    queue,
                    data,
                    mandatory=self._native.confirm_delivery,
                    properties=pika.BasicProperties(
                        delivery_mode=2,
                        priority=priority,
                        headers={RETURNS: returns} if returns else None,
                    ),
                )
                return
            except UnroutableError as error:
                # The queue was deleted, or never made. declare_queue would have this worker consume
                # it.
                broken = error
                self.queues.forget()
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


def _come_before(data: bytes) -> bytes:
    """A message that says itself that it came before, as RabbitMQ does not say it of a copy."""
    found = read_message(data)
    if isinstance(found, Refused):
        return data
    found.options.setdefault(WAITS, 1)
    return found.encode()
