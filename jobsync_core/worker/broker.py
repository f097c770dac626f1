"""The broker, as rescue and parking need it: two interfaces that each adapter implements for each
of its brokers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

__all__ = ['Broker', 'Delivery', 'search']


class Delivery(Protocol):
    """One message that was taken off a queue and is not acknowledged yet.

    Attributes:
        id: The message's id, for logs.
        task: What it is for: the name of a task or an actor; '' where it does not say.
        route: Its route; None where none can be made.
        home: The queue that it was sent to.
    """

    id: str
    task: str
    route: str | None
    home: str

    def forward(self, queue: str) -> None:
        """Publish it durably to a queue, then acknowledge it here."""

    def requeue(self) -> None:
        """Leave it in the queue that it came from."""


class Broker(Protocol):
    """A connection to the broker for one thread. Any error of its client may come out; the work is
    tried again then.
    """

    #: A message that is sent to a deleted queue is kept (in the parked queue), not lost and not
    #: stranded.
    catches_strays: bool
    #: What is taken off a queue and requeued is as it was. A quorum queue of RabbitMQ counts how
    #: often that happens, and drops a message at its limit.
    requeue_is_free: bool

    def mark(self, mark: str) -> None:
        """Write the cluster's mark, by which its nodes know that they are at one broker, where the
        broker has lost it.
        """

    def restore(self, node: str) -> int:
        """Restore what a node that is gone had taken and not acknowledged; returns how many
        messages.
        """

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        """Queues of nodes that are gone in which something may wait, or whose node may have taken
        something and not acknowledged it: in few trips, however many they are.

        Args:
            queues: Each queue, and its node.
        """

    def size(self, queue: str) -> int:
        """How many messages wait in a queue, those that somebody has taken not counted; 0 where
        there is no such queue.
        """

    def take(self, queue: str) -> Delivery | None:
        """The next message of a queue; None where it is empty or there is no such queue. What it
        holds makes this raise nothing.
        """

    def delete(self, queue: str) -> bool:
        """Delete a queue if it is empty, and nobody consumes it or has anything of it in hand;
        whether it is gone.
        """

    def reset(self) -> None:
        """Drop the connection after an error; the next call opens another."""


def search(
    items: Sequence[str], any_of: Callable[[Sequence[str]], bool], at_once: int = 100
) -> frozenset[str]:
    """Find the few of many items for which something holds, with few questions.

    Args:
        items: The items.
        any_of: Whether it holds for any of some items.
        at_once: Items about which it is asked at first.
    """
    found: set[str] = set()
    groups = [items[start : start + at_once] for start in range(0, len(items), at_once)]
    while groups:
        group = groups.pop()
        if not any_of(group):
            continue
        if len(group) == 1:
            found.update(group)
        else:
            middle = len(group) // 2
            groups += [group[:middle], group[middle:]]
    return frozenset(found)
