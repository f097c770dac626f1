"""Where a producer sends a message: straight to its owner's queue, by a map of each process."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..job import Job
from ..store.sessions import Sessions
from ..store.tables import Tables
from .owners import OwnerMap
from .settings import PluginSettings

__all__ = ['OwnerLookup']


class OwnerLookup:
    """Knows the queue of the node that owns a route.

    Args:
        settings: Gives the plugin's settings, which are read when they are needed first.
        job: Gives this process's node; None where it only sends.
    """

    def __init__(
        self, settings: Callable[[], PluginSettings], job: Callable[[], Job | None]
    ) -> None:
        self._settings = settings
        self._job = job
        self._map: tuple[int, OwnerMap] | None = None

    def use(self, owners: OwnerMap | None) -> None:
        """Look into the map of this process's node; None: it has no node any more."""
        self._map = (os.getpid(), owners) if owners is not None else None

    def queue_of(self, route: str) -> str | None:
        """The owner's queue; None where there is none, where nobody knows, and where the settings
        have messages go home.

        Raises:
            ConfigurationError: A setting cannot work.
            InvalidTaskId: The route is no task id.
        """
        if not self._settings().route_producers:
            return None
        # A node without a lease does not ask: its database is most likely away, and each question
        # takes seconds then.
        job = self._job()
        if job is not None and not job.has_lease:
            return None
        place = self._owners().find_fresh(route)
        return place.queue if place is not None else None

    def _owners(self) -> OwnerMap:
        # Of this process: a forked child makes its own.
        if self._map is None or self._map[0] != os.getpid():
            config = self._settings().config
            sessions = Sessions(config, 'jobsync producer')
            self._map = os.getpid(), OwnerMap(sessions, Tables.of(config))
        return self._map[1]
