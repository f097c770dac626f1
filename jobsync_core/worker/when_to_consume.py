"""When a worker takes messages: with a lease, and while the database begins work.

Both adapters ask here, each in its own consumers; what they then stop and give back is theirs.
"""

from __future__ import annotations

import threading
from enum import Enum

from ..logs import Repeats, get_logger
from ..protocol.pausing import Pausing, remedy

__all__ = ['Consume', 'WhenToConsume']

logger = get_logger(__name__)


class Consume(Enum):
    """Whether messages are taken now."""

    #: Yes.
    NOW = 'now'
    #: No: there is no lease.
    NO_LEASE = 'no lease'
    #: No: the database refuses to begin anything, and a pause is under way.
    PAUSED = 'paused'


class WhenToConsume:
    """Says whether messages are taken now. That the database refuses is logged when a pause begins,
    at most once a minute, and again when it is over. Any thread may ask.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paused = self._refusing = False
        self._repeats = Repeats()

    def look(self, leased: bool, pausing: Pausing, now: float) -> Consume:
        """Whether messages are taken now.

        Args:
            leased: The node's lease is valid.
            pausing: The node's pause.
            now: The moment, in seconds on the monotonic clock.
        """
        if not leased:
            return Consume.NO_LEASE
        if pausing.is_paused(now):
            if not self._paused:
                self._pause(pausing, now)
            return Consume.PAUSED
        self._paused = False
        if self._refusing and not pausing.length:
            self._go_on()
        return Consume.NOW

    def _pause(self, pausing: Pausing, now: float) -> None:
        with self._lock:
            if self._paused:
                return  # another thread has said so
            self._paused = self._refusing = True
            error, more = pausing.error, self._repeats.say('refused', now)
        if more is not None:
            logger.warning(
                'JobSync: the database refuses to begin anything; consuming stops for %.0f s, and '
                'one message tries then: %s; %s%s',
                pausing.length,
                error,
                remedy(error.sqlstate),
                more,
            )

    def _go_on(self) -> None:
        with self._lock:
            over, self._refusing = self._refusing, False
        if over:
            logger.info('JobSync: the database begins work again; consuming goes on')
