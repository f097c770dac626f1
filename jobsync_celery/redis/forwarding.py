"""Passing a message on within one Redis: the copy is stored and the original's record removed in
one transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kombu.transport import virtual
from kombu.utils.json import dumps
from kombu.utils.uuid import uuid

from ..broker.forwarding import Forwarder
from ..broker.queues import Queues
from ..parts import PASS_ON, missing

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['RedisForwarder']


class RedisForwarder(Forwarder):
    """Passes messages on with one trip in place of two, where the installed kombu allows it.

    Args:
        app, queues, patient: As for Forwarder.
    """

    def __init__(self, app: Celery, queues: Queues, patient: bool = True) -> None:
        super().__init__(app, queues, patient)
        self._in_one_trip = not missing((PASS_ON,))

    def _publish(self, queue: str, message: Any, headers: dict[str, Any]) -> None:
        if self._in_one_trip and getattr(message.channel, 'ack_emulation', False):
            self._pass_on(queue, message, headers)
        else:
            super()._publish(queue, message, headers)

    def _pass_on(self, queue: str, message: Any, headers: dict[str, Any]) -> None:
        channel = (self._producer or self._open()).channel
        raw = message._raw
        properties = raw['properties']
        copy = {
            **raw,
            'headers': headers,
            'properties': {
                **properties,
                'delivery_tag': uuid(),
                'delivery_info': {
                    **properties.get('delivery_info', {}),
                    'exchange': '',
                    'routing_key': queue,
                },
            },
        }
        with channel.conn_or_acquire() as client, client.pipeline() as pipe:
            pipe.lpush(channel._q_for_pri(queue, channel._get_message_priority(copy)), dumps(copy))
            message.channel.qos._remove_from_indices(message.delivery_tag, pipe)
            forgotten = pipe.execute()[-1]
        if forgotten:
            message.channel = _Forgotten(message.channel)


class _Forgotten:
    """In place of the channel of a message that Redis has forgotten: only kombu has to be told that
    it is acknowledged.
    """

    no_ack_consumers = None

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Count it as acknowledged, so that the next one may come."""
        virtual.QoS.ack(self._channel.qos, delivery_tag)
