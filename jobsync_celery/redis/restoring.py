"""Restoring on Redis what was taken and not acknowledged, whatever it looks like.

kombu removes the record of a message and stores the message again in one transaction. It stores
nothing where the message has `headers: null` or `delivery_info: null`, which it had delivered well
before, where a priority is beyond all numbers, or where the bindings of the message's exchange
cannot be read: such a message is lost. Here each of them comes back, marked as redelivered where
there is room for the mark. A record that nobody can read is set aside once, so that it neither
stays for ever nor keeps others waiting.
"""

from __future__ import annotations

import functools
from typing import Any

from kombu.connection import Connection
from kombu.exceptions import InconsistencyError
from kombu.transport import redis
from kombu.utils.json import dumps

from jobsync_core.logs import shown
from jobsync_core.worker.incoming import Refused

from ..incoming import read_record
from ..logs import get_logger
from .client import is_redis, with_channel

__all__ = ['RestoringChannel', 'RestoringQoS', 'restoring']

logger = get_logger(__name__)
# kombu has no types.
transport: Any = redis


class RestoringQoS(transport.QoS):  # type: ignore[misc]
    """kombu's record of what is not acknowledged; restoring from it loses nothing."""

    def restore_by_tag(self, tag: str | bytes, client: Any = None, leftmost: bool = False) -> None:
        """Restore a message, if it is recorded.

        Args:
            tag: Its delivery tag.
            client: A client of redis-py.
            leftmost: Put it at the end of its queue.
        """
        refused: list[Refused] = []

        def restore(pipe: Any) -> None:
            refused.clear()  # Redis may have this done again
            text = pipe.hget(self.unacked_key, tag)
            pipe.multi()
            self._remove_from_indices(tag, pipe)
            if text is None:
                return
            record = read_record(text)
            if isinstance(record, Refused):
                refused.append(record)
            else:
                self.channel._do_restore_message(*record, pipe, leftmost)

        with self.channel.conn_or_acquire(client) as connected:
            connected.transaction(restore, self.unacked_key)
        for one in refused:
            # Redis has no dead letters.
            logger.error(
                'hash=%s: the record %s of a message that was not acknowledged cannot be read, '
                'and is dropped: %s',
                self.unacked_key,
                shown(tag, 60),
                one.reason,
            )


class RestoringChannel(transport.Channel):  # type: ignore[misc]
    """kombu's channel; restoring through it loses nothing."""

    QoS = RestoringQoS
    #: Delivery tag of a message that goes back as it came and where it was, as it was only looked
    #: at: a task may take `redelivered` for a sign that it has begun before, and killed its worker.
    looked_at: str | None = None

    def _do_restore_message(
        self, payload: Any, exchange: Any, routing_key: Any, pipe: Any, leftmost: bool = False
    ) -> None:
        if payload.get('headers') is None:
            payload['headers'] = {}  # which is how kombu reads it
        tag = payload['properties'].get('delivery_tag')
        if self.looked_at is not None and tag == self.looked_at:
            leftmost = False
        else:
            for marked in (payload['headers'], payload['properties']['delivery_info']):
                if isinstance(marked, dict):
                    marked['redelivered'] = True
        push = pipe.lpush if leftmost else pipe.rpush
        for queue in self._ways(exchange, routing_key):
            push(self._q_for_pri(queue, self._get_message_priority(payload)), dumps(payload))

    def _ways(self, exchange: Any, routing_key: Any) -> list[str]:
        """The queues that a message goes back to."""
        if not exchange:
            return list(self._lookup(exchange, routing_key))
        try:
            if self.get_table(exchange):
                return list(self._lookup(exchange, routing_key))
        except InconsistencyError:
            pass  # how an older kombu says that there are none
        logger.warning(
            'exchange=%s: its bindings are not in Redis any more; a message goes back to the '
            'queue of its routing key, %s',
            shown(exchange, 100),
            shown(routing_key, 100),
        )
        return [routing_key or self.deadletter_queue]

    def _get_message_priority(self, message: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._get_message_priority(message, *args, **kwargs)
        except OverflowError:  # JSON has numbers beyond all integers
            return super()._get_message_priority({'properties': {}}, *args, **kwargs)


@functools.cache
def _restoring(plain: Any) -> Any:
    if not is_redis(plain) or issubclass(plain.Channel, RestoringChannel):
        return plain
    return with_channel(plain, RestoringChannel)


def restoring(connection: Connection) -> Connection:
    """Let a connection that has not been opened yet restore without losing; other brokers' are
    left as they are.
    """
    plain: Any = connection.get_transport_cls
    vars(connection).update(get_transport_cls=lambda: _restoring(plain()))
    return connection
