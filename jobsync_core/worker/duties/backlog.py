"""The backlog moves with the tokens: what waits in this node's own queues for tokens that went
elsewhere is passed on to their owners, however busy its consumer is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ... import clock
from ...errors import JobSyncError
from ...logs import get_logger
from ..broker import Broker, Delivery
from ..passage import Owners, Passage, destination_of
from .duty import Moment

__all__ = ['Backlog']

logger = get_logger(__name__)

#: Seconds after a plan at which the queues are looked at once more: who has an older map still
#: sends to them.
_AGAIN_SEC = 1.0
#: Seconds after which a look ends, however much there is: other duties wait. Where it has passed
#: something on, or has not come to all queues, another one follows.
_LONGEST_SEC = 5.0


class Backlog:
    """Each node's own: nobody but its consumer, which may be busy for long, takes from its queues.

    Args:
        node: This node's name, for logs.
        broker: The broker.
        passage: For passing over queues.
        queues: The names of this node's queues.
        owners: Who owns what.
        owns: Whether a route is this node's, of a message that was sent to a home queue.
        count: Counts events.
        now: The clock.
    """

    name = 'backlog'

    def __init__(
        self,
        node: str,
        broker: Broker,
        passage: Passage,
        queues: Callable[[], Sequence[str]],
        owners: Owners,
        *,
        owns: Callable[[str, str], bool],
        count: Callable[[str, int], object],
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._node = node
        self._broker = broker
        self._passage = passage
        self._queues = queues
        self._owners = owners
        self._owns = owns
        self._count = count
        self._now = now
        self._version = -1
        self._at = float('inf')
        #: All queues are looked at once more after a plan.
        self._again = False
        #: Queues that the last look did not come to, and behind them those where it left something:
        #: they come first in the next one.
        self._left: tuple[str, ...] = ()

    def due(self, moment: Moment) -> float:
        """After each plan, and a moment later."""
        if not moment.leased:
            return float('inf')
        return 0.0 if moment.version != self._version else self._at - moment.now

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Pass on what was there when this began."""
        is_new = moment.version != self._version
        self._version, self._at = moment.version, moment.now

        def over() -> bool:
            return stop() or self._now() > moment.now + _LONGEST_SEC

        queues = self._queues()
        todo = [queue for queue in self._left if queue in queues]
        if is_new or self._again:
            todo += [queue for queue in queues if queue not in todo]
        self._again = is_new
        unfinished: list[str] = []
        self._left = (*todo,)
        while todo and not over():
            queue = todo.pop(0)
            # Should this raise, the queue is left for the next look.
            self._left = (*todo, *unfinished, queue)
            if self._pass_on(queue, over):
                unfinished.append(queue)
            self._left = (*todo, *unfinished)
        self._at = moment.now + _AGAIN_SEC if self._left or self._again else float('inf')

    def _pass_on(self, queue: str, stop: Callable[[], bool]) -> bool:
        """Whether there is more that belongs elsewhere, as far as that shows."""

        def where(delivery: Delivery) -> str | None:
            if delivery.route is None:
                return None
            try:
                if self._owns(delivery.route, delivery.home):
                    return None
            except JobSyncError:  # no key of ours: the consumer sets it aside
                return None
            found = destination_of(self._owners, delivery)
            # Nobody is a member of the group yet, or any more: its consumer decides.
            return None if found.deserted or found.queue == queue else found.queue

        passed = self._passage.go(queue, where, stop)
        if passed.moved:
            self._count('forwarded', passed.moved)
            logger.info(
                'node=%s queue=%s passed on %d messages of keys that went elsewhere, %d stay',
                self._node,
                queue,
                passed.moved,
                passed.stayed,
            )
        return passed.moved > 0 and not passed.whole
