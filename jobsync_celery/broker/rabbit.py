"""RabbitMQ, as the duties need it."""

from __future__ import annotations

from typing import Any

from kombu.entity import Queue

from .broker import CeleryBroker
from .declaring import declare_exchange, declare_queue
from .forwarding import CONNECT_SEC

__all__ = ['RabbitBroker']


class RabbitBroker(CeleryBroker):
    """Node queues hang on an exchange whose alternate exchange leads to the parked queue."""

    catches_strays = True

    def identify(self, make: bool) -> str | None:
        """The name of its cluster of servers, and the virtual host."""
        with self._app.connection_for_write() as connection:
            _ = connection.default_channel  # opens it
            name = getattr(connection.connection, 'server_properties', {}).get('cluster_name')
            return f'{name} {connection.virtual_host}' if name else ''

    def mark(self, mark: str) -> None:
        """Make again where strays are parked, should RabbitMQ have come back empty: consumers make
        no more than their own queues.
        """
        channel = self._open()
        try:
            channel.exchange_declare(self._queues.stray.name, 'fanout', passive=True)
            for shared in (self._queues.parked, self._queues.unknown):
                channel.queue_declare(shared, passive=True)
        except self._missing():
            self.reset()
            with self._app.connection_for_write(connect_timeout=CONNECT_SEC) as connection:
                self._declare_shared(connection)

    def declare(self, queue: str) -> None:
        """Make a node's queue, the exchange it hangs on, and the shared queues."""
        parked, own = self._queues.parked, self._queues.make(queue)
        with self._app.connection_for_write() as connection:
            self._declare_shared(connection)
            mine = self._app.amqp.queues.get(queue)
            if (
                not declare_queue(connection, own, lambda: self._park_all(queue, parked))
                and mine is not None
            ):
                mine.no_declare = True  # its consumer would end the worker

    def _declare_shared(self, connection: Any) -> None:
        parked: Any
        parked, unknown = (
            self._queues.make(name) for name in (self._queues.parked, self._queues.unknown)
        )
        for exchange in (self._queues.stray, self._queues.exchange):
            declare_exchange(connection, exchange)
        # The shared ones are never deleted: what comes just then would be lost. Their arguments
        # mean little.
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

    def _park_all(self, queue: str, parked: str) -> None:
        """Move a queue's messages to the parked ones; no more than there are at first."""
        for _ in range(self.size(queue)):
            delivery = self.take(queue)
            if delivery is None:
                return
            delivery.forward(parked)

    def size(self, queue: str) -> int:
        """How many messages wait in a queue; 0 where there is no such queue."""
        try:
            return int(self._open().queue_declare(queue, passive=True).message_count)
        except self._missing():
            self.reset()
            return 0
