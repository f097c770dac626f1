"""A worker process as a node: what is Dramatiq's own of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from dramatiq.errors import BrokerError
from dramatiq.threading import is_gevent_active

from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.job import Job
from jobsync_core.ledger.current import set_current_ledger
from jobsync_core.ledger.single import SingleLedger
from jobsync_core.logs import get_logger
from jobsync_core.worker.consuming import Consuming
from jobsync_core.worker.node import Framework, WorkerNode
from jobsync_core.worker.node_status import node_status, tell_uncoordinated
from jobsync_core.worker.parts import missing
from jobsync_core.worker.routing import is_of_cluster, node_queue
from jobsync_core.worker.settings import PluginSettings
from jobsync_core.worker.startup import wait_for_server

from .broker.declared import own_queues
from .broker.interface import WorkerBroker
from .broker.opening import open_counter
from .errors import BootFailed, BrokerAway, DeclarationRefused
from .gate import WorkerGate
from .hooks import Consumers, attach
from .parts import GATE, GROUPS, PARTS, SENDING
from .process import OrphanWatch, StopSignals, new_node_name, process_number
from .producer import Producer

__all__ = ['WorkerProcess', 'check_parts', 'refuse_to_boot']

logger = get_logger(__name__)


class WorkerProcess:
    """One start of a worker.

    Args:
        settings: The plugin's.
        producer: What this process sends by, with its broker and its actors.
        native: Dramatiq's broker.

    Attributes:
        gate: The worker's gate; None while the worker is no node.
        consuming: What is told of the consumers; None before there are any.
    """

    def __init__(self, settings: PluginSettings, producer: Producer, native: Any) -> None:
        self._settings = settings
        self._producer = producer
        self._native = native
        self._node: WorkerNode | None = None
        self.gate: WorkerGate | None = None
        self.consuming: Consuming | None = None
        self._orphans = OrphanWatch()
        self._leaving = False
        self._undo: list[Callable[[], object]] = []
        self._worker: Any = None
        #: The node's queues that are not consumed yet: nothing is owned that comes by them.
        self._coming: set[str] = set()

    @property
    def job(self) -> Job | None:
        """The node; None before it is made, and after it has left."""
        return self._node.job if self._node is not None else None

    def boot(self, worker: Any) -> WorkerGate:
        """Enter the cluster, before any queue is consumed.

        Args:
            worker: Dramatiq's worker.

        Returns:
            The worker's gate.

        Raises whatever keeps it from that; then `abandon` is to be called.
        """
        if is_gevent_active():
            raise DeclarationRefused(
                'dramatiq-gevent: JobSync does not work with green threads, whose blocking '
                'database calls would stop heartbeats; '
                'use dramatiq'
            )
        broker, actors = self._producer.broker, self._producer.actors
        check_parts(broker)
        self._worker = worker
        self._orphans = OrphanWatch(worker.stop)
        for text in actors.unknown_pins():
            logger.warning('JobSync: %s', text)
        # A worker's thread waits for messages for as long as `dramatiq_worker_timeout` says.
        patience = self._settings.config.heartbeat_timeout_sec + worker.worker_timeout / 1000
        self.consuming = consuming = Consuming(patience)
        self._node = node = self._make_node(broker, consuming, patience)
        self._producer.job = node.job
        # The processes of one `dramatiq -p` listen on this port and those that follow it.
        node.serve(max(0, process_number() - 1))
        self._wait_for_servers(broker, node)
        node.enter()
        node.start()
        self._producer.lookup.use(node.gate.owners)
        self.gate = gate = WorkerGate(node.gate, broker, actors, consuming, node.parked_something)
        self._undo.append(attach(self._native, gate))
        worker.consumers = Consumers(worker.consumers)
        for queue in node.queues.values():
            self._allow(queue)
        return gate

    def _make_node(self, broker: WorkerBroker, consuming: Consuming, patience: float) -> WorkerNode:
        actors, name = self._producer.actors, new_node_name(self._settings.node_name)

        def declare(queues: Mapping[str, str]) -> None:
            broker.join(name)
            for home, queue in queues.items():
                broker.declare(home, queue)

        def route_of(delivery: Any) -> str | None:
            return actors.route_of(delivery.message)

        return WorkerNode(
            self._settings,
            name,
            Framework(
                kind='dramatiq',
                broker=broker,
                homes=self._homes(),
                declare=declare,
                tasks=lambda: frozenset(self._native.actors),
                pins=actors.pins(),
                busy=self._busy,
                problem=consuming.problem,
                silence=self._silence,
                patience=patience,
                on_lease=_tell_lease,
                on_change=self._recall,
                on_tick=self._tick,
                route=route_of,
                log=logger,
                counter=open_counter(self._native, self._settings.config.appname),
            ),
        )

    def _homes(self) -> list[str]:
        """The user's queues that the worker consumes."""
        declared = own_queues(self._native, self._settings.config.appname)
        return [queue for queue in declared if self._consumes(queue)]

    def _consumes(self, queue: str) -> bool:
        chosen = self._worker.consumer_whitelist  # None, or empty, for all
        return not chosen or queue in chosen

    def add_queue(self, home: str) -> None:
        """A queue was declared while the worker runs."""
        node, appname = self._node, self._settings.config.appname
        if (
            node is None
            or is_of_cluster(home, appname)
            or home in node.queues
            or not self._consumes(home)
        ):
            return
        self._coming.add(node_queue(home, appname, node.name))
        node.add_home(home, self._begin)

    def _begin(self, queue: str) -> None:
        """Consume another queue of the node's."""
        if self.consuming is not None:
            self.consuming.rests(queue)  # nobody could look at it before
        self._coming.discard(queue)
        self._allow(queue)
        self._native.emit_after('declare_queue', queue)  # Dramatiq's worker begins by that

    def _allow(self, queue: str) -> None:
        """Have the worker consume a queue of the node's, from its start or the queue's
        declaration.
        """
        if self._worker.consumer_whitelist:
            self._worker.consumer_whitelist.add(queue)
        self._native.queues.add(queue)  # no delay queue: delays wait on the actor's own
        self._undo.append(lambda: self._native.queues.discard(queue))

    def _silence(self) -> float:
        """Seconds for which one of the node's queues was not looked at: the others would send keys
        to it that nobody gets.
        """
        node, consuming = self._node, self.consuming
        if node is None or consuming is None:
            return 0.0
        queues = {*node.queues.values()} - self._coming
        return max((consuming.silence(queue) for queue in queues), default=0.0)

    def _wait_for_servers(self, broker: WorkerBroker, node: WorkerNode) -> None:
        """Wait for a broker that is not up yet, for as long as it takes, as Dramatiq does; then for
        the database.
        """
        with StopSignals() as signals:

            def check() -> None:
                self._orphans.look(False)
                signals.check()

            wait_for_server(
                broker.reach,
                lambda error: isinstance(error, BrokerAway),
                math.inf,
                '',
                check=check,
                sleep=time.sleep,
                log=logger,
            )
            node.wait_for_database(check)

    def abandon(self) -> None:
        """The boot has failed, and the worker ends."""
        self._detach()
        if self._node is not None:
            self._node.leave()

    def go_uncoordinated(self, reason: str, trace: BaseException | None) -> None:
        """The boot has failed, and the worker goes on: it answers probes.

        Args:
            reason: Why it could not enter.
            trace: An error that nobody expected.
        """
        self._detach()
        if self._node is not None:
            self._node.go_uncoordinated(reason, 'required', trace)
        else:
            tell_uncoordinated(logger, reason, 'required', trace)
        set_current_ledger(SingleLedger())

    def drain(self) -> None:
        """Give the tokens away while actors end."""
        self._leaving = True
        if self.consuming is not None:
            self.consuming.stopped = True
        if self._node is not None:
            self._node.drain()

    def leave(self) -> None:
        """Leave; survivors take over what is left in the node's queue."""
        self._producer.job = None
        if self._node is not None:
            self._node.leave()
        self._detach()

    def _detach(self) -> None:
        # Another worker of this process, as in tests, begins anew.
        while self._undo:
            self._undo.pop()()
        self.gate = self._producer.job = None
        self._producer.lookup.use(None)

    def _busy(self, tokens: TokenSet) -> bool:
        return self.gate is not None and self.gate.busy(tokens)

    def _recall(self) -> None:
        if self.gate is not None:
            self.gate.recall()

    def _tick(self) -> None:
        self._recall()
        self._orphans.look(self._leaving)
        self._producer.broker.requeue_failed()

    def status(self, job: Job) -> dict[str, Any]:
        """The node as it sees itself, as plain values.

        Args:
            job: The node, or the one that tests put in its place.
        """
        if self._node is None:
            return node_status(job, consuming=False, messages={})
        return self._node.status(job)


def refuse_to_boot(error: Exception, process: WorkerProcess | None, required: bool) -> None:
    """A worker cannot become a node: it ends, or goes on without coordination.

    Args:
        error: Why.
        process: What has begun of it.
        required: It ends.

    Raises:
        BootFailed: It is required.
    """
    expected = isinstance(error, (JobSyncError, BrokerError, OSError))
    text = str(error) if expected else f'{type(error).__name__}: {error}'
    trace = None if expected else error
    if process is not None and not required:
        process.go_uncoordinated(text, trace)
        return
    logger.critical('JobSync: this worker cannot start: %s', text, exc_info=trace)
    if process is not None:
        process.abandon()
    # What is not expected was logged above with its traceback.
    raise BootFailed(text) from None


def check_parts(broker: WorkerBroker) -> None:
    """Look whether the installed versions have what the plugin uses of them.

    Raises:
        ConfigurationError: They lack something.
    """
    lacking = missing(PARTS, (SENDING, GATE, GROUPS, *broker.parts))
    if lacking:
        raise ConfigurationError(
            f'the installed Dramatiq or its client of the broker lacks {", ".join(lacking)}, '
            'without which keys would not be safe: install versions that JobSync knows, with '
            'pip install "jobsync-workers[dramatiq]"'
        )


def _tell_lease(leased: bool) -> None:
    if leased:
        logger.info('JobSync: the lease is valid again; consuming goes on')
    else:
        logger.warning('JobSync: the lease ran out; consuming stops until there is one again')
