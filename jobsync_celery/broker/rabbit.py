"""RabbitMQ, as the duties need it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from amqp.exceptions import AccessRefused, NotFound
from kombu.connection import Connection
from kombu.entity import Queue

from jobsync_core.worker.consumer_timeout import REMEDY, is_heeded
from jobsync_core.worker.presence import presence_queue
from jobsync_core.worker.routing import parked_queue

from ..logs import get_logger
from .broker import CeleryBroker
from .declaring import declare_exchange, declare_queue, delete_empty
from .forwarding import CONNECT_SEC
from .presence import is_present

__all__ = ['RabbitBroker']

logger = get_logger(__name__)

#: Seconds after which an answer is not waited for any more.
_ANSWER_SEC = 10.0
#: Where Celery's native delayed delivery puts what is due.
_DELAYED = 'celery_delayed_delivery'


class RabbitBroker(CeleryBroker):
    """Node queues hang on an exchange whose alternate exchange leads to the parked queue."""

    catches_strays = True
    requeue_is_free = False  # a queue does not tell whether it is a quorum queue
    _looking: Any = None
    _warned = False

    def identify(self, make: bool) -> str | None:
        """The name of its cluster of servers, and the virtual host."""
        with self._app.connection_for_write() as connection:
            _ = connection.default_channel  # opens it
            name = getattr(connection.connection, 'server_properties', {}).get('cluster_name')
            return f'{name} {connection.virtual_host}' if name else ''

    def mark(self, mark: str) -> None:
        """Make again what node queues hang on and where strays are parked, should RabbitMQ have
        come back empty, or somebody have deleted it: consumers make no more than their own queues.
        """
        channel = self._open()
        try:
            for exchange in (self._queues.stray, self._queues.exchange, self._queues.topic):
                channel.exchange_declare(exchange.name, exchange.type, passive=True)
            for shared in (self._queues.parked, self._queues.unknown):
                channel.queue_declare(shared, passive=True)
        except self._missing():
            self.reset()
            with self._app.connection_for_write(connect_timeout=CONNECT_SEC) as connection:
                self._declare_shared(connection)

    def declare(self, queues: Mapping[str, str]) -> None:
        """As its base's; queues that are there with other arguments are made anew."""
        with self._app.connection_for_write() as connection:
            self._declare_shared(connection)
            self._warn_of_old(connection)
            for home, queue in queues.items():
                self._declare(connection, home, queue)

    def _declare(self, connection: Any, home: str, queue: str) -> None:
        parked = parked_queue(home, self._queues.appname)
        for name in (parked, queue):
            own: Any = self._queues.make(name)
            # The parked ones are shared, and never deleted: what comes just then would be lost.
            empty = None if name == parked else lambda: self._empty(queue, parked)
            bindings = self._queues.bindings_of(name)
            as_wanted = declare_queue(connection, own, empty, bindings)
            self._queues.settle(name, own.queue_arguments, as_wanted)
        if not home:
            self._bind(connection, queue)

    def _warn_of_old(self, connection: Any) -> None:
        version = connection.connection.server_properties.get('version')
        if not is_heeded(version) and not self._warned:
            self._warned = True
            logger.warning(
                'JobSync: RabbitMQ %s delivers the message of a task that outlasts its '
                'consumer_timeout, 30 minutes by default, a second time. To prevent it, %s',
                version,
                REMEDY,
            )

    def _declare_shared(self, connection: Any) -> None:
        parked: Any
        parked, unknown = (
            self._queues.make(name) for name in (self._queues.parked, self._queues.unknown)
        )
        for exchange in (self._queues.stray, self._queues.exchange, self._queues.topic):
            declare_exchange(connection, exchange)
        # Never deleted, either; and their arguments mean little.
        declare_queue(
            connection,
            Queue(
                parked.name,
                self._queues.stray,
                durable=True,
                queue_arguments=parked.queue_arguments,
            ),
        )
        for each in (parked, unknown):
            declare_queue(connection, each)
            self._bind(connection, each.name)

    def _bind(self, connection: Any, queue: str) -> None:
        """Hang a queue where messages for it are sent to."""
        with connection.channel() as channel:
            channel.queue_bind(queue, self._queues.exchange.name, queue)

    def _prepare(self, connection: Connection) -> Connection:
        """A broker that is stuck must not keep the duties from others for ever."""
        bounds = {'read_timeout': _ANSWER_SEC, 'write_timeout': _ANSWER_SEC}
        connection.transport_options = {**bounds, **(connection.transport_options or {})}
        return connection

    def _empty(self, queue: str, parked: str) -> bool:
        """Move a queue's messages to the parked ones, no more than there are at first; False where
        something of it may be in the hands of a former life of its node.
        """
        self._open()
        if is_present(self._connection, queue):
            return False
        for _ in range(self.size(queue)):
            delivery = self.take(queue)
            if delivery is None:
                break
            delivery.forward(parked)
        return True

    def delete(self, queue: str) -> bool:
        """Delete a queue if it is empty and nobody consumes it, nor has anything of it in hand;
        whether it is gone.
        """
        self._open()
        assert self._connection is not None
        if is_present(self._connection, queue):
            return False
        with self._connection.channel() as channel:
            bindings = self._queues.bindings_of(queue)
            gone = delete_empty(channel, queue, bindings)
        if gone:
            with self._connection.channel() as channel:
                channel.queue_delete(presence_queue(queue))
            self._unbind_delayed(bindings[-1][1])
        return gone

    def _unbind_delayed(self, key: str) -> None:
        """Take out what Celery has put in for native delayed delivery to a queue that is gone: of
        nodes that come and go more and more would stay.
        """
        assert self._connection is not None
        # This user may do what JobSync needs, and no more.
        with contextlib.suppress(AccessRefused), self._connection.channel() as channel:
            channel.exchange_unbind(self._queues.topic.name, _DELAYED, key)

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        """Queues that nodes that are gone may have left something in: one trip for each."""
        return frozenset(queue for queue in sorted(queues) if self._may_hold(queue))

    def _may_hold(self, queue: str) -> bool:
        """Whether something waits in a queue, or the queue makes trouble; on a channel of its own,
        as the answer that there is none closes it.
        """
        self._open()
        if self._looking is None or not self._looking.is_open:
            self._looking = self._connection.channel()  # type: ignore[union-attr]  # it is open
        try:
            return bool(self._looking.queue_declare(queue, passive=True).message_count)
        except NotFound:
            return False
        except self._missing() as error:
            logger.debug('queue=%s cannot be looked at: %r', queue, error)
            return True

    def reset(self) -> None:
        """Drop the connection after an error; the next call opens another."""
        self._looking = None
        super().reset()

    def size(self, queue: str) -> int:
        """How many messages wait in a queue; 0 where there is no such queue."""
        try:
            return int(self._open().queue_declare(queue, passive=True).message_count)
        except self._missing():
            self.reset()
            return 0
