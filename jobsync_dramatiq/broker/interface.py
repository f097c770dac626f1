"""What producers, the gate and the node's duties ask of a broker: there is one such class for
Redis, and one for RabbitMQ.
"""

from __future__ import annotations

from typing import Any, Protocol

from jobsync_core.worker.evacuation import Evacuable
from jobsync_core.worker.incoming import Refused, Stamps

from ..incoming import Said

__all__ = ['Origins', 'QueueConsumer', 'UnknownOrigins', 'WorkerBroker']


class Origins(Protocol):
    """What a process knows of the actors of messages: their routes, and the queues that they were
    declared with.
    """

    def read_route(self, message: Any, stamps: Stamps) -> str | Refused | None:
        """The route of a message, or why it has none; None where its actor is not coordinated."""

    def home_of(self, message: Any, stamp: str | None) -> str:
        """The queue that a message was sent to.

        Args:
            message: The message.
            stamp: What it says itself.
        """

    def home_of_unreadable(self, said: Said) -> str | None:
        """The queue to which a message was sent that no worker can have; None where nothing
        tells.
        """


class UnknownOrigins:
    """Origins of a process that knows no actors: what a message says counts, if it can be right."""

    def read_route(self, message: Any, stamps: Stamps) -> str | Refused | None:
        """The route that the message carries."""
        return stamps.key

    def home_of(self, message: Any, stamp: str | None) -> str:
        """The queue that the message names."""
        return stamp or str(message.queue_name)

    def home_of_unreadable(self, said: Said) -> str | None:
        """The queue that the message names."""
        return said.stamp or said.queue


class QueueConsumer(Protocol):
    """The broker's own consumer of one queue. Only `ack`, `nack` and `requeue` may be called by
    other threads.
    """

    queue: str

    def next(self, patient: bool) -> Any:
        """The next message; None where there is none. What no worker can have is set aside, with
        one line in the log.

        Args:
            patient: Wait as long as the worker is configured to; False: a moment only.
        """

    def idle(self, seconds: float) -> None:
        """Take no message for a while, and keep up what the broker expects of a consumer."""

    def ack(self, message: Any) -> None:
        """The message is done."""

    def nack(self, message: Any) -> None:
        """Put the message among the dead letters of the queue that its actor was declared with."""

    def requeue(self, message: Any, begun: bool = False) -> None:
        """Requeue the message.

        Args:
            message: The message.
            begun: An attempt of it goes on here: who takes it next can tell that it came before.
        """

    def pause(self) -> None:
        """Requeue what was taken and not handed out, and take nothing more."""

    def resume(self) -> None:
        """Take messages again."""

    def close(self, waiting: list[Any]) -> None:
        """Requeue what waits, and what was taken and not handed out; end."""


class WorkerBroker(Evacuable, Protocol):
    """A broker, for one process.

    Attributes:
        place: Its address, without a password.
        native: Dramatiq's own broker.
        parts: Which uses of `jobsync_dramatiq.parts` it needs.
    """

    native: Any
    parts: frozenset[str]

    @property
    def place(self) -> str: ...

    def reach(self) -> None:
        """Look whether the broker is there.

        Raises:
            BrokerAway: It cannot be reached, and may be there later.
        """

    def identify(self, make: bool) -> str | None:
        """The mark of the broker: the same by whatever address it is reached, and another for each
        part of it ('' where there is none).

        Args:
            make: Make one where it has none; else None then.
        """

    def join(self, node: str) -> None:
        """This process is a node from here on; it may be called again.

        Raises:
            BrokerConnectionError: The broker cannot be reached.
        """

    def declare(self, home: str, queue: str) -> None:
        """Make a queue of the node, and the parked one beside it; called before the node owns
        anything that comes by it.

        Args:
            home: The home queue whose messages it is for.
            queue: The node's queue.

        Raises:
            BrokerConnectionError: The broker cannot be reached.
        """

    def consume(self, queue: str, prefetch: int, timeout: int) -> QueueConsumer:
        """Begin to consume a queue.

        Args:
            queue: The queue.
            prefetch: How many messages may be taken and not done.
            timeout: Longest wait for a message, in milliseconds.

        Raises:
            ConnectionClosed: The broker cannot be asked.
        """

    def send(
        self,
        message: Any,
        queue: str,
        route: str | None,
        hops: int = 0,
        source: QueueConsumer | None = None,
    ) -> None:
        """Publish a copy of a message to a queue; in a worker it returns when the broker has it. No
        middleware sees it.

        Args:
            message: The message.
            queue: Where the copy goes.
            route: The message's route.
            hops: How often it was handed on.
            source: Where the message came from and is acknowledged next. On Redis both are one
                step, which is taken when the next message is asked for, for all that were sent
                until then.

        Raises whatever the broker's client raises: then the copy may be there, or not.
        """

    def begin_evacuation(self) -> None:
        """This process is no worker, and is about to evacuate."""

    def requeue_failed(self) -> None:
        """Called at least once a second by the node's own thread: requeue what could not go back
        when it should have.
        """
