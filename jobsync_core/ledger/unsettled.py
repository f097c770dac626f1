"""Attempts whose end is not recorded yet, and the thread that records it later: so no key stays
taken while its process lives.

What lets go of an attempt may be a finalizer, in the middle of any line of any thread. So nothing
here takes a lock that it could find taken by its own thread: each step is one operation of a
dictionary, or of a lock that is only ever released.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from .. import clock
from ..errors import DatabaseRefused, DatabaseUnavailable
from ..logs import get_logger
from .state import Unsettled

__all__ = ['Settling']

logger = get_logger(__name__)

_FIRST_RETRY_SEC, _LAST_RETRY_SEC = 0.2, 2.0
#: How many a process remembers, and how many bytes of them; then nothing begins until some are
#: recorded.
MOST_UNSETTLED = 10_000
MOST_BYTES = 64_000_000
_SAY_AGAIN_SEC = 60.0


class Settling:
    """The attempts of one process.

    Args:
        settle: Records the end of an attempt; False where it has to be tried again later.
        release: Lets go of an attempt that is not known to have begun, if it has.
        patience: Seconds for which such an attempt may still begin: the server may execute a
            statement long after its client gave it up.

    Attributes:
        running: By key: who is at it, so that one process begins a key once. Whoever puts itself
            there takes itself away.
    """

    def __init__(
        self,
        settle: Callable[[Unsettled], bool],
        release: Callable[[Unsettled], object],
        patience: float,
    ) -> None:
        self.running: dict[str, object] = {}
        self._ended: dict[str, Unsettled] = {}
        self._unknown: dict[str, Unsettled] = {}
        self._settle = settle
        self._release = release
        self._patience = patience
        self._thread: threading.Thread | None = None
        self._woken = threading.Lock()
        self._woken.acquire()
        self._closing = False
        self._said_at = float('-inf')

    def __len__(self) -> int:
        return len(self._ended) + len(self._unknown)

    def start(self) -> None:
        """Have the thread run: before anything may have to be settled, as a finalizer cannot start
        one.
        """
        if self._closing or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._run, name='jobsync ledger', daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            logger.warning(
                'what cannot be recorded at once waits, as no thread can be started for it: %s',
                error,
            )

    def check_room(self) -> None:
        """Raises DatabaseUnavailable where too many attempts wait for their end to be recorded:
        memory is bounded that way.
        """
        count = len(self)
        if count >= MOST_UNSETTLED or (
            count > 64 and sum(each.size for each in list(self._ended.values())) >= MOST_BYTES
        ):
            raise DatabaseUnavailable(
                f'{count} attempts of this process wait until the database records their end; '
                'nothing begins before that'
            )

    def find(self, key: str) -> Unsettled | None:
        """The attempt at a key whose end is not recorded."""
        return self._ended.get(key)

    def leave(self, unsettled: Unsettled) -> None:
        """Nobody but the thread cares for this attempt any more. For finalizers, too; may be called
        again.
        """
        key = unsettled.key
        if unsettled.sent and not unsettled.settled:
            if unsettled.began:
                self._ended[key] = unsettled
            elif key not in self._unknown:
                unsettled.until = clock.now() + self._patience
                self._unknown[key] = unsettled
            self._wake()
        if not unsettled.busy and self.running.get(key) is unsettled:
            self.running.pop(key, None)

    def forget(self, unsettled: Unsettled) -> None:
        """Its end is recorded."""
        unsettled.settled = True
        if self._ended.get(unsettled.key) is unsettled:
            self._ended.pop(unsettled.key, None)

    def close(self) -> None:
        """Try once more to record what could not be recorded, then stop trying."""
        self._closing = True
        self._wake()
        if not self._pass():
            logger.warning(
                '%d executions end unrecorded; they may run again when this node is gone', len(self)
            )

    def _wake(self) -> None:
        try:
            self._woken.release()
        except RuntimeError:
            pass  # it is awake

    def _run(self) -> None:
        delay = _FIRST_RETRY_SEC
        while not self._closing:
            self._woken.acquire(timeout=delay if len(self) else -1)
            if self._closing:
                return
            try:
                answered = self._pass()
            except Exception:  # one that nobody foresaw must not end the thread
                logger.exception('what is left of executions could not be looked at')
                answered = False
            delay = min(2 * delay, _LAST_RETRY_SEC) if len(self) else _FIRST_RETRY_SEC
            if not answered:
                self._pause(delay)

    def _pause(self, delay: float) -> None:
        # The database is away: not asked again for each attempt that comes to wait for it.
        until = clock.now() + delay
        while not self._closing and (left := until - clock.now()) > 0:
            self._woken.acquire(timeout=left)

    def _pass(self) -> bool:
        """Try each once, each by itself; whether the database answered."""
        for unsettled in [*self._ended.values(), *self._unknown.values()]:
            mark = object()  # so that the key does not begin here meanwhile
            if unsettled.busy or self.running.setdefault(unsettled.key, mark) is not mark:
                continue
            try:
                if not unsettled.began and unsettled.key in self._ended:
                    # the key was taken over here, and has ended since: what its row says is that
                    # attempt's
                    continue
                self._try(unsettled)
            except DatabaseRefused as error:
                self._say(unsettled, error)
                if error.pause:
                    return False
            except DatabaseUnavailable as error:
                self._say(unsettled, error)
                return False
            except Exception as error:
                self._say(unsettled, error)
            finally:
                self.running.pop(unsettled.key, None)
        return True

    def _try(self, unsettled: Unsettled) -> None:
        if unsettled.began:
            if unsettled.settled or self._settle(unsettled):
                self.forget(unsettled)
        else:
            self._release(unsettled)
        known = unsettled.began
        if self._unknown.get(unsettled.key) is unsettled and (
            known or clock.now() >= unsettled.until
        ):
            self._unknown.pop(unsettled.key, None)

    def _say(self, unsettled: Unsettled, error: Exception) -> None:
        now = clock.now()
        if now - self._said_at >= _SAY_AGAIN_SEC:
            self._said_at = now
            logger.warning(
                'executions=%d are not recorded yet, key=%s for one: %s',
                len(self),
                unsettled.key,
                error,
            )
