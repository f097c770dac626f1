"""What producers, the gate and the keeper ask of the broker: there is one such class for Redis, and
one for RabbitMQ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from dramatiq import Message
from dramatiq.common import q_name, xq_name

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.evacuation import Evacuable
from jobsync_core.worker.incoming import Refused, read_stamps
from jobsync_core.worker.routing import HOME, HOPS, KEY, parked_queue

from .incoming import homes_in

if TYPE_CHECKING:
    from .actors import Actors

__all__ = ['BrokerMail', 'Hold', 'dead_letters', 'home_of', 'mail_of', 'place_of', 'wrapped']


class Hold(Protocol):
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

    def requeue(self, message: Any) -> None:
        """Give the message back to this queue."""

    def pause(self) -> None:
        """Give back what was taken and not handed out, and take nothing more."""

    def resume(self) -> None:
        """Take messages again."""

    def close(self, waiting: list[Any]) -> None:
        """Give back what waits, and what was taken and not handed out; end."""


class BrokerMail(Evacuable, Protocol):
    """A broker, for one process.

    Attributes:
        place: Its address, without a password.
    """

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

    #: What this process knows of actors; None: it only sends.
    actors: Actors | None

    def join(self, node: str, queue: str) -> None:
        """Make the node's queue; called before the node owns anything.

        Raises:
            BrokerConnectionError: The broker cannot be reached.
        """

    def consume(self, queue: str, prefetch: int, timeout: int) -> Hold:
        """Begin to consume a queue, as the broker's `consume` does."""

    def send(
        self, message: Any, queue: str, route: str | None, hops: int = 0, source: Hold | None = None
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

    def tidy(self) -> None:
        """Called at least once a second by the keeper: do again what failed."""


def home_of(message: Any) -> str:
    """The queue that a message's actor was declared with."""
    return str(read_stamps(message.options).home or message.queue_name)


def place_of(actors: Actors | None, message: Any) -> tuple[str | None, str]:
    """The route of a message that lies in a node's or the parked queue, and its home queue.

    Args:
        actors: What the process knows of actors; None in one that knows none: then what the message
            says counts, if it can be right.
        message: The message.
    """
    stamps = read_stamps(message.options)
    if actors is None:
        return stamps.key, stamps.home or str(message.queue_name)
    route = actors.read_route(message, stamps)
    return None if isinstance(route, Refused) else route, actors.home_of(message, stamps.home)


def dead_letters(queue: str, data: bytes, appname: str, actors: Actors | None) -> str:
    """Where a message goes that no worker can have: to the dead letters that the user knows, else
    to those of the parked queue.

    Args:
        queue: Where it was found.
        data: The message.
        appname: The cluster.
        actors: What the process knows of actors; None in one that knows none.
    """
    if not queue.startswith('jobsync.'):
        return xq_name(q_name(queue))
    said = homes_in(data)
    home = actors.home_of_unreadable(said) if actors is not None else said.stamp or said.queue
    return xq_name(home or parked_queue(appname))


def wrapped(
    message: Any, queue: str, route: str | None, hops: int = 0, **options: Any
) -> Message[Any]:
    """A copy of a message for a queue: same id, arguments and time, so that its age counts from the
    first sending as without the plugin.
    """
    home = home_of(message)
    kept = {name: value for name, value in message.options.items() if name not in (KEY, HOPS, HOME)}
    if route is not None:
        kept[KEY] = route
    if queue != home:
        kept.update({HOME: home, HOPS: hops})
    return Message(
        queue_name=queue,
        actor_name=message.actor_name,
        args=message.args,
        kwargs=message.kwargs,
        options={**kept, **options},
        message_id=message.message_id,
        message_timestamp=message.message_timestamp,
    )


def mail_of(broker: Any, config: CoordinationConfig) -> BrokerMail:
    """How to work with a broker.

    Raises:
        ConfigurationError: It is neither of Redis nor of RabbitMQ.
    """
    # By name: the other broker's client need not be installed.
    kinds = {f'{kind.__module__}.{kind.__name__}' for kind in type(broker).__mro__}
    if 'dramatiq.brokers.redis.RedisBroker' in kinds:
        from .redis_mail import RedisMail

        return RedisMail(broker, config.appname)
    if 'dramatiq.brokers.rabbitmq.RabbitmqBroker' in kinds:
        from .rabbit_mail import RabbitMail

        return RabbitMail(broker, config)
    raise ConfigurationError(
        f'{type(broker).__name__}: JobSync coordinates workers of RedisBroker and RabbitmqBroker '
        'only'
    )
