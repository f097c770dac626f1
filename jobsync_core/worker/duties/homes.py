"""Home queues that a worker begins to consume while it runs, and those that it stops consuming."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from ...logs import get_logger
from .duty import Moment

__all__ = ['Homes']

logger = get_logger(__name__)

#: Seconds between two looks whether all is given away of a queue that is to be consumed no more.
_LOOK_SEC = 0.25


class Homes:
    """A node's home queues. Any thread adds and drops them; the duties' thread carries it out.

    A queue that is added gets its row and its place at the broker first, then the node consumes it,
    then the node belongs to its group. A queue that is dropped goes the other way round: first the
    node leaves the group, and goes on with what it has there until all is given away.

    Args:
        homes: Those that the worker consumes at its start.
        name_of: Name of the node's queue for a home queue.
        groups: The groups of a worker that consumes these home queues.
        record: Writes down that the node has a queue: the home queue, the queue.
        declare: Makes it at the broker.
        enroll: Belong to these groups, and no others; returns at once.
        holds: Whether the node has something of the group of a home queue, or may get some, or has
            something in hand from its queue for it.
        retire: The node has these queues and none besides.
        problem: What is wrong with a worker that consumes these home queues; '' for nothing.

    Attributes:
        queues: Each home queue, and the node's queue for it; swapped as a whole.
        wanted: The home queues of those that are not being dropped; swapped as a whole.
    """

    name = 'homes'

    def __init__(
        self,
        homes: Sequence[str],
        *,
        name_of: Callable[[str], str],
        groups: Callable[[frozenset[str]], Sequence[str]],
        record: Callable[[str, str], object],
        declare: Callable[[str, str], object],
        enroll: Callable[[Sequence[str]], object],
        holds: Callable[[str], bool],
        retire: Callable[[Sequence[str]], object],
        problem: Callable[[frozenset[str]], str] = lambda homes: '',
    ) -> None:
        self._name_of = name_of
        self._groups = groups
        self._record, self._declare = record, declare
        self._enroll, self._holds, self._retire = enroll, holds, retire
        self._problem = problem
        self._look_at = -math.inf
        self._lock = threading.Lock()
        self._adding: dict[str, Callable[[str], object]] = {}
        self._dropping: dict[str, Callable[[str], object]] = {}
        self._enrolled = tuple(groups(frozenset(homes)))
        self.queues: Mapping[str, str] = MappingProxyType({home: name_of(home) for home in homes})
        self.wanted = frozenset(homes)

    def add(self, home: str, ready: Callable[[str], object]) -> None:
        """Begin with a home queue.

        Args:
            home: The queue.
            ready: Called with the node's queue for it, by the duties' thread, once that can be
                consumed; again, if it raises.

        Raises:
            ConfigurationError: The node's queue would have a name that cannot be.
        """
        self._name_of(home)
        with self._lock:
            self._dropping.pop(home, None)
            self._adding[home] = ready
            self.wanted |= {home}

    def drop(self, home: str, done: Callable[[str], object]) -> None:
        """End with a home queue.

        Args:
            home: The queue.
            done: Called with the node's queue for it, by the duties' thread, when nothing of it is
                held any more; again, if it raises.
        """
        with self._lock:
            self._adding.pop(home, None)
            self.wanted -= {home}
            if home in self.queues:
                self._dropping[home] = done

    def due(self, moment: Moment) -> float:
        """Now, where a queue was added or dropped; soon, where one is being given away."""
        if not moment.leased:
            return math.inf
        if self._adding or self._enrolled != tuple(self._groups(self.wanted)):
            return 0.0
        return self._look_at - moment.now if self._dropping else math.inf

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Carry out what was asked for: one queue that makes trouble is tried again, and holds up
        no other.

        Raises:
            Exception: What the first one raised, after all have had their turn.
        """
        self._look_at = moment.now + _LOOK_SEC
        trouble: dict[str, Exception] = {}
        for home, ready in list(self._adding.items()):
            try:
                self._begin(home, ready)
            except Exception as error:  # the broker refuses this one, for example
                trouble[home] = error
        # After what is consumed from now on; before what is consumed until it is given away.
        groups = tuple(self._groups(self.wanted - trouble.keys()))
        if groups != self._enrolled:
            self._enroll(groups)
            self._enrolled = groups
            problem = self._problem(self.wanted)
            if problem:
                logger.warning('%s; it owns no keys of this group now', problem)
        for home, done in list(self._dropping.items()):
            if self._holds(home):
                continue
            try:
                self._end(home, done)
            except Exception as error:
                trouble[home] = error
        for first in trouble.values():
            raise first

    def _begin(self, home: str, ready: Callable[[str], object]) -> None:
        queue = self._name_of(home)
        with self._lock:
            if self._adding.get(home) is not ready:
                return  # it was dropped meanwhile, or added once more
            self.queues = MappingProxyType({**self.queues, home: queue})
        self._record(home, queue)
        self._declare(home, queue)
        ready(queue)
        with self._lock:
            if self._adding.get(home) is ready:
                del self._adding[home]
        logger.info('queue=%s is consumed here from now on', home)

    def _end(self, home: str, done: Callable[[str], object]) -> None:
        done(self.queues[home])
        with self._lock:
            if self._dropping.get(home) is not done:
                return  # it was added again
            rest = {name: queue for name, queue in self.queues.items() if name != home}
        self._retire(list(rest.values()))
        with self._lock:
            if self._dropping.pop(home, None) is not None:
                self.queues = MappingProxyType(rest)
        logger.info('queue=%s is not consumed here any more; all of it was given away', home)
