"""The broker's mark, by which a cluster's nodes know that they are at one broker: written again
where the broker has lost it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .duty import Moment, turn_of

__all__ = ['BrokerMark']

#: Seconds between two looks whether the broker still has it.
_LOOK_SEC = 5.0


class BrokerMark:
    """Keeps the mark at the broker, with a lease or without.

    Args:
        mark: The cluster's mark; '' where its broker has none.
        write: Writes it to the broker, where it is not there.
    """

    name = 'mark'

    def __init__(self, mark: Callable[[], str], write: Callable[[str], object]) -> None:
        self._mark = mark
        self._write = write
        self._at = -math.inf

    def due(self, moment: Moment) -> float:
        """Seconds until the next look."""
        return self._at - moment.now if self._mark() else math.inf

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Look."""
        self._at = moment.now + turn_of(moment, _LOOK_SEC)
        self._write(self._mark())
