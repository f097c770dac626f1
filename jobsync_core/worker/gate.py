"""The core of both gates: looks up what is so of a delivery on this node, and counts what becomes
of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..job import Job
from ..store.sessions import Sessions
from ..store.tables import Tables
from . import inbox
from .inbox import Here, Outcome, Received, Rules
from .owners import FRESH_SEC, OwnerMap
from .pinned import Pinned
from .settings import PluginSettings

__all__ = ['Gate']


class Gate:
    """A node's gate.

    Args:
        settings: The plugin's.
        job: The node.
        pin_of: The patterns of a pinned task; None where a task has no pin.
    """

    def __init__(
        self,
        settings: PluginSettings,
        job: Job,
        pin_of: Callable[[str], Sequence[str] | None] = lambda name: None,
    ) -> None:
        self.job = job
        self.settings = settings
        #: The queue group of a home queue.
        self.group_of: Callable[[str], str] = settings.group_of
        config = settings.config
        #: Of the gate and of the duties: they hardly ever need one at the same moment.
        self.sessions = Sessions(config, f'jobsync duties {job.node_name}')
        self._pinned = Pinned(pin_of, lambda: settings.pin_slots)
        tables = Tables.of(config)
        self.owners = OwnerMap(self.sessions, tables, settings.group_of, self._pinned)
        self.rules = Rules(config.appname, settings.max_hops, settings.on_unclaimed == 'drop')
        #: Whether this worker consumes a home queue, and is a member of its group soon.
        self.consumes: Callable[[str], bool] = lambda home: False
        self.counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def place(self, delivery: Received, now: float) -> Outcome:
        """What becomes of a delivery; no I/O while the owner map is as new as the node.

        Args:
            delivery: What is known of it.
            now: The moment, in seconds on the monotonic clock.
        """
        here = self.here(delivery.route, delivery.home)
        outcome = inbox.place(delivery, here, self.rules, now)
        if here.unmatched and outcome.event == 'parked' and delivery.route is not None:
            self._pinned.tell(delivery.route, delivery.home)
        return outcome

    def may_begin(self, delivery: Received) -> bool:
        """The last look, right before a task runs: whether it may run here still. No I/O."""
        return inbox.may_begin(delivery, self._glance(delivery.route, delivery.home))

    def here(self, route: str | None, home: str = '') -> Here:
        """What is so on this node at this moment.

        Args:
            route: The route; None where there is no owner to look for.
            home: The queue that the message was sent to.
        """
        seen = self._glance(route, home)
        if route is None or seen.mine or not seen.leased:
            return seen
        if self.owners.version != self.job.token_version:
            self.owners.catch_up()
        place = self.owners.find(route, home)
        if place.node is not None and place.queue is None and self.owners.catch_up(FRESH_SEC):
            place = self.owners.find(route, home)  # it may have one by now
        return replace(
            seen,
            # The look-up may have waited for the database: the lease may be over by now.
            leased=self.job.am_i_healthy(),
            owner=place.node,
            queue=place.queue,
            unmatched=place.unmatched,
            deserted=place.deserted and not self.consumes(home),
        )

    def owns(self, route: str, home: str) -> bool:
        """Whether a message that was sent to a home queue may run on this node by its route."""
        job = self.job
        return job.owns(route, self.group_of(home)) and self._pinned.allows(route, job.node_name)

    def _glance(self, route: str | None, home: str) -> Here:
        """The same without the owner."""
        job = self.job
        mine = route is not None and self.owns(route, home)
        return Here(job.node_name, job.incarnation, mine, mine or job.am_i_healthy())

    def admits(self, completes_once: Callable[[], bool], now: float) -> bool:
        """Whether a task may begin, as far as the database is concerned, which may refuse to begin
        anything. What asks it nothing always may.

        Args:
            completes_once: Whether the task asks the database; called only where that matters.
            now: The moment, in seconds on the monotonic clock.
        """
        pausing = self.job.pausing
        if not pausing.length or not completes_once():
            return True
        with self._lock:
            return pausing.admits(now)

    def count(self, event: str, number: int = 1) -> None:
        """Count an event, for metrics and `local_status`."""
        with self._lock:
            self.counts[event] = self.counts.get(event, 0) + number
