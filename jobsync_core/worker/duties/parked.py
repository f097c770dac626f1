"""Parked messages, which nobody owned: handed out when they have an owner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ... import clock
from ...logs import get_logger
from ..broker import Broker, Delivery
from ..passage import Owners, Passage, destination_of
from ..registry import Registry
from .duty import Moment, Pace

__all__ = ['Parked']

logger = get_logger(__name__)

#: Seconds between two looks at how many there are; and where none are parked any more but what was
#: sent to a queue that is gone.
_LOOK_SEC, _OLD_LOOK_SEC = 2.0, 5.0
#: Seconds until they are passed over again, for each second that a pass took; and at least. Twice
#: as long after each pass that had nothing to hand out and no new plan: up to so many seconds.
_REST, _REST_LEAST, _REST_MOST = 10.0, 5.0, 60.0
#: Seconds until the next try, where another node is at it.
_HELD_SEC = 1.0


@dataclass
class _Queue:
    """What is remembered of one parked queue.

    Attributes:
        stray: Something was parked, or may be handed out without another plan.
        released: Version of the plan for which it was passed over last.
        left: Messages that this left.
        in_vain: Passes in a row that had no new plan, and nothing to hand out. So it is where
            producers park what no node matches: the number rises, and nothing can go.
        not_before: When it may be passed over again without another plan.
        looked: When it was looked at last.
        pace: When it is looked at.
    """

    stray: bool = False
    released: int = -1
    left: int = -1
    in_vain: int = 0
    not_before: float = 0.0
    looked: float = -math.inf
    pace: Pace = field(default_factory=Pace)


class Parked:
    """One node's part in it: it looks after the parked messages of the home queues that it
    consumes, and after those of the layout that knew no queue groups. One node at a time does it.

    They are passed over once for each plan, and when their number is not what the last pass left:
    the less often, the longer that is in vain. Who parks by an older map does so soon after a plan.

    Args:
        broker: The broker.
        passage: For passing over queues.
        registry: Whether another node is at it.
        owners: Who owns what.
        homes: The home queues that this node consumes, at this moment.
        parked: Name of the parked queue of a home queue.
        unknown: Name of the queue of messages whose task nobody knew.
        interval: The longest time between two looks, in seconds.
        tasks: The names of the tasks that this node's consumers know, at this moment.
        count: Counts events.
        consumers: How many nodes consume a home queue: they alone look after it, so that each
            does the more often the fewer they are; 0 where that is not known.
        now: The clock.
    """

    name = 'parked'

    def __init__(
        self,
        broker: Broker,
        passage: Passage,
        registry: Registry,
        owners: Owners,
        homes: Callable[[], frozenset[str]],
        parked: Callable[[str], str],
        unknown: str,
        *,
        interval: float,
        tasks: Callable[[], frozenset[str]],
        count: Callable[[str, int], object],
        consumers: Callable[[str], int] = lambda home: 0,
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._broker = broker
        self._passage = passage
        self._registry = registry
        self._owners = owners
        self._homes = homes
        self._parked, self._unknown = parked, unknown
        self._interval = min(_LOOK_SEC, interval)
        self._tasks = tasks
        self._count = count
        self._consumers = consumers
        self._now = now
        self._queues: dict[str, _Queue] = {}

    def note(self, home: str) -> None:
        """A message of a home queue was parked: a plan may have come meanwhile. Called by any
        thread.
        """
        self._queues.setdefault(home, _Queue()).stray = True

    def due(self, moment: Moment) -> float:
        """After each plan, once in a while, and where something was parked."""
        if not moment.leased:
            return math.inf
        return min(self._due(home, moment) for home in self._homes() | {''})

    def _due(self, home: str, moment: Moment) -> float:
        queue = self._queues.setdefault(home, _Queue())
        due = queue.pace.due(self._of(home, moment))
        return min(due, queue.not_before - moment.now) if queue.stray else due

    def _of(self, home: str, moment: Moment) -> Moment:
        consumers = self._consumers(home) if home else 0
        # None of them need be the leader.
        return replace(moment, nodes=consumers + 1) if consumers else moment

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Look at how many there are, and hand them out if there is a reason to."""
        here = self._homes() | {''}
        for home in list(self._queues):
            if home not in here:  # somebody else looks after it
                del self._queues[home]
        due = [home for home in sorted(here) if self._due(home, moment) <= 0]
        for home in due:
            if stop():
                return
            queue = self._queues[home]
            queue.pace.begin(self._of(home, moment))
            if (
                home
                or queue.stray
                or queue.released != self._owners.version
                or moment.now >= queue.looked + _OLD_LOOK_SEC
            ):
                queue.looked = moment.now
                self._look(home, queue, moment, stop)
        now = self._now()
        for home in due:
            self._queues[home].pace.rest(now + self._interval)

    def _look(self, home: str, queue: _Queue, moment: Moment, stop: Callable[[], bool]) -> None:
        size = self._broker.size(self._parked(home))
        # A new plan is followed at once; whatever else happens comes again and again.
        rested = moment.now >= queue.not_before
        if size and (
            queue.released != self._owners.version
            or (rested and (queue.stray or size != queue.left))
        ):
            self._hand_out(home, queue, stop)
        elif not size:
            queue.stray, queue.released, queue.left = False, self._owners.version, 0

    def _hand_out(self, home: str, queue: _Queue, stop: Callable[[], bool]) -> None:
        name = self._parked(home)
        # What '' stands for is what nodes of other versions hold for it.
        with self._registry.held(name if home else '') as held:
            began = self._now()
            if not held:
                queue.not_before = began + _HELD_SEC
                return
            queue.stray = False
            in_vain, queue.in_vain = queue.in_vain, 0
            try:
                self._owners.refresh()
                version = self._owners.version
                passed = self._passage.go(
                    name, lambda delivery: self._destination(delivery, queue), stop
                )
            except BaseException:
                queue.stray = True
                raise
            finally:
                ended = self._now()
                rest = max(_REST_LEAST, (ended - began) * _REST)
                queue.not_before = ended + rest
            if passed.whole and not passed.moved and version == queue.released:
                queue.in_vain = in_vain + 1
                rest = min(rest * 2 ** min(queue.in_vain, 9), max(rest, _REST_MOST))
                queue.not_before = ended + rest
            if passed.moved:
                self._count('released', passed.moved)
                logger.info(
                    'queue=%s released=%d still_parked=%d', name, passed.moved, passed.stayed
                )
            if passed.whole:
                queue.released, queue.left = version, passed.stayed
            if passed.failed or not passed.whole:
                queue.stray = True  # their number will be the same

    def _destination(self, delivery: Delivery, queue: _Queue) -> str | None:
        if delivery.route is None and delivery.task not in self._tasks():
            return self._unknown
        found = destination_of(self._owners, delivery)
        if found.deserted and delivery.home in self._homes():
            return None  # this node is about to be a member: at home it would take it again
        if found.soon:
            queue.stray = True
        return found.queue
