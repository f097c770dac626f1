"""How long a worker has been deaf: its event loop stands still, or the broker does not answer.

Its lease stays valid meanwhile, as the database is another server, and the others would send its
keys to a queue that nobody empties.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery.worker import state

from jobsync_core import clock

if TYPE_CHECKING:
    from .redis.carried_over import CarriedOver

__all__ = ['LoopWatch', 'Reconnecting']

#: Seconds that mingle and the like may take after a connection is made.
_BEGIN_SEC = 30.0
#: Seconds before another try to connect, after one that came to nothing; twice as many each time.
_FIRST_SEC, _MOST_SEC, _LOOK_SEC = 1.0, 15.0, 0.2


class LoopWatch:
    """What the event loop tells of itself; `silence` may be asked by any thread.

    Args:
        carried: Knows since when an answer of Redis has been due.
        solo: Tasks run in the event loop, which stands still while one does.
    """

    def __init__(self, carried: CarriedOver, solo: bool) -> None:
        self._carried = carried
        self._solo = solo
        self._turned = clock.now()
        self._lost: float | None = None
        self._frames = -1
        self._heard = clock.now()
        self._beat = 0.0
        self._begins_until = 0.0

    def connected(self) -> None:
        """There is a connection, the first one or another; mingle comes before the event loop
        turns.
        """
        self._lost = None
        self._frames = -1
        self.turned(None)
        self._begins_until = clock.now() + _BEGIN_SEC

    def disconnected(self) -> None:
        """There is none."""
        if self._lost is None:
            self._lost = clock.now()

    def turned(self, connection: Any) -> None:
        """The event loop has turned.

        Args:
            connection: RabbitMQ's, whose heartbeats are counted; None on Redis, where questions are
                answered.
        """
        now = clock.now()
        self._turned, self._begins_until = now, 0.0
        frames = getattr(connection, 'bytes_recv', None)
        if frames is None or frames != self._frames:
            self._frames, self._heard = frames if frames is not None else -1, now
        # The broker sends two in each interval that was agreed upon.
        self._beat = (
            float(getattr(connection, 'heartbeat', 0) or 0) / 2 if frames is not None else 0.0
        )

    def silence(self) -> float:
        """Seconds since the worker could last have taken a message."""
        now = clock.now()
        if self._lost is not None:
            return now - self._lost
        if self._solo and state.active_requests:
            return 0.0  # it is at work; whether the broker answers is found out afterwards
        asked = self._carried.asked_at
        unanswered = now - asked if asked is not None else 0.0
        if self._beat:
            unanswered = max(unanswered, now - self._heard - self._beat)
        still = 0.0 if now < self._begins_until else now - self._turned
        return max(0.0, still, unanswered)


class Reconnecting:
    """Pauses between tries to connect. Celery makes them where the server cannot be reached, and
    none where it can and refuses what begins a connection, as a Redis does that has become a
    replica.

    Args:
        check: Called now and then; raises where the worker shuts down.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        check: Callable[[], object] = state.maybe_shutdown,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._check = check
        self._sleep = sleep
        self._tries = 0

    def wait(self) -> None:
        """Before a try."""
        if self._tries:
            until = clock.now() + min(_MOST_SEC, _FIRST_SEC * 2 ** (self._tries - 1))
            while (left := until - clock.now()) > 0:
                self._check()
                self._sleep(min(left, _LOOK_SEC))
        self._tries = min(self._tries + 1, 10)

    def connected(self) -> None:
        """The try has led to a connection."""
        self._tries = 0
