"""RabbitMQ: workers publish with confirms, and acknowledge a message only after its copy is
confirmed. What a lost connection had taken RabbitMQ requeues by itself.

A node's queue has no delay queue: what is delayed waits in the delay queue of its actor's own
queue, and goes to whoever owns it then.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dramatiq import Message
from dramatiq.errors import ConnectionClosed
from pika.exceptions import (
    AuthenticationError,
    ChannelClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from jobsync_core.config import CoordinationConfig
from jobsync_core.logs import get_logger, shown
from jobsync_core.worker.broker import Delivery
from jobsync_core.worker.consumer_timeout import REMEDY, is_heeded
from jobsync_core.worker.incoming import Refused
from jobsync_core.worker.routing import WAITS

from ..errors import BrokerAway
from ..incoming import read_message
from ..parts import RABBITMQ
from .copies import route_and_home
from .interface import Origins, QueueConsumer
from .rabbit_consumer import RabbitQueueConsumer
from .rabbit_errors import BROKEN, is_absent, translated
from .rabbit_publisher import RabbitPublisher, RawDelivery

__all__ = ['RabbitWorkerBroker']

logger = get_logger(__name__)

#: Seconds for which RabbitMQ may refuse to take messages in before a publish fails.
_BLOCKED_SEC = 30.0


class _Taken:
    """A message that was taken off a queue for rescue, parking or evacuation."""

    def __init__(
        self,
        publisher: RabbitPublisher,
        channel: Any,
        raw: RawDelivery,
        message: Message[Any],
        origins: Origins,
        appname: str,
    ) -> None:
        self._publisher, self._channel, self._raw = publisher, channel, raw
        self.message = message
        if raw.redelivered:
            message.options.setdefault(
                WAITS, 1
            )  # RabbitMQ does not say of a copy that it came before
        self.id, self.task = shown(message.message_id), message.actor_name
        self.route: str | None
        self.route, self.home = route_and_home(origins, message, raw.queue, appname)

    def forward(self, queue: str) -> None:
        """Publish it to a queue, then acknowledge it here. The acknowledgement fails if publishing
        had to change the connection: then the message comes again.
        """
        if queue == self._raw.queue:
            self._publisher.publish_again(self._raw)
        else:
            self._publisher.publish(self.message, queue, self.route, 0, self._raw)
        self._channel.basic_ack(self._raw.tag)

    def requeue(self) -> None:
        """Requeue it."""
        if self._publisher.requeues_anew(self._raw):
            self._channel.basic_ack(self._raw.tag)
        else:
            self._channel.basic_nack(self._raw.tag, requeue=True)


class RabbitWorkerBroker:
    """A WorkerBroker at RabbitMQ. Each thread has a connection of its own, which Dramatiq's broker
    keeps.

    Args:
        native: The RabbitmqBroker.
        config: The cluster.
        origins: What this process knows of actors.

    Attributes:
        consumer_parameters: Of the connections of consumers.
    """

    catches_strays = True
    requeue_is_free = False
    kind = 'dramatiq'
    parts = frozenset({RABBITMQ})

    def __init__(self, native: Any, config: CoordinationConfig, origins: Origins) -> None:
        self.native = native
        self._origins = origins
        self._publisher = RabbitPublisher(native, config.appname, origins)
        # So that RabbitMQ takes back soon what a stopped or unreachable worker holds.
        self._heartbeat = max(2, math.ceil(config.heartbeat_timeout_sec))
        self._appname = config.appname
        #: The node's queues, and whose messages they are for.
        self._homes: dict[str, str] = {}
        self._joined = False
        #: A channel of the thread that does the node's duties.
        self._looking: Any = None
        self.consumer_parameters = native.parameters

    @property
    def place(self) -> str:
        """The addresses of the servers."""
        return f'amqp://{_places(self.native.parameters)}'

    def reach(self) -> None:
        """Look whether RabbitMQ answers.

        Raises:
            BrokerAway: It cannot be reached.
            ConnectionClosed: It refuses this user.
        """
        try:
            _ = self.native.connection
        except (
            AuthenticationError,
            ProbableAccessDeniedError,
            ProbableAuthenticationError,
        ) as error:
            raise ConnectionClosed(
                RuntimeError(f'RabbitMQ refuses its user at {self.place}: {error!r}')
            ) from error
        except BROKEN as error:
            raise BrokerAway(f'RabbitMQ cannot be reached at {self.place}: {error!r}') from error

    def identify(self, make: bool) -> str | None:
        """The name of RabbitMQ's cluster, which it tells with each connection, and the virtual
        host.
        """
        name = self._properties().get('cluster_name')
        parameters = self.native.parameters
        first = parameters[0] if isinstance(parameters, list) else parameters
        return f'{name} {first.virtual_host}' if name else ''

    def _properties(self) -> Mapping[str, Any]:
        """What RabbitMQ tells of itself with this thread's connection."""
        connection = getattr(self.native.connection, '_impl', None)
        return getattr(connection, 'server_properties', None) or {}

    def mark(self, mark: str) -> None:
        """Nothing: RabbitMQ does not lose its name."""

    def join(self, node: str) -> None:
        """From here on this process publishes with confirms, the worker's own retries and delays
        included.
        """
        if self._joined:
            return
        self._joined = True
        self.native.parameters = _adjusted(
            self.native.parameters, blocked_connection_timeout=_BLOCKED_SEC
        )
        self.consumer_parameters = _adjusted(self.native.parameters, heartbeat=self._heartbeat)
        self.native.confirm_delivery = True
        self.reset()  # a channel that was opened before has no confirms

    def declare(self, home: str, queue: str) -> None:
        """Make a queue of the node, and the parked one beside it.

        Raises:
            ConnectionClosed: RabbitMQ cannot be used.
        """
        first, self._homes[queue] = not self._homes, home
        try:
            self._publisher.queues.declare_node(home, queue)
            version = self._properties().get('version')
        except BROKEN as error:
            raise ConnectionClosed(
                RuntimeError(
                    f'RabbitMQ at {_places(self.native.parameters)} cannot be used: {error!r}'
                )
            ) from error
        if first and not is_heeded(version):
            logger.warning(
                'RabbitMQ %s delivers the message of an actor that outlasts its consumer_timeout, '
                '30 minutes by default, a second time. To prevent it, %s',
                version,
                REMEDY,
            )

    def consume(self, queue: str, prefetch: int, timeout: int) -> QueueConsumer:
        """Begin to consume a queue, which is declared if it is not there."""
        try:
            with translated():
                if queue in self._homes:
                    self._publisher.queues.declare_node(self._homes[queue], queue)
                else:
                    self.native.declare_queue(queue, ensure=True)
        except ConnectionClosed:
            # the worker tries again in a moment, and would find the same broken connection
            self.reset()
            raise
        # A consumer sends heartbeats while it waits; other connections lie idle, and keep
        # RabbitMQ's slower ones.
        return RabbitQueueConsumer(
            self._publisher, self.consumer_parameters, queue, prefetch, timeout / 1000
        )

    def send(
        self,
        message: Any,
        queue: str,
        route: str | None,
        hops: int = 0,
        source: QueueConsumer | None = None,
    ) -> None:
        """Publish a copy of a message to a queue."""
        self._publisher.publish(message, queue, route, hops)

    def requeue_failed(self) -> None:
        """Nothing: what could not go back goes with its connection."""

    def restore(self, node: str) -> int:
        """Nothing: what a node had taken went back with its connections."""
        return 0

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        """Queues that nodes that are gone may have left something in: one trip for each."""
        return frozenset(queue for queue in sorted(queues) if self._may_hold(queue))

    def _may_hold(self, queue: str) -> bool:
        """Whether something waits in a queue, or the queue makes trouble; on a channel of its own,
        as the answer that there is none closes it.
        """
        if self._looking is None or not self._looking.is_open:
            self._looking = self.native.connection.channel()
        try:
            found = self._looking.queue_declare(queue, passive=True)
        except ChannelClosedByBroker as error:
            return not is_absent(error)
        return bool(found.method.message_count)

    def size(self, queue: str) -> int:
        """How many messages wait in a queue; 0 where there is none."""
        found = self._publisher.queues.count(queue)
        return found[0] if found is not None else 0

    def take(self, queue: str) -> Delivery | None:
        """The next message of a queue; None where it is empty or there is none."""
        channel = self.native.channel
        while True:
            try:
                method, properties, body = channel.basic_get(queue)
            except ChannelClosedByBroker as error:
                self.reset()
                if is_absent(error):
                    return None
                raise
            if method is None:
                return None
            raw = RawDelivery.of(queue, method, properties, body)
            message = read_message(body)
            if not isinstance(message, Refused):
                return _Taken(self._publisher, channel, raw, message, self._origins, self._appname)
            self._publisher.set_aside(channel, queue, raw.tag, body, message.reason)

    def begin_evacuation(self) -> None:
        """Publish with confirms: a message is acknowledged when its copy is confirmed."""
        self.native.confirm_delivery = True
        self.reset()

    def places(self) -> Iterable[str]:
        """None: AMQP cannot list queues; the table knows them."""
        return ()

    def close(self) -> None:
        """Close all connections."""
        self.native.close()

    def delete(self, queue: str) -> bool:
        """Delete a queue of the cluster if it is empty and nobody consumes it; whether it is
        gone.
        """
        return self._publisher.queues.delete(queue)

    def reset(self) -> None:
        """Drop this thread's connection; the next use opens another."""
        self._looking = None
        self._publisher.reset()


def _places(parameters: Any) -> str:
    return ', '.join(
        f'{each.host}:{each.port}'
        for each in (parameters if isinstance(parameters, list) else [parameters])
    )


def _adjusted(parameters: Any, **values: Any) -> Any:
    """Connection parameters with values that their maker did not set."""
    if isinstance(parameters, list):
        return [_adjusted(item, **values) for item in parameters]
    changed = copy.copy(parameters)
    for name, value in values.items():
        if getattr(changed, name) is None:
            setattr(changed, name, value)
    return changed
