"""What waits at the broker because nobody took it: parked messages, handed out when they have an
owner; and those of unknown tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .. import clock
from ..logs import get_logger
from ..store.connection import Sessions
from ..store.queues import QueueStore
from ..store.tables import Tables
from .broker import Broker, Delivery
from .owners import OwnerMap
from .passage import Passage, destination_of

__all__ = ['Parking']

logger = get_logger(__name__)

#: Seconds between two looks at messages of unknown tasks while nothing comes of it: more each time.
_LOOK_FIRST, _LOOK_MOST = 2.0, 60.0
#: Seconds until parked messages are looked at again, for each second that a look took; and at
#: least.
_REST, _REST_LEAST = 10.0, 5.0


class Parking:
    """One node's part in it. One node at a time does it; used by one thread.

    Parked messages are looked at once for each plan, and when their number is not what the last
    pass left. Messages of tasks that the node which got them does not know wait apart, so that they
    are in nobody's way: a deploy removed the task, or a producer was updated first. A node that
    knows other tasks than before, a new one for example, looks at them, and any node after a plan,
    or when there are others than it left; with time less and less often, as it may be that they
    come back at once.

    Args:
        broker: The broker.
        passage: For passing over queues.
        sessions: Connections to the database.
        tables: Names of the tables.
        owners: Who owns what.
        parked: Name of the parked queue.
        unknown: Name of the queue of messages whose task nobody knew.
        tasks: The names that this node's consumers know, at this moment.
        route: Makes the route of a message that does not tell it, from its arguments; None where it
            needs none, or none can be made.
        count: Counts events.
        stop: Whether something more urgent is to be done.
    """

    def __init__(
        self,
        broker: Broker,
        passage: Passage,
        sessions: Sessions,
        tables: Tables,
        owners: OwnerMap,
        parked: str,
        unknown: str,
        *,
        tasks: Callable[[], frozenset[str]],
        route: Callable[[Delivery], str | None],
        count: Callable[[str, int], object],
        stop: Callable[[], bool],
    ) -> None:
        self._broker = broker
        self._passage = passage
        self._sessions = sessions
        self._tables = tables
        self._owners = owners
        self._parked, self._unknown = parked, unknown
        self._tasks, self._route = tasks, route
        self._count = count
        self._stop = stop
        self._stray = False
        self._released, self._left = -1, -1
        self._not_before = 0.0
        self._known: frozenset[str] = frozenset()
        self._looked = -1
        self._unknown_left = -1
        self._look_at, self._pause = 0.0, _LOOK_FIRST

    def note(self) -> None:
        """Something was parked: a plan may have come meanwhile. Called by any thread."""
        self._stray = True

    @property
    def pause(self) -> float:
        """Seconds until there may be something to do, if no plan comes before."""
        wait = max(0.0, (self._not_before if self._stray else math.inf) - clock.now())
        return min(wait, max(0.0, self._look_at - clock.now()))

    def run(self) -> None:
        """Look at both queues, if there is a reason to.

        Raises:
            DatabaseUnavailable, psycopg2.Error, Exception: The database or the broker fails; the
                next call tries again.
        """
        size = self._broker.size(self._parked)
        # A new plan is followed at once. Whatever else happens comes again and again, and rescue
        # calls this twice a second meanwhile.
        rested = clock.now() >= self._not_before
        if size and (
            self._released != self._owners.version
            or (rested and (self._stray or size != self._left))
        ):
            self._hand_out()
        elif not size:
            self._stray, self._released, self._left = False, self._owners.version, 0
        now = clock.now()
        if self._tasks() != self._known or self._owners.version != self._looked:
            self._look_at, self._pause, self._unknown_left = now, _LOOK_FIRST, -1
        if now >= self._look_at:
            self._look_at = now + self._pause
            size = self._broker.size(self._unknown)
            if size and size != self._unknown_left:
                self._bring_home()

    def _hand_out(self) -> None:
        with self._sessions.session() as connection:
            if not QueueStore(connection, self._tables).hold(''):
                return
            self._stray = False
            began = clock.now()
            try:
                self._owners.refresh()
                version = self._owners.version
                passed = self._passage.go(self._parked, self._destination, self._stop)
            except BaseException:
                self._stray = True
                raise
            finally:
                self._not_before = clock.now() + max(_REST_LEAST, (clock.now() - began) * _REST)
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

    def _known_place(self, delivery: Delivery, tasks: frozenset[str]) -> str | None:
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
        return destination_of(self._owners, delivery).queue or self._parked

    def _bring_home(self) -> None:
        tasks, version = self._tasks(), self._owners.version
        with self._sessions.session() as connection:
            if not QueueStore(connection, self._tables).hold(''):
                return
            passed = self._passage.go(
                self._unknown, lambda delivery: self._known_place(delivery, tasks), self._stop
            )
        if passed.whole:
            self._known, self._looked, self._unknown_left = tasks, version, passed.stayed
        # They may come back at once: a node that does not know their task may own their keys.
        self._pause = min(_LOOK_MOST, self._pause * 2)
        self._look_at = clock.now() + self._pause
        if passed.moved:
            self._count('known_again', passed.moved)
            logger.info(
                'queue=%s brought_home=%d still_unknown=%d',
                self._unknown,
                passed.moved,
                passed.stayed,
            )
