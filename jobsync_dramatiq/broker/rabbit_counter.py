"""What waits in queues at RabbitMQ, which does not tell over AMQP what was taken from them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pika
from dramatiq.common import dq_name
from pika.exceptions import ChannelClosedByBroker

from jobsync_core.worker.backlog import QueueCount
from jobsync_core.worker.routing import is_of_cluster

from .declared import own_queues

__all__ = ['RabbitCounter']

_NOT_FOUND = 404


class RabbitCounter:
    """Counts and empties queues, on a connection that is opened for each question: those of
    Dramatiq's broker belong to threads.

    Args:
        native: The RabbitmqBroker.
        appname: The cluster.
    """

    #: The plugin's name.
    kind = 'dramatiq'

    def __init__(self, native: Any, appname: str) -> None:
        self._native = native
        self._appname = appname

    def homes(self) -> Iterable[str]:
        """The queues of the actors."""
        return own_queues(self._native, self._appname)

    def count(self, queues: Sequence[str], nodes: Mapping[str, str]) -> Mapping[str, QueueCount]:
        """What is ready in queues, and in the delay queues beside them."""
        found: dict[str, QueueCount] = {}
        with self._connected() as connection:
            for queue in queues:
                ready = _ready(connection, queue)
                later = (
                    None
                    if is_of_cluster(queue, self._appname)
                    else _ready(connection, dq_name(queue))
                )
                if ready is not None:
                    found[queue] = QueueCount(ready, delayed=later)
        return found

    def purge(self, queue: str) -> int:
        """Delete what is ready in a queue; how many messages. What was taken stays, and what is
        delayed.
        """
        with self._connected() as connection:
            if _ready(connection, queue) is None:
                return 0
            return int(connection.channel().queue_purge(queue).method.message_count)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        connection = pika.BlockingConnection(parameters=self._native.parameters)
        try:
            yield connection
        finally:
            with contextlib.suppress(Exception):  # it is not needed any more
                connection.close()


def _ready(connection: Any, queue: str) -> int | None:
    """How many messages are ready in a queue; None where there is none."""
    # A channel of its own: RabbitMQ closes it where there is no such queue.
    channel = connection.channel()
    try:
        count = int(channel.queue_declare(queue, passive=True).method.message_count)
    except ChannelClosedByBroker as error:
        # "Not found" is what RabbitMQ says as well of a queue whose server is down.
        if error.reply_code == _NOT_FOUND and 'no queue' in error.reply_text:
            return None
        raise
    channel.close()
    return count
