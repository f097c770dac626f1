"""The broker, as the duties and an evacuation need it: what both brokers do alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from kombu.connection import Connection
from kombu.serialization import prepare_accept_content

from jobsync_core.logs import shown
from jobsync_core.worker.broker import Delivery
from jobsync_core.worker.incoming import Refused, Stamps, read_name, read_stamps
from jobsync_core.worker.routing import HOME, HOPS, KEY, REDELIVERED, REFUSED, RETURNS, parked_queue

from ..incoming import Incoming, read_delivery
from .abandoning import abandon
from .forwarding import CONNECT_SEC, Forwarder
from .queues import Queues

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['CeleryBroker', 'RouteOf']


class RouteOf(Protocol):
    """Makes the route of a message: None where its task has no affinity or is not coordinated, a
    reason where it can have none. Raises nothing.
    """

    def __call__(
        self, name: str, args: object, kwargs: object, message_id: object, stamps: Stamps
    ) -> str | Refused | None: ...


class CeleryDelivery:
    """A message that was taken off a queue and is not acknowledged yet."""

    def __init__(self, broker: CeleryBroker, message: Any, queue: str) -> None:
        self._broker = broker
        self._message = message
        self._failed = False
        headers = message.headers if isinstance(message.headers, Mapping) else {}
        self.headers: dict[str, Any] = {
            name: value
            for name, value in headers.items()
            if name not in (KEY, HOPS, HOME, REDELIVERED, REFUSED, RETURNS)
        }
        if headers.get(REDELIVERED) is True:
            message.delivery_info['redelivered'] = True  # what was true of it stays true
        found = read_delivery(message)
        if isinstance(found, Incoming):  # the headers of protocol 1 say nothing of it
            self.id, self.task = shown(found.id), found.task
        else:
            self.id = shown(headers.get('id'))
            task = read_name(headers.get('task'), 'its task')
            self.task = '' if isinstance(task, Refused) else task
        self.route: str | None
        self.route, self.home = broker.address_of(message, queue)

    def forward(self, queue: str) -> None:
        """Publish it durably to a queue, then acknowledge it here."""
        self._failed = True
        self._broker.forwarder.send(
            queue,
            self._message,
            {
                **self.headers,
                HOPS: 0,
                HOME: self.home,
                **({KEY: self.route} if self.route is not None else {}),
            },
        )
        self._message.ack()

    def requeue(self) -> None:
        """Leave it in the queue that it came from; what could not go on, behind all others there,
        so that it keeps none waiting.
        """
        if self._failed:
            self._message.reject(requeue=True)
        else:
            self._broker.put_back(self._message)


class CeleryBroker:
    """What the duties ask of the broker; of one that is neither Redis nor RabbitMQ, all of it.

    Args:
        app: The app.
        queues: The cluster's.
        forwarder: Passes messages on; closed with this.
        route_of: Makes routes.
    """

    #: The plugin's name.
    kind = 'celery'
    #: See `jobsync_core.worker.broker`.
    catches_strays = False
    requeue_is_free = True
    #: Of the connection on which messages are taken, whatever the app's say.
    _transport_options: Mapping[str, Any] = {}

    def __init__(
        self, app: Celery, queues: Queues, forwarder: Forwarder, route_of: RouteOf
    ) -> None:
        self._app = app
        self._queues = queues
        self._route_of = route_of
        self.forwarder = forwarder
        self._connection: Connection | None = None
        self._channel: Any = None

    @property
    def place(self) -> str:
        """The broker's address, without its password."""
        with self._app.connection_for_write() as connection:
            return str(connection.as_uri())

    def identify(self, make: bool) -> str | None:
        """The mark of the broker: the same by whatever address it is reached, and another for each
        part of it ('' where there is none).

        Args:
            make: Make one where Redis has none; else None then.
        """
        return ''

    def mark(self, mark: str) -> None:
        """Write the cluster's mark where the broker has lost it."""

    def declare(self, queues: Mapping[str, str]) -> None:
        """Make a node's queues for its home queues, the parked ones for these, and what they hang
        on; over one connection.

        Args:
            queues: Home queue -> the node's queue for it.
        """
        parked = [parked_queue(home, self._queues.appname) for home in queues]
        with self._app.connection_for_write() as connection:
            for name in (self._queues.parked, self._queues.unknown, *parked, *queues.values()):
                self._queues.make(name)(connection.default_channel).declare()

    def address_of(self, message: Any, queue: str) -> tuple[str | None, str]:
        """The route of a message, made from its arguments where its task is known here, and its
        home queue.

        None as its route is what has none, or cannot be right: it goes home, where a gate sets it
        aside or runs it.

        Args:
            message: Kombu's message.
            queue: Where it was taken from.
        """
        stamps = read_stamps(message.headers)
        home = self._queues.own_home(stamps, message, queue)
        found = read_delivery(message)
        if isinstance(found, Refused):
            return None, home
        if found.task not in self._app.tasks:
            return stamps.key, home
        route = self._route_of(found.task, found.args, found.kwargs, found.id, stamps)
        return (None if isinstance(route, Refused) else route), home

    def put_back(self, message: Any) -> None:
        """Leave a message that was only looked at in its queue. RabbitMQ calls it redelivered from
        then on, so that there such messages are published anew (`requeue_is_free`).
        """
        message.reject(requeue=True)

    def restore(self, node: str) -> int:
        """Restore what a node that is gone had taken and not acknowledged; how many messages.

        RabbitMQ gives back by itself what a lost connection held.
        """
        return 0

    def restore_own(self, node: str) -> int:
        """Restore what this node's lost connections had taken; how many messages."""
        return 0

    def restore_shared(self, options: Mapping[str, Any]) -> int:
        """Restore what plain workers had taken and not acknowledged for longer than their
        visibility timeout; how many messages. RabbitMQ does so by itself.

        Args:
            options: The app's own transport options, without those of this node.
        """
        return 0

    def shared_every(self, options: Mapping[str, Any]) -> float:
        """Seconds between two looks at what plain workers had taken."""
        return math.inf

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        """Queues that nodes that are gone may have left something in: here, all.

        Args:
            queues: Each queue, and its node.
        """
        return frozenset(queues)

    def places(self) -> Iterable[str]:
        """Names of queues of this plugin that the broker itself knows of. RabbitMQ cannot list
        queues.
        """
        return ()

    def size(self, queue: str) -> int:
        """How many messages wait in a queue, those that somebody has taken not counted."""
        return int(self._open()._size(queue))

    def take(self, queue: str) -> Delivery | None:
        """The next message of a queue; None where it is empty or there is no such queue."""
        try:
            message = self._get(queue)
        except self._missing():
            self.reset()
            return None
        return CeleryDelivery(self, message, queue) if message is not None else None

    def _get(self, queue: str) -> Any:
        """As kombu's `Queue.get`, which raises where a message cannot be decompressed here: its
        owner may be able to.
        """
        channel = self._open()
        message = channel.basic_get(queue=queue, no_ack=False)
        if message is not None:
            convert = getattr(channel, 'message_to_python', None)
            message = convert(message) if convert is not None else message
            message.accept = prepare_accept_content(self._app.conf.accept_content)
        return message

    def delete(self, queue: str) -> bool:
        """Delete a queue if it is empty and nobody consumes it; whether it is gone."""
        try:
            self._open().queue_delete(queue, if_unused=True, if_empty=True)
        except self._missing():
            self.reset()
            return False
        return True

    def reset(self) -> None:
        """Drop the connection after an error; the next call opens another."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            abandon(connection)

    def close(self) -> None:
        """Close all connections."""
        self.reset()
        self.forwarder.close()

    def _open(self) -> Any:
        if self._channel is None:
            self._connection = self._prepare(
                self._app.connection_for_write(
                    connect_timeout=CONNECT_SEC, transport_options=dict(self._transport_options)
                )
            )
            self._channel = self._connection.default_channel
        return self._channel

    def _prepare(self, connection: Connection) -> Connection:
        """What a connection needs before it is opened."""
        return connection

    def _missing(self) -> tuple[type[BaseException], ...]:
        """How the broker says that there is no such queue."""
        return tuple(self._connection.channel_errors) if self._connection is not None else ()
