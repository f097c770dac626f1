"""A process that ends waits no longer for a database that does not answer."""

from __future__ import annotations

import mmap
import time

__all__ = ['HURRIED_SEC', 'Hurry']

#: Seconds that one call may take in a process that ends; and, after one that got no answer, those
#: for which the others do not ask.
HURRIED_SEC, _SILENT_SEC = 2.0, 10.0


class Hurry:
    """Whether a process ends. Its forked children see it, too. Threads may share it.

    Times are seconds of the monotonic clock, which all processes of a machine share.
    """

    def __init__(self) -> None:
        view = memoryview(mmap.mmap(-1, 8))
        #: When the end began; 0 before.
        self._since = view.cast('d')
        self._limit = HURRIED_SEC
        self._silent_until = 0.0

    def begin(self, limit: float = HURRIED_SEC) -> None:
        """The process ends. It may be called again.

        Args:
            limit: Seconds that a call of this process may take from now on; never more than before.
        """
        if not self._since[0] or limit < self._limit:
            self._since[0], self._limit = time.monotonic(), limit

    @property
    def begun(self) -> bool:
        """Whether it ends."""
        return self._since[0] > 0

    def due(self, began: float, due: float) -> float:
        """When a call is overdue.

        Args:
            began: When it began.
            due: When it would be otherwise.
        """
        since = self._since[0]
        return min(due, max(began, since) + self._limit) if since else due

    def unanswered(self) -> None:
        """A call got no answer."""
        if self._since[0]:
            self._silent_until = time.monotonic() + _SILENT_SEC

    def answered(self) -> None:
        """A call got one."""
        self._silent_until = 0.0

    @property
    def is_hopeless(self) -> bool:
        """Whether the process ends, and the database has not answered a moment ago."""
        return self._silent_until > 0 and time.monotonic() < self._silent_until
