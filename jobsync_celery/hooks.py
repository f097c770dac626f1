"""What a worker's node does at Celery's hooks, from before the pool forks until the last task has
ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery import signals
from kombu.connection import Connection

from jobsync_core import clock
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.job import Job
from jobsync_core.protocol.effects import RebalanceEvent
from jobsync_core.worker.node import Framework, WorkerNode
from jobsync_core.worker.node_of_tests import node_of_tests
from jobsync_core.worker.node_status import node_status

from .application import Application
from .broker.broker import CeleryBroker
from .broker.presence import Presence
from .broker.startup import wait_for_broker
from .children import PoolChildren
from .configuring import NodeConfiguration
from .consuming import LeasedConsumer
from .entering import Entry
from .gate.gate import ConsumerGate
from .home_queues import HomeQueues
from .logs import get_logger
from .loop_watch import LoopWatch, Reconnecting
from .outlasted import survive
from .parts import check_parts
from .redis.carried_over import CarriedOver
from .signals import rebalanced, released
from .tasks.coordinated import odd_names
from .worker_checks import check_records, checked_pool

__all__ = ['WorkerHooks', 'restore_last']

logger = get_logger(__name__)

#: Seconds by which a turn of the event loop may be late that is not stuck.
_LOOP_SEC = 1.0
_NAME = '_jobsync_hooks'


class WorkerHooks:
    """A worker's node, as Celery's bootsteps drive it.

    Args:
        application: The app.

    Attributes:
        entry: How far the node has entered; None before it begins to.
    """

    def __init__(self, application: Application) -> None:
        self.entry: Entry | None = None
        self._application = application
        self._app: Any = application.app
        vars(application.app)[_NAME] = self
        self._node: WorkerNode | None = None
        self._broker: CeleryBroker | None = None
        self._configuration: NodeConfiguration | None = None
        self._children: PoolChildren | None = None
        self._loop_watch: LoopWatch | None = None
        self._consumer: Any = None
        self._gate: ConsumerGate | None = None
        self._leased: LeasedConsumer | None = None
        self._presence: Presence | None = None
        self._carried = CarriedOver()
        self._reconnecting = Reconnecting()
        self._pins: Mapping[str, Sequence[str]] = {}
        self._solo = self._atomic = self._reconnects = False
        self._shared_at = 0.0

    @staticmethod
    def of(app: Any) -> WorkerHooks | None:
        """Those of an app; None where it has no plugin."""
        found: WorkerHooks | None = vars(
            app._get_current_object() if hasattr(app, '_get_current_object') else app
        ).get(_NAME)
        return found

    @property
    def node(self) -> WorkerNode:
        """The worker's node, which has been prepared."""
        assert self._node is not None
        return self._node

    @property
    def job(self) -> Job | None:
        """This worker's node; None where there is none. In tests the Job of `jobsync_core.testing`
        that stands in.
        """
        return node_of_tests() or self._own_job()

    def _own_job(self) -> Job | None:
        return self._node.job if self._node is not None else None

    @property
    def required(self) -> bool:
        """Whether a worker that cannot be a node must not run."""
        return self._application.settings.required

    def prepare_worker(self, worker: Any, node: str | None, weight: float | None) -> None:
        """Make the Job, before the pool forks, and have the worker consume the node's queue.

        Args:
            worker: Celery's `WorkController`.
            node: The node's name, from the command line.
            weight: Its share, from there too.

        Raises:
            ConfigurationError: The worker cannot work like that.
        """
        application = self._application
        settings = application.read_again(**({'weight': weight} if weight is not None else {}))
        self._solo = 'solo' in checked_pool(worker)
        check_records(self._app.conf, application.driver)
        self._atomic = check_parts(application.driver, settings.redis_atomic)
        name = node or settings.node_name or worker.hostname
        homes = application.queues.homes()
        self._configuration = NodeConfiguration(application, name, self._solo)
        self._broker = broker = application.broker(self._carried, self.receiving)
        self._children = PoolChildren(worker)
        # With the pool solo nothing else is heard of it while a task runs.
        signals.worker_shutting_down.connect(self._shutting_down)
        self._loop_watch = loop_watch = LoopWatch(self._carried, self._solo)
        self._pins = application.tasks.pins()
        odd = odd_names(self._app, settings.pins)
        if odd:
            logger.warning('JobSync: %s', '; '.join(odd))
        self._node = WorkerNode(
            settings,
            name,
            Framework(
                kind='celery',
                broker=broker,
                homes=homes,
                declare=broker.declare,
                tasks=lambda: list(self._app.tasks),
                pins=self._pins,
                busy=self._busy,
                in_hand=self._in_hand,
                problem=lambda: '' if self._consumes() else 'not consuming',
                silence=loop_watch.silence,
                patience=settings.config.heartbeat_timeout_sec + _LOOP_SEC,
                on_lease=self._lease_changed,
                on_change=self._look_again,
                on_tick=self._tick,
                on_rebalance=self._rebalanced,
                on_release=self._released,
                application=application.name,
                comes_back=True,
                log=logger,
                counter=application.counter(),
            ),
        )
        for queue in self._node.queues.values():
            self._app.amqp.queues.select_add(application.queues.make(queue))

    def wait_for_servers(self, check: Callable[[], object]) -> None:
        """Wait for a broker and a database that are not up yet; `check` raises where the worker is
        to end.

        Raises:
            OperationalError: The broker cannot be reached, and is not to be waited for.
            DatabaseUnavailable: The database cannot be reached within `wait_for_database_sec`.
        """
        wait_for_broker(self._app, check)
        self.node.wait_for_database(check)

    def go_uncoordinated(self, error: Exception) -> None:
        """The worker is no node, and may run all the same."""
        assert self._configuration is not None
        self.node.go_uncoordinated(str(error), 'jobsync_required')
        # It is as any worker without the plugin: what it takes is where the others of its kind
        # look.
        self._configuration.undo()
        for queue in self.node.queues.values():
            self._app.amqp.queues.consume_from.pop(queue, None)
            self._app.amqp.queues.pop(queue, None)

    def attach(self, consumer: Any) -> None:
        """The consumer exists; it has no connection and no strategies yet."""
        assert self._loop_watch is not None
        application = self._application
        self._consumer = consumer
        self._gate = ConsumerGate(
            self._app,
            consumer,
            self.node.gate,
            application.tasks,
            application.queues,
            application.forwarder(patient=False),
            pinned=self._pins,
            solo=self._solo,
            is_node=lambda: self._own_job() is not None,
            on_parked=self.node.parked_something,
        )
        self._leased = LeasedConsumer(
            consumer,
            self._gate,
            self._own_job,
            self._loop_watch,
            self._carried,
            application.driver,
            application.settings.config.heartbeat_timeout_sec,
        )
        if application.driver == 'amqp':
            self._presence = Presence(self._app, consumer, application.queues)
        HomeQueues(
            self._app,
            consumer,
            application.queues,
            lambda: self._node if self._own_job() is not None else None,
            self._leased.queues_changed,
            self._presence,
        )
        if application.driver == 'redis':
            from redis.exceptions import MasterDownError, ReadOnlyError

            # A server that has become a replica is no server any more: as for one that has ended,
            # the consumer connects anew.
            consumer.connection_errors = (
                *consumer.connection_errors,
                ReadOnlyError,
                MasterDownError,
            )

        def connect(heartbeat: Any = None) -> Any:
            self._reconnecting.wait()
            return consumer.ensure_connected(
                self.receiving(self._app.connection_for_read(heartbeat=heartbeat), consumer.hub)
            )

        consumer.connection_for_read = connect
        if application.driver == 'amqp':
            consumer.loop = survive(consumer.loop)

    def receiving(self, connection: Connection, hub: Any = None) -> Connection:
        """A connection that has not been opened yet, on which messages are received; with an event
        loop, waited for.
        """
        if self._atomic and (self._node is None or self._node.coordinated):
            from .redis.channel import receive_atomically  # needs redis

            receive_atomically(connection, self._carried, hub)
        return connection

    def connected(self) -> None:
        """The consumer has a connection, the first one or another."""
        assert self._leased is not None
        self._reconnecting.connected()
        job = self._own_job()
        if self._reconnects and job is not None and self._broker is not None:
            # What the lost connection had taken: nobody can acknowledge it any more, and Redis
            # gives it back to nobody.
            try:
                self._broker.restore_own(job.node_name)
            except Exception as error:  # the broker went away again; the next connection does it
                logger.warning(
                    'JobSync: what the lost connection held is not given back yet: %r', error
                )
        self._reconnects = True
        if job is not None and self._presence is not None:
            self._presence.announce()
        self._leased.connected()

    def disconnected(self) -> None:
        """The consumer has no connection."""
        if self._leased is not None:
            self._leased.disconnected()

    def _shutting_down(self, **_: Any) -> None:
        # In a signal's handler.
        if self._node is not None:
            self._node.hurry()

    def closing(self) -> None:
        """The worker shuts down; its tasks end."""
        if self._leased is not None:
            self._leased.closing()
        if self._node is not None:
            self._node.drain()

    def leave(self) -> None:
        """Leave the cluster; survivors take over what is left at the broker."""
        node, self._node = self._node, None
        if node is None:
            return
        if self.entry is not None:
            self.entry.give_up()
        if node.job is not None and self._broker is not None:
            restore_last(self._broker, node.name, self._carried)
        node.leave()
        if self._gate is not None:
            self._gate.close()
        if self._broker is not None:
            self._broker.close()

    def _busy(self, tokens: TokenSet) -> bool:
        return self._gate is not None and self._gate.busy(tokens)

    def _in_hand(self, home: str) -> bool:
        return self._gate is not None and self._gate.in_hand(home)

    def _rebalanced(self, event: RebalanceEvent) -> None:
        rebalanced.send(sender=self._app, event=event)
        job = self._own_job()
        if self._consumer is not None and job is not None:
            fields = {
                'node': job.node_name,
                'version': event.token_version,
                'added': event.tokens_added,
                'removed': event.tokens_removed,
            }
            self._consumer.call_soon(self._send_event, 'jobsync-rebalanced', fields)

    def _released(self, tokens: TokenSet) -> None:
        released.send(sender=self._app, tokens=tokens)
        self._look_again()

    def _send_event(self, kind: str, fields: Mapping[str, Any]) -> None:
        dispatcher = getattr(self._consumer, 'event_dispatcher', None)
        if dispatcher is not None and dispatcher.enabled:
            dispatcher.send(kind, **fields)

    def _lease_changed(self, leased: bool) -> None:
        if self._consumer is not None and self._leased is not None:
            self._consumer.call_soon(self._leased.follow)

    def _look_again(self) -> None:
        if self._consumer is not None and self._gate is not None:
            self._consumer.call_soon(self._gate.look)

    def _tick(self) -> None:
        job = self._own_job()
        if self._gate is not None and self._gate.waiting:
            self._look_again()  # should the timer have lost its entry: a reconnect clears it
        if job is not None and self._children is not None:
            self._children.release_lost(job)
        if job is not None and job.has_lease and clock.now() >= self._shared_at:
            self._restore_shared()

    def _restore_shared(self) -> None:
        """Restore what plain workers of the same queues had taken when they were killed, after as
        long as they would.
        """
        assert self._broker is not None and self._configuration is not None
        options = self._configuration.plain_options
        restored = self._broker.restore_shared(options)
        self._shared_at = clock.now() + self._broker.shared_every(options)
        if restored:
            logger.warning(
                'JobSync: %d messages that workers without the plugin had taken are given back',
                restored,
            )

    def local_status(self) -> dict[str, Any]:
        """The node as it sees itself, as plain values."""
        job = self.job
        if job is None:
            return {'coordination_enabled': False}
        waiting = self._gate.waiting if self._gate is not None else 0
        if self._node is None:
            return node_status(job, consuming=False, messages={'waiting': waiting})
        return self._node.status(job, waiting=waiting)

    def _consumes(self) -> bool:
        return self._leased is not None and self._leased.consumes


def restore_last(broker: CeleryBroker, node: str, carried: CarriedOver) -> None:
    """Restore what a worker's lost connections brought, as it ends; what is lost is named."""
    if not carried.unrecorded:
        return
    try:
        broker.restore_own(node)
    except Exception as error:  # whatever the broker's client raises
        lost = carried.ids()
        logger.critical(
            'JobSync: %d messages that a lost connection brought are lost with this '
            'worker, as the broker cannot be '
            'reached (%r); send them again: %s',
            len(lost),
            error,
            ', '.join(lost),
        )
