"""What a channel on Redis has delivered and not acknowledged, and how it delivers what cannot be
decoded.
"""

from __future__ import annotations

import sys
from typing import Any

from kombu.transport import virtual
from kombu.utils.json import dumps
from redis.exceptions import RedisError, ResponseError

from ..logs import get_logger
from .restoring import RestoringQoS
from .scripts import FOR_NOW, says

__all__ = ['RecordedQoS', 'UndecodedMessage']

logger = get_logger(__name__)
# kombu has no types.
plain_qos: Any = virtual.QoS
plain_message: Any = virtual.Message


class RecordedQoS(RestoringQoS):
    """kombu's record of what is not acknowledged, where the script may have written it already."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Remember a message as delivered."""
        if self.channel.recorded == delivery_tag:
            self.channel.recorded = None
            plain_qos.append(self, message, delivery_tag)
            return
        try:
            super().append(message, delivery_tag)
        except BaseException:
            delivery = message.delivery_info
            self.channel.carried.unrecorded[delivery_tag] = dumps(
                [message._raw, delivery['exchange'], delivery['routing_key']]
            )
            raise

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message."""
        self.channel.carried.acknowledged.add(delivery_tag)
        plain_qos.ack(
            self, delivery_tag
        )  # first: what is not confirmed is made again, and must not be restored
        self.channel.acknowledge(delivery_tag)

    def remove(self, delivery_tag: str | bytes) -> None:
        """Remove the record of an acknowledged message, and wait for the answer."""
        self._remove_from_indices(delivery_tag).execute()
        self.channel.carried.acknowledged.discard(delivery_tag)

    def can_consume(self) -> bool:
        """Whether another message may be delivered, or answers are due, which have to be read."""
        return any(self.channel.due) or bool(plain_qos.can_consume(self))

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Restore what has been taken for too long; kombu's timer calls this in the event loop,
        which an error would end.
        """
        try:
            super().restore_visible(*args, **kwargs)
        except ResponseError as error:
            if not says(error, FOR_NOW):
                raise
            logger.debug('looking for what was taken long ago: %r', error)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Restore what was delivered and not acknowledged; with the broker out of reach, the next
        connection does it.
        """
        try:
            super().restore_unacked_once(stderr)
        except (
            RedisError,
            OSError,
            AttributeError,
        ) as error:  # AttributeError: kombu, for a channel whose connection has been closed
            logger.info('JobSync: what the lost connection held is given back later: %r', error)


class UndecodedMessage(plain_message):  # type: ignore[misc]
    """A message that remembers why it cannot be decoded, where kombu's raises into the consumer."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **options)
        except Exception:  # whatever a codec raises, or headers that are none
            trouble, headers = sys.exc_info(), payload.get('headers')
            kept = (
                {name: value for name, value in headers.items() if name != 'compression'}
                if isinstance(headers, dict)
                else {}
            )
            super().__init__(
                {'properties': payload['properties'], 'headers': kept}, channel=channel
            )
            self._raw = payload
            self.errors.append(trouble)
