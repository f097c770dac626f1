"""When a message that cannot run now comes back, and whether a line in the log says so."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from ..errors import ExecutionRunning, JobSyncError
from ..logs import Repeats, forget_oldest

__all__ = ['MOST_SEC', 'ComeBack', 'ComeBacks', 'come_back_sec', 'waited_sec']

#: Seconds until a message comes back at most: where its key is running, and where anything else is
#: in the way (the database, an eviction), which is over for all at once and needs no long pause.
MOST_SEC, _MOST_TROUBLE_SEC = 30.0, 15.0
#: Doublings after which any pause is at its most.
_GROWS = 20
#: Seconds without a come-back after which those of a key are told of anew.
_QUIET_SEC = 2 * MOST_SEC
#: Keys of which is remembered that they were told of; of more, the oldest is forgotten.
_MOST_KEYS = 1000


def come_back_sec(waits: int, most: float = MOST_SEC) -> float:
    """Seconds until something comes back: 1, 2, 4 and so on.

    Args:
        waits: How often it has waited.
        most: Seconds that it waits at most.
    """
    return min(float(2 ** min(waits, _GROWS)), most)


def waited_sec(waits: int) -> float:
    """Seconds that a message has waited, at least, that came back `waits` times.

    Args:
        waits: How often it came back.
    """
    growing = min(waits, _GROWS)
    return sum(come_back_sec(n) for n in range(growing)) + (waits - growing) * MOST_SEC


@dataclass(frozen=True)
class ComeBack:
    """A message's next come-back.

    Attributes:
        delay_sec: Seconds until then.
        more: What stands at the end of the line in the log; None: there is no line.
    """

    delay_sec: float
    more: str | None


class ComeBacks:
    """The come-backs of a process's messages. What is in the way of all of them is said once for
    each task, and again each minute; a running key is said once. Threads may share it.
    """

    def __init__(self) -> None:
        self._repeats = Repeats()
        self._told: dict[Hashable, float] = {}

    def next(
        self, task: str, error: JobSyncError, waits: int, now: float, told: bool = False
    ) -> ComeBack:
        """When a message comes back.

        Args:
            task: The name of its task.
            error: Why it cannot run now.
            waits: How often it came back before.
            now: The moment, in seconds on the monotonic clock.
            told: Another process has told of this message.
        """
        if isinstance(error, ExecutionRunning):
            first = self._is_first((task, error.key or None), now)
            return ComeBack(come_back_sec(waits), '' if first and not told else None)
        more = self._repeats.say((task, type(error)), now)
        return ComeBack(come_back_sec(waits, _MOST_TROUBLE_SEC), more)

    def _is_first(self, kind: Hashable, now: float) -> bool:
        # Written anew each time, so that the oldest is one that comes back no more.
        before = self._told.pop(kind, None)
        forget_oldest(self._told, _MOST_KEYS)
        self._told[kind] = now
        return before is None or now - before > _QUIET_SEC
