"""RabbitMQ, as the duties need it."""

from __future__ import annotations

from typing import Any

from kombu.entity import Queue

from .broker import CeleryBroker
from .declaring import declare_exchange, declare_queue

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

    def declare(self, queue: str) -> None:
        """Make a node's queue, the exchange it hangs on, and the shared queues."""
        parked: Any
        parked, unknown, own = (
            self._queues.make(name) for name in (self._queues.parked, self._queues.unknown, queue)
        )
        with self._app.connection_for_write() as connection:
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
            mine = self._app.amqp.queues.get(queue)
            if (
                not declare_queue(connection, own, lambda: self._park_all(queue, parked.name))
                and mine is not None
            ):
                mine.no_declare = True  # its consumer would end the worker

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
