"""Pinned tasks: which nodes may run them, and what is said of one that none may run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from .. import clock
from ..assignment.patterns import matches
from ..logs import Repeats, get_logger
from .routing import pinned_task

__all__ = ['Pinned']

logger = get_logger(__name__)


class Pinned:
    """The pins that a process knows.

    A pin is a lock on the task's virtual keys. The rows follow it where a node of the queue group
    matches; where none does, it is held here: the tokens of these keys have other keys as well,
    which have to go on.

    Args:
        pin_of: The patterns of a task; None where it has no pin.
        slots: Gives how many virtual keys a pinned task has. A key that reads like one of them is
            one.
    """

    def __init__(
        self,
        pin_of: Callable[[str], Sequence[str] | None] = lambda name: None,
        slots: Callable[[], int] = lambda: 64,
    ) -> None:
        self._pin_of = pin_of
        self._slots = slots
        self._repeats = Repeats()

    def patterns_of(self, route: str) -> tuple[str, ...] | None:
        """The patterns that hold for a route; None where it is none of a pinned task."""
        name = pinned_task(route, self._slots())
        patterns = self._pin_of(name) if name is not None else None
        return tuple(patterns) if patterns is not None else None

    def allows(self, route: str, node: str) -> bool:
        """Whether a node may run what has this route, as far as pins are concerned."""
        if '#' not in route:
            return True  # as nearly every key
        patterns = self.patterns_of(route)
        return patterns is None or _matches(patterns, node)

    def tell(self, route: str, home: str) -> None:
        """Say, once in a while for each pinned task and queue, that its messages are parked; of all
        other keys together, once for the queue: it may be all of its keys.

        Args:
            route: The route of one of them.
            home: The queue that it was sent to.
        """
        patterns = self.patterns_of(route)
        task = route.rpartition('#')[0] if patterns is not None else None
        again = self._repeats.say((task, home), clock.now())
        if again is None:
            return
        if patterns is None:
            logger.warning(
                'queue=%s key=%s: no live node that consumes this queue may own this key: they '
                'drain, or its lock names none of them; its messages are parked until one may%s',
                home,
                route,
                again,
            )
        else:
            logger.warning(
                'queue=%s task=%s: no live node that consumes this queue matches its pin %s; its '
                'messages are parked until there is one%s',
                home,
                task,
                ', '.join(map(repr, patterns)),
                again,
            )


@lru_cache(maxsize=4096)
def _matches(patterns: tuple[str, ...], node: str) -> bool:
    return any(matches(pattern, node) for pattern in patterns)
