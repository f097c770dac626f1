"""What a message says: read once, and judged by nobody else."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

from jobsync_core import clock
from jobsync_core.job import Job
from jobsync_core.logs import Repeats
from jobsync_core.worker.inbox import Received
from jobsync_core.worker.incoming import Refused, Stamps, read_id, read_stamps

from ..broker.queues import Queues
from ..incoming import Incoming, read_delivery
from ..logs import get_logger
from ..tasks.coordinated import Tasks
from .delivery import Note, mark_redelivered

__all__ = ['Reader']

logger = get_logger(__name__)

_INCOMING = 'jobsync_incoming'


class Reader:
    """Makes of a message what its way is decided by.

    Args:
        job: The node.
        tasks: The app's coordinated tasks.
        queues: The cluster's.
        pinned: Names of the tasks whose pins the node registered when it entered.
        park_sec: Seconds for which a message waits in memory for an owner.
    """

    def __init__(
        self, job: Job, tasks: Tasks, queues: Queues, pinned: Container[str], park_sec: float
    ) -> None:
        self._job = job
        self._tasks = tasks
        self._queues = queues
        self._pinned = pinned
        self._park_sec = park_sec
        self._repeats = Repeats()

    def read(self, message: Any) -> Incoming | Refused:
        """A message's own parts; kept with it."""
        known = vars(message)
        found = known.get(_INCOMING)
        if found is None:
            found = known[_INCOMING] = read_delivery(message)
            mark_redelivered(message)
        return found  # type: ignore[no-any-return]

    def note(self, name: str, message: Any) -> Note:
        """What is known of a message of a coordinated task."""
        found = self.read(message)
        if isinstance(found, Refused):
            return self._refused(name, found)
        message_id = read_id(found.id)
        if isinstance(message_id, Refused):
            return self._refused(name, message_id)
        stamps = self._stamps(found, message)
        route = self._tasks.route_of(name, found.args, found.kwargs, message_id, stamps)
        if route is None and self._tasks.find(name) is None:
            route = Refused('its task is not coordinated any more')
        if isinstance(route, Refused):
            return self._refused(name, route)
        home = self._queues.own_home(stamps, message)
        until = clock.now() + self._park_sec
        received = Received(self._job.incarnation, route, stamps.hops, until, home=home)
        if self._is_pinned_late(name):
            self._tell_unknown(
                name, message, 'was pinned after this worker began, and its pin is not registered'
            )
            received = replace(received, route=None, known=False)
        return Note(name, route or '', home, received)

    def unknown(self, found: Incoming, message: Any) -> Note:
        """What is known of a message whose task nobody here knows."""
        stamps = self._stamps(found, message)
        home = self._queues.own_home(stamps, message)
        self._tell_unknown(found.task, message, 'is not registered here')
        received = Received(self._job.incarnation, None, known=False, home=home)
        return Note(found.task, stamps.key or '', home, received)

    def later(self, received: Received, seconds: float | None = None) -> Received:
        """The same, which waits from now on.

        Args:
            received: What a message's way is decided by.
            seconds: How long it waits before it is parked; default: as one that has just come.
        """
        wait = self._park_sec if seconds is None else seconds
        return replace(received, until=clock.now() + wait)

    def _refused(self, name: str, refused: Refused) -> Note:
        return Note(name, '', '', Received(self._job.incarnation, None, problem=refused.reason))

    def _is_pinned_late(self, name: str) -> bool:
        """Whether a task has a pin that this node did not register when it entered, so that nothing
        holds its messages to it.
        """
        found = self._tasks.find(name)
        return found is not None and found.pin is not None and name not in self._pinned

    def _stamps(self, found: Incoming, message: Any) -> Stamps:
        stamps = read_stamps(message.headers)
        if stamps.wrong:
            more = self._repeats.say((found.task, 'stamps'), clock.now())
            if more is not None:
                logger.warning(
                    'Task %s[%s]: its %s cannot be right, and is left out%s',
                    found.task,
                    found.id,
                    stamps.wrong,
                    more,
                )
        return stamps

    def _tell_unknown(self, name: str, message: Any, why: str) -> None:
        more = self._repeats.say((name, why), clock.now())
        if more is not None:
            logger.error(
                'Task %s[%s] %s: set apart until a node comes that knows it. Nodes of one cluster '
                'must know the same tasks%s',
                name,
                (message.headers or {}).get('id'),
                why,
                more,
            )
