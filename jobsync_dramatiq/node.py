"""A worker process as a node: from before its first message until after its last."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from dramatiq.threading import is_gevent_active

from jobsync_core import clock
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.job import Job
from jobsync_core.logs import get_logger
from jobsync_core.worker.consuming import Consuming, SelfDrain
from jobsync_core.worker.duties.node import NodeDuties
from jobsync_core.worker.entering import make_job
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.parts import missing
from jobsync_core.worker.routing import node_queue, parked_queue
from jobsync_core.worker.settings import PluginSettings
from jobsync_core.worker.startup import wait_for_database, wait_for_server

from .broker.interface import WorkerBroker
from .errors import BrokerAway
from .gate import WorkerGate
from .hooks import Consumers, attach
from .parts import GATE, GROUPS, PARTS, SENDING
from .process import OrphanWatch, StopSignals, new_node_name, process_number
from .producer import Producer

__all__ = ['WorkerProcess', 'check_parts', 'job_status']

logger = get_logger(__name__)


class WorkerProcess:
    """One start of a worker.

    Args:
        settings: The plugin's.
        producer: What this process sends by, with its broker and its actors.
        native: Dramatiq's broker.

    Attributes:
        job: The node; None before it is made, and after it has left.
        gate: The worker's gate; None while the worker is no node.
        consuming: What is told of the consumers; None before there are any.
    """

    def __init__(self, settings: PluginSettings, producer: Producer, native: Any) -> None:
        self._settings = settings
        self._producer = producer
        self._native = native
        self.job: Job | None = None
        self.gate: WorkerGate | None = None
        self.consuming: Consuming | None = None
        self._counts: dict[str, int] = {}
        self._http: Any = None
        self._duties: NodeDuties | None = None
        self._self_drain: SelfDrain | None = None
        self._orphans = OrphanWatch()
        self._leaving = self._uncoordinated = False
        self._undo: list[Callable[[], object]] = []

    def boot(self, worker: Any) -> None:
        """Enter the cluster, before any queue is consumed.

        Args:
            worker: Dramatiq's worker.

        Raises whatever keeps it from that; then `abandon` is to be called.
        """
        if is_gevent_active():
            raise ConfigurationError(
                'dramatiq-gevent: JobSync does not work with green threads, whose blocking '
                'database calls would stop heartbeats; '
                'use dramatiq'
            )
        settings, broker, actors = self._settings, self._producer.broker, self._producer.actors

        def route_of(delivery: Any) -> str | None:
            return actors.route_of(delivery.message)

        check_parts(broker)
        self._orphans = OrphanWatch(worker.stop)
        for text in actors.unknown_pins():
            logger.warning('JobSync: %s', text)
        appname, name = settings.config.appname, new_node_name(settings.node_name)
        queue = node_queue(appname, name)
        # A worker's thread waits for messages for as long as `dramatiq_worker_timeout` says.
        silence = settings.config.heartbeat_timeout_sec + worker.worker_timeout / 1000
        self.consuming = consuming = Consuming(silence)
        self.job = self._producer.job = job = make_job(
            settings,
            name,
            queue,
            'dramatiq',
            actors.pins(),
            known=list(self._native.actors),
            identify=broker.identify,
            place=broker.place,
            prepare=lambda: broker.join(name, queue),
            busy=self._busy,
            on_rebalance=lambda event: None,
            on_release=lambda tokens: None,
        )
        job.prepare_fork()
        self._serve(job)
        self._wait_for_servers(broker)
        job.__enter__()
        gate = Gate(settings, job)
        self._counts = gate.counts
        self._duties = duties = NodeDuties(
            gate,
            broker,
            'dramatiq',
            queue,
            parked_queue(appname),
            on_lease=self._lease_changed,
            on_change=lambda: None,
            on_tick=self._tick,
            tasks=lambda: frozenset(self._native.actors),
            route=route_of,
        )
        gate.owners.refresh()
        duties.start()
        self._producer.node_owners = gate.owners
        self.gate = WorkerGate(gate, broker, actors, consuming, duties.parked_something)
        self._undo.append(attach(self._native, self.gate))
        self._consume_node_queue(worker, queue)
        self._self_drain = SelfDrain(job, lambda: consuming.silence(queue), silence)
        self._self_drain.start()
        logger.info('JobSync: node %s of %s* with %d tokens', name, appname, len(job.my_tokens))

    def _consume_node_queue(self, worker: Any, queue: str) -> None:
        worker.consumers = Consumers(worker.consumers)
        if worker.consumer_whitelist:
            worker.consumer_whitelist.add(queue)
        self._native.queues.add(queue)  # no delay queue: delays wait on the actor's own
        self._undo.append(lambda: self._native.queues.discard(queue))

    def _wait_for_servers(self, broker: WorkerBroker) -> None:
        """Wait for a broker that is not up yet, for as long as it takes, as Dramatiq does; then for
        the database.
        """
        settings = self._settings
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
            limit = settings.wait_for_database_sec if settings.required else 0.0
            wait_for_database(settings.config, limit, check=check, sleep=time.sleep, log=logger)

    def abandon(self, goes_on: bool) -> None:
        """The boot has failed: be no node.

        Args:
            goes_on: The worker goes on without coordination, and answers probes.
        """
        self._uncoordinated = goes_on
        self._stop(goes_on)

    def drain(self) -> None:
        """Give the tokens away while actors end."""
        self._leaving = True
        if self.consuming is not None:
            self.consuming.stopped = True
        if self._self_drain is not None:
            self._self_drain.stop()
        if self.job is not None:
            try:
                self.job.drain(0)
            except JobSyncError as error:
                logger.warning('JobSync: %s', error)

    def leave(self) -> None:
        """Leave; survivors take over what is left in the node's queue."""
        self._stop(False)

    def _stop(self, answers: bool) -> None:
        job, self.job = self.job, None
        self._producer.job = None
        if self._duties is not None:
            self._duties.stop(5.0)
        if not answers and self._http is not None:
            self._http.close()
            self._http = None
        if job is not None:
            job.__exit__(None, None, None)
        # Another worker of this process, as in tests, begins anew.
        while self._undo:
            self._undo.pop()()
        self.gate = self._duties = None
        self._producer.node_owners = None

    def _busy(self, tokens: TokenSet) -> bool:
        return self.gate is not None and self.gate.busy(tokens)

    def _tick(self) -> None:
        self._orphans.look(self._leaving)
        self._producer.broker.requeue_failed()

    def _lease_changed(self, leased: bool) -> None:
        if not leased or self.job is None:
            logger.warning('JobSync: the lease ran out; consuming stops until there is one again')
            return
        logger.info('JobSync: the lease is valid again; consuming goes on')
        # While this node was taken for dead, its empty queue may have been deleted and forgotten.
        name, appname = self.job.node_name, self._settings.config.appname
        self._producer.broker.join(name, node_queue(appname, name))

    def status(self, job: Job) -> dict[str, Any]:
        """The node as it sees itself, as plain values."""
        consuming = self.consuming is not None and bool(self._ready(job)['consuming'])
        return job_status(job, consuming, self._counts)

    def _serve(self, job: Job) -> None:
        """Answer probes, also while the worker joins, and where it goes on without coordination."""
        if self._settings.http is None:
            return
        from jobsync_core.web.health import HealthServer, node_metrics, split_address

        host, port = split_address(self._settings.http)
        # The processes of one `dramatiq -p` listen on this port and those that follow it.
        port += max(0, process_number() - 1) if port else 0
        self._http = HealthServer(
            f'[{host}]:{port}' if ':' in host else f'{host}:{port}',
            ready=lambda: self._ready(job),
            live=lambda: job.alive,
            metrics=node_metrics(job, lambda: dict(self._counts)),
        )

    def _ready(self, job: Job) -> dict[str, object]:
        leased = job.am_i_healthy()
        problem = self.consuming.problem() if self.consuming is not None else 'stopped'
        if not problem and not leased and not self._uncoordinated:
            problem = 'no lease'
        problem = problem or _refusal(job)
        return {
            'consuming': not problem,
            'lease': leased,
            'coordinated': not self._uncoordinated,
            'node': job.node_name,
            **({'reason': problem} if problem else {}),
        }


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


def job_status(job: Job, consuming: bool, counts: dict[str, int]) -> dict[str, Any]:
    """A node as it sees itself, as plain values.

    Args:
        job: The node.
        consuming: Whether its worker takes messages.
        counts: What became of messages.
    """
    status: dict[str, Any] = dict(job.local_status())
    status['recent_events'] = [
        {**event, 'timestamp': str(event['timestamp'])} for event in status['recent_events']
    ]
    status['last_heartbeat'] = str(status['last_heartbeat'])
    return {**status, 'consuming': consuming, 'paused': _refusal(job), 'messages': dict(counts)}


def _refusal(job: Job) -> str:
    """Why consuming pauses, as the database refuses to begin anything; '' where it does not."""
    return str(job.pausing.error) if job.pausing.is_paused(clock.now()) else ''
