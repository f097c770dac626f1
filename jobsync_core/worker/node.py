"""A worker process as a node, from before its first message until after its last: what both
adapters do alike, once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .. import clock
from ..assignment.tokens import TokenSet
from ..errors import JobSyncError
from ..job import Job
from ..ledger.cluster import UNCOORDINATED
from ..logs import get_logger
from ..protocol.effects import RebalanceEvent
from .broker import Broker, Delivery
from .consuming import SelfDrain
from .duties.node import NodeDuties
from .entering import make_job
from .gate import Gate
from .routing import node_queue
from .settings import PluginSettings
from .startup import wait_for_database

__all__ = ['Framework', 'NodeBroker', 'WorkerNode', 'node_status', 'refusal', 'tell_uncoordinated']

#: Seconds within which the duties' thread ends.
_STOP_SEC = 5.0


class NodeBroker(Broker, Protocol):
    """The broker, as a node needs it."""

    @property
    def place(self) -> str:
        """Its address, without a password."""

    def identify(self, make: bool) -> str | None:
        """The broker's mark, '' where it has none of its own; makes one where it is asked to, else
        None where there is none yet.
        """


@dataclass(frozen=True, kw_only=True)
class Framework:
    """What an adapter hands over of its framework and its worker.

    Args:
        kind: The plugin's name; one cluster has one plugin.
        broker: The broker; but for entering, used by the duties' thread alone.
        declare: Makes the node's queue at the broker: while entering, and when there is a lease
            again, as the empty queue of a node that is taken for dead may be deleted.
        tasks: The names of the tasks, or actors, that the worker knows at this moment.
        pins: Pinned tasks.
        busy: Whether work on one of these tokens is running.
        problem: Why the worker takes no messages; '' where it does.
        silence: Seconds for which it has taken none.
        patience: Seconds of silence after which the node gives its keys to others.
        on_lease: Called with False when the lease has run out, and with True when there is one
            again; again, if it raises.
        on_change: Called after each change of plan, when the owner map is up to date.
        on_tick: Called once a second.
        on_rebalance, on_release: The adapter's signals; the user's callbacks run as well.
        route: Makes the route of a message that does not tell it; None where it needs none.
        application: What the framework takes for the application's name.
        comes_back: A worker of the same name is the same node, so that it restores what its former
            life had taken.
        log: Where lines of the worker's life go.
    """

    kind: str
    broker: NodeBroker
    declare: Callable[[], object]
    tasks: Callable[[], Iterable[str]]
    pins: Mapping[str, Sequence[str]]
    busy: Callable[[TokenSet], bool]
    problem: Callable[[], str]
    silence: Callable[[], float]
    patience: float
    on_lease: Callable[[bool], object]
    on_change: Callable[[], object] = lambda: None
    on_tick: Callable[[], object] = lambda: None
    on_rebalance: Callable[[RebalanceEvent], object] = lambda event: None
    on_release: Callable[[TokenSet], object] = lambda tokens: None
    route: Callable[[Delivery], str | None] = lambda delivery: delivery.route
    application: str = ''
    comes_back: bool = False
    log: logging.Logger = field(default_factory=lambda: get_logger(__name__))


class WorkerNode:
    """One start of a worker. Its Job is made here, so that children that are forked afterwards
    share its memory; it is entered later.

    Args:
        settings: The plugin's.
        name: The node's name.
        framework: What the adapter hands over.

    Attributes:
        name: The node's name.
        queue: The name of its own queue.
        gate: Decides on its messages, and counts.
        job: The node; None when it is none any more.
        coordinated: False: it could not enter, and the worker runs all the same.

    Raises:
        ConfigurationError: The node cannot have that name.
    """

    def __init__(self, settings: PluginSettings, name: str, framework: Framework) -> None:
        self._settings = settings
        self._framework = framework
        self.name = name
        self.queue = node_queue(settings.config.appname, name)
        self._job = job = make_job(
            settings,
            name,
            self.queue,
            framework.kind,
            framework.pins,
            known=list(framework.tasks()),
            identify=framework.broker.identify,
            place=framework.broker.place,
            application=framework.application,
            prepare=framework.declare,
            busy=framework.busy,
            on_rebalance=framework.on_rebalance,
            on_release=framework.on_release,
        )
        job.prepare_fork()
        self.job: Job | None = job
        self.gate = Gate(settings, job)
        self.coordinated = True
        self._duties: NodeDuties | None = None
        self._self_drain: SelfDrain | None = None
        self._http: Any = None

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
        job = self._job
        self._http = HealthServer(
            f'[{host}]:{port}' if ':' in host else f'{host}:{port}',
            ready=self.ready,
            live=lambda: job.alive,
            metrics=node_metrics(job, lambda: dict(self.gate.counts)),
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

    def enter(self) -> None:
        """Enter the cluster; takes as long as joining does. `start` comes next.

        Raises whatever keeps it from that.
        """
        self._job.__enter__()

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
            self.queue,
            self.gate.rules.parked,
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
            job, lambda: min(framework.silence(), clock.now() - began), framework.patience
        )
        self._self_drain.start()
        framework.log.info(
            'JobSync: node %s of %s* with %d tokens',
            job.node_name,
            self._settings.config.appname,
            len(job.my_tokens),
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
        if self._self_drain is not None:
            self._self_drain.stop()
        if self.job is not None:
            try:
                self.job.drain(0)
            except JobSyncError as error:
                self._framework.log.warning('JobSync: %s', error)

    def leave(self) -> None:
        """Leave; survivors take over what is left at the broker. It may be called again, and where
        nothing was entered.
        """
        if self._http is not None:
            self._http.close()
            self._http = None
        self._leave()

    def _leave(self) -> None:
        self.job = None
        if self._self_drain is not None:
            self._self_drain.stop()
        if self._duties is not None:
            self._duties.stop(_STOP_SEC)
            self._duties = None
        self._job.__exit__(None, None, None)

    def parked_something(self) -> None:
        """A message went into the parked queue."""
        if self._duties is not None:
            self._duties.parked_something()

    def _lease_changed(self, leased: bool) -> None:
        if leased:
            self._framework.declare()
            if self._framework.comes_back and self._duties is not None:
                self._duties.restore_former()
        self._framework.on_lease(leased)

    def ready(self) -> dict[str, object]:
        """What probes are told: 'consuming' is whether the worker is ready, 'reason' why it is
        not.
        """
        leased = self._job.am_i_healthy()
        problem = 'no lease' if self.coordinated and not leased else ''
        problem = problem or refusal(self._job, clock.now()) or self._framework.problem()
        return {
            'consuming': not problem,
            'lease': leased,
            'coordinated': self.coordinated,
            'node': self.name,
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


def tell_uncoordinated(
    log: logging.Logger, reason: str, setting: str, trace: BaseException | None = None
) -> None:
    """Say that a worker is no node, and runs all the same.

    Args:
        log: Where.
        reason: Why it could not enter.
        setting: What the setting is called that lets it run.
        trace: An error that nobody expected.
    """
    log.critical(
        'JobSync: %s -- THIS WORKER RUNS WITHOUT COORDINATION, because %s is False: '
        'keys may run twice',
        reason,
        setting,
        exc_info=trace,
    )


def node_status(job: Job, *, consuming: bool, messages: Mapping[str, int]) -> dict[str, Any]:
    """A node as it sees itself, as plain values.

    Args:
        job: The node.
        consuming: Whether its worker takes messages.
        messages: What became of messages.
    """
    status: dict[str, Any] = dict(job.local_status())
    status['recent_events'] = [
        {**event, 'timestamp': str(event['timestamp'])} for event in status['recent_events']
    ]
    heartbeat = status['last_heartbeat']
    status['last_heartbeat'] = str(heartbeat) if heartbeat is not None else None
    return {
        **status,
        'consuming': consuming,
        'paused': refusal(job, clock.now()),
        'messages': dict(messages),
    }


def refusal(job: Job, now: float) -> str:
    """Why consuming pauses, as the database refuses to begin anything; '' where it does not."""
    return str(job.pausing.error) if job.pausing.is_paused(now) else ''
