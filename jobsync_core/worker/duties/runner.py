"""The runner: one thread that does a node's duties, and a duty that fails holds up no other."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from ... import clock
from ...errors import JobSyncError
from ...logs import Repeats, get_logger
from .duty import Duty, Moment

__all__ = ['Runner']

logger = get_logger(__name__)

#: Seconds after which a duty that failed is tried again.
_FAILED_SEC = 1.0
#: The longest and the shortest wait between two turns, in seconds.
_MOST_SEC, _LEAST_SEC = 1.0, 0.01


class Runner:
    """Does duties in turn. In each turn the first of them comes first.

    Args:
        node: The node's name, for logs.
        duties: What is to be done.
        look: Tells what is so at this moment.
        wait: Waits until a condition holds, for so many seconds at most; `Job.wait_until`.
        wake: Has `wait` look at its condition; `Job.wake`.
        reset: Drops the broker's connection after an error that may be its own.
    """

    def __init__(
        self,
        node: str,
        duties: Sequence[Duty],
        look: Callable[[], Moment],
        *,
        wait: Callable[[Callable[[], bool], float], object],
        wake: Callable[[], object],
        reset: Callable[[], object],
    ) -> None:
        self._node = node
        self._duties = tuple(duties)
        self._look = look
        self._wait, self._wake = wait, wake
        self._reset = reset
        self._not_before: dict[str, float] = {}
        self._repeats = Repeats()
        self._thread = threading.Thread(target=self._run, name='jobsync-duties', daemon=True)
        #: It is told to end.
        self.closing = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread; wait for it for so many seconds at most."""
        self.closing = True
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def turn(self) -> None:
        """Do what is due; each duty once at most. Where lease or plan change meanwhile, the turn
        ends: what follows a plan comes after the duty that reads it.
        """
        first = self._look()
        for duty in self._duties:
            if self._is_past(first):
                return
            # A duty may take long, so that each is told what is so by now.
            moment = self._look()
            if self._due(duty, moment) <= 0:
                try:
                    duty.run(moment, lambda before=moment: self._is_past(before))  # type: ignore[misc]
                except Exception as error:
                    self._failed(duty, error)

    def _run(self) -> None:
        while not self.closing:
            try:
                self._turn_and_wait()
            except Exception:
                # Nothing foreseen; but a thread that ends would leave all duties undone for good.
                logger.exception('node=%s duties failed; they are tried again', self._node)
                time.sleep(_FAILED_SEC)

    def _turn_and_wait(self) -> None:
        self.turn()
        moment = self._look()
        pause = min(_MOST_SEC, *(self._due(duty, moment) for duty in self._duties))
        self._wait(lambda: self._is_past(moment), max(_LEAST_SEC, pause))

    def _is_past(self, before: Moment) -> bool:
        """Whether something has changed that duties follow."""
        now = self._look()
        return self.closing or (now.leased, now.version) != (before.leased, before.version)

    def _due(self, duty: Duty, moment: Moment) -> float:
        wait = self._not_before.get(duty.name, -math.inf) - moment.now
        if wait > 0:
            return wait
        try:
            return duty.due(moment)
        except Exception as error:
            self._failed(duty, error)
            return _FAILED_SEC

    def _failed(self, duty: Duty, error: Exception) -> None:
        now = clock.now()
        self._not_before[duty.name] = now + _FAILED_SEC
        # One line for all of them: what ails one of them ails most.
        again = self._repeats.say(type(error).__name__, now)
        if again is not None:
            logger.warning(
                'node=%s duty=%s failed; it is tried again: %s: %s%s',
                self._node,
                duty.name,
                type(error).__name__,
                error,
                again,
            )
        if not isinstance(error, JobSyncError):
            # Whatever the broker's client raises: its connection is of no use any more.
            self._reset()
