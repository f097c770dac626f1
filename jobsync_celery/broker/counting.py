"""What waits in queues, as a broker tells it through kombu."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobsync_core.worker.backlog import QueueCount
from jobsync_core.worker.routing import is_of_cluster

from .forwarding import CONNECT_SEC
from .queues import Queues

if TYPE_CHECKING:
    from celery import Celery
    from kombu.connection import Connection

__all__ = ['CeleryCounter']


def _routed_to(routes: Any) -> set[str]:
    """The queues that `task_routes` names: a table, or a sequence of tables, pairs and others."""
    if isinstance(routes, Mapping):
        places = [
            place.get('queue') if isinstance(place, Mapping) else place for place in routes.values()
        ]
        return {str(getattr(place, 'name', place)) for place in places if place}
    if not isinstance(routes, (list, tuple)):
        return set()
    if len(routes) == 2 and isinstance(routes[0], str):
        return _routed_to({routes[0]: routes[1]})
    return set().union(*map(_routed_to, routes))


class CeleryCounter:
    """Counts and empties queues, on a connection that is opened for each question.

    Args:
        app: The app.
        queues: The cluster's.
    """

    #: The plugin's name.
    kind = 'celery'

    def __init__(self, app: Celery, queues: Queues) -> None:
        self._app: Any = app
        self._queues = queues

    def homes(self) -> Iterable[str]:
        """The queues that the app names."""
        named = {
            str(name)
            for name, queue in self._app.amqp.queues.items()
            # The queues of a broadcast are one for each worker, with names that say nothing.
            if queue.exchange.type != 'fanout'
        }
        # What a route names, and nobody consumes, would wait unseen.
        queues = self._app.amqp.queues
        named |= _routed_to(self._app.conf.task_routes).difference(queues.aliases, queues)
        return sorted(name for name in named if not is_of_cluster(name, self._queues.appname))

    def count(self, queues: Sequence[str], nodes: Mapping[str, str]) -> Mapping[str, QueueCount]:
        """What is ready in queues; AMQP does not tell what was taken."""
        with self._connect() as connection:
            found = {queue: _ready(connection, queue) for queue in queues}
        return {queue: QueueCount(ready) for queue, ready in found.items() if ready is not None}

    def purge(self, queue: str) -> int:
        """Delete what is ready in a queue; how many messages. What was taken stays."""
        with self._connect() as connection, connection.channel() as channel:
            try:
                return int(channel.queue_purge(queue) or 0)
            except connection.channel_errors:
                if _ready(connection, queue) is None:
                    return 0
                raise

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        with self._app.connection_for_write(connect_timeout=CONNECT_SEC) as connection:
            connection.connect()  # once: a channel would be tried for again and again
            yield connection


def _ready(connection: Connection, queue: str) -> int | None:
    """How many messages are ready in a queue; None where there is none."""
    # A channel of its own: RabbitMQ closes it where there is no such queue.
    try:
        with connection.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).message_count)
    except connection.channel_errors as error:
        # "Not found" is what RabbitMQ says as well of a queue whose server is down.
        if 'no queue' in str(error):
            return None
        raise
