"""What a channel on Redis knows of empty queues: that they are empty, when it looks again, and who
tells it of the next message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redis.exceptions import ResponseError

from ..logs import get_logger
from .key_changes import KeyChangeListener

__all__ = ['LOOK_SEC', 'EmptyQueues']

logger = get_logger(__name__)

#: Seconds after which empty queues are looked at even if no change was heard of.
LOOK_SEC = 1.0


class EmptyQueues:
    """Of one channel, in the thread that polls.

    Args:
        hub: kombu's event loop, to hear of changes; None: this channel does not wait.
    """

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        #: The script found nothing the last time, and nothing has changed since.
        self.known = False
        #: When the script looks again, should a change have been missed; by the monotonic clock.
        self.look_at = 0.0
        #: Hears of the next message.
        self.listener: KeyChangeListener | None = None
        #: Redis has not refused to tell of changes.
        self.can_listen = True
        #: How many changes were heard of.
        self.changes = 0
        self._changes_before = 0

    def asked(self) -> None:
        """The script is about to look."""
        self._changes_before = self.changes

    def found(self) -> None:
        """There was a message."""
        self.known = False

    def nothing(self, now: float) -> None:
        """The script has found none."""
        # A change between the look and its answer was what came in between.
        self.known, self.look_at = self.changes == self._changes_before, now + LOOK_SEC

    def nobody_tells(self) -> bool:
        """Whether the queues are empty and no listener tells of the next message, so that only a
        pop that waits gets it.
        """
        return self.known and self.listener is None

    def is_waiting(self, now: float) -> bool:
        """Whether the queues are empty, and it is not time to look."""
        return self.known and now < self.look_at

    def wants_listener(self, connection: Any) -> bool:
        """Whether nobody hears of changes to what this connection reads, and somebody could."""
        if self._hub is None or not self.can_listen:
            return False
        return self.listener is None or not self.listener.belongs_to(connection)

    def listen(self, connection: Any, another: Callable[[], Any], poller: Any) -> None:
        """Hear of changes from now on; where Redis refuses, a warning says so.

        Args:
            connection: The connection that reads; nothing may be under way on it.
            another: Makes another one, not connected yet.
            poller: The `MultiChannelPoller` of the transport.
        """
        try:
            self.listener = KeyChangeListener(
                connection, another(), poller, self._hub, self._changed
            )
        except ResponseError as error:
            self.can_listen = False
            logger.warning(
                'JobSync: Redis does not tell of changes, so a message can be lost when Redis or '
                'this worker is killed just while it is received on empty queues; use Redis 6 or '
                'newer, and allow CLIENT TRACKING and SUBSCRIBE to __redis__:invalidate: %s',
                error,
            )
            return
        self.known = False  # what came before it listens is found by another look

    def _changed(self) -> None:
        self.changes += 1
        self.known = False

    def close(self) -> None:
        """Hear no more."""
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.close()
