"""One call in the event loop for all messages of a kind that wait, in place of one for each."""

from __future__ import annotations

from collections.abc import Callable

from jobsync_core import clock

__all__ = ['LookTimer']

#: Seconds between two looks.
_LOOK_SEC = 0.1
#: Seconds after which a look that is due is taken for lost.
_LOST_SEC = 2.0


class LookTimer:
    """Has messages that wait looked at in a moment. Threads that share it exclude each other.

    Args:
        call_after: Calls a function in the event loop after some seconds.
        look: Looks at the messages.
    """

    def __init__(
        self, call_after: Callable[[float, Callable[[], None]], object], look: Callable[[], object]
    ) -> None:
        self._call_after = call_after
        self._look = look
        self._due: float | None = None

    def set(self) -> None:
        """Have them looked at, unless that is due already; should its entry have been lost, once
        more.
        """
        if self._due is None or clock.now() > self._due + _LOST_SEC:
            self._due = clock.now() + _LOOK_SEC
            self._call_after(_LOOK_SEC, self._time_has_come)

    def forget(self) -> None:
        """The connection is gone: the event loop's entries go with it."""
        self._due = None

    def _time_has_come(self) -> None:
        self._due = None
        self._look()
