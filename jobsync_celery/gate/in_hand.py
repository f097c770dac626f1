"""Messages from queues of this node on RabbitMQ that are not acknowledged yet, and would be lost
with their queue. Redis has a record of each.
"""

from __future__ import annotations

import weakref
from typing import Any

from ..broker.queues import Queues

__all__ = ['InHand']


class InHand:
    """Knows them by their home queues. Any thread may ask.

    Args:
        queues: The cluster's.
    """

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._home_of: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

    def add(self, message: Any) -> None:
        """A message has come, from whatever queue."""
        if self._queues.is_of_node(message):
            self._home_of[message] = self._queues.home_of(message)

    def holds(self, home: str) -> bool:
        """Whether one that has come through this home queue is not acknowledged yet."""
        messages = (reference() for reference in self._home_of.keyrefs())
        return any(
            each is not None and not each.acknowledged and self._home_of.get(each) == home
            for each in messages
        )

    def clear(self) -> None:
        """The connection is gone, and the broker delivers them again."""
        self._home_of.clear()
