"""The keeper: a node's thread that follows lease and plans, and does what is to be done at the
broker: rescue and parking.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import psycopg2

from .. import clock
from ..errors import JobSyncError
from ..logs import Repeats, get_logger
from ..store.queues import QueueStore
from ..store.tables import Tables
from .broker import Broker, Delivery
from .parking import Parking
from .passage import Passage
from .plugin import Gate
from .rescue import Rescue
from .routing import unknown_queue

__all__ = ['Keeper']

logger = get_logger(__name__)

#: Seconds for which a new life of a node waits until its former one is swept, and between two
#: looks.
_RECLAIM_SEC, _TRY_AGAIN_SEC = 60.0, 0.1
#: Seconds after which work that failed is tried again.
_FAILED_SEC = 1.0
#: Seconds between two looks whether the broker still has the cluster's mark.
_MARK_SEC = 5.0


class Keeper:
    """One thread for a node.

    Args:
        gate: The node's gate.
        broker: The broker; used by this thread alone.
        kind: The plugin's name.
        queue: Name of the node's own queue.
        parked: Name of the parked queue.
        on_lease: Called with True when there is a lease again, and with False when it has run out;
            again, if it raises.
        on_change: Called after each change of plan, when the owner map is up to date.
        on_tick: Called at least once a second.
        tasks: The names of the tasks, or actors, that this node's consumers know at this moment.
        route: Makes the route of a message that does not tell it; None where it needs none.
    """

    def __init__(
        self,
        gate: Gate,
        broker: Broker,
        kind: str,
        queue: str,
        parked: str,
        *,
        on_lease: Callable[[bool], object],
        on_change: Callable[[], object],
        on_tick: Callable[[], object] = lambda: None,
        tasks: Callable[[], frozenset[str]] = frozenset,
        route: Callable[[Delivery], str | None] = lambda delivery: delivery.route,
    ) -> None:
        self._gate = gate
        self._job = gate.job
        self._broker = broker
        self._kind = kind
        self._queue = queue
        self._on_lease, self._on_change, self._on_tick = on_lease, on_change, on_tick
        config = gate.settings.config
        self._tables = Tables.of(config)
        self._sessions = gate.sessions
        self._closing = False
        self._leased, self._version = True, -1
        self._told = True
        self._sweep_at = self._mark_at = 0.0
        self._repeats = Repeats()
        passage = Passage(broker, gate.job.node_name)
        self._parking = Parking(
            broker,
            passage,
            self._sessions,
            self._tables,
            gate.owners,
            parked,
            unknown_queue(config.appname),
            tasks=tasks,
            route=route,
            count=gate.count,
            stop=self._has_work,
        )
        self._rescue = Rescue(
            broker,
            passage,
            self._sessions,
            self._tables,
            gate.owners,
            kind=kind,
            node=gate.job.node_name,
            parked=parked,
            interval=config.rebalance_check_interval_sec,
            leads=gate.job.am_i_leader,
            count=gate.count,
            stray=self._parking.note,
            stop=lambda: self._closing or not gate.job.am_i_healthy(),
        )
        self._thread = threading.Thread(target=self._run, name='jobsync-keeper', daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread."""
        self._closing = True
        self._job.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._sessions.close_all()

    def parked_something(self) -> None:
        """A message was put into the parked queue: a plan may have come meanwhile."""
        self._parking.note()

    def reclaim(self) -> int:
        """Put back what an earlier life of this node left; before it consumes. Waits for others who
        are at it.

        Raises:
            JobSyncError: The database cannot be reached, or somebody else was at it for a minute.
        """
        node, give_up = self._job.node_name, clock.now() + _RECLAIM_SEC
        while True:
            with self._sessions.session() as connection:
                if QueueStore(connection, self._tables).hold(node):
                    return self._broker.restore(node)
            if self._closing:
                return 0
            if clock.now() >= give_up:
                raise JobSyncError(
                    f'another node has been putting back what an earlier life of {node!r} left '
                    f'for more than {_RECLAIM_SEC:.0f} s: '
                    'see whether its connection to the broker is stuck, and end it'
                )
            self._job.wait_until(lambda: self._closing, _TRY_AGAIN_SEC)

    def _run(self) -> None:
        while not self._closing:
            now = clock.now()
            if self._job.am_i_healthy() != self._leased:
                self._leased, self._told = not self._leased, False
            if not self._told:
                self._guarded(self._tell_lease)
            if self._leased and self._job.token_version != self._version:
                self._version = self._job.token_version
                self._guarded(self._gate.owners.reread)
                self._guarded(self._on_change)
                self._sweep_at = now
            if self._leased and now >= self._sweep_at:
                self._sweep_at = now + _FAILED_SEC
                self._guarded(self._sweep)
            if now >= self._mark_at and self._job.belonging.broker:
                self._mark_at = now + _MARK_SEC
                self._guarded(lambda: self._broker.mark(self._job.belonging.broker))
            self._guarded(self._on_tick)
            self._sessions.trim()
            self._job.rest()
            self._job.wait_until(self._has_work, max(0.01, min(1.0, self._sweep_at - clock.now())))

    def _has_work(self) -> bool:
        if self._closing or self._job.am_i_healthy() != self._leased:
            return True
        return self._leased and self._job.token_version != self._version

    def _tell_lease(self) -> None:
        if self._leased:
            # While this node was taken for dead, its empty queue may have been deleted and
            # forgotten.
            with self._sessions.session() as connection:
                QueueStore(connection, self._tables).record(
                    self._queue, self._job.node_name, self._job.belonging
                )
        self._on_lease(self._leased)
        self._told = True

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (JobSyncError, psycopg2.Error) as error:
            self._tell(error)
        except Exception as error:
            # Whatever the broker's client raises: its connection is of no use any more.
            self._tell(error)
            self._broker.reset()

    def _tell(self, error: Exception) -> None:
        again = self._repeats.say(type(error).__name__, clock.now())
        if again is not None:
            logger.warning(
                'node=%s keeper failed; it tries again: %s: %s%s',
                self._job.node_name,
                type(error).__name__,
                error,
                again,
            )

    def _sweep(self) -> None:
        """Rescue first: it never waits behind what is parked."""
        pause = self._rescue.run()
        self._parking.run()
        self._sweep_at = clock.now() + min(pause, self._parking.pause)
