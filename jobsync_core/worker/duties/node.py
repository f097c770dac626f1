"""The duties of a worker's node, in the order in which they come first."""

from __future__ import annotations

from collections.abc import Callable

from ... import clock
from ...store.tables import Tables
from ..broker import Broker, Delivery
from ..gate import Gate
from ..passage import Passage
from ..registry import QueueRegistry, restore_former_life
from ..sweeping import Sweeping
from .answering import BrokerAnswers
from .backlog import Backlog
from .drained import Drained
from .duty import Every, Moment
from .homes import Homes
from .lease import LeaseWatch
from .leftovers import Leftovers
from .mark import BrokerMark
from .parked import Parked
from .plan import PlanWatch
from .rescue import Rescue
from .runner import Runner
from .unknown import UnknownTasks

__all__ = ['NodeDuties']


class NodeDuties:
    """What a node does beside its messages.

    Args:
        gate: The node's gate.
        broker: The broker; used by the runner's thread alone.
        kind: The plugin's name.
        homes: The node's home queues.
        on_lease: Called with True when there is a lease again, and with False when it has run out;
            again, if it raises.
        on_change: Called after each change of plan, when the owner map is up to date.
        on_tick: Called once a second.
        tasks: The names of the tasks, or actors, that this node's consumers know at this moment.
        route: Makes the route of a message that does not tell it; None where it needs none.
    """

    def __init__(
        self,
        gate: Gate,
        broker: Broker,
        kind: str,
        homes: Homes,
        *,
        on_lease: Callable[[bool], object],
        on_change: Callable[[], object],
        on_tick: Callable[[], object] = lambda: None,
        tasks: Callable[[], frozenset[str]] = frozenset,
        route: Callable[[Delivery], str | None] = lambda delivery: delivery.route,
    ) -> None:
        self._job = job = gate.job
        self._broker = broker
        self._sessions = gate.sessions
        self._owners = owners = gate.owners
        config, node = gate.settings.config, gate.job.node_name
        unknown, parked = gate.rules.unknown, gate.rules.parked
        interval = config.rebalance_check_interval_sec
        self._registry = registry = QueueRegistry(
            gate.sessions, Tables.of(config), kind, node, gate.group_of
        )
        passage = Passage(broker, node)
        self._parked = Parked(
            broker,
            passage,
            registry,
            owners,
            lambda: homes.wanted,
            parked,
            unknown,
            interval=interval,
            tasks=tasks,
            count=gate.count,
            consumers=owners.consumers_of,
        )
        self._answers = BrokerAnswers(
            lambda: broker.size(next(iter(homes.queues.values()), parked('')))
        )
        sweeping = Sweeping(
            node,
            broker,
            passage,
            registry,
            owners,
            parked,
            count=gate.count,
            stray=self._parked.note,
        )
        self.runner = Runner(
            node,
            (
                LeaseWatch(lambda: registry.record(homes.queues, job.belonging), on_lease),
                PlanWatch(owners.reread, on_change),
                homes,
                self._answers,
                Backlog(
                    node,
                    broker,
                    passage,
                    lambda: tuple(homes.queues.values()),
                    owners,
                    owns=gate.owns,
                    count=gate.count,
                ),
                # Rescue never waits behind what is parked.
                Rescue(registry, sweeping, interval),
                Leftovers(broker, registry, sweeping, interval),
                Drained(node, registry, sweeping, interval, gate.count),
                self._parked,
                UnknownTasks(
                    broker,
                    passage,
                    registry,
                    owners,
                    parked,
                    unknown,
                    interval=interval,
                    tasks=tasks,
                    route=route,
                    count=gate.count,
                ),
                BrokerMark(lambda: job.belonging.broker, broker.mark),
                Every('tick', 1.0, on_tick),
                Every('idle connections', 1.0, self._close_idle),
            ),
            self._look,
            wait=job.wait_until,
            wake=job.wake,
            reset=self._reset,
        )

    def start(self) -> None:
        """Start their thread."""
        self.runner.start()

    def stop(self, timeout: float) -> None:
        """End it; wait for it for so many seconds at most."""
        self.runner.stop(timeout)
        self._sessions.close_all()

    def problem(self) -> str:
        """Why the broker counts as away; '' where it answers."""
        return self._answers.problem()

    def parked_something(self, home: str) -> None:
        """A message was put into the parked queue of a home queue."""
        self._parked.note(home)

    def restore_former(self) -> int:
        """Restore what an earlier life of this node had taken; before it consumes.

        Raises:
            JobSyncError: The database cannot be reached, or somebody else was at it for a minute.
        """
        return restore_former_life(
            self._registry,
            self._broker,
            self._job.node_name,
            wait=self._job.wait_until,
            closing=lambda: self.runner.closing,
        )

    def _reset(self) -> None:
        self._answers.failed()
        self._broker.reset()

    def _look(self) -> Moment:
        job = self._job
        return Moment(
            clock.now(),
            job.am_i_healthy(),
            job.token_version,
            job.am_i_leader(),
            self._owners.nodes,
        )

    def _close_idle(self) -> None:
        self._sessions.trim()
        self._job.rest()
