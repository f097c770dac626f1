"""JobSync: the middleware that makes a broker's worker processes nodes of a cluster."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from typing import Any

from dramatiq.errors import BrokerError, ConnectionClosed
from dramatiq.logging import get_logger as logger_of
from dramatiq.middleware import Middleware, Retries
from dramatiq.threading import is_gevent_active

from jobsync_core import clock
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.job import Job
from jobsync_core.ledger.current import set_current_ledger
from jobsync_core.ledger.single import SingleLedger
from jobsync_core.logs import get_logger
from jobsync_core.worker.consuming import Consuming, SelfDrain
from jobsync_core.worker.duties.node import NodeDuties
from jobsync_core.worker.entering import make_job
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.node_of_tests import node_of_tests
from jobsync_core.worker.owners import OwnerMap, owner_map
from jobsync_core.worker.parts import missing
from jobsync_core.worker.routing import HOME, HOPS, KEY, node_queue, parked_queue
from jobsync_core.worker.settings import PluginSettings
from jobsync_core.worker.startup import wait_for_database, wait_for_server

from .actors import OPTIONS, ActorOptions, Actors, check_actor, check_message, read_settings
from .broker.in_memory import InMemory, is_in_memory
from .broker.interface import WorkerBroker
from .broker.opening import open_broker
from .errors import BootFailed, BrokerAway, DeclarationRefused
from .gate import GatedConsumer, WatchedConsumer, WorkerGate
from .groups import mark_members, unmark_members
from .notes import is_quiet
from .once import processing
from .parts import GATE, GROUPS, PARTS, SENDING
from .process import OrphanWatch, StopSignals, new_node_name, process_number

__all__ = ['BootFailed', 'JobSync']

logger = get_logger(__name__)


class _Consumers(dict[str, Any]):
    """A worker's consumers. Any of them can acknowledge any message: the gate knows where it came
    from. So one that has not reached the broker yet, and a queue that is not consumed here, are
    answered by another: a message of theirs may have come by the node's queue.
    """

    def __getitem__(self, queue: str) -> Any:
        own = self.get(queue)
        if own is None or own.consumer is None:
            return next((found for found in self.values() if found.consumer is not None), own)
        return own


class JobSync(Middleware):
    """The plugin of one broker: `broker.add_middleware(JobSync(database_url='postgresql://…'))`,
    before actors are declared.

    Args:
        settings: Any setting of PluginSettings and CoordinationConfig. What is not given comes from
            Django's DRAMATIQ_JOBSYNC or JOBSYNC, and the environment (`JOBSYNC_…`). They are read
            when they are needed first.
    """

    def __init__(self, **settings: Any) -> None:
        self._job: Job | None = None
        self._given = settings
        self._settings: PluginSettings | None = None
        self._actors: Actors | None = None
        self._owners: tuple[int, OwnerMap] | None = None
        self._broker: Any = None
        self._opened: WorkerBroker | None = None
        self._enqueue: Any = None
        self._consume: Any = None
        self._gate: Gate | None = None
        self._shared: WorkerGate | None = None
        self._http: Any = None
        self._orphans = OrphanWatch()
        self.leaving = False
        self._duties: NodeDuties | None = None
        self._consuming: Consuming | None = None
        self._self_drain: SelfDrain | None = None
        self._in_memory: InMemory | None = None
        self._uncoordinated = False
        self._undo: list[Callable[[], object]] = []

    @property
    def actor_options(self) -> Any:
        """Options of actors; Dramatiq asks for them when the middleware is added, right before it
        can see the broker.
        """
        return ActorOptions(OPTIONS)

    @property
    def job(self) -> Job | None:
        """This process's node; None where there is none. In tests the Job of `jobsync_core.testing`
        that stands in, and with a StubBroker one in memory.
        """
        return node_of_tests() or self._job

    @property
    def settings(self) -> PluginSettings:
        """The settings; read at the first use.

        Raises:
            ConfigurationError: A setting cannot work.
        """
        if self._settings is None:
            self._settings = read_settings(self._given)
        return self._settings

    # --- producers ---

    def before_declare_actor(self, broker: Any, actor: Any) -> None:
        """The first time that the plugin sees its broker.

        Raises:
            DeclarationRefused: The actor, or the way in which the plugin was added, cannot work.
        """
        self._install(broker)
        check_actor(actor)

    def after_declare_actor(self, broker: Any, actor: Any) -> None:
        """Actors that were declared before the plugin was added count as well; Dramatiq 1 gives
        their names.
        """
        self._install(broker)
        check_actor(broker.actors[actor] if isinstance(actor, str) else actor)

    def _install(self, broker: Any) -> None:
        others = [item for item in broker.middleware if isinstance(item, JobSync)]
        if len(others) > 1:
            raise DeclarationRefused(
                f'JobSync is {len(others)} times among the middleware of {broker!r}, so that each '
                'message would be routed more than once: '
                'add it once, in the settings (DRAMATIQ_BROKER) or in code'
            )
        if self._broker is broker:
            return
        if self._broker is not None:
            raise DeclarationRefused(
                f'this JobSync belongs to {self._broker!r} already, and would coordinate nothing '
                f'of {broker!r}: '
                'make one for each broker, with an appname of its own'
            )
        self._broker = broker
        # Ahead of whoever looks at a message's queue, or counts what runs.
        broker.middleware.remove(self)
        broker.middleware.insert(0, self)
        self._enqueue, broker.enqueue = broker.enqueue, self._route
        self._consume, broker.consume = broker.consume, self._gated

    def _known(self) -> Actors:
        if self._actors is None:
            self._actors = Actors(self._broker, self.settings)
        return self._actors

    def _route(self, message: Any, *, delay: int | None = None) -> Any:
        """In place of the broker's `enqueue`: messages of coordinated actors go straight to the
        owner's queue.
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
        self._broker.emit_before('enqueue', message, delay)
        try:
            self._post().send(message, queue, message.options[KEY])
        except ConnectionClosed as error:
            # RabbitMQ may refuse this user the plugin's exchange. A worker sends the message on.
            logger.warning('id=%s goes to its home queue: %s', message.message_id, error)
            return self._enqueue(message, delay=delay)
        self._broker.emit_after('enqueue', message, delay)
        return message

    def _post(self) -> WorkerBroker:
        if self._opened is None:
            self._opened = open_broker(self._broker, self.settings.config, self._known())
        return self._opened

    def _owner_queue(self, message: Any) -> str | None:
        if node_of_tests() is not None:
            return None
        try:
            route = self._known().route_of(message)
            if route is None:
                return None
            message.options[KEY] = route
            if not self.settings.route_producers:
                return None
            self._post()
            # A node without a lease does not ask: its database is most likely away, and each
            # question takes seconds then.
            place = (
                self._owner_map().find_fresh(route)
                if self._job is None or self._job.has_lease
                else None
            )
        # whatever a key function raises: the actor will say what is wrong with its arguments
        except Exception as error:
            message.options.pop(KEY, None)
            logger.debug('actor=%s goes to its home queue: %s', message.actor_name, error)
            return None
        return place.queue if place is not None else None

    def _owner_map(self) -> OwnerMap:
        if self._gate is not None:
            return self._gate.owners
        # Of this process: a forked child makes its own.
        if self._owners is None or self._owners[0] != os.getpid():
            self._owners = os.getpid(), owner_map(self.settings.config)
        return self._owners[1]

    def _gated(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> Any:
        if self._shared is not None:
            return GatedConsumer(
                self._shared,
                queue_name,
                lambda: self._post().consume(queue_name, prefetch, timeout),
            )
        consumer = self._consume(queue_name, prefetch, timeout)
        return (
            WatchedConsumer(consumer, queue_name, self._consuming)
            if self._consuming is not None
            else consumer
        )

    # --- the worker's life ---

    def before_worker_boot(self, broker: Any, worker: Any) -> None:
        """Become a node, before any queue is consumed."""
        try:
            self._install(broker)
            if node_of_tests() is not None:
                return  # a test's worker is no node
            if is_in_memory(broker):
                self._in_memory = InMemory(broker)
                self._job = self._in_memory.job
                return
            self._boot(broker, worker)
        # whatever the user's own settings and callbacks raise, too: Dramatiq would log it and go on
        except Exception as error:
            self._boot_failed(error)

    def _boot_failed(self, error: Exception) -> None:
        expected = isinstance(error, (JobSyncError, BrokerError, OSError))
        text = str(error) if expected else f'{type(error).__name__}: {error}'
        trace = None if expected else error
        required = (
            self._settings is None
            or self._settings.required
            or isinstance(error, DeclarationRefused)
        )
        job, self._job = self._job, None
        if self._duties is not None:
            self._duties.stop(5.0)
        if required:
            logger.critical('JobSync: this worker cannot start: %s', text, exc_info=trace)
            self._close_http()
        else:
            logger.critical(
                'JobSync: %s -- THIS WORKER RUNS WITHOUT COORDINATION, because required is False: '
                'keys may run twice',
                text,
                exc_info=trace,
            )
        if job is not None:
            job.__exit__(None, None, None)
        self._detach()
        self._gate = self._shared = self._duties = None
        if required:
            raise BootFailed(
                text
            ) from None  # what is not expected was logged above with its traceback
        self._uncoordinated = True
        set_current_ledger(SingleLedger())

    def _route_of(self, delivery: Any) -> str | None:
        return self._known().route_of(delivery.message)

    def _boot(self, broker: Any, worker: Any) -> None:
        if is_gevent_active():
            raise ConfigurationError(
                'dramatiq-gevent: JobSync does not work with green threads, whose blocking '
                'database calls would stop heartbeats; '
                'use dramatiq'
            )
        settings, opened = self.settings, self._post()
        check_parts(opened)
        self._orphans, self.leaving, self._uncoordinated = OrphanWatch(worker.stop), False, False
        for text in self._known().unknown_pins():
            logger.warning('JobSync: %s', text)
        appname, name = settings.config.appname, new_node_name(settings.node_name)
        queue, timeout = node_queue(appname, name), settings.config.heartbeat_timeout_sec
        # A worker's thread waits for messages for as long as `dramatiq_worker_timeout` says.
        self._consuming = consuming = Consuming(timeout + worker.worker_timeout / 1000)
        self._job = job = make_job(
            settings,
            name,
            queue,
            'dramatiq',
            self._known().pins(),
            known=list(broker.actors),
            identify=opened.identify,
            place=opened.place,
            prepare=lambda: opened.join(name, queue),
            busy=self._busy,
            on_rebalance=lambda event: None,
            on_release=lambda tokens: None,
        )
        job.prepare_fork()
        self._serve(job)
        self._wait_for_servers(opened)
        job.__enter__()
        gate = Gate(settings, job)
        self._duties = NodeDuties(
            gate,
            opened,
            'dramatiq',
            queue,
            parked_queue(appname),
            on_lease=self._lease_changed,
            on_change=lambda: None,
            on_tick=self._tick,
            tasks=lambda: frozenset(broker.actors),
            route=self._route_of,
        )
        gate.owners.refresh()
        self._duties.start()
        self.attach(gate, opened, consuming)
        worker.consumers = _Consumers(worker.consumers)
        if worker.consumer_whitelist:
            worker.consumer_whitelist.add(queue)
        broker.queues.add(queue)  # no delay queue: delays wait on the actor's own
        self._undo.append(lambda: broker.queues.discard(queue))
        self._self_drain = SelfDrain(
            job, lambda: consuming.silence(queue), timeout + worker.worker_timeout / 1000
        )
        self._self_drain.start()
        logger.info('JobSync: node %s of %s* with %d tokens', name, appname, len(job.my_tokens))

    def _wait_for_servers(self, opened: WorkerBroker) -> None:
        """Wait for a broker that is not up yet, for as long as it takes, as Dramatiq does; then for
        the database.
        """
        settings = self.settings
        with StopSignals() as signals:

            def check() -> None:
                self._orphans.look(False)
                signals.check()

            wait_for_server(
                opened.reach,
                lambda error: isinstance(error, BrokerAway),
                math.inf,
                '',
                check=check,
                sleep=time.sleep,
                log=logger,
            )
            limit = settings.wait_for_database_sec if settings.required else 0.0
            wait_for_database(settings.config, limit, check=check, sleep=time.sleep, log=logger)

    def attach(self, gate: Gate, opened: WorkerBroker, consuming: Consuming) -> None:
        """Put the gate between the broker and its worker, which is a node by now."""
        self._gate = gate
        self._shared = shared = WorkerGate(
            gate, opened, self._known(), consuming, lambda: self.parked_something()
        )
        broker = self._broker
        before, after = broker.emit_before, broker.emit_after
        broker.emit_before, broker.emit_after = (
            _hiding(shared, before),
            _hiding(shared, _without_retries(shared, broker, after)),
        )
        mark_members(broker, self._known())
        last = _Last(shared)
        broker.middleware.append(last)

        quiet, theirs = _QuietSkips(), logger_of('dramatiq.worker', 'WorkerThread')
        theirs.addFilter(quiet)

        def detach() -> None:
            theirs.removeFilter(quiet)
            broker.emit_before, broker.emit_after = before, after
            unmark_members(broker)
            broker.middleware.remove(last)

        self._undo.append(detach)

    def _detach(self) -> None:
        while self._undo:
            self._undo.pop()()

    def before_worker_shutdown(self, broker: Any, worker: Any) -> None:
        """Give the tokens away while actors end."""
        self.leaving = True
        if self._consuming is not None:
            self._consuming.stopped = True
        if self._self_drain is not None:
            self._self_drain.stop()
        if self._job is not None and self._in_memory is None:
            try:
                self._job.drain(0)
            except JobSyncError as error:
                logger.warning('JobSync: %s', error)

    def after_worker_shutdown(self, broker: Any, worker: Any) -> None:
        """Leave; survivors take over what is left in the node's queue."""
        job, self._job = self._job, None
        if self._in_memory is not None:
            self._in_memory.stop()
            self._in_memory = None
            return
        if self._duties is not None:
            self._duties.stop(5.0)
        self._close_http()
        if job is not None:
            job.__exit__(None, None, None)
        # Another worker of this process, as in tests, begins anew.
        self._detach()
        self._gate = self._shared = self._duties = self._consuming = self._self_drain = None

    def _busy(self, tokens: TokenSet) -> bool:
        return self._shared is not None and self._shared.busy(tokens)

    def _tick(self) -> None:
        self._orphans.look(self.leaving)
        self._post().requeue_failed()

    def _lease_changed(self, leased: bool) -> None:
        if not leased or self._job is None:
            logger.warning('JobSync: the lease ran out; consuming stops until there is one again')
            return
        logger.info('JobSync: the lease is valid again; consuming goes on')
        # While this node was taken for dead, its empty queue may have been deleted and forgotten.
        name, appname = self._job.node_name, self.settings.config.appname
        self._post().join(name, node_queue(appname, name))

    def parked_something(self) -> None:
        """A message went into the parked queue."""
        if self._duties is not None:
            self._duties.parked_something()

    # --- messages ---

    def before_process_message(self, broker: Any, message: Any) -> None:
        """The last look before the actor runs."""
        if self._shared is not None:
            self._shared.begin(message)
        processing.set((broker, message))

    def after_process_message(
        self,
        broker: Any,
        message: Any,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        """The actor has ended."""
        processing.set(None)
        if self._shared is not None:
            self._shared.end(message)

    def after_skip_message(self, broker: Any, message: Any) -> None:
        """The actor did not run, or ended by SkipMessage."""
        self.after_process_message(broker, message)

    # --- operating ---

    def evacuable(self) -> WorkerBroker:
        """The broker, for `jobsync evacuate --app MODULE:NAME`, where that is this object. Its
        actors are declared by then.

        Raises:
            ConfigurationError: The broker is neither of Redis nor of RabbitMQ, or there is none.
        """
        if self._broker is None:
            raise ConfigurationError(
                'this JobSync has no broker with actors: name the module that declares them'
            )
        opened = self._post()
        opened.begin_evacuation()
        return opened

    def local_status(self) -> dict[str, Any]:
        """The node as it sees itself, as plain values."""
        if self.job is None:
            return {'coordination_enabled': False}
        status = self.job.local_status()
        status['recent_events'] = [
            {**event, 'timestamp': str(event['timestamp'])} for event in status['recent_events']
        ]
        status['last_heartbeat'] = str(status['last_heartbeat'])
        consuming = self._consuming is not None and bool(self._ready(self.job)['consuming'])
        return {
            **status,
            'consuming': consuming,
            'paused': _refusal(self.job),
            'messages': dict(self._gate.counts) if self._gate is not None else {},
        }

    def _serve(self, job: Job) -> None:
        """Answer probes, also while the worker joins, and where it goes on without coordination."""
        if self.settings.http is None:
            return
        from jobsync_core.web.health import HealthServer, node_metrics, split_address

        host, port = split_address(self.settings.http)
        # The processes of one `dramatiq -p` listen on this port and those that follow it.
        port += max(0, process_number() - 1) if port else 0
        self._http = HealthServer(
            f'[{host}]:{port}' if ':' in host else f'{host}:{port}',
            ready=lambda: self._ready(job),
            live=lambda: job.alive,
            metrics=node_metrics(job, lambda: dict(self._gate.counts if self._gate else {})),
        )

    def _ready(self, job: Job) -> dict[str, object]:
        leased = job.am_i_healthy()
        problem = self._consuming.problem() if self._consuming is not None else 'stopped'
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

    def _close_http(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None


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


def _refusal(job: Job) -> str:
    """Why consuming pauses, as the database refuses to begin anything; '' where it does not."""
    return str(job.pausing.error) if job.pausing.is_paused(clock.now()) else ''


class _QuietSkips(logging.Filter):
    """Leaves out Dramatiq's own line for each message that comes back or goes back: ours says so,
    once for a key.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (isinstance(record.args, tuple) and any(is_quiet(item) for item in record.args))


class _Last(Middleware):
    """At the end of the list: the others have seen a message begin by now, and so may see it
    end.
    """

    def __init__(self, shared: WorkerGate) -> None:
        self._shared = shared

    def before_process_message(self, broker: Any, message: Any) -> None:
        """See WorkerGate.refuse."""
        self._shared.refuse(message)


def _hiding(shared: WorkerGate, emit: Callable[..., None]) -> Callable[..., None]:
    def emit_seen(signal: str, *args: Any, **kwargs: Any) -> None:
        if not args or not shared.hides(signal, args[0]):
            emit(signal, *args, **kwargs)

    return emit_seen


def _without_retries(
    shared: WorkerGate, broker: Any, emit: Callable[..., None]
) -> Callable[..., None]:
    """In place of a broker's `emit_after`: Retries do not hear of a message that was refused, which
    would fail for hours.
    """

    def emit_after(signal: str, *args: Any, **kwargs: Any) -> None:
        if not args or not shared.is_refused(signal, args[0]):
            emit(signal, *args, **kwargs)
            return
        args[0].options.pop('throws', None)
        for item in reversed(broker.middleware):
            if not isinstance(item, Retries):
                try:
                    item.after_process_message(broker, *args, **kwargs)
                except Exception:
                    logger.critical(
                        'unexpected failure in after_process_message of %r', item, exc_info=True
                    )

    return emit_after
