"""The core of both gates: looks up what is so of a delivery on this node, and counts what becomes
of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from ..job import Job
from ..store.sessions import Sessions
from ..store.tables import Tables
from . import inbox
from .inbox import Here, Outcome, Received, Rules
from .owners import OwnerMap
from .routing import old_parked_queue, unknown_queue
from .settings import PluginSettings

__all__ = ['Gate']


class Gate:
    """A node's gate.

    Args:
        settings: The plugin's.
        job: The node.
    """

    def __init__(self, settings: PluginSettings, job: Job) -> None:
        self.job = job
        self.settings = settings
        config = settings.config
        #: Of the gate and of the duties: they hardly ever need one at the same moment.
        self.sessions = Sessions(config, f'jobsync duties {job.node_name}')
        self.owners = OwnerMap(self.sessions, Tables.of(config))
        self.rules = Rules(
            old_parked_queue(config.appname),
            unknown_queue(config.appname),
            settings.max_hops,
            settings.on_unclaimed == 'drop',
        )
        self.counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def place(self, delivery: Received, now: float) -> Outcome:
        """What becomes of a delivery; no I/O while the owner map is as new as the node.

        Args:
            delivery: What is known of it.
            now: The moment, in seconds on the monotonic clock.
        """
        return inbox.place(delivery, self.here(delivery.route), self.rules, now)

    def may_begin(self, delivery: Received) -> bool:
        """The last look, right before a task runs: whether it may run here still. No I/O."""
        return inbox.may_begin(delivery, self._glance(delivery.route))

    def here(self, route: str | None) -> Here:
        """What is so on this node at this moment, of one route; None where there is no owner to
        look for.
        """
        seen = self._glance(route)
        if route is None or seen.mine or not seen.leased:
            return seen
        if self.owners.version != self.job.token_version:
            self.owners.refresh()
        place = self.owners.find(route)
        if place is not None and place.queue is None:
            place = self.owners.find_fresh(route) or place  # it may have one by now
        # The look-up may have waited for the database: the lease may be over by now.
        seen = replace(seen, leased=self.job.am_i_healthy())
        return seen if place is None else replace(seen, owner=place.node, queue=place.queue)

    def _glance(self, route: str | None) -> Here:
        """The same without the owner."""
        job = self.job
        mine = route is not None and job.owns(route)
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
