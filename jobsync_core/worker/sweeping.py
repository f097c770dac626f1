"""Sweeping what a node left: what it had taken is restored, what waits in its queue goes to the
present owners. A queue that makes trouble is left aside, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .. import clock
from ..errors import JobSyncError
from ..logs import Repeats, get_logger
from ..store.queues import Orphan
from .broker import Broker, Delivery
from .passage import Owners, Passage, destination_of
from .registry import Registry

__all__ = ['Sweeping']

logger = get_logger(__name__)

#: Seconds for which a queue that made trouble is left alone: more with each failure.
_ASIDE_FIRST, _ASIDE_MOST = 1.0, 600.0
#: Queues that fail one after another: then the broker is asked whether it is the one that fails.
_IN_A_ROW = 3


@dataclass(frozen=True)
class _Aside:
    until: float
    seconds: float


class Sweeping:
    """What those duties share that look after the queues of others; used by one thread.

    Args:
        node: This node's name, for logs.
        broker: The broker.
        passage: For passing over queues.
        registry: Who has which queue, and who is gone.
        owners: Who owns what.
        parked: Name of the parked queue of a home queue.
        count: Counts events.
        stray: Called with a home queue of which something was parked.
        now: The clock.
    """

    def __init__(
        self,
        node: str,
        broker: Broker,
        passage: Passage,
        registry: Registry,
        owners: Owners,
        parked: Callable[[str], str],
        *,
        count: Callable[[str, int], object],
        stray: Callable[[str], object],
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._node = node
        self._broker = broker
        self._passage = passage
        self._registry = registry
        self._owners = owners
        self._parked = parked
        self._count = count
        self._stray = stray
        self._now = now
        self._aside: dict[str, _Aside] = {}
        self._repeats = Repeats()

    def sweep(self, orphans: Sequence[Orphan], stop: Callable[[], bool]) -> None:
        """Bring back what these nodes left, in their order; asks the broker first who left
        anything.

        Raises:
            JobSyncError, Exception: The database or the broker fails.
        """
        here = self.without_trouble(orphans)
        if not here:
            return
        left = self._broker.left({orphan.queue: orphan.node for orphan in here})
        self.each(
            [orphan for orphan in here if orphan.queue in left],
            lambda orphan: self.sweep_one(orphan, stop),
            stop,
        )

    def sweep_one(self, orphan: Orphan, stop: Callable[[], bool]) -> None:
        """Bring back what one node left, unless somebody else is at it or the node has come
        back.
        """
        with self._registry.held(orphan.node) as held:
            if not held or not self._registry.is_left(orphan.queue):
                return
            # A node that lives has left this queue alone: what it has in hand is its own.
            is_gone = self._registry.is_gone(orphan.node)
            restored = self._broker.restore(orphan.node) if is_gone else 0
            moved = self.drain(orphan.queue, stop)
        if restored or moved:
            self._count('rescued', restored + moved)
            logger.info(
                'node=%s gone=%s restored=%d moved=%d', self._node, orphan.node, restored, moved
            )

    def drain(self, queue: str, stop: Callable[[], bool]) -> int:
        """Send what waits in a queue to its present owners; returns how many messages."""
        stale = False

        def where(delivery: Delivery) -> str | None:
            nonlocal stale
            found = destination_of(self._owners, delivery)
            if found.queue == queue:
                # The owner map is older than the end of this queue's node. Forwarded, the message
                # would come again for ever.
                stale = True
                return None
            if found.queue is None:
                self._stray(delivery.home)
            return found.queue or self._parked(delivery.home)

        passed = self._passage.go(queue, where, lambda: stale or stop())
        if stale:
            self._owners.reread()
        return passed.moved

    def bring_home(self, homes: Iterable[str], stop: Callable[[], bool]) -> None:
        """Send home what is parked of home queues that nobody consumes any more."""
        for home in sorted(homes):
            if stop():
                return
            queue = self._parked(home)
            if self._owners.is_deserted(home) and self._broker.size(queue):
                with self._registry.held(queue) as held:
                    moved = self.drain(queue, stop) if held else 0
                if moved:
                    self._count('sent_home', moved)
                    logger.info('node=%s queue=%s sent_home=%d', self._node, queue, moved)

    def without_trouble(self, orphans: Sequence[Orphan]) -> list[Orphan]:
        """Those that are not left aside at this moment."""
        now = self._now()
        self._aside = {
            queue: aside for queue, aside in self._aside.items() if now < aside.until + _ASIDE_MOST
        }
        return [
            orphan
            for orphan in orphans
            if orphan.queue not in self._aside or now >= self._aside[orphan.queue].until
        ]

    def made_trouble(self, orphan: Orphan) -> bool:
        """Whether the last that was done with a queue failed, not long ago."""
        return orphan.queue in self._aside

    def each(
        self,
        orphans: Sequence[Orphan],
        action: Callable[[Orphan], object],
        stop: Callable[[], bool],
    ) -> None:
        """Do something with each: whatever goes wrong with one keeps nobody from the others.

        Raises:
            JobSyncError, Exception: The database or the broker fails: several in a row have
                failed, and the broker does not answer.
        """
        in_a_row = 0
        for orphan in orphans:
            if stop():
                return
            try:
                action(orphan)
            except Exception as error:
                self._leave_aside(orphan, error)
                in_a_row += 1
                if in_a_row == _IN_A_ROW:
                    in_a_row = 0
                    if isinstance(error, JobSyncError):
                        raise  # the database
                    # Raises where it is the broker that fails; else it is these queues, and those
                    # behind them go on.
                    self._broker.size(self._parked(''))
            else:
                self._aside.pop(orphan.queue, None)
                in_a_row = 0

    def _leave_aside(self, orphan: Orphan, error: Exception) -> None:
        now = self._now()
        before = self._aside.get(orphan.queue)
        seconds = min(_ASIDE_MOST, before.seconds * 2) if before is not None else _ASIDE_FIRST
        self._aside[orphan.queue] = _Aside(now + seconds, seconds)
        again = self._repeats.say(orphan.queue, now)
        if again is not None:
            logger.warning(
                'node=%s gone=%s queue=%s cannot be swept now, and is left aside for %.0f s: %r%s',
                self._node,
                orphan.node,
                orphan.queue,
                seconds,
                error,
                again,
            )
        self._broker.reset()
