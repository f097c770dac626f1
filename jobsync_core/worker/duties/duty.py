"""What a duty is: something that a node does again and again beside its messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ['Duty', 'Every', 'Moment', 'Pace']


@dataclass(frozen=True)
class Moment:
    """What a duty is told of its node.

    Attributes:
        now: The moment, in seconds on the monotonic clock.
        leased: The node has a valid lease.
        version: Version of the assignment that the node has seen: another one is another plan.
        leads: The node is the leader.
    """

    now: float
    leased: bool
    version: int
    leads: bool = False


class Duty(Protocol):
    """One duty. The runner's thread alone calls it. It may raise anything: it is tried again.

    Attributes:
        name: For logs.
    """

    name: str

    def due(self, moment: Moment) -> float:
        """Seconds until it is to run, 0 or less for now; `math.inf`: not before something
        changes.
        """

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Do it once.

        Args:
            moment: What is so as it begins.
            stop: Whether that has changed, so that a long run leaves the rest to another one.
        """


class Pace:
    """When a duty is due that needs the lease: after each plan, and after a pause."""

    def __init__(self) -> None:
        self._version = -1
        self._at = -math.inf

    def due(self, moment: Moment) -> float:
        """Seconds until it is."""
        if not moment.leased:
            return math.inf
        return 0.0 if moment.version != self._version else self._at - moment.now

    def begin(self, moment: Moment) -> None:
        """The duty runs; should it fail, it is due still."""
        self._version, self._at = moment.version, moment.now

    def rest(self, until: float) -> None:
        """The duty has run, and is due again at this moment if no plan comes before."""
        self._at = until


class Every:
    """A duty that is one call, once in a while, with a lease or without.

    Args:
        name: For logs.
        seconds: From one call to the next.
        action: What is called.
    """

    def __init__(self, name: str, seconds: float, action: Callable[[], object]) -> None:
        self.name = name
        self._seconds = seconds
        self._action = action
        self._at = -math.inf

    def due(self, moment: Moment) -> float:
        """Seconds until the next call."""
        return self._at - moment.now

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Call it."""
        self._at = moment.now + self._seconds
        self._action()
