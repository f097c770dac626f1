"""Which queues a cluster has at its app's broker, and where a message came from.

On RabbitMQ node queues hang on an exchange of their own, whose alternate exchange leads to the
parked queue: a message for a queue that has gone is parked, not lost. On Redis a queue is a list,
and publishing to it always succeeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kombu.entity import Exchange, Queue

from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.incoming import Stamps
from jobsync_core.worker.routing import old_node_queue, old_parked_queue, unknown_queue

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['Queues', 'driver_of']

_DRIVERS = ('redis', 'amqp', 'memory')


def driver_of(app: Celery) -> str:
    """'redis', 'amqp' or 'memory'.

    Raises:
        ConfigurationError: The broker is another one.
    """
    with app.connection_for_write() as connection:
        driver = str(connection.transport.driver_type)
    if driver not in _DRIVERS:
        raise ConfigurationError(
            f'broker transport {driver!r}: JobSync works with Redis and RabbitMQ; use redis:// or '
            'amqp://'
        )
    return driver


class Queues:
    """The queues of a cluster.

    Args:
        app: The app, whose own queues messages come from.
        driver: The broker's kind.
        appname: The cluster's.

    Attributes:
        parked: Name of the queue of messages that nobody takes now.
        unknown: Name of the queue of messages whose task no live node knows.
        exchange: Where node queues hang.
    """

    def __init__(self, app: Celery, driver: str, appname: str) -> None:
        self._app = app
        self._ours = old_node_queue(appname, '')
        self._priorities: dict[str, int | None] = {}
        self.driver = driver
        self.appname = appname
        self.parked, self.unknown = old_parked_queue(appname), unknown_queue(appname)
        name = f'jobsync.{appname}'
        self.stray = Exchange(f'{name}.unrouted', type='fanout', durable=True)
        self.exchange = (
            Exchange(
                name, type='direct', durable=True, arguments={'alternate-exchange': self.stray.name}
            )
            if driver == 'amqp'
            else Exchange('', type='direct')
        )

    def name_of(self, node: str) -> str:
        """The name of a node's queue."""
        return old_node_queue(self.appname, node)

    def is_of_cluster(self, queue: str) -> bool:
        """Whether a queue is one of the cluster's, by its name."""
        return queue.startswith(self._ours)

    def make(self, name: str, declare: bool = True) -> Queue:
        """A queue of the cluster: durable, never deleted by the broker, never expiring."""
        highest = self._highest_priority(name) if self.driver == 'amqp' else None
        return Queue(
            name,
            self.exchange,
            routing_key=name,
            durable=True,
            auto_delete=False,
            queue_arguments={'x-max-priority': highest} if highest else None,
            no_declare=not declare,
        )

    def _highest_priority(self, name: str) -> int | None:
        """The most that a queue of the app's own has, wherever that is said: what overtook others
        there overtakes them in the queue of a node as well. It is found once for each, as RabbitMQ
        refuses another answer; and not for the shared ones, which apps of other queues share.
        """
        if name in (self.parked, self.unknown):
            most: int | None = self._app.conf.task_queue_max_priority
            return most
        if name not in self._priorities:
            self._priorities[name] = self._highest_of_all()
        return self._priorities[name]

    def _highest_of_all(self) -> int | None:
        own = [
            queue for name, queue in self._app.amqp.queues.items() if not self.is_of_cluster(name)
        ]
        given = [
            self._app.conf.task_queue_max_priority,
            *(queue.max_priority for queue in own),
            *((queue.queue_arguments or {}).get('x-max-priority') for queue in own),
        ]
        return max((most for most in given if most), default=None)

    def home_of(self, message: Any) -> str:
        """The queue that a message was taken from, as far as it shows: of a node's queue it is the
        app's default one.
        """
        place = message.delivery_info or {}
        exchange, key = place.get('exchange') or '', place.get('routing_key')
        for name, queue in self._app.amqp.queues.consume_from.items():
            if not self.is_of_cluster(name) and (
                (not exchange and name == key)
                or (exchange == queue.exchange.name and key == queue.routing_key)
            ):
                return str(name)
        return str(self._app.conf.task_default_queue)

    def own_home(self, stamps: Stamps, message: Any) -> str:
        """The queue that a message was sent to: what it says itself, unless that is a queue of the
        cluster, to which it would be sent back again and again.
        """
        home = stamps.home
        return home if home and not self.is_of_cluster(home) else self.home_of(message)

    def is_of_node(self, message: Any) -> bool:
        """Whether a message came from the queue of a node on RabbitMQ: it has no dead letters."""
        place = message.delivery_info or {}
        return self.driver == 'amqp' and place.get('exchange') == self.exchange.name
