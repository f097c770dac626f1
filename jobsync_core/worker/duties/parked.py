"""Parked messages, which nobody owned: handed out when they have an owner."""

from __future__ import annotations

from collections.abc import Callable

from ... import clock
from ...logs import get_logger
from ..broker import Broker, Delivery
from ..passage import Owners, Passage, destination_of
from ..registry import Registry
from .duty import Moment, Pace

__all__ = ['Parked']

logger = get_logger(__name__)

#: Seconds between two looks at how many there are.
_LOOK_SEC = 2.0
#: Seconds until they are passed over again, for each second that a pass took; and at least.
_REST, _REST_LEAST = 10.0, 5.0
#: Seconds until the next try, where another node is at it.
_HELD_SEC = 1.0


class Parked:
    """One node's part in it. One node at a time does it.

    They are passed over once for each plan, and when their number is not what the last pass left.

    Args:
        broker: The broker.
        passage: For passing over queues.
        registry: Whether another node is at it.
        owners: Who owns what.
        parked: Name of the parked queue.
        unknown: Name of the queue of messages whose task nobody knew.
        interval: The longest time between two looks, in seconds.
        tasks: The names of the tasks that this node's consumers know, at this moment.
        count: Counts events.
        now: The clock.
    """

    name = 'parked'

    def __init__(
        self,
        broker: Broker,
        passage: Passage,
        registry: Registry,
        owners: Owners,
        parked: str,
        unknown: str,
        *,
        interval: float,
        tasks: Callable[[], frozenset[str]],
        count: Callable[[str, int], object],
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._broker = broker
        self._passage = passage
        self._registry = registry
        self._owners = owners
        self._parked, self._unknown = parked, unknown
        self._interval = min(_LOOK_SEC, interval)
        self._tasks = tasks
        self._count = count
        self._now = now
        self._pace = Pace()
        self._stray = False
        self._released, self._left = -1, -1
        self._not_before = 0.0

    def note(self) -> None:
        """Something was parked: a plan may have come meanwhile. Called by any thread."""
        self._stray = True

    def due(self, moment: Moment) -> float:
        """After each plan, once in a while, and where something was parked."""
        due = self._pace.due(moment)
        return min(due, self._not_before - moment.now) if self._stray and moment.leased else due

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Look at how many there are, and hand them out if there is a reason to."""
        self._pace.begin(moment)
        size = self._broker.size(self._parked)
        # A new plan is followed at once; whatever else happens comes again and again.
        rested = moment.now >= self._not_before
        if size and (
            self._released != self._owners.version
            or (rested and (self._stray or size != self._left))
        ):
            self._hand_out(stop)
        elif not size:
            self._stray, self._released, self._left = False, self._owners.version, 0
        self._pace.rest(self._now() + self._interval)

    def _hand_out(self, stop: Callable[[], bool]) -> None:
        with self._registry.held('') as held:
            began = self._now()
            if not held:
                self._not_before = began + _HELD_SEC
                return
            self._stray = False
            try:
                self._owners.refresh()
                version = self._owners.version
                passed = self._passage.go(self._parked, self._destination, stop)
            except BaseException:
                self._stray = True
                raise
            finally:
                ended = self._now()
                self._not_before = ended + max(_REST_LEAST, (ended - began) * _REST)
            if passed.moved:
                self._count('released', passed.moved)
                logger.info(
                    'queue=%s released=%d still_parked=%d',
                    self._parked,
                    passed.moved,
                    passed.stayed,
                )
            if passed.whole:
                self._released, self._left = version, passed.stayed
            else:
                self._stray = True

    def _destination(self, delivery: Delivery) -> str | None:
        if delivery.route is None and delivery.task not in self._tasks():
            return self._unknown
        found = destination_of(self._owners, delivery)
        if found.soon:
            self._stray = True
        return found.queue
