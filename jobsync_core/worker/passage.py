"""One pass over a queue: each message goes where it belongs now, and one that cannot harms none
behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .. import clock
from ..errors import JobSyncError
from ..logs import Repeats, get_logger
from .broker import Broker, Delivery
from .owners import Place

__all__ = ['Destination', 'Owners', 'Passage', 'Passed', 'destination_of']

logger = get_logger(__name__)

#: Messages that stay and are kept in hand until the end of a pass; what more there is goes to the
#: end of the queue at once. So does each where requeueing is not free.
IN_HAND = 1000
#: Messages that fail one after another: then it is the broker that fails.
_IN_A_ROW = 3


class Owners(Protocol):
    """Who owns what, as passing over needs it; an OwnerMap."""

    @property
    def version(self) -> int:
        """Version of the assignment that is known."""

    def find(self, route: str, home: str) -> Place:
        """Who owns a route in a home queue, and what else is so of it."""

    def is_deserted(self, home: str) -> bool:
        """Whether it is known that nobody consumes a home queue."""

    def refresh(self) -> bool:
        """Read it anew where it has changed; whether the database answered."""

    def reread(self) -> bool:
        """Read it anew."""


@dataclass(frozen=True)
class Destination:
    """Where a message goes: a queue, or None where nobody takes it now.

    Attributes:
        queue: The queue.
        soon: Its owner has no queue yet, and may get one without another plan.
        deserted: It goes home, as no node consumes its queue.
    """

    queue: str | None
    soon: bool = False
    deserted: bool = False


def destination_of(owners: Owners, delivery: Delivery) -> Destination:
    """Where a message belongs by the map at hand: to the owner of its route in its
    queue; home without a route, and where nobody consumes its queue.
    """
    if delivery.route is None:
        return Destination(delivery.home)
    try:
        place = owners.find(delivery.route, delivery.home)
    except JobSyncError:  # no key of ours: the consumer at home sets it aside
        return Destination(delivery.home)
    if place.deserted:
        return Destination(delivery.home, deserted=True)
    return Destination(place.queue, place.node is not None and place.queue is None)


@dataclass
class Passed:
    """What a pass did.

    Attributes:
        moved: Messages that went on.
        stayed: Messages that are still in the queue, of those that it looked at.
        failed: Those of them that were to go on, and could not.
        whole: It came to the end of what was there when it began.
    """

    moved: int = 0
    stayed: int = 0
    failed: int = 0
    whole: bool = True


class Passage:
    """Passes over queues.

    Args:
        broker: The broker.
        node: This node, for logs.
    """

    def __init__(self, broker: Broker, node: str) -> None:
        self._broker = broker
        self._node = node
        self._repeats = Repeats()

    def go(
        self, queue: str, where: Callable[[Delivery], str | None], stop: Callable[[], bool]
    ) -> Passed:
        """Pass each message on that was in the queue when this began.

        Args:
            queue: The queue.
            where: Where a message goes; None: it stays.
            stop: Asked before each message: whether to leave it at that.

        Raises:
            Exception: Whatever the broker's client raises when it is the broker that fails. What
                was in hand goes back to the queue, at once or with the connection.
        """
        passed, kept, in_a_row = Passed(), list[Delivery](), 0
        in_hand = IN_HAND if self._broker.requeue_is_free else 0
        try:
            for _ in range(self._broker.size(queue)):
                if stop():
                    passed.whole = False
                    break
                delivery = self._broker.take(queue)
                if delivery is None:
                    break
                target = where(delivery)
                if target is None and len(kept) < in_hand:
                    kept.append(delivery)
                    continue
                try:
                    delivery.forward(queue if target is None else target)
                except Exception as error:
                    kept.append(delivery)
                    in_a_row += 1
                    passed.failed += 1
                    self._tell(queue, delivery, error)
                    if in_a_row == _IN_A_ROW:
                        raise
                else:
                    in_a_row = 0
                    passed.moved += target is not None
                    passed.stayed += target is None
        finally:
            passed.stayed += len(kept)
            self._requeue(queue, kept)
        return passed

    def _tell(self, queue: str, delivery: Delivery, error: Exception) -> None:
        again = self._repeats.say((queue, delivery.id), clock.now())
        if again is not None:
            logger.warning(
                'node=%s queue=%s id=%s task=%s cannot go on now, and stays: %r%s',
                self._node,
                queue,
                delivery.id,
                delivery.task,
                error,
                again,
            )

    def _requeue(self, queue: str, kept: list[Delivery]) -> None:
        """Requeue deliveries, the last one first, so that they keep their order."""
        for number, delivery in enumerate(reversed(kept)):
            try:
                delivery.requeue()
            except Exception as error:
                logger.warning(
                    'node=%s queue=%s: %d messages go back with the connection, since they cannot '
                    'be put back: %r',
                    self._node,
                    queue,
                    len(kept) - number,
                    error,
                )
                self._broker.reset()
                return
