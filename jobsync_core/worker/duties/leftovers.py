"""Leftovers: what nodes left that have been gone for long, and the deletion of their queues."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ...store.queues import Orphan
from ..broker import Broker
from ..registry import CLOSE_SEC, Registry
from ..sweeping import Sweeping
from .duty import Moment

__all__ = ['Leftovers']

#: Seconds after which an empty queue of a node that is gone is forgotten, where publishing to it
#: would make it anew.
_KEEP_SEC = 3600.0
#: Empty queues that one run deletes: a run is to be short.
_DELETIONS = 50


class Leftovers:
    """The leader's alone, in few trips: most of it is empty.

    Args:
        broker: The broker.
        registry: Who left what.
        sweeping: Brings it back.
        interval: Seconds between two looks.
    """

    name = 'leftovers'

    def __init__(
        self, broker: Broker, registry: Registry, sweeping: Sweeping, interval: float
    ) -> None:
        self._broker = broker
        self._registry = registry
        self._sweeping = sweeping
        self._interval = interval
        self._at = -math.inf

    def due(self, moment: Moment) -> float:
        """Once in a while, where this node leads."""
        return self._at - moment.now if moment.leased and moment.leads else math.inf

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Bring back what came late, then delete what is empty."""
        self._at = moment.now + self._interval
        old = self._registry.old_orphans(CLOSE_SEC)
        self._sweeping.sweep(old, stop)
        self._delete(old, stop)
        if stop():
            self._at = moment.now  # it was cut off: the rest in the next turn

    def _delete(self, orphans: Sequence[Orphan], stop: Callable[[], bool]) -> None:
        """Delete queues that have been empty for long, and forget them."""
        due = [
            orphan
            for orphan in orphans
            if (self._broker.catches_strays or orphan.age >= _KEEP_SEC)
            and not self._sweeping.made_trouble(orphan)
        ]
        if not due:
            return
        left = (
            self._broker.left({orphan.node: orphan.queue for orphan in due})
            if not self._broker.catches_strays
            else frozenset()
        )
        empty = [orphan for orphan in due if orphan.node not in left][:_DELETIONS]
        self._sweeping.each(empty, self.delete_one, stop)

    def delete_one(self, orphan: Orphan) -> None:
        """Delete one node's queue if nothing is in it, and forget it."""
        with self._registry.held(orphan.node) as held:
            if not held or not self._registry.is_gone(orphan.node):
                return
            if self._broker.delete(orphan.queue):
                self._registry.forget(orphan.queue)
