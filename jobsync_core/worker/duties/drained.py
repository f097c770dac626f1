"""Drained nodes: what waits for a node that lives and owns nothing any more is passed on."""

from __future__ import annotations

import math
from collections.abc import Callable

from ... import clock
from ...logs import get_logger
from ...store.queues import Orphan
from ..registry import Registry
from ..sweeping import Sweeping
from .duty import Moment, Pace

__all__ = ['Drained']

logger = get_logger(__name__)

#: Seconds between two looks after a plan or where something was found, as who has an older map
#: still sends to such a node; for how long; and between two looks later.
_BUSY_SEC, _CLOSE_SEC, _LOOK_SEC = 5.0, 15.0, 10.0
#: How many of the leader's pauses pass until one of the others looks.
_SHARE = 5.0


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
        self._interval = interval
        self._count = count
        self._now = now
        self._pace = Pace(_SHARE)
        self._version = -1
        self._busy_until = -math.inf

    def due(self, moment: Moment) -> float:
        """For the leader after each plan, and once in a while."""
        return self._pace.due(moment)

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Pass on what is there."""
        self._pace.begin(moment)
        if moment.version != self._version:
            self._version, self._busy_until = moment.version, moment.now + _CLOSE_SEC
        drained = self._sweeping.without_trouble(self._registry.draining())
        self._sweeping.each(drained, lambda orphan: self._pass_on(orphan, stop), stop)
        now = self._now()
        pause = _BUSY_SEC if now < self._busy_until else _LOOK_SEC
        self._pace.rest(now + min(pause, self._interval))

    def _pass_on(self, orphan: Orphan, stop: Callable[[], bool]) -> None:
        moved = self._sweeping.drain(orphan.queue, stop)
        if moved:
            self._busy_until = self._now() + _CLOSE_SEC
            self._count('rescued', moved)
            logger.info(
                'node=%s passed on %d messages of node=%s, which owns nothing now',
                self._node,
                moved,
                orphan.node,
            )
