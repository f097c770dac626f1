"""The plan watch: the owner map is read after each change of plan, and messages that wait for an
owner are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .duty import Moment

__all__ = ['PlanWatch']


class PlanWatch:
    """Follows the plans, while there is a lease.

    Args:
        reread: Reads the owner map.
        on_change: Called after each change of plan, when the map is up to date.
    """

    name = 'plan'

    def __init__(self, reread: Callable[[], object], on_change: Callable[[], object]) -> None:
        self._reread = reread
        self._on_change = on_change
        self._version = -1

    def due(self, moment: Moment) -> float:
        """Now, where there is another plan."""
        return 0.0 if moment.leased and moment.version != self._version else math.inf

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Read the map, and tell."""
        self._version = moment.version
        try:
            self._reread()
        finally:
            self._on_change()
