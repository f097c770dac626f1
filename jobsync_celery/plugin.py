"""JobSync(app): the one line that makes an app's workers nodes of a cluster."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from celery.utils.dispatch import Signal

from jobsync_core import clock
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.job import Job
from jobsync_core.ledger.cluster import UNCOORDINATED
from jobsync_core.logs import Repeats
from jobsync_core.protocol.effects import RebalanceEvent
from jobsync_core.protocol.pausing import Pausing, remedy
from jobsync_core.worker.consuming import SelfDrain
from jobsync_core.worker.duties.node import NodeDuties
from jobsync_core.worker.entering import make_job
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.node_of_tests import node_of_tests
from jobsync_core.worker.owners import OwnerMap, owner_map
from jobsync_core.worker.routing import node_queue, parked_queue
from jobsync_core.worker.startup import wait_for_database

from .gate import ConsumerGate
from .listening import Listening
from .logs import get_logger
from .mail import VISIBILITY_SEC, CeleryMail, Leftovers, driver_of, node_queue_of, redis_options
from .parts import CLIENTS, GATE, HAND_OVER, LIFE, RECEIVE, RESTORE, missing
from .router import install_router
from .settings import CelerySettings, read_settings
from .startup import wait_for_broker
from .tasks import Tasks, guarded_trace, odd_names, prepare_task, watch_tasks

if TYPE_CHECKING:
    from celery import Celery
    from kombu.connection import Connection

    from .evacuation import CeleryEvacuation

__all__ = ['JobSync', 'rebalanced', 'released']

logger = get_logger(__name__)

#: Sent in a worker when its tokens have changed: arguments sender (the app) and event (a
#: RebalanceEvent).
rebalanced = Signal(name='jobsync_rebalanced', providing_args={'event'})
#: Sent in a worker before tokens go to another node: arguments sender (the app) and tokens (a
#: TokenSet).
released = Signal(name='jobsync_released', providing_args={'tokens'})

#: Seconds between two looks at the lease.
_LOOK_SEC = 0.2
#: Least seconds that Redis may take to answer a worker.
_ANSWER_SEC = 5.0
#: Seconds by which a turn of the event loop may be late that is not stuck.
_LOOP_SEC = 1.0
#: Celery's own default, in seconds: whoever wants just that gives 121.
_DEFAULT_BROKER_HEARTBEAT = 120
#: RabbitMQ sends one in half of this. Celery's mingle ends when nothing has come for a second: with
#: a heartbeat in each second it goes on until RabbitMQ, to which the worker sends none meanwhile,
#: closes the connection.
_LEAST_BROKER_HEARTBEAT_SEC = 3


class JobSync:
    """The plugin of one app: `JobSync(app, database_url='postgresql://…')`, before its tasks are
    used.

    Args:
        app: The Celery app.
        settings: Any setting of CelerySettings and CoordinationConfig. What is not given comes from
            `app.conf.jobsync_…`, `app.conf.jobsync`, and the environment (`JOBSYNC_…`). They are
            read when they are needed first.

    Raises:
        ConfigurationError: The app has the plugin already.
    """

    def __init__(self, app: Celery, **settings: Any) -> None:
        if '_jobsync' in vars(app):
            raise ConfigurationError(
                f'JobSync(app) was called before for the app {app.main!r}: once is enough'
            )
        vars(app)['_jobsync'] = self
        self.app = app
        self._job: Job | None = None
        self._given: Mapping[str, Any] = settings
        self._settings: CelerySettings | None = None
        self._tasks: Tasks | None = None
        self._driver: str | None = None
        self._owners: tuple[int, OwnerMap] | None = None
        self._mail: CeleryMail | None = None
        self._gate: Gate | None = None
        self._duties: NodeDuties | None = None
        self._http: Any = None
        self._consumer: Any = None
        self._consumer_gate: ConsumerGate | None = None
        self._children: set[int] = set()
        self._worker: Any = None
        self._leased_at = 0.0
        self._refusing = False
        self._repeats = Repeats()
        self._look: Any = None
        self._left = Leftovers()
        self._pins: Mapping[str, Sequence[str]] = {}
        self._connected = self._consuming = self._uncoordinated = self._reconnects = False
        self._atomic = False
        self._solo = False
        self._listening: Listening | None = None
        self._self_drain: SelfDrain | None = None
        # What the app was configured with before this plugin put a node's own settings in.
        self._plain: dict[str, Any] = {}
        self._shared_at = 0.0
        self._install()

    @property
    def job(self) -> Job | None:
        """This worker's node; None where there is none. In tests the Job of `jobsync_core.testing`
        that stands in.
        """
        return node_of_tests() or self._job

    def __repr__(self) -> str:
        return f'<JobSync of {self.app.main!r}: {self.job!r}>'

    @staticmethod
    def of(app: Celery) -> JobSync | None:
        """The plugin of an app; None where it has none."""
        found: JobSync | None = vars(
            app._get_current_object() if hasattr(app, '_get_current_object') else app
        ).get('_jobsync')
        return found

    def _install(self) -> None:
        from . import control  # noqa: F401  # registers the inspect command
        from .steps import GateStep, NodeStep

        watch_tasks(self.app)
        install_router(self.app, self)
        self.app.steps['worker'].add(NodeStep)
        self.app.steps['consumer'].add(GateStep)
        self.app.user_options['worker'].add(
            click.Option(
                ('--jobsync-node',), help="Name of this node (default: the worker's node name)."
            )
        )
        self.app.user_options['worker'].add(
            click.Option(
                ('--jobsync-weight',), type=float, help='Share of this node relative to the others.'
            )
        )

    # --- producers ---

    @property
    def settings(self) -> CelerySettings:
        """The settings; read at the first use.

        Raises:
            ConfigurationError: A setting cannot work.
        """
        if self._settings is None:
            self._settings = read_settings(self.app, self._given)
        return self._settings

    @property
    def tasks(self) -> Tasks:
        """The app's coordinated tasks."""
        if self._tasks is None:
            self._tasks = Tasks(self.app, self.settings)
        return self._tasks

    @property
    def driver(self) -> str:
        """The broker's kind."""
        if self._driver is None:
            self._driver = driver_of(self.app)
        return self._driver

    def owner_queue(self, route: str) -> str | None:
        """The queue of the node that owns a route; None where there is none, or nobody knows."""
        try:
            if not self.settings.route_producers:
                return None
            # A node without a lease does not ask: its database is most likely away, and each
            # question takes seconds then.
            place = (
                self._owner_map().find_fresh(route)
                if self.job is None or self.job.has_lease
                else None
            )
        except JobSyncError as error:
            logger.debug('a message goes to its home queue: %s', error)
            return None
        return place.queue if place is not None else None

    def _owner_map(self) -> OwnerMap:
        # Of this process: a forked child makes its own.
        if self._owners is None or self._owners[0] != os.getpid():
            self._owners = os.getpid(), owner_map(self.settings.config)
        return self._owners[1]

    # --- the worker's life ---

    def prepare_worker(self, worker: Any, node: str | None, weight: float | None) -> None:
        """Make the Job, before the pool forks, and have the worker consume the node's queue.

        Raises:
            ConfigurationError: The worker cannot work like that.
        """
        given = {**self._given, **({'weight': weight} if weight is not None else {})}
        self._settings, self._tasks = read_settings(self.app, given), None
        settings = self.settings
        pool = (
            worker.pool_cls
            if isinstance(worker.pool_cls, str)
            else f'{worker.pool_cls.__module__}:{worker.pool_cls.__name__}'
        )
        if any(green in pool for green in ('gevent', 'eventlet')):
            raise ConfigurationError(
                f'pool {pool!r}: JobSync does not work with green threads, whose blocking '
                'database calls would stop heartbeats; '
                'use --pool prefork, threads or solo'
            )
        self._check_parts()
        self._plain = {
            name: self.app.conf[name] for name in ('broker_transport_options', 'broker_heartbeat')
        }
        name = node or settings.node_name or worker.hostname
        appname = settings.config.appname
        queue = node_queue(appname, name)
        if self.driver == 'redis':
            # kombu waits for an answer for ever, in the event loop; but a router may have forgotten
            # the connection.
            answer = max(_ANSWER_SEC, settings.config.heartbeat_timeout_sec)
            self.app.conf.broker_transport_options = {
                'visibility_timeout': VISIBILITY_SEC,
                'socket_timeout': answer,
                **(self.app.conf.broker_transport_options or {}),
                **redis_options(appname, name),
            }
        if (
            self.driver == 'amqp'
            and self.app.conf.broker_heartbeat == _DEFAULT_BROKER_HEARTBEAT
            and 'solo' not in pool
        ):
            # So that RabbitMQ takes back what a stopped or unreachable worker holds; a solo worker
            # sends none while a task runs.
            self.app.conf.broker_heartbeat = max(
                _LEAST_BROKER_HEARTBEAT_SEC, math.ceil(settings.config.heartbeat_timeout_sec)
            )
        self._mail = mail = CeleryMail(self)
        self._pins = self.tasks.pins()
        odd = odd_names(self.app, settings.pins)
        if odd:
            logger.warning('JobSync: %s', '; '.join(odd))
        self._job = job = make_job(
            settings,
            name,
            queue,
            'celery',
            self._pins,
            known=list(self.app.tasks),
            identify=mail.identify,
            place=mail.place,
            application=self._application(),
            prepare=lambda: mail.declare(queue),
            busy=self._busy,
            on_rebalance=self._rebalanced,
            on_release=lambda tokens: released.send(sender=self.app, tokens=tokens),
        )
        job.prepare_fork()
        self.app.amqp.queues.select_add(node_queue_of(self, queue))
        self._gate = Gate(settings, job)
        self._worker = worker
        self._solo = 'solo' in pool
        self._listening = Listening(self._left, self._solo)

    def _application(self) -> str:
        main = self.app.main
        return main if isinstance(main, str) and main != '__main__' else ''

    def _check_parts(self) -> None:
        """Whether the installed versions have what the plugin uses of them."""
        lacking = missing((GATE, LIFE, RESTORE) if self.driver == 'redis' else (GATE, LIFE))
        if lacking:
            raise ConfigurationError(
                f'the installed Celery or kombu lacks {", ".join(lacking)}, without which keys '
                'would not be safe: install versions that '
                'JobSync knows, with pip install "jobsync-workers[celery]"'
            )
        lacking = missing((RECEIVE, HAND_OVER, CLIENTS)) if self.driver == 'redis' else []
        if lacking:
            logger.warning(
                "JobSync: the installed kombu or redis lacks %s: messages are received in kombu's "
                'way, and one can be lost when this '
                'worker is killed just while it is received; install versions that JobSync knows, '
                'with '
                'pip install "jobsync-workers[celery]"',
                ', '.join(lacking),
            )
        self._atomic = self.driver == 'redis' and self.settings.redis_atomic and not lacking

    def wait_for_servers(self, check: Callable[[], object]) -> None:
        """Wait for a broker and a database that are not up yet; `check` raises where the worker is
        to end.

        Raises:
            OperationalError: The broker cannot be reached, and is not to be waited for.
            DatabaseUnavailable: The database cannot be reached within `wait_for_database_sec`.
        """
        settings = self.settings
        wait_for_broker(self.app, check)
        limit = settings.wait_for_database_sec if settings.required else 0.0
        wait_for_database(settings.config, limit, check=check, sleep=time.sleep, log=logger)

    def entered(self, worker: Any) -> None:
        """The worker is a node."""
        assert self._gate is not None and self._mail is not None and self.job is not None
        appname = self.settings.config.appname
        self._duties = NodeDuties(
            self._gate,
            self._mail,
            'celery',
            node_queue(appname, self.job.node_name),
            parked_queue(appname),
            on_lease=self._lease_changed,
            on_change=self._look_again,
            on_tick=self._tick,
            tasks=lambda: frozenset(self.app.tasks),
        )
        self._gate.owners.refresh()
        self._duties.restore_former()
        self._duties.start()
        assert self._listening is not None
        self._self_drain = SelfDrain(
            self.job,
            self._listening.silence,
            self.settings.config.heartbeat_timeout_sec + _LOOP_SEC,
        )
        self._self_drain.start()
        logger.info(
            'JobSync: node %s of %s* with %d tokens',
            self.job.node_name,
            self.settings.config.appname,
            len(self.job.my_tokens),
        )

    def go_uncoordinated(self, error: Exception) -> None:
        """The worker is no node, and may run all the same."""
        assert self.job is not None
        logger.critical(
            'JobSync: %s -- THIS WORKER RUNS WITHOUT COORDINATION, because jobsync_required is '
            'False: keys may run twice',
            error,
        )
        self.job.abandon(UNCOORDINATED)
        self._uncoordinated = True
        # It is as any worker without the plugin: what it takes is where the others of its kind
        # look.
        queue = node_queue(self.settings.config.appname, self.job.node_name)
        self.app.conf.update(self._plain)
        self.app.amqp.queues.consume_from.pop(queue, None)
        self.app.amqp.queues.pop(queue, None)
        self._job = None

    def attach(self, consumer: Any) -> None:
        """The consumer exists; it has no connection and no strategies yet."""
        assert self._gate is not None
        self._consumer = consumer
        self._consumer_gate = ConsumerGate(self, self._gate, consumer)
        if self.driver == 'redis':
            from redis.exceptions import MasterDownError, ReadOnlyError

            # A server that has become a replica is no server any more: as for one that has ended,
            # the consumer connects anew.
            consumer.connection_errors = (
                *consumer.connection_errors,
                ReadOnlyError,
                MasterDownError,
            )
        consumer.connection_for_read = lambda heartbeat=None: consumer.ensure_connected(
            self.receiving(self.app.connection_for_read(heartbeat=heartbeat), consumer.hub)
        )

    def receiving(self, connection: Connection, hub: Any = None) -> Connection:
        """A connection that has not been opened yet, on which messages are received; with an event
        loop, waited for.
        """
        if self._atomic and not self._uncoordinated:
            from .receive import receive_atomically  # needs redis

            receive_atomically(connection, self._left, hub)
        return connection

    def connected(self) -> None:
        """The consumer has a connection, the first one or another."""
        if self._reconnects and self.job is not None and self._mail is not None:
            # What the lost connection had taken: nobody can acknowledge it any more, and Redis
            # gives it back to nobody.
            try:
                self._mail.restore(self.job.node_name, self._left)
            except Exception as error:  # the broker went away again; the next connection does it
                logger.warning(
                    'JobSync: what the lost connection held is not given back yet: %r', error
                )
        self._reconnects = True
        self._connected = self._consuming = True  # the consumer begins in a moment
        if self._listening is not None:
            self._listening.connected()
        # Not left to the duties, whose questions to the database may take seconds.
        self._look = self._consumer.timer.call_repeatedly(_LOOK_SEC, self._follow_lease)

    def disconnected(self) -> None:
        """The consumer has no connection."""
        self._connected = self._consuming = False
        if self._listening is not None:
            self._listening.disconnected()
        if self._look is not None:
            self._look.cancel()  # not every Celery clears its timer with the connection
        if self._consumer_gate is not None:
            self._consumer_gate.forget()

    def closing(self) -> None:
        """The worker shuts down; its tasks end."""
        self._connected = self._consuming = False
        if self._self_drain is not None:
            self._self_drain.stop()
        if self.job is not None:
            try:
                self.job.drain(0)
            except JobSyncError as error:
                logger.warning('JobSync: %s', error)

    def leave(self) -> None:
        """Leave the cluster; survivors take over what is left at the broker."""
        job, self._job = self._job, None
        if self._http is not None:
            self._http.close()
        if job is None:
            return
        if self._self_drain is not None:
            self._self_drain.stop()
        if self._left.unrecorded and self._mail is not None:
            try:
                self._mail.restore(job.node_name, self._left)
            except Exception as error:  # whatever the broker's client raises
                lost = self._left.ids()
                logger.critical(
                    'JobSync: %d messages that a lost connection brought are lost with this '
                    'worker, as the broker cannot be '
                    'reached (%r); send them again: %s',
                    len(lost),
                    error,
                    ', '.join(lost),
                )
        if self._duties is not None:
            self._duties.stop(5.0)
        job.__exit__(None, None, None)
        if self._consumer_gate is not None:
            self._consumer_gate.close()
        if self._mail is not None:
            self._mail.close()

    def prepare_tasks(self) -> None:
        """Before messages of new tasks can come."""
        for task in list(self.app.tasks.values()):
            prepare_task(task)

    def guard_traces(self) -> None:
        """After Celery has built its tracers, which those pools use that have no processes."""
        for name, task in list(self.app.tasks.items()):
            try:
                coordinated = self.tasks.find(name) is not None
            except JobSyncError:
                continue  # it runs nowhere
            if (
                coordinated or self._solo
            ) and task.__trace__ is not None:  # in a solo pool it would raise into the consumer
                task.__trace__ = guarded_trace(task, self._solo)

    def pinned_late(self, name: str) -> bool:
        """Whether a task has a pin that this node did not register when it entered, so that nothing
        holds its messages to it.
        """
        found = self.tasks.find(name)
        return found is not None and found.pin is not None and name not in self._pins

    # --- events ---

    def parked_something(self) -> None:
        """A message went into the parked queue."""
        if self._duties is not None:
            self._duties.parked_something()

    def _busy(self, tokens: TokenSet) -> bool:
        return self._consumer_gate is not None and self._consumer_gate.busy(tokens)

    def _rebalanced(self, event: RebalanceEvent) -> None:
        rebalanced.send(sender=self.app, event=event)
        if self._consumer is not None and self.job is not None:
            fields = {
                'node': self.job.node_name,
                'version': event.token_version,
                'added': event.tokens_added,
                'removed': event.tokens_removed,
            }
            self._consumer.call_soon(self._send_event, 'jobsync-rebalanced', fields)

    def _send_event(self, kind: str, fields: Mapping[str, Any]) -> None:
        dispatcher = getattr(self._consumer, 'event_dispatcher', None)
        if dispatcher is not None and dispatcher.enabled:
            dispatcher.send(kind, **fields)

    def _look_again(self) -> None:
        if self._consumer is not None and self._consumer_gate is not None:
            self._consumer.call_soon(self._consumer_gate.look)

    def _tick(self) -> None:
        if self._consumer_gate is not None and self._consumer_gate.waiting:
            self._look_again()  # should the timer have lost its entry: a reconnect clears it
        self._watch_children()
        self._restore_shared()

    def _restore_shared(self) -> None:
        """Give back what plain workers of the same queues had taken when they were killed, after as
        long as they would.
        """
        if (
            self._mail is None
            or self.driver != 'redis'
            or self.job is None
            or not self.job.has_lease
            or clock.now() < self._shared_at
        ):
            return
        options = self._plain.get('broker_transport_options') or {}
        restored = self._mail.restore_shared(options)
        self._shared_at = clock.now() + self._mail.shared_every(options)
        if restored:
            logger.warning(
                'JobSync: %d messages that workers without the plugin had taken are given back',
                restored,
            )

    def _lease_changed(self, leased: bool) -> None:
        if self._consumer is None or self._consumer_gate is None:
            return
        if leased and self._duties is not None and self._mail is not None and self.job is not None:
            self._mail.declare(node_queue(self.settings.config.appname, self.job.node_name))
            self._duties.restore_former()
        self._consumer.call_soon(self._follow_lease)

    def _follow_lease(self) -> None:
        """Consume with a lease and a database that begins work, and not otherwise. By what is so
        now: the event loop keeps no order among its calls.
        """
        consumer, gate, job = self._consumer.task_consumer, self._consumer_gate, self.job
        if self._listening is not None:
            self._listening.turned(self._amqp_connection())
        if consumer is None or gate is None or job is None or not self._connected:
            return
        now, leased = clock.now(), job.am_i_healthy()
        asked = self._left.asked_at
        if asked is not None and now - asked > self.settings.config.heartbeat_timeout_sec:
            # Redis answers within a second: who has forgotten this connection may let another one
            # through
            self._left.cut()
        paused = job.pausing.is_paused(now)
        if leased:
            self._leased_at = now
        if self._consuming and (paused or not leased):
            self._consuming = False
            self._tell_stop(leased, job.pausing, now)
            consumer.cancel()
            gate.give_back()
        elif (
            not leased
            and self.driver == 'amqp'
            and now - self._leased_at > self.settings.config.heartbeat_timeout_sec
        ):
            # On Redis the survivors take what is running here; RabbitMQ gives it only to whom it
            # comes from.
            gate.surrender()
        elif leased and not paused and not self._consuming:
            self._consuming = True
            consumer.consume()
            if not self._refusing:
                logger.info('JobSync: the lease is valid again; consuming goes on')
        elif paused:
            gate.give_back()  # whose time has come meanwhile
        if self._refusing and not job.pausing.length:
            self._refusing = False
            logger.info('JobSync: the database begins work again; consuming goes on')

    def _tell_stop(self, leased: bool, pausing: Pausing, now: float) -> None:
        if not leased:
            logger.warning('JobSync: the lease ran out; consuming stops until there is one again')
            return
        self._refusing = True
        error = pausing.error
        more = self._repeats.say('refused', now)
        if more is not None:
            logger.warning(
                'JobSync: the database refuses to begin anything; consuming stops for %.0f s, and '
                'one message tries then: %s; '
                '%s%s',
                pausing.length,
                error,
                remedy(error.sqlstate),
                more,
            )

    def _amqp_connection(self) -> Any:
        connection = self._consumer.connection if self.driver == 'amqp' else None
        return connection.connection if connection is not None and connection.connected else None

    def _watch_children(self) -> None:
        """Release what a pool child was executing that is gone."""
        processes = getattr(
            getattr(getattr(self._worker, 'pool', None), '_pool', None), '_pool', None
        )
        if not isinstance(processes, list) or self.job is None:
            return
        present = {process.pid for process in processes if getattr(process, 'pid', None)}
        for pid in self._children - present:
            count = self.job.release_child(pid)
            if count:
                logger.warning(
                    'JobSync: pool process %d is gone; %d of its keys may run again', pid, count
                )
            self._children.discard(pid)
        self._children |= present

    # --- operating ---

    def local_status(self) -> dict[str, Any]:
        """The node as it sees itself, as plain values."""
        if self.job is None:
            return {'coordination_enabled': False}
        status = self.job.local_status()
        status['recent_events'] = [
            {**event, 'timestamp': str(event['timestamp'])} for event in status['recent_events']
        ]
        status['last_heartbeat'] = (
            str(status['last_heartbeat']) if status['last_heartbeat'] else None
        )
        waiting = self._consumer_gate.waiting if self._consumer_gate is not None else 0
        return {
            **status,
            'consuming': self._consumes(),
            'paused': self._refusal(),
            'messages': {**(self._gate.counts if self._gate else {}), 'waiting': waiting},
        }

    def _refusal(self) -> str:
        """Why consuming pauses; '' where it does not."""
        job = self.job
        return (
            str(job.pausing.error) if job is not None and job.pausing.is_paused(clock.now()) else ''
        )

    def _consumes(self) -> bool:
        return self._consuming and (
            self._listening is None
            or self._listening.silence() <= self.settings.config.heartbeat_timeout_sec
        )

    def evacuable(self) -> CeleryEvacuation:
        """The broker, for `jobsync evacuate`."""
        from .evacuation import CeleryEvacuation

        return CeleryEvacuation(self)

    def serve(self) -> None:
        """Answer probes, also while the worker joins."""
        if self.settings.http is None or self.job is None:
            return
        from jobsync_core.web.health import HealthServer, node_metrics

        job = self.job
        self._http = HealthServer(
            self.settings.http,
            live=lambda: job.alive,
            ready=lambda: {
                'lease': job.am_i_healthy() or self._uncoordinated,
                'consuming': self._consumes(),
                'node': job.node_name,
                **({'reason': reason} if (reason := self._refusal()) else {}),
            },
            metrics=node_metrics(job, lambda: dict(self._gate.counts if self._gate else {})),
        )
