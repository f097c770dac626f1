"""Which queues a cluster has at its app's broker, and where a message came from.

A node has a queue of its own for each home queue that it consumes, with the home queue's own
arguments. On RabbitMQ these hang on an exchange of the cluster, whose alternate exchange leads to a
parked queue: a message for a queue that has gone is parked, not lost. It is a topic exchange, since
Celery's native delayed delivery can bind to no direct one. The queues of the old layout, one for
each node, hang on a direct one. On Redis a queue is a list, and publishing to it always succeeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from kombu.entity import Exchange, Queue

from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.consumer_timeout import ARGUMENT, LONGEST_MS
from jobsync_core.worker.incoming import Stamps
from jobsync_core.worker.returns import limit_of
from jobsync_core.worker.routing import (
    home_of_queue,
    old_node_queue,
    old_parked_queue,
    parked_queue,
    unknown_queue,
)

from .homes import arguments_for, home_name, is_way_into

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['Queues', 'driver_of']

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
        parked: Name of the queue of parked messages in the old layout; it is there still, for
            messages whose queue has gone.
        unknown: Name of the queue of messages whose task no live node knows.
        exchange: Where queues of the old layout hang.
        topic: Where node queues hang.
        stray: Where messages for queues that are gone come out.
    """

    def __init__(self, app: Celery, driver: str, appname: str) -> None:
        self._app = app
        self._ours = old_node_queue(appname, '')
        #: Home queues by the routing keys of the queues that stand for them.
        self._homes: dict[str, str] = {}
        #: What RabbitMQ takes of a queue's arguments, and whether it has other ones.
        self._settled: dict[str, tuple[dict[str, Any] | None, bool]] = {}
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

    def homes(self) -> list[str]:
        """The home queues that this worker consumes."""
        consumed = self._app.amqp.queues.consume_from
        return [
            home_name(queue) for name, queue in consumed.items() if not self.is_of_cluster(name)
        ]

    def is_of_cluster(self, queue: str) -> bool:
        """Whether a queue is one of the cluster's, by its name."""
        return self._home_of_name(queue) is not None

    def _home_of_name(self, queue: str) -> str | None:
        return home_of_queue(queue, self.appname)

    def make(self, name: str, declare: bool = True) -> Queue:
        """A queue of the cluster: durable, never deleted by the broker, never expiring."""
        key, home = self.way_to(name)[1], self._home_of_name(name)
        if home:
            self._homes[key] = home
        arguments, other = self._settled.get(name) or (self._arguments(name, home), False)
        return Queue(
            name,
            self.topic,
            routing_key=key,
            durable=True,
            auto_delete=False,
            queue_arguments=arguments or None,
            no_declare=other or not declare,
        )

    def counts(self, home: str) -> bool:
        """Whether a home queue is known to count what comes back to it, and so are those that stand
        for it.
        """
        return self._given(home).get('x-queue-type') == 'quorum'

    def limit_of(self, home: str, version: object) -> int | None:
        """How often a message may come back to a home queue: see `jobsync_core.worker.returns`.

        Args:
            home: The queue.
            version: RabbitMQ's, as it says.
        """
        return limit_of(self._given(home), version)

    def _given(self, home: str) -> Mapping[str, Any]:
        queues = self._app.amqp.queues
        own = queues.aliases.get(home) or queues.get(home)
        return (own.queue_arguments if own is not None else None) or {}

    def settle(self, name: str, arguments: dict[str, Any] | None, as_wanted: bool) -> None:
        """A queue has been declared: its consumer declares it as well, and what RabbitMQ refuses
        would end the worker.

        Args:
            name: The queue.
            arguments: What RabbitMQ takes.
            as_wanted: It has these.
        """
        self._settled[name] = arguments, not as_wanted
        mine = self._app.amqp.queues.get(name)
        if mine is not None:
            mine.queue_arguments, mine.no_declare = arguments, not as_wanted

    def _arguments(self, name: str, home: str | None) -> dict[str, Any]:
        if self.driver != 'amqp':
            return {}
        if not home:  # shared ones, which apps of other queues share
            most = self._app.conf.task_queue_max_priority
            return {'x-max-priority': most} if most else {}
        queues = self._app.amqp.queues
        # Another app's queue may not be known here: it is not for this one to make.
        own = queues.aliases.get(home) or queues.get(home)
        found = arguments_for(own) if own is not None else {}
        if name != parked_queue(home, self.appname):
            found.setdefault(ARGUMENT, LONGEST_MS)  # what may take long at home may here
        return found

    def way_to(self, name: str) -> tuple[str, str]:
        """Exchange and routing key of messages for a queue of the cluster."""
        if self.driver != 'amqp':
            return '', name
        home = self._home_of_name(name)
        if not home:
            return self.exchange.name, name
        return self.topic.name, self._key_of(name, home)

    def _key_of(self, name: str, home: str) -> str:
        """The key of a queue on the topic exchange: its name, where nothing but that is meant by
        it. Celery binds `#.<key>` as well, by which the queue of `b` would get what is for `a.b`.
        """
        rest = name[len(home) + 1 :]
        if '.' in home or home in _WILDCARDS:
            home = _short(home)
        return f'{home}.{rest if _WILDCARDS.isdisjoint(rest.split(".")) else _short(rest)}'

    def bindings_of(self, name: str) -> list[tuple[str, str]]:
        """The ways into a queue of the cluster: (exchange, routing key). Celery adds the last one,
        for native delayed delivery.
        """
        key = self.way_to(name)[1]
        return [(self.exchange.name, name), (self.topic.name, key), (self.topic.name, f'#.{key}')]

    def home_of(self, message: Any) -> str:
        """The home queue of the queue that a message was taken from, as far as it shows."""
        found = self._taken_from(message)
        if found is None:
            mine = self._consumed()
            found = home_name(mine[0]) if len(mine) == 1 else None
        return found or str(self._app.conf.task_default_queue)

    def _consumed(self) -> list[Any]:
        """Those of the user's own queues that this worker consumes."""
        queues = self._app.amqp.queues.consume_from
        return [queue for name, queue in queues.items() if not self.is_of_cluster(name)]

    def _taken_from(self, message: Any) -> str | None:
        """The home queue of the queue that a message was taken from, where the message tells."""
        place = message.delivery_info or {}
        exchange, key = place.get('exchange') or '', str(place.get('routing_key') or '')
        own = self._homes.get(key) or self._home_of_name(key)
        if own and (not exchange or self.is_node_exchange(exchange)):
            return own
        found = (queue for queue in self._consumed() if is_way_into(queue, exchange, key))
        return next((home_name(queue) for queue in found), None)

    def own_home(self, stamps: Stamps, message: Any, queue: str = '') -> str:
        """The queue that a message was sent to: that it was taken from, or whose queue of a node
        that is. What the message itself says counts for queues that serve several, since anybody
        may say it: a message that names a queue that nobody consumes would be sent there.

        Args:
            stamps: What it says.
            message: Kombu's message.
            queue: The queue that it was taken from; '' where that is not known.
        """
        named = self._home_of_name(queue) if queue else self._taken_from(message)
        if named:
            return named
        if queue and named is None:
            return queue
        home = stamps.home
        if home and (
            not self.is_of_cluster(home) if queue else home in map(home_name, self._consumed())
        ):
            return home
        return self.home_of(message)

    def is_of_node(self, message: Any) -> bool:
        """Whether a message came from the queue of a node on RabbitMQ: its dead letters are those
        of its home queue.
        """
        place = message.delivery_info or {}
        return self.driver == 'amqp' and self.is_node_exchange(place.get('exchange'))

    def is_node_exchange(self, name: object) -> bool:
        """Whether an exchange is one of those of node queues."""
        return bool(name) and name in (self.exchange.name, self.topic.name)


def _short(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12]
