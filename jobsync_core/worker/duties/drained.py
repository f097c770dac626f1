"""Drained nodes: what waits for a node that lives and owns nothing any more is passed on."""

from __future__ import annotations

from collections.abc import Callable

from ... import clock
from ...logs import get_logger
from ...store.queues import Orphan
from ..registry import Registry
from ..sweeping import Sweeping
from .duty import Moment, Pace

__all__ = ['Drained']

logger = get_logger(__name__)

#: Seconds between two looks: who has an older map still sends to such a node.
_LOOK_SEC = 2.0


class Drained:
    """One node's part in it. Such a node may be cut off from the broker, so that it cannot pass on
    itself what waits for it.

    Args:
        node: This node's name, for logs.
        registry: Which nodes are drained.
        sweeping: Empties a queue.
        interval: The longest time between two looks, in seconds.
        count: Counts events.
        now: The clock.
    """

    name = 'drained'

    def __init__(
        self,
        node: str,
        registry: Registry,
        sweeping: Sweeping,
        interval: float,
        count: Callable[[str, int], object],
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._node = node
        self._registry = registry
        self._sweeping = sweeping
        self._interval = min(_LOOK_SEC, interval)
        self._count = count
        self._now = now
        self._pace = Pace()

    def due(self, moment: Moment) -> float:
        """After each plan, and once in a while."""
        return self._pace.due(moment)

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Pass on what is there."""
        self._pace.begin(moment)
        drained = self._sweeping.without_trouble(self._registry.draining())
        self._sweeping.each(drained, lambda orphan: self._pass_on(orphan, stop), stop)
        self._pace.rest(self._now() + self._interval)

    def _pass_on(self, orphan: Orphan, stop: Callable[[], bool]) -> None:
        moved = self._sweeping.drain(orphan.queue, stop)
        if moved:
            self._count('rescued', moved)
            logger.info(
                'node=%s passed on %d messages of node=%s, which owns nothing now',
                self._node,
                moved,
                orphan.node,
            )
