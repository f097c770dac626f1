"""Leftovers: what nodes left that have been gone for long, and the deletion of their queues."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ... import clock
from ...store.queues import Orphan
from ..broker import Broker
from ..registry import CLOSE_SEC, Registry
from ..sweeping import Sweeping
from .duty import Moment, Pace

__all__ = ['Leftovers']

#: Seconds after which an empty queue of a node that is gone is forgotten, where publishing to it
#: would make it anew.
_KEEP_SEC = 3600.0
#: Empty queues that one run deletes: a run is to be short.
_DELETIONS = 50
#: How many of the leader's pauses pass until one of the others looks.
_SHARE = 2.0


class Leftovers:
    """The leader's, in few trips: most of it is empty. The others look whether the leader does it.

    Args:
        broker: The broker.
        registry: Who left what.
        sweeping: Brings it back.
        interval: Seconds between two looks.
        now: The clock.
    """

    name = 'leftovers'

    def __init__(
        self,
        broker: Broker,
        registry: Registry,
        sweeping: Sweeping,
        interval: float,
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._broker = broker
        self._registry = registry
        self._sweeping = sweeping
        self._interval = interval
        self._now = now
        self._pace = Pace(_SHARE, interval)
        #: In which run each queue was last due for deletion.
        self._tried: dict[str, int] = {}
        self._runs = 0

    def due(self, moment: Moment) -> float:
        """Once in a while."""
        return self._pace.due(moment)

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Bring back what came late, then delete what is empty."""
        self._pace.begin(moment)
        self._pace.rest(self._now() + self._interval)
        old = self._registry.old_orphans(CLOSE_SEC)
        self._sweeping.sweep(old, stop)
        self._sweeping.bring_home({orphan.home for orphan in old}, stop)
        self._delete(old, stop)
        if stop():
            self._pace.begin(moment)  # it was cut off: the rest in the next turn

    def _delete(self, orphans: Sequence[Orphan], stop: Callable[[], bool]) -> None:
        """Delete queues that have been empty for long, and forget them: many at once, in three
        transactions.
        """
        could = [
            orphan
            for orphan in orphans
            if (self._broker.catches_strays or orphan.age >= _KEEP_SEC)
            and not self._sweeping.made_trouble(orphan)
        ]
        # Those that stay, as somebody has something of them in hand, keep none behind them waiting.
        due = sorted(could, key=lambda orphan: self._tried.get(orphan.queue, 0))[:_DELETIONS]
        if not due or stop():
            return
        self._runs += 1
        self._tried = {each.queue: self._tried.get(each.queue, 0) for each in could}
        self._tried.update({each.queue: self._runs for each in due})
        deleted: list[str] = []

        def delete(orphan: Orphan) -> None:
            if self._broker.delete(orphan.queue):
                deleted.append(orphan.queue)

        with self._registry.all_held(due) as held:
            ours = [orphan for orphan in due if orphan.queue in held]
            left = self._broker.left({orphan.queue: orphan.node for orphan in ours})
            empty = [orphan for orphan in ours if orphan.queue not in left]
            try:
                self._sweeping.each(empty, delete, stop)
            finally:
                if deleted:
                    self._registry.forget(deleted)
