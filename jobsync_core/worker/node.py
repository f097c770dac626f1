"""A worker process as a node, from before its first message until after its last: what both
adapters do alike, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .. import clock
from ..errors import ConfigurationError, JobSyncError
from ..job import Job
from ..ledger.cluster import UNCOORDINATED
from ..store.queues import QueueStore
from ..store.tables import Tables
from .backlog import BacklogWatch, read_backlog
from .consuming import SelfDrain
from .duties.homes import Homes
from .duties.node import NodeDuties
from .entering import make_job
from .framework import Framework, NodeBroker
from .gate import Gate
from .node_status import node_status, refusal, tell_uncoordinated
from .queue_groups import divided, whole_groups
from .registry import QueueRegistry
from .routing import node_queue
from .settings import PluginSettings
from .standby import Standby
from .startup import wait_for_database

__all__ = ['Framework', 'NodeBroker', 'WorkerNode']

#: Seconds within which the duties' thread ends; and that its last call to the database may take.
_STOP_SEC, _LAST_SEC = 5.0, 0.5


class WorkerNode:
    """One start of a worker. Its Job is made here, so that children that are forked afterwards
    share its memory; it is entered later.

    Args:
        settings: The plugin's.
        name: The node's name.
        framework: What the adapter hands over.

    Attributes:
        name: The node's name.
        gate: Decides on its messages, and counts.
        job: The node; None when it is none any more.
        coordinated: False: it could not enter, and the worker runs all the same.

    Raises:
        ConfigurationError: The node cannot have that name, or the worker consumes a part of a queue
            group.
    """

    def __init__(self, settings: PluginSettings, name: str, framework: Framework) -> None:
        self._settings = settings
        self._framework = framework
        self.name = name
        problem = divided(settings.queue_groups, framework.homes)
        if problem:
            raise ConfigurationError(problem)
        self._standby = Standby(settings.config.heartbeat_timeout_sec)
        appname = settings.config.appname
        queues = {home: node_queue(home, appname, name) for home in framework.homes}
        self._job = job = make_job(
            settings,
            name,
            queues,
            framework.kind,
            framework.pins,
            known=list(framework.tasks()),
            identify=framework.broker.identify,
            place=framework.broker.place,
            application=framework.application,
            groups=whole_groups(settings.queue_groups, framework.homes),
            prepare=self._declare,
            ready=self._standby.hold,
            busy=framework.busy,
            on_rebalance=framework.on_rebalance,
            on_release=framework.on_release,
        )
        job.prepare_fork()
        self.job: Job | None = job
        self.gate = Gate(settings, job, framework.pins.get)
        self._homes = self._make_homes(job)
        self.gate.consumes = lambda home: home in self._homes.wanted
        self.coordinated = True
        self._duties: NodeDuties | None = None
        self._self_drain: SelfDrain | None = None
        self._http: Any = None
        self._ends = False

    def _make_homes(self, job: Job) -> Homes:
        settings, gate, kind = self._settings, self.gate, self._framework.kind
        tables = Tables.of(settings.config)
        registry = QueueRegistry(gate.sessions, tables, kind, self.name, gate.group_of)
        return Homes(
            self._framework.homes,
            name_of=lambda home: node_queue(home, settings.config.appname, self.name),
            groups=lambda homes: whole_groups(settings.queue_groups, homes),
            record=lambda home, queue: registry.record({home: queue}, job.belonging),
            declare=partial(self._declare_unswept, registry),
            enroll=job.enroll,
            # A sweeper deletes a queue that looks empty: what has an ETA would go with it.
            holds=lambda home: job.holds(settings.group_of(home)) or self._framework.in_hand(home),
            retire=registry.retire,
            problem=lambda homes: divided(settings.queue_groups, homes),
        )

    @property
    def queues(self) -> Mapping[str, str]:
        """Each home queue of the worker, and the node's own queue for it."""
        return self._homes.queues

    def add_home(self, home: str, ready: Callable[[str], object]) -> None:
        """The worker consumes another home queue. Returns at once.

        Args:
            home: The queue.
            ready: Called with the node's own queue for it, by the duties' thread, when the worker
                is to consume that too; again, if it raises, and where the worker had begun to drop
                it.

        Raises:
            ConfigurationError: The node's own queue would have a name that cannot be.
        """
        self._homes.add(home, ready)

    def drop_home(self, home: str, done: Callable[[str], object]) -> None:
        """The worker consumes a home queue no more. Returns at once: until all of it is given away,
        the node's own queue for it has to be consumed.

        Args:
            home: The queue.
            done: Called with the node's own queue, by the duties' thread, when the worker is to
                stop consuming that too; again, if it raises.
        """
        self._homes.drop(home, done)

    def serve(self, port_offset: int = 0) -> None:
        """Answer probes, while the worker joins as well, and where it goes on without coordination.

        Args:
            port_offset: What is added to the port, as a worker has several processes.

        Raises:
            ConfigurationError: The address is none, or cannot be listened on.
        """
        if self._settings.http is None:
            return
        from ..web.health import HealthServer, node_metrics, split_address

        host, port = split_address(self._settings.http)
        port += port_offset if port else 0
        job, counter = self._job, self._framework.counter
        read = partial(read_backlog, counter, self._settings.config) if counter else None
        watch = BacklogWatch(read) if read else None
        self._http = HealthServer(
            f'[{host}]:{port}' if ':' in host else f'{host}:{port}',
            ready=self.ready,
            live=lambda: job.alive,
            metrics=node_metrics(
                job,
                lambda: dict(self.gate.counts),
                # One node shows the numbers, which are those of all: they may be summed up.
                lambda: (
                    watch.latest() if watch is not None and job.local_status()['is_leader'] else ()
                ),
            ),
            backlog=watch.answer if watch is not None else None,
        )

    def wait_for_database(self, check: Callable[[], object]) -> None:
        """Wait for a database that is not up yet.

        Args:
            check: Called before each try; raises where the worker is to end.

        Raises:
            DatabaseUnavailable: It cannot be reached within `wait_for_database_sec`, or at once
                where it is not required.
        """
        settings = self._settings
        limit = settings.wait_for_database_sec if settings.required else 0.0
        wait_for_database(
            settings.config, limit, check=check, sleep=time.sleep, log=self._framework.log
        )

    def enter(self, waits: bool = False) -> None:
        """Enter the cluster; takes as long as joining does. `start` comes next.

        Raises whatever keeps it from that.

        Args:
            waits: It registers, and owns nothing before `take_part` is called by another thread.
        """
        if not waits:
            self.take_part()
        self._job.__enter__()
        self._standby.give_away(self._job)

    @property
    def registered(self) -> bool:
        """Whether the node is known to the others, and has all that it needs to own tokens."""
        return self._standby.registered

    def take_part(self) -> None:
        """The worker can take messages: plans may give it tokens."""
        self._standby.end()
        self._job.wake()

    def start(self) -> None:
        """Begin the node's duties, before any message is consumed; the node has been entered.

        Raises:
            JobSyncError: What a former life of the node left cannot be restored.
        """
        framework, job = self._framework, self._job
        self._duties = duties = NodeDuties(
            self.gate,
            framework.broker,
            framework.kind,
            self._homes,
            on_lease=self._lease_changed,
            on_change=framework.on_change,
            on_tick=framework.on_tick,
            tasks=lambda: frozenset(framework.tasks()),
            route=framework.route,
        )
        self.gate.owners.refresh()
        if framework.comes_back:
            duties.restore_former()
        duties.start()
        began = clock.now()
        # Nothing could be consumed while the node entered.
        self._self_drain = SelfDrain(
            job,
            lambda: min(framework.silence(), clock.now() - began),
            framework.patience,
            self._tell_silent,
        )
        self._self_drain.start()
        framework.log.info(
            'JobSync: node %s of %s* with %d tokens',
            job.node_name,
            self._settings.config.appname,
            len(job.my_tokens),
        )

    def _tell_silent(self, silent: bool) -> None:
        job = self._job
        with job.session(pinned=True) as connection:
            QueueStore(connection, Tables.of(self._settings.config)).tell_silent(
                self.name, job.incarnation, silent
            )

    def give_up(self) -> None:
        """End an `enter` that another thread waits in; `leave` is due then."""
        self._job.give_up()

    def go_uncoordinated(
        self, reason: str, setting: str, trace: BaseException | None = None
    ) -> None:
        """The worker is no node, and runs all the same. Probes are answered.

        Args:
            reason: Why it could not enter.
            setting: What the setting is called that lets it run.
            trace: An error that nobody expected.
        """
        self.coordinated = False
        tell_uncoordinated(self._framework.log, reason, setting, trace)
        self._leave()
        self._job.abandon(UNCOORDINATED)

    def drain(self) -> None:
        """The worker shuts down: give the tokens away while its tasks end."""
        self.hurry()
        if self._self_drain is None:
            return  # it owns nothing yet
        if self.job is not None:
            try:
                self.job.drain(0)
            except JobSyncError as error:
                self._framework.log.warning('JobSync: %s', error)
        self._self_drain.stop()

    def hurry(self) -> None:
        """The worker is about to shut down: nothing waits long for the database any more. Quick, so
        that a signal's handler may call it.
        """
        self._ends = True
        self._job.hurry()
        self.gate.sessions.hurry()

    def leave(self) -> None:
        """Leave; survivors take over what is left at the broker. It may be called again, and where
        nothing was entered.
        """
        self.hurry()
        try:
            self._leave()
        finally:
            # Last: a probe that is not answered while the worker leaves has it killed.
            if self._http is not None:
                self._http.close()
                self._http = None

    def _leave(self) -> None:
        self.job = None
        if self._self_drain is not None:
            self._self_drain.stop()
        if self._duties is not None:
            # What a duty leaves undone is done by others.
            self.gate.sessions.hurry(_LAST_SEC)
            self._duties.stop(_STOP_SEC)
            self._duties = None
        self._job.__exit__(None, None, None)

    def parked_something(self, home: str = '') -> None:
        """A message went into the parked queue of a home queue."""
        if self._duties is not None:
            self._duties.parked_something(home)

    def _declare(self) -> None:
        self._framework.declare(self.queues)

    def _declare_unswept(self, registry: QueueRegistry, home: str, queue: str) -> None:
        # Who began to sweep it when it was nobody's may be about to delete it.
        with registry.held(self.name) as held:
            if not held:
                raise JobSyncError(f'{queue!r} is being swept; it is consumed after that')
            self._framework.declare({home: queue})

    def _lease_changed(self, leased: bool) -> None:
        if leased:
            # This waits for who sweeps what is this node's, and may be about to delete its queues.
            if self._framework.comes_back and self._duties is not None:
                self._duties.restore_former()
            self._declare()
        self._framework.on_lease(leased)

    def ready(self) -> dict[str, object]:
        """What probes are told: 'consuming' is whether the worker is ready, 'reason' why it is
        not.
        """
        leased = self._job.am_i_healthy()
        problem = 'no lease' if self.coordinated and not leased else ''
        problem = problem or refusal(self._job, clock.now()) or self._framework.problem()
        duties = self._duties
        problem = problem or (duties.problem() if duties is not None else '')
        problem = problem or ('the worker shuts down' if self._ends else '')
        groups = self._job.local_status().get('groups') if self.coordinated else None
        return {
            'consuming': not problem,
            'lease': leased,
            'coordinated': self.coordinated,
            'node': self.name,
            **({'groups': groups} if groups else {}),
            **({'reason': problem} if problem else {}),
        }

    def status(self, job: Job, **messages: int) -> dict[str, Any]:
        """The node as it sees itself, as plain values.

        Args:
            job: The node, or the one that tests put in its place.
            messages: What is counted besides what became of messages.
        """
        return node_status(
            job,
            consuming=bool(self.ready()['consuming']),
            messages={**self.gate.counts, **messages},
        )
