"""A worker consumes with a lease and a database that begins work, and not otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amqp.exceptions import ChannelError, RecoverableConnectionError

from jobsync_core import clock
from jobsync_core.job import Job
from jobsync_core.worker.when_to_consume import Consume, WhenToConsume

from .gate.gate import ConsumerGate
from .logs import get_logger
from .loop_watch import LoopWatch
from .redis.carried_over import CarriedOver

__all__ = ['LeasedConsumer']

logger = get_logger(__name__)

#: Seconds between two looks at the lease.
_LOOK_SEC = 0.2


class LeasedConsumer:
    """Celery's consumer, stopped and started with the lease. In the event loop.

    Args:
        consumer: Celery's consumer.
        gate: Its gate.
        node: This worker's node; None where it has none any more.
        loop_watch: Learns what the event loop does.
        carried: Knows since when an answer of Redis has been due.
        driver: The broker's kind.
        timeout_sec: The heartbeat timeout.
    """

    def __init__(
        self,
        consumer: Any,
        gate: ConsumerGate,
        node: Callable[[], Job | None],
        loop_watch: LoopWatch,
        carried: CarriedOver,
        driver: str,
        timeout_sec: float,
    ) -> None:
        self._consumer = consumer
        self._gate = gate
        self._node = node
        self._loop_watch = loop_watch
        self._carried = carried
        self._is_rabbit = driver == 'amqp'
        self._timeout = timeout_sec
        self._connected = self._consuming = False
        self._leased_at = 0.0
        self._when = WhenToConsume()
        #: Why the consumer was stopped.
        self._stopped_by = Consume.NOW
        self._look: Any = None

    def connected(self) -> None:
        """The consumer has a connection, the first one or another, and begins in a moment."""
        self._connected = self._consuming = True
        self._loop_watch.connected()
        # Not left to the duties, whose questions to the database may take seconds.
        self._look = self._consumer.timer.call_repeatedly(_LOOK_SEC, self.follow)

    def disconnected(self) -> None:
        """The consumer has no connection."""
        self.closing()
        self._loop_watch.disconnected()
        if self._look is not None:
            self._look.cancel()  # not every Celery clears its timer with the connection
        self._gate.disconnected()

    def closing(self) -> None:
        """The worker shuts down: nothing is consumed any more."""
        self._connected = self._consuming = False

    def queues_changed(self) -> None:
        """Another queue is consumed: with a lease, and not without."""
        consumer = self._consumer.task_consumer
        if consumer is not None and self._connected:
            if self._consuming:
                self._consume_again(consumer)
            else:
                consumer.cancel()

    @property
    def consumes(self) -> bool:
        """Whether messages are taken, as far as is known."""
        return self._consuming and self._loop_watch.silence() <= self._timeout

    def follow(self) -> None:
        """Stop or start consuming, by what is so now: the event loop keeps no order among its
        calls.
        """
        consumer, job = self._consumer.task_consumer, self._node()
        self._loop_watch.turned(self._rabbit_connection())
        if consumer is None or job is None or not self._connected:
            return
        now = clock.now()
        asked = self._carried.asked_at
        if asked is not None and now - asked > self._timeout:
            # Redis answers within a second: who has forgotten this connection may let another one
            # through
            self._carried.cut()
        found = self._when.look(job.am_i_healthy(), job.pausing, now)
        if found is not Consume.NO_LEASE:
            self._leased_at = now
        if self._consuming and found is not Consume.NOW:
            self._stop(found)
        elif found is Consume.NOW and not self._consuming:
            self._consuming = True
            self._consume_again(consumer)
            if self._stopped_by is Consume.NO_LEASE:
                logger.info('JobSync: the lease is valid again; consuming goes on')
        elif found is not Consume.NOW:
            self._gate.requeue_waiting()  # whose time has come meanwhile
            lost = found is Consume.NO_LEASE and now - self._leased_at > self._timeout
            if lost and self._is_rabbit:
                # On Redis the survivors take what is running here; RabbitMQ gives it only to whom
                # it comes from.
                self._gate.requeue_running()

    def _consume_again(self, consumer: Any) -> None:
        """Others may have deleted the queues of a node that was taken for dead. The duties make
        them again, perhaps not as soon as this. A timer of the event loop only logs what RabbitMQ
        says of a queue that is not there, and nothing would be consumed from then on.
        """
        try:
            if self._is_rabbit and self._stopped_by is Consume.NO_LEASE:
                self._gate.declare_own(consumer)
            consumer.consume()
        except ChannelError as error:
            raise RecoverableConnectionError(str(error)) from error  # so it connects anew

    def _stop(self, why: Consume) -> None:
        self._consuming, self._stopped_by = False, why
        if why is Consume.NO_LEASE:
            logger.warning('JobSync: the lease ran out; consuming stops until there is one again')
        self._consumer.task_consumer.cancel()
        self._gate.requeue_waiting()

    def _rabbit_connection(self) -> Any:
        connection = self._consumer.connection if self._is_rabbit else None
        return connection.connection if connection is not None and connection.connected else None
