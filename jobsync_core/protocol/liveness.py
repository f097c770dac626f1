"""Telling the dead from the living without comparing anybody's clock with another's.

A node is dead when its sign of life has not changed for one whole timeout of the observer's own
clock, during which the observer kept looking. Only the rates of clocks matter: a node's lease
(LEASE_FRACTION of the timeout, counted from before its heartbeat was sent) has run out before any
observer has waited that long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .messages.signs import Sign

__all__ = ['Liveness']


@dataclass
class _Watch:
    sign: Sign
    since: float
    looked: float


class Liveness:
    """One observer's knowledge of other nodes' signs of life.

    Args:
        timeout: Seconds without a change after which a node is dead.
        max_gap: Seconds between two looks beyond which the wait begins anew: an observer that could
            not look (a database outage, a pause of its own) must not blame the others for it.
    """

    def __init__(self, timeout: float, max_gap: float) -> None:
        self._timeout = timeout
        self._max_gap = max_gap
        self._watched: dict[str, _Watch] = {}

    def look(self, signs: Iterable[Sign], now: float) -> None:
        """Take in what a look at the database showed. `now` is when the answer arrived, so that the
        wait starts late rather than early.
        """
        for sign in signs:
            watch = self._watched.get(sign.name)
            if watch is None or watch.sign != sign or self._missed(watch, now):
                self._watched[sign.name] = _Watch(sign, now, now)
            else:
                watch.looked = now

    def _missed(self, watch: _Watch, now: float) -> bool:
        return now - watch.looked > self._max_gap

    def forget(self, names: Iterable[str]) -> None:
        """Drop nodes that are no longer in the table."""
        for name in names:
            self._watched.pop(name, None)

    def keep(self, names: Iterable[str]) -> None:
        """Drop all nodes but these."""
        self.forget(set(self._watched) - set(names))

    def shows_life(self, sign: Sign) -> bool:
        """Whether somebody has moved this sign on since the last look. One that went back tells of
        another history of the database.
        """
        watch = self._watched.get(sign.name)
        return watch is not None and (
            watch.sign.incarnation != sign.incarnation or watch.sign.beat < sign.beat
        )

    def is_dead(self, sign: Sign, now: float) -> bool:
        """Whether this very sign has stood unchanged for the whole timeout, watched all the
        time.
        """
        watch = self._watched.get(sign.name)
        return (
            watch is not None
            and watch.sign == sign
            and now - watch.since >= self._timeout
            and not self._missed(watch, now)
        )

    def dead(self, now: float) -> tuple[Sign, ...]:
        """The signs of all nodes that are dead, by name."""
        return tuple(
            sorted(
                (w.sign for w in self._watched.values() if self.is_dead(w.sign, now)),
                key=lambda sign: sign.name,
            )
        )

    def next_death(self, now: float) -> float:
        """When the next node will be dead if nothing changes; infinity where none can be."""
        soonest = float('inf')
        for watch in self._watched.values():
            dead_at = watch.since + self._timeout
            if now < dead_at < soonest:
                soonest = dead_at
        return soonest
