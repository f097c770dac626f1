"""Messages of tasks that nobody knew: they wait apart, so that they are in nobody's way, until a
node comes that knows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ... import clock
from ...logs import get_logger
from ..broker import Broker, Delivery
from ..passage import Owners, Passage, destination_of
from ..registry import Registry
from .duty import Moment, Pace

__all__ = ['UnknownTasks']

logger = get_logger(__name__)

#: Seconds between two looks at whether there is a reason to pass over them.
_LOOK_SEC = 2.0
#: Seconds between two passes while nothing comes of it: more each time.
_PAUSE_FIRST, _PAUSE_MOST = 2.0, 60.0


class UnknownTasks:
    """One node's part in it. One node at a time does it.

    A deploy removed the task, or a producer was updated first. A node that knows other tasks than
    before, a new one for example, passes over them, and any node after a plan, or when there are
    others than it left; with time less and less often, as it may be that they come back at once.

    Args:
        broker: The broker.
        passage: For passing over queues.
        registry: Whether another node is at it.
        owners: Who owns what.
        parked: Name of the parked queue of a home queue.
        unknown: Name of the queue of these messages.
        interval: The longest time between two looks, in seconds.
        tasks: The names of the tasks that this node's consumers know, at this moment.
        route: Makes the route of a message that does not tell it, from its arguments; None where it
            needs none, or none can be made.
        count: Counts events.
        now: The clock.
    """

    name = 'unknown'

    def __init__(
        self,
        broker: Broker,
        passage: Passage,
        registry: Registry,
        owners: Owners,
        parked: Callable[[str], str],
        unknown: str,
        *,
        interval: float,
        tasks: Callable[[], frozenset[str]],
        route: Callable[[Delivery], str | None],
        count: Callable[[str, int], object],
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._broker = broker
        self._passage = passage
        self._registry = registry
        self._owners = owners
        self._parked, self._unknown = parked, unknown
        self._interval = min(_LOOK_SEC, interval)
        self._tasks, self._route = tasks, route
        self._count = count
        self._now = now
        self._pace = Pace()
        self._known: frozenset[str] = frozenset()
        self._looked, self._left = -1, -1
        self._pass_at, self._pause = -math.inf, _PAUSE_FIRST

    def due(self, moment: Moment) -> float:
        """After each plan, and once in a while."""
        return self._pace.due(moment)

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Pass over them, if there is a reason to."""
        self._pace.begin(moment)
        if self._tasks() != self._known or self._owners.version != self._looked:
            self._pass_at, self._pause, self._left = moment.now, _PAUSE_FIRST, -1
        if moment.now >= self._pass_at:
            self._pass_at = moment.now + self._pause
            size = self._broker.size(self._unknown)
            if size and size != self._left:
                self._bring_home(stop)
        self._pace.rest(self._now() + self._interval)

    def _bring_home(self, stop: Callable[[], bool]) -> None:
        tasks, version = self._tasks(), self._owners.version
        with self._registry.held('') as held:
            if not held:
                return
            passed = self._passage.go(
                self._unknown, lambda delivery: self._place(delivery, tasks), stop
            )
        if passed.whole:
            self._known, self._looked = tasks, version
            self._left = -1 if passed.failed else passed.stayed
        # They may come back at once: a node that does not know their task may own their keys.
        self._pause = min(_PAUSE_MOST, self._pause * 2)
        self._pass_at = self._now() + self._pause
        if passed.moved:
            self._count('known_again', passed.moved)
            logger.info(
                'queue=%s brought_home=%d still_unknown=%d',
                self._unknown,
                passed.moved,
                passed.stayed,
            )

    def _place(self, delivery: Delivery, tasks: frozenset[str]) -> str | None:
        """Where a message goes whose task is known here: past its own queue, where a node that does
        not know it may take it again.
        """
        if delivery.task not in tasks:
            return None
        if delivery.route is None:
            try:
                delivery.route = self._route(delivery)
            # arguments that make no key: the consumer of its queue sets it aside, and says so
            except Exception as error:
                logger.debug('id=%s task=%s has no key: %r', delivery.id, delivery.task, error)
        return destination_of(self._owners, delivery).queue or self._parked(delivery.home)
