"""A read-only copy of who owns what, for gates and for producers that are no nodes."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

from .. import clock
from ..assignment.hashing import HASH_FUNCTIONS, check_task_id
from ..errors import DatabaseUnavailable, MissingPrivilege, MissingSchema, MissingTable
from ..logs import Repeats, get_logger
from ..store.queues import Owners, QueueStore
from ..store.sessions import Sessions
from ..store.tables import Tables

__all__ = ['OwnerMap', 'Place']

logger = get_logger(__name__)

#: Seconds for which a copy is used without asking again, and for which nobody asks after a failure.
FRESH_SEC, PAUSE_SEC = 1.0, 5.0


@dataclass(frozen=True)
class Place:
    """An owner, and the queue where its messages go; None where it takes none."""

    node: str
    queue: str | None


@dataclass(frozen=True)
class _Copy:
    """One version of the map; immutable, and swapped as a whole."""

    version: int = -1
    total_tokens: int = 1
    hash_of: Callable[[bytes], int] = HASH_FUNCTIONS['double_sha256']
    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    places: tuple[Place, ...] = ()
    #: Every owner has a queue. One that has none may be about to get it, which makes no other
    #: version.
    whole: bool = True
    nodes: int = 0


class OwnerMap:
    """Finds the owner of a route. One statement at most once a second, and none while nobody asks.

    A copy that is older than the cluster is harmless: the gate of the node that gets the message
    sends it on.

    Args:
        sessions: Connections to the database.
        tables: Names of the tables.
    """

    def __init__(self, sessions: Sessions, tables: Tables) -> None:
        self._sessions = sessions
        self._tables = tables
        self._copy = _Copy()
        self._read_at = float('-inf')
        self._pause_until = float('-inf')
        self._reading = threading.Lock()
        self._repeats = Repeats()

    @property
    def version(self) -> int:
        """Version of the assignment that the copy shows; -1 before the first."""
        return self._copy.version

    @property
    def nodes(self) -> int:
        """How many nodes own something, as far as is known."""
        return self._copy.nodes

    def find(self, route: str) -> Place | None:
        """The owner by the copy at hand; None where nobody owns the route, or nothing is known."""
        copy = self._copy
        if not copy.starts:
            return None
        token = copy.hash_of(check_task_id(route).encode()) % copy.total_tokens
        at = bisect_right(copy.starts, token) - 1
        return copy.places[at] if at >= 0 and token < copy.ends[at] else None

    def find_fresh(self, route: str) -> Place | None:
        """As `find`, by a copy that is not older than a second; None while the database is away."""
        if clock.now() - self._read_at > FRESH_SEC and not self.refresh():
            return None
        return self.find(route)

    def refresh(self) -> bool:
        """Read the map again if it has changed; whether the database answered. Of several threads
        one asks.
        """
        if not self._reading.acquire(blocking=self._copy.version < 0):
            return True
        try:
            now = clock.now()
            if now < self._pause_until:
                return False
            try:
                with self._sessions.session() as connection:
                    found = QueueStore(connection, self._tables).owners(
                        self._copy.version if self._copy.whole else -1
                    )
            except DatabaseUnavailable as error:
                self._pause_until = clock.now() + PAUSE_SEC
                again = self._repeats.say(type(error).__name__, now)
                if again is not None:
                    logger.warning(
                        'owners are unknown, %s: %s%s',
                        _why(error),
                        ' '.join(str(error).split()),
                        again,
                    )
                return False
            self._read_at = now
            if found is not None:
                self._copy = _copy(found)
            return True
        finally:
            self._reading.release()

    def reread(self) -> bool:
        """As `refresh`, even where the version is the same: a node's queue is new."""
        self._copy = replace(self._copy, version=-1)
        self._pause_until = float('-inf')
        return self.refresh()


def _why(error: Exception) -> str:
    if isinstance(error, (MissingTable, MissingSchema)):
        return 'as no worker of this version has started yet; messages go to their home queues'
    if isinstance(error, MissingPrivilege):
        return (
            'as this role may not read them (`jobsync doctor` tells what it lacks); messages '
            'go to their home queues'
        )
    return 'while the database is away; messages go to their home queues'


def _copy(found: Owners) -> _Copy:
    rows = [
        (first, end, Place(node, found.queues.get((node, ''))))
        for first, end, node, _ in found.rows
        if node is not None and end <= found.total_tokens
    ]
    return _Copy(
        found.version,
        found.total_tokens,
        HASH_FUNCTIONS[found.hash_function],
        tuple(first for first, _, _ in rows),
        tuple(end for _, end, _ in rows),
        tuple(place for _, _, place in rows),
        all(place.queue is not None for _, _, place in rows),
        len({place.node for _, _, place in rows}),
    )
