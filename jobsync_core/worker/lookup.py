"""Where a producer sends a message: straight to its owner's queue, by a map of each process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ..job import Job
from ..store.sessions import Sessions
from ..store.tables import Tables
from .owners import OwnerMap
from .pinned import Pinned
from .routing import parked_queue
from .settings import PluginSettings

__all__ = ['OwnerLookup']


class OwnerLookup:
    """Knows the queue of the node that owns a route.

    Args:
        settings: Gives the plugin's settings, which are read when they are needed first.
        job: Gives this process's node; None where it only sends.
        pin_of: The patterns of a pinned task; None where a task has no pin.
    """

    def __init__(
        self,
        settings: Callable[[], PluginSettings],
        job: Callable[[], Job | None],
        pin_of: Callable[[str], Sequence[str] | None] = lambda name: None,
    ) -> None:
        self._settings = settings
        self._job = job
        self._pinned = Pinned(pin_of, lambda: settings().pin_slots)
        self._map: tuple[int, OwnerMap] | None = None

    def use(self, owners: OwnerMap | None) -> None:
        """Look into the map of this process's node; None: it has no node any more."""
        self._map = (os.getpid(), owners) if owners is not None else None

    def queue_of(self, route: str, home: str = '') -> str | None:
        """The owner's queue for the messages of a home queue; the parked one where no node of the
        queue matches the route's pin. None where the message goes home: there is no owner yet, or
        nobody knows, or the settings say so.

        Args:
            route: The route.
            home: The queue that the message is sent to.

        Raises:
            ConfigurationError: A setting cannot work.
            InvalidTaskId: The route is no task id.
        """
        if not self._settings().route_producers:
            return None
        # A node without a lease does not ask, nor does one that ends: its database is most likely
        # away, or may be, and nobody waits for it then.
        job = self._job()
        if job is not None and (job.hurried or not job.has_lease):
            return None
        place = self._owners().find_fresh(route, home)
        if place is None:
            return None
        if place.unmatched:
            self._pinned.tell(route, home)
            return parked_queue(home, self._settings().config.appname)
        return place.queue

    def _owners(self) -> OwnerMap:
        # Of this process: a forked child makes its own.
        if self._map is None or self._map[0] != os.getpid():
            settings = self._settings()
            sessions = Sessions(settings.config, 'jobsync producer')
            tables = Tables.of(settings.config)
            owners = OwnerMap(sessions, tables, settings.group_of, self._pinned)
            self._map = os.getpid(), owners
        return self._map[1]
