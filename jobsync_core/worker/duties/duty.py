"""What a duty is: something that a node does again and again beside its messages."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ['Duty', 'Every', 'Moment', 'Pace', 'turn_of']

#: Seconds after a plan within which one of all followers looks, whether the leader does its part.
_SOON_SEC = 1.0


@dataclass(frozen=True)
class Moment:
    """What a duty is told of its node.

    Attributes:
        now: The moment, in seconds on the monotonic clock.
        leased: The node has a valid lease.
        version: Version of the assignment that the node has seen: another one is another plan.
        leads: The node is the leader.
        nodes: How many nodes own something.
    """

    now: float
    leased: bool
    version: int
    leads: bool = False
    nodes: int = 1


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


def turn_of(
    moment: Moment, seconds: float, share: float = 1.0, chance: Callable[[], float] = random.random
) -> float:
    """Seconds that one node pauses, where the leader pauses for so many: what all followers do
    together is the same however many they are. One that looks at random is not kept off by the same
    other one each time.

    Args:
        moment: What is so.
        seconds: The leader's pause.
        share: How many times that passes, on average, until one of all followers looks.
        chance: A number from 0 to 1.
    """
    if moment.leads:
        return seconds
    return seconds * share * max(1, moment.nodes - 1) * 2 * chance()


class Pace:
    """When a duty is due that needs the lease: for the leader after each plan, and after a pause.
    For the others less often, so that what one leaves undone is done by another all the same: a
    leader may be cut off from the broker, or be stuck with one queue.

    Args:
        share: How many of the leader's pauses pass until one of the followers looks.
        first: Seconds until a leader would look for the first time; None: each node looks at once,
            and after each plan.
        chance: A number from 0 to 1.
    """

    def __init__(
        self,
        share: float = 1.0,
        first: float | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._share = share
        self._first = first
        self._chance = chance
        self._began: Moment | None = None
        self._noted = -1
        self._at = -math.inf

    def due(self, moment: Moment) -> float:
        """Seconds until it is."""
        if not moment.leased:
            return math.inf
        before = self._began
        if before is None:
            return self._due_first(moment)
        if moment.leads and not before.leads:
            return 0.0  # whoever led may have left it in the middle
        if self._first is None and moment.version != before.version:
            if moment.leads:
                return 0.0
            if moment.version != self._noted:
                self._noted = moment.version
                soon = moment.now + turn_of(moment, _SOON_SEC, 1.0, self._chance)
                self._at = min(self._at, soon)
        return self._at - moment.now

    def _due_first(self, moment: Moment) -> float:
        if self._first is None or moment.leads:
            return 0.0
        if self._at == -math.inf:
            self._at = moment.now + turn_of(moment, self._first, self._share, self._chance)
        return self._at - moment.now

    def begin(self, moment: Moment) -> None:
        """The duty runs; should it fail, it is due still."""
        self._began, self._at = moment, moment.now

    def rest(self, until: float) -> None:
        """The duty has run, and is due again at this moment if no plan comes before; where another
        node leads, later.
        """
        if self._began is not None:
            pause = until - self._began.now
            self._at = self._began.now + turn_of(self._began, pause, self._share, self._chance)


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
