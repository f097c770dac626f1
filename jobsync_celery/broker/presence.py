"""A worker's presence at the queues of its node on RabbitMQ: see `jobsync_core.worker.presence`."""

from __future__ import annotations

from typing import Any

from amqp.exceptions import AccessRefused, ChannelError, NotFound, RecoverableConnectionError

from jobsync_core.worker.presence import ARGUMENTS, presence_queue

from ..logs import get_logger
from .declaring import is_no_queue
from .queues import Queues

__all__ = ['Presence', 'is_present']

logger = get_logger(__name__)


class Presence:
    """Shown by the channel that takes the worker's messages. In the event loop.

    Args:
        app: The app.
        consumer: Celery's consumer.
        queues: The cluster's.
    """

    def __init__(self, app: Any, consumer: Any, queues: Queues) -> None:
        self._app = app
        self._consumer = consumer
        self._queues = queues
        self._refused = False
        #: Where it is shown, and by which channel.
        self._shown: set[str] = set()
        self._by: Any = None

    def announce(self) -> None:
        """The worker is about to consume its queues; once more does no harm.

        Raises:
            RecoverableConnectionError: RabbitMQ does not let it, and may in a moment.
        """
        consumed = [str(name) for name in self._app.amqp.queues.consume_from]
        for queue in consumed:
            if self._queues.is_of_cluster(queue):
                self._announce(presence_queue(queue))

    def _announce(self, name: str) -> None:
        connection = self._consumer.connection
        channel = connection.default_channel
        if channel is not self._by:
            self._shown, self._by = set(), channel
        if name in self._shown:
            return
        try:
            with connection.channel() as other:
                other.queue_declare(name, durable=True, auto_delete=False, arguments=ARGUMENTS)
            channel.basic_consume(name, consumer_tag=name, no_ack=True, callback=_ignore)
            self._shown.add(name)
        except AccessRefused as error:
            if not channel.is_open:
                raise RecoverableConnectionError(str(error)) from error
            self._tell(name, error)
        except NotFound as error:
            if not channel.is_open:
                raise RecoverableConnectionError(str(error)) from error
            # It is on a server of the cluster that is down, and nobody deletes the queue of the
            # node for as long. That one may be on several.
            logger.warning('JobSync: RabbitMQ cannot use the queue %s now: %s', name, error)
        except ChannelError as error:
            raise RecoverableConnectionError(str(error)) from error

    def _tell(self, name: str, error: Exception) -> None:
        if not self._refused:
            self._refused = True
            logger.warning(
                'JobSync: RabbitMQ refuses the queue %s (%s): should this worker be cut off from '
                'the database for long and then die, what it was running is lost. Let the user '
                'configure, write and read names as the documentation says',
                name,
                error,
            )

    def withdraw(self, queue: str) -> None:
        """Nothing is taken from a queue of the node any more, and nothing of it is in hand."""
        name = presence_queue(queue)
        if name in self._shown and self._by.is_open:
            self._shown.discard(name)
            self._by.basic_cancel(name)


def is_present(connection: Any, queue: str) -> bool:
    """Whether somebody may have taken messages from a node's queue and not acknowledged them.

    Args:
        connection: Kombu's.
        queue: The node's queue.

    Raises whatever py-amqp raises where RabbitMQ cannot tell.
    """
    try:
        with connection.channel() as channel:
            found = channel.queue_declare(presence_queue(queue), passive=True)
            return bool(found.consumer_count)
    except NotFound as error:
        if not is_no_queue(error):
            raise
        return False


def _ignore(message: Any) -> None:
    """Nobody sends anything there."""
