"""A read-only copy of who owns what, for gates and for producers that are no nodes."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .. import clock
from ..assignment.groups import window
from ..assignment.hashing import HASH_FUNCTIONS, check_task_id
from ..errors import DatabaseUnavailable, MissingPrivilege, MissingSchema, MissingTable
from ..logs import Repeats, get_logger
from ..store.queues import Owners, QueueStore
from ..store.sessions import Sessions
from ..store.tables import Tables
from .background import Background
from .pinned import Pinned

__all__ = ['OwnerMap', 'Place']

logger = get_logger(__name__)

#: Seconds for which a copy is used without asking again, and for which nobody asks after a failure.
FRESH_SEC, PAUSE_SEC = 1.0, 5.0
#: Age in seconds up to which a producer uses a copy while it is read again; and seconds for which
#: anybody waits for a database, once, until it answers again.
STALE_SEC, WAIT_SEC = 3.0, 2.0


@dataclass(frozen=True)
class Place:
    """What is known of a route in a home queue.

    Attributes:
        node: Who owns it, or is about to; None: nobody yet, or nothing is known.
        queue: The queue where the node takes messages of this home queue; None where it takes none.
        unmatched: It has a pin, or a lock, that no node of its queue group matches.
        deserted: Its queue group has no members: nobody consumes the home queue.
    """

    node: str | None = None
    queue: str | None = None
    unmatched: bool = False
    deserted: bool = False


_NOBODY, _UNMATCHED, _DESERTED = Place(), Place(unmatched=True), Place(deserted=True)


@dataclass(frozen=True)
class _Copy:
    """One version of the map; immutable, and swapped as a whole. Rows are on the number line, where
    each group has a window.
    """

    version: int = -1
    total_tokens: int = 1
    hash_of: Callable[[bytes], int] = HASH_FUNCTIONS['double_sha256']
    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    #: The owner of each row; None where nobody is, and whether a pin, or a lock, keeps it so.
    nodes: tuple[str | None, ...] = ()
    blocked: tuple[bool, ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)
    deserted: frozenset[str] = frozenset()
    queues: Mapping[tuple[str, str], str] = field(default_factory=dict)
    number_of_nodes: int = 0
    #: How many nodes have a queue for each home queue.
    consumers: Mapping[str, int] = field(default_factory=dict)

    def lacks(self, group: str) -> bool:
        """Whether it is known that a group has no members. That of the plain Job has all nodes."""
        if self.version < 0 or not group:
            return False
        return group not in self.groups or group in self.deserted


class OwnerMap:
    """Finds the owner of a route. One statement at most once a second, and none while nobody asks.
    It is read in the background: a database that is silent is waited for once.

    A copy that is older than the cluster is harmless: the gate of the node that gets the message
    sends it on.

    Args:
        sessions: Connections to the database.
        tables: Names of the tables.
        group_of: The queue group of a home queue.
        pinned: The pins that this process knows.
    """

    def __init__(
        self,
        sessions: Sessions,
        tables: Tables,
        group_of: Callable[[str], str] = lambda home: home,
        pinned: Pinned | None = None,
    ) -> None:
        self._sessions = sessions
        self._tables = tables
        self._group_of = group_of
        self._pinned = pinned if pinned is not None else Pinned()
        self._copy = _Copy()
        #: An owner without a queue was found. It may be about to get one, which makes no other
        #: version.
        self._lacking = False
        self._read_at = float('-inf')
        self._pause_until = float('-inf')
        self._reading = threading.Lock()
        self._background = Background(self._read_behind, 'jobsync owner map', WAIT_SEC)
        self._repeats = Repeats()

    @property
    def version(self) -> int:
        """Version of the assignment that the copy shows; -1 before the first."""
        return self._copy.version

    @property
    def nodes(self) -> int:
        """How many nodes own something, as far as is known."""
        return self._copy.number_of_nodes

    def consumers_of(self, home: str) -> int:
        """How many nodes consume a home queue, as far as is known."""
        return self._copy.consumers.get(home, 0)

    def find(self, route: str, home: str = '') -> Place:
        """What the copy at hand knows of a route.

        Args:
            route: The route.
            home: The queue that the message was sent to.

        Raises:
            InvalidTaskId: The route is no task id.
        """
        copy, group = self._copy, self._group_of(home)
        # First, as a route that is no task id is so in any group.
        offset = copy.hash_of(check_task_id(route).encode()) % copy.total_tokens
        if copy.version < 0:
            return _NOBODY
        if copy.lacks(group):
            return _DESERTED
        number = copy.groups.get(group)
        if number is None:
            return _NOBODY
        token = window(number, copy.total_tokens)[0] + offset
        at = bisect_right(copy.starts, token) - 1
        if at < 0 or token >= copy.ends[at]:
            return _NOBODY
        node = copy.nodes[at]
        if node is None:
            return _UNMATCHED if copy.blocked[at] else _NOBODY
        if not self._pinned.allows(route, node):
            return _UNMATCHED
        queue = copy.queues.get((node, home))
        if queue is None:
            self._lacking = True
        return Place(node, queue)

    def is_deserted(self, home: str) -> bool:
        """Whether it is known that no node consumes a home queue."""
        return self._copy.lacks(self._group_of(home))

    def find_fresh(self, route: str, home: str = '') -> Place | None:
        """As `find`, by a copy that is at most a few seconds old; None where there is none, as the
        database is away.
        """
        age = self._age
        if age > FRESH_SEC:
            answered = self._ask(wait=age > STALE_SEC)
            if not answered and self._age > STALE_SEC:
                return None
        return self.find(route, home)

    def catch_up(self, seconds: float = 0.0) -> bool:
        """Have the map read again if it has changed; waits for that, but not for a database that is
        known to be silent.

        Args:
            seconds: A copy that is not older than this is new enough.

        Returns:
            Whether the copy is new now.
        """
        return self._age <= seconds or self._ask(wait=True)

    def refresh(self) -> bool:
        """Read the map again if it has changed; whether the database answered. Of several threads
        one asks.
        """
        return self._read(wait=self._copy.version < 0)

    def reread(self) -> bool:
        """As `refresh`, even where the version is the same: a node's queue is new."""
        self._lacking, self._pause_until = True, float('-inf')
        return self._read(wait=True)

    @property
    def _age(self) -> float:
        return clock.now() - self._read_at

    def _ask(self, wait: bool) -> bool:
        return clock.now() >= self._pause_until and self._background.ask(wait)

    def _read_behind(self) -> bool:
        try:
            return self._read(wait=True)
        except Exception as error:  # settings that cannot work, for example
            now = clock.now()
            self._pause_until = now + PAUSE_SEC
            again = self._repeats.say(type(error).__name__, now)
            if again is not None:
                logger.warning('owners are unknown; messages go home: %r%s', error, again)
            return False

    def _read(self, wait: bool) -> bool:
        if not self._reading.acquire(blocking=wait):
            return True
        try:
            now = clock.now()
            if now < self._pause_until:
                return False
            # First the flag: a thread that misses a queue in the old copy meanwhile sets it again.
            known, self._lacking = -1 if self._lacking else self._copy.version, False
            try:
                with self._sessions.session() as connection:
                    found = QueueStore(connection, self._tables).owners(known)
            except DatabaseUnavailable as error:
                self._pause_until = clock.now() + PAUSE_SEC
                self._lacking = self._lacking or known < 0
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
    return _Copy(
        found.version,
        found.total_tokens,
        HASH_FUNCTIONS[found.hash_function],
        tuple(row[0] for row in found.rows),
        tuple(row[1] for row in found.rows),
        tuple(row[2] for row in found.rows),
        tuple(row[3] for row in found.rows),
        found.groups,
        found.deserted,
        found.queues,
        len({row[2] for row in found.rows if row[2] is not None}),
        Counter(home for _, home in found.queues),
    )
