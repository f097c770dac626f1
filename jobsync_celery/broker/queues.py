"""Which queues a cluster has at its app's broker, and where a message came from.

On RabbitMQ node queues hang on an exchange of their own, whose alternate exchange leads to the
parked queue: a message for a queue that has gone is parked, not lost. Celery knows them on a second
exchange, a topic one, since its native delayed delivery can bind to no direct one. On Redis a queue
is a list, and publishing to it always succeeds.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

from kombu.entity import Exchange, Queue

from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.consumer_timeout import ARGUMENT, LONGEST_MS
from jobsync_core.worker.incoming import Stamps
from jobsync_core.worker.routing import old_node_queue, old_parked_queue, unknown_queue

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['Queues', 'driver_of']

_PRIORITY = 'x-max-priority'
_DRIVERS = ('redis', 'amqp', 'memory')
#: Words of a binding's key that stand for others.
_WILDCARDS = frozenset('*#')


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
        topic: Where Celery knows them.
        stray: Where messages for queues that are gone come out.
    """

    def __init__(self, app: Celery, driver: str, appname: str) -> None:
        self._app = app
        self._ours = old_node_queue(appname, '')
        self._arguments: dict[str, dict[str, int]] = {}
        self.driver = driver
        self.appname = appname
        self.parked, self.unknown = old_parked_queue(appname), unknown_queue(appname)
        name = f'jobsync.{appname}'
        self.stray = Exchange(f'{name}.unrouted', type='fanout', durable=True)
        plain = Exchange('', type='direct')
        self.exchange, self.topic = (
            (self._exchange(name, 'direct'), self._exchange(f'{name}.nodes', 'topic'))
            if driver == 'amqp'
            else (plain, plain)
        )

    def _exchange(self, name: str, kind: str) -> Exchange:
        alternate = {'alternate-exchange': self.stray.name}
        return Exchange(name, type=kind, durable=True, arguments=alternate)

    def name_of(self, node: str) -> str:
        """The name of a node's queue."""
        return old_node_queue(self.appname, node)

    def is_of_cluster(self, queue: str) -> bool:
        """Whether a queue is one of the cluster's, by its name."""
        return queue.startswith(self._ours)

    def make(self, name: str, declare: bool = True) -> Queue:
        """A queue of the cluster: durable, never deleted by the broker, never expiring."""
        return Queue(
            name,
            self.topic,
            routing_key=self._key_of(name),
            durable=True,
            auto_delete=False,
            queue_arguments=self._arguments_of(name) if self.driver == 'amqp' else None,
            no_declare=not declare,
        )

    def _key_of(self, name: str) -> str:
        """The key of a queue on the topic exchange: its name, unless that has wildcards."""
        if self.driver == 'amqp' and not _WILDCARDS.isdisjoint(name.split('.')):
            return f'{self._ours}{sha256(name.encode()).hexdigest()}'
        return name

    def bindings_of(self, name: str) -> list[tuple[str, str]]:
        """The ways into a queue of the cluster: (exchange, routing key). Celery adds the last one,
        for native delayed delivery.
        """
        key = self._key_of(name)
        return [(self.exchange.name, name), (self.topic.name, key), (self.topic.name, f'#.{key}')]

    def _arguments_of(self, name: str) -> dict[str, int]:
        """What overtook others in a queue of the app's own overtakes them in the queue of a node as
        well, and what may take long there may here. It is found once for each, as RabbitMQ refuses
        another answer; and not for the shared ones, which apps of other queues share.
        """
        if name in (self.parked, self.unknown):
            most: int | None = self._app.conf.task_queue_max_priority
            return {_PRIORITY: most} if most else {}
        if name not in self._arguments:
            highest = self._highest_of_all()
            patience = {ARGUMENT: self._longest_of_all()}
            self._arguments[name] = {_PRIORITY: highest, **patience} if highest else patience
        return dict(self._arguments[name])  # Celery writes into what it gets

    def _highest_of_all(self) -> int | None:
        own = [
            queue for name, queue in self._app.amqp.queues.items() if not self.is_of_cluster(name)
        ]
        given = [
            self._app.conf.task_queue_max_priority,
            *(queue.max_priority for queue in own),
            *((queue.queue_arguments or {}).get(_PRIORITY) for queue in own),
        ]
        return max((most for most in given if most), default=None)

    def _longest_of_all(self) -> int:
        given = (
            (queue.queue_arguments or {}).get(ARGUMENT)
            for name, queue in self._app.amqp.queues.items()
            if not self.is_of_cluster(name)
        )
        return max((limit for limit in given if limit), default=LONGEST_MS)

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
        return self.driver == 'amqp' and self.is_node_exchange(place.get('exchange'))

    def is_node_exchange(self, name: object) -> bool:
        """Whether an exchange is one of those of node queues."""
        return bool(name) and name in (self.exchange.name, self.topic.name)
