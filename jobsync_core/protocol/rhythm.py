"""When a node sends its next heartbeat, and when it tries again what has failed."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

__all__ = ['Backoff', 'beat_delay', 'spread']

#: Whoever looks at a node within this many seconds of its heartbeat finds its death within the
#: timeout and a second.
_SOON = 0.75
#: Each of the oldest nodes has a place of its own behind the leader's heartbeat: so many seconds
#: behind the one before it, and no farther from the middle of its place than this part of that, so
#: that they do not drift past each other.
_STEP, _HALF = 0.3 * _SOON, 0.25
#: A heartbeat that would have to come a little later comes a little later; for more than this part
#: of the interval, one more is sent.
_STRETCH = 0.1


def beat_delay(ages: Sequence[float], interval: float) -> float:
    """Seconds from this heartbeat to the next: the interval, or another time where this node has to
    fall in behind the older ones.

    A wait for a node's death begins when its last heartbeat is seen. The nodes that come after the
    leader and its successor see others with their own heartbeats alone; so each beats shortly after
    those before it, and needs no further look.

    Args:
        ages: Seconds since the last heartbeat of each of the older nodes, the oldest first, by one
            clock. What they say is used for this alone: where they are wrong, a death is found
            later, by no more than the interval.
        interval: Seconds between two heartbeats.
    """
    if interval <= _SOON or not ages or not all(age >= 0 for age in ages):
        return interval
    behind_leader = ages[0]
    place = (len(ages) - 0.5) * _STEP
    if behind_leader >= interval or abs(behind_leader - place) <= _HALF * _STEP:
        return (
            interval  # the leader is late or gone, and there is nothing to follow; or all is well
        )
    shift = (place - behind_leader) % interval
    return interval + shift if shift <= _STRETCH * interval else shift


def spread(delay: float, who: str, attempt: int) -> float:
    """The delay, or up to half as much more or less: what many do at the same moment, they do not
    try again at the same moment.

    Args:
        delay: Seconds.
        who: A text that is the caller's own.
        attempt: Its number.
    """
    return delay * (0.5 + crc32(f'{who} {attempt}'.encode()) / 2**32)


class Backoff:
    """When a duty that failed is tried again, and for how long it has been failing. Times are the
    caller's.

    Args:
        first: Seconds after the first failure; each further one doubles them.
        most: Seconds at most.
    """

    def __init__(self, first: float, most: float) -> None:
        self.not_before = 0.0
        self.failing_for = 0.0
        self._first = first
        self._most = most
        self._delay = 0.0
        self._since: float | None = None

    def failed(self, now: float) -> None:
        """It failed once more."""
        self._since = now if self._since is None else self._since
        self.failing_for = now - self._since
        self._delay = min(2 * self._delay or self._first, self._most)
        self.not_before = now + self._delay

    def reset(self) -> None:
        """It worked, or is needed no longer."""
        self.not_before = self.failing_for = self._delay = 0.0
        self._since = None
