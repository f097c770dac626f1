"""Rescue: what nodes left at the broker that have gone just now comes back in seconds."""

from __future__ import annotations

from collections.abc import Callable

from ... import clock
from ..registry import CLOSE_SEC, Registry
from ..sweeping import Sweeping
from .duty import Moment, Pace

__all__ = ['Rescue']

#: Seconds between two looks at what was left just now: a message may be on its way to it.
_BUSY_SEC = 0.5
#: The same where nothing was.
_LOOK_SEC = 3.0
#: How many of the leader's pauses pass until one of the others looks.
_SHARE = 5.0
#: Seconds until the next look, for each second that one took: with many queues at a broker that is
#: far away a look takes long.
_REST = 5.0


class Rescue:
    """One node's part in it.

    The leader looks closely at what has been left in the last seconds, the newest first, so that it
    comes back soon. The others look whether it does; what they find, they bring back themselves.

    Args:
        registry: Who left what.
        sweeping: Brings it back.
        interval: The longest time between two looks, in seconds.
        now: The clock.
    """

    name = 'rescue'

    def __init__(
        self,
        registry: Registry,
        sweeping: Sweeping,
        interval: float,
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._registry = registry
        self._sweeping = sweeping
        self._interval = min(_LOOK_SEC, interval)
        self._now = now
        self._pace = Pace(_SHARE)

    def due(self, moment: Moment) -> float:
        """For the leader after each plan, and soon after a look that found something."""
        return self._pace.due(moment)

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Sweep once."""
        self._pace.begin(moment)
        fresh = self._registry.orphans(CLOSE_SEC)
        self._sweeping.sweep(fresh, stop)
        now = self._now()
        pause = max(_BUSY_SEC if fresh else self._interval, _REST * (now - moment.now))
        self._pace.rest(now + pause)
