"""The lease watch: a worker consumes with a lease, and not without."""

from __future__ import annotations

import math
from collections.abc import Callable

from .duty import Moment

__all__ = ['LeaseWatch']


class LeaseWatch:
    """Tells the worker when the lease runs out and when there is one again.

    Args:
        record: Records the node's queues: while the node was taken for dead, empty ones may have
            been deleted and forgotten.
        on_lease: Called with True when there is a lease again, and with False when it has run out;
            again, if it raises.
    """

    name = 'lease'

    def __init__(self, record: Callable[[], object], on_lease: Callable[[bool], object]) -> None:
        self._record = record
        self._on_lease = on_lease
        self._leased = self._told = True

    def due(self, moment: Moment) -> float:
        """Now, where the worker does not know."""
        return math.inf if self._told and moment.leased == self._leased else 0.0

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Tell it."""
        self._leased, self._told = moment.leased, False
        if self._leased:
            self._record()
        self._on_lease(self._leased)
        self._told = True
