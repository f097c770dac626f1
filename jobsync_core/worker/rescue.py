"""What nodes that are gone left at the broker: put back, passed on to the present owners, over and
over until nothing comes any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import clock
from ..logs import Repeats, get_logger
from ..store.connection import Sessions
from ..store.queues import Orphan, QueueStore
from ..store.tables import Tables
from .broker import Broker, Delivery
from .owners import OwnerMap
from .passage import Passage, destination_of

__all__ = ['CLOSE_SEC', 'Rescue']

logger = get_logger(__name__)

#: Seconds between two looks at an orphan that is looked after closely, and for how long one is: a
#: message may be on its way to it.
_BUSY_SEC = 0.5
CLOSE_SEC = 15.0
#: The same for a live node that has given all of its tokens away: who has an older map still sends
#: to it.
_DRAINED_SEC = 2.0
#: Seconds after which an empty queue of a node that is gone is forgotten, where publishing to it
#: would make it anew.
_KEEP_SEC = 3600.0
#: Empty queues that one pass deletes: a pass is to be short.
_DELETIONS = 50
#: Seconds for which an orphan that made trouble is left alone: more with each failure.
_ASIDE_FIRST, _ASIDE_MOST = 1.0, 600.0
#: Orphans that fail one after another: then it is the broker that fails.
_IN_A_ROW = 3


@dataclass
class _Aside:
    until: float
    seconds: float


class Rescue:
    """One node's part in it; used by one thread.

    Every node looks closely at what has been left in the last seconds, the newest first, so that it
    comes back soon whoever lives. What is older is looked at by the leader alone, in few trips:
    most of it is empty.

    Args:
        broker: The broker.
        passage: For passing over queues.
        sessions: Connections to the database.
        tables: Names of the tables.
        owners: Who owns what.
        kind: The plugin's name.
        node: This node's name.
        parked: Name of the parked queue.
        interval: Seconds between two looks at what is older.
        leads: Whether this node leads.
        count: Counts events.
        stray: Called when something was parked.
        stop: Whether to leave it at that.
    """

    def __init__(
        self,
        broker: Broker,
        passage: Passage,
        sessions: Sessions,
        tables: Tables,
        owners: OwnerMap,
        *,
        kind: str,
        node: str,
        parked: str,
        interval: float,
        leads: Callable[[], bool],
        count: Callable[[str, int], object],
        stray: Callable[[], object],
        stop: Callable[[], bool],
    ) -> None:
        self._broker = broker
        self._passage = passage
        self._sessions = sessions
        self._tables = tables
        self._owners = owners
        self._kind, self._node, self._parked = kind, node, parked
        self._interval = interval
        self._leads = leads
        self._count = count
        self._stray = stray
        self._stop = stop
        self._old_at = 0.0
        self._aside: dict[str, _Aside] = {}
        self._repeats = Repeats()
        self._in_a_row = 0

    def run(self) -> float:
        """Sweep once; seconds until the next sweep.

        Raises:
            DatabaseUnavailable, psycopg2.Error, Exception: The database or the broker fails; the
                next call tries again.
        """
        with self._sessions.session() as connection:
            fresh = QueueStore(connection, self._tables).orphans(self._kind, CLOSE_SEC)
            drained = QueueStore(connection, self._tables).draining(self._kind, self._node)
        self._in_a_row = 0
        self._sweep(fresh)
        now = clock.now()
        if now >= self._old_at and self._leads():
            self._old_at = now + self._interval
            with self._sessions.session() as connection:
                old = QueueStore(connection, self._tables).old_orphans(self._kind, CLOSE_SEC)
            self._sweep(old)
            self._delete(old)
        here = [
            orphan
            for orphan in drained
            if orphan.queue not in self._aside or now >= self._aside[orphan.queue].until
        ]
        for orphan in here:
            if not self._stop():
                self._guarded(orphan, self.pass_on)
        return _BUSY_SEC if fresh else min(_DRAINED_SEC, self._interval) if here else self._interval

    def pass_on(self, orphan: Orphan) -> None:
        """What waits for a node that lives and owns nothing any more: cut off from the broker, it
        cannot pass it on itself.
        """
        moved = self._drain(orphan.queue)
        if moved:
            self._count('rescued', moved)
            logger.info(
                'node=%s passed on %d messages of node=%s, which owns nothing now',
                self._node,
                moved,
                orphan.node,
            )

    def _sweep(self, orphans: Sequence[Orphan]) -> None:
        now = clock.now()
        self._aside = {
            queue: aside for queue, aside in self._aside.items() if now < aside.until + _ASIDE_MOST
        }
        here = [
            orphan
            for orphan in orphans
            if orphan.queue not in self._aside or now >= self._aside[orphan.queue].until
        ]
        left = (
            self._broker.left({orphan.node: orphan.queue for orphan in here})
            if here
            else frozenset()
        )
        for orphan in here:
            if self._stop():
                return
            if orphan.node in left:
                self._guarded(orphan, self.sweep_one)

    def sweep_one(self, orphan: Orphan) -> None:
        """Bring back what one node left, unless somebody else is at it or the node has come
        back.
        """
        with self._sessions.session() as connection:
            if not QueueStore(connection, self._tables).hold(orphan.node) or not self._is_gone(
                orphan.node
            ):
                return
            restored = self._broker.restore(orphan.node)
            moved = self._drain(orphan.queue)
        if restored or moved:
            self._count('rescued', restored + moved)
            logger.info(
                'node=%s gone=%s restored=%d moved=%d', self._node, orphan.node, restored, moved
            )

    def _drain(self, queue: str) -> int:
        stale = False

        def where(delivery: Delivery) -> str | None:
            nonlocal stale
            found = destination_of(self._owners, delivery)
            if found.queue == queue:
                # The owner map is older than the end of this queue's node. Forwarded, the delivery
                # would come again for ever.
                stale = True
                return None
            if found.queue is None:
                self._stray()
            return found.queue or self._parked

        passed = self._passage.go(queue, where, lambda: stale or self._stop())
        if stale:
            self._owners.reread()
        return passed.moved

    def _is_gone(self, node: str) -> bool:
        # On another connection: read in the holding transaction, the table would be locked against
        # a migration while the broker works.
        with self._sessions.session() as connection:
            return QueueStore(connection, self._tables).is_gone(node)

    def _delete(self, orphans: Sequence[Orphan]) -> None:
        """Delete queues that have been empty for long, and forget them."""
        due = [
            orphan
            for orphan in orphans
            if (self._broker.catches_strays or orphan.age >= _KEEP_SEC)
            and orphan.queue not in self._aside
        ]
        if not due:
            return
        left = (
            self._broker.left({orphan.node: orphan.queue for orphan in due})
            if not self._broker.catches_strays
            else frozenset()
        )
        for orphan in [orphan for orphan in due if orphan.node not in left][:_DELETIONS]:
            if self._stop():
                return
            self._guarded(orphan, self.delete_one)

    def delete_one(self, orphan: Orphan) -> None:
        """Delete one node's queue if nothing is in it, and forget it."""
        with self._sessions.session() as connection:
            if not QueueStore(connection, self._tables).hold(orphan.node) or not self._is_gone(
                orphan.node
            ):
                return
            if self._broker.delete(orphan.queue):
                QueueStore(connection, self._tables).forget(orphan.queue)

    def _guarded(self, orphan: Orphan, action: Callable[[Orphan], object]) -> None:
        """Whatever goes wrong with one orphan keeps nobody from looking at the others."""
        try:
            action(orphan)
        except Exception as error:
            now = clock.now()
            before = self._aside.get(orphan.queue)
            seconds = min(_ASIDE_MOST, before.seconds * 2) if before is not None else _ASIDE_FIRST
            self._aside[orphan.queue] = _Aside(now + seconds, seconds)
            again = self._repeats.say(orphan.queue, now)
            if again is not None:
                logger.warning(
                    'node=%s gone=%s queue=%s cannot be swept now, and is left aside for %.0f s: '
                    '%r%s',
                    self._node,
                    orphan.node,
                    orphan.queue,
                    seconds,
                    error,
                    again,
                )
            self._broker.reset()
            self._in_a_row += 1
            if self._in_a_row == _IN_A_ROW:
                raise
        else:
            self._aside.pop(orphan.queue, None)
            self._in_a_row = 0
