"""What a process sends: messages of coordinated actors go straight to the owner's queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dramatiq.errors import ConnectionClosed

from jobsync_core import clock
from jobsync_core.job import Job
from jobsync_core.logs import Repeats, get_logger
from jobsync_core.worker.lookup import OwnerLookup
from jobsync_core.worker.node_of_tests import node_of_tests
from jobsync_core.worker.routing import HOME, HOPS, KEY
from jobsync_core.worker.settings import PluginSettings

from .actors import Actors, check_message
from .broker.interface import WorkerBroker
from .broker.opening import open_broker

__all__ = ['Producer']

logger = get_logger(__name__)


class Producer:
    """Stands in place of a broker's `enqueue`.

    Args:
        native: Dramatiq's broker.
        settings: Gives the plugin's settings, which are read when they are needed first.

    Attributes:
        job: The node of this process; None in one that only sends.
        lookup: Knows the owners' queues.
    """

    def __init__(self, native: Any, settings: Callable[[], PluginSettings]) -> None:
        self._native = native
        self._settings = settings
        self._enqueue = native.enqueue
        self._actors: Actors | None = None
        self._broker: WorkerBroker | None = None
        self._repeats = Repeats()
        self.job: Job | None = None
        self.lookup = OwnerLookup(settings, lambda: self.job, lambda name: self.actors.pin_of(name))

    @property
    def actors(self) -> Actors:
        """The coordinated actors of the broker."""
        if self._actors is None:
            self._actors = Actors(self._native, self._settings())
        return self._actors

    @property
    def broker(self) -> WorkerBroker:
        """How this process works with the broker.

        Raises:
            ConfigurationError: The broker is neither of Redis nor of RabbitMQ.
        """
        if self._broker is None:
            self._broker = open_broker(self._native, self._settings().config, self.actors)
        return self._broker

    def enqueue(self, message: Any, *, delay: int | None = None) -> Any:
        """Send a message, straight to the owner's queue if that is known.

        Args:
            message: The message.
            delay: Milliseconds until it is due; None: at once.
        """
        for name in (HOPS, HOME):
            message.options.pop(name, None)
        check_message(message)
        queue = (
            self._owner_queue(message) if delay is None and 'eta' not in message.options else None
        )
        if queue is None:
            return self._enqueue(message, delay=delay)
        # To all middleware, and to who asks for the result, the message is in its actor's own
        # queue.
        self._native.emit_before('enqueue', message, delay)
        try:
            self.broker.send(message, queue, message.options[KEY])
        except ConnectionClosed as error:
            # RabbitMQ may refuse this user the plugin's exchange. A worker sends the message on.
            more = self._repeats.say(repr(error), clock.now())
            if more is not None:
                logger.warning(
                    'id=%s goes to its home queue: %s%s', message.message_id, error, more
                )
            return self._enqueue(message, delay=delay)
        self._native.emit_after('enqueue', message, delay)
        return message

    def _owner_queue(self, message: Any) -> str | None:
        if node_of_tests() is not None:
            return None
        try:
            route = self.actors.route_of(message)
            if route is None:
                if self.actors.is_known(message):
                    message.options.pop(KEY, None)
                return None
            message.options[KEY] = route
            _ = self.broker  # one of another kind is refused here
            return self.lookup.queue_of(route, message.queue_name)
        # whatever a key function raises: the actor will say what is wrong with its arguments
        except Exception as error:
            message.options.pop(KEY, None)
            logger.debug('actor=%s goes to its home queue: %s', message.actor_name, error)
            return None
