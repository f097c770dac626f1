"""Messages that cannot be taken now, through no fault of theirs: each is kept for a while,
unacknowledged, and then tried again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobsync_core import clock
from jobsync_core.logs import Repeats
from jobsync_core.worker.come_back import come_back_sec

from ..logs import get_logger
from .timer import LookTimer

__all__ = ['Retries']

logger = get_logger(__name__)

#: Seconds that a message is kept at most.
_MOST_SEC = 60.0
#: Tries after which a message is requeued.
_EVERY = 10
#: Messages of which is remembered how often they were held.
_MOST_KNOWN = 1000


@dataclass(frozen=True)
class _Retry:
    """A message that is held.

    Attributes:
        name: Its task, for the log.
        act: What is done when its pause is over.
        requeue: Returns it to its queue.
        due: When its pause is over, by JobSync's clock.
    """

    name: str
    act: Callable[[], object]
    requeue: Callable[[], object]
    due: float


class Retries:
    """Keeps messages for a second, and twice as long each time that the same one comes again, up to
    a minute. Threads may share it.

    A message that is held counts as prefetched. If this process dies, or loses its connection, the
    broker delivers it again.

    Args:
        call_after: Calls a function in the event loop after some seconds.
        count: Counts an event.
    """

    def __init__(
        self,
        call_after: Callable[[float, Callable[[], None]], object],
        count: Callable[[str], object],
    ) -> None:
        self._count = count
        self._lock = threading.RLock()
        self._held: list[_Retry] = []
        self._timer = LookTimer(call_after, self.look)
        self._times: dict[str, int] = {}
        self._repeats = Repeats()

    def __len__(self) -> int:
        return len(self._held)

    def keep(
        self,
        name: object,
        message_id: object,
        error: BaseException,
        requeue: Callable[[], object],
        act: Callable[[], object] | None = None,
        stays: bool = False,
    ) -> None:
        """Hold a message.

        Args:
            name: Its task.
            message_id: Its id.
            error: Why it cannot be taken now.
            requeue: Returns it to its queue.
            act: What is tried when its pause is over; default: `requeue`.
            stays: It is tried here until that works. Otherwise each tenth time it is requeued:
                another worker may be better off. Not more often, as a quorum queue drops what comes
                back twenty times.
        """
        with self._lock:
            times = self._times.pop(str(message_id), 0)
            while len(self._times) >= _MOST_KNOWN:
                self._times.pop(next(iter(self._times)))
            self._times[str(message_id)] = times + 1
            pause = come_back_sec(times, _MOST_SEC)
            todo = act if act is not None and (stays or times % _EVERY != _EVERY - 1) else requeue
            self._held.append(_Retry(str(name), todo, requeue, clock.now() + pause))
            more = self._repeats.say((str(name), type(error)), clock.now())
            self._timer.set()
        if more is not None:
            logger.warning(
                'Task %s[%s] cannot be taken now, and is tried again in %g s: %s: %s%s',
                name,
                message_id,
                pause,
                type(error).__name__,
                error,
                more,
            )

    def look(self) -> None:
        """Try again those whose pause is over."""
        now = clock.now()
        with self._lock:
            due = [item for item in self._held if item.due <= now]
            self._held = [item for item in self._held if item.due > now]
            if self._held:
                self._timer.set()
        for item in due:
            self._do(item, item.act, 'returned' if item.act is item.requeue else 'retried')

    def requeue_all(self) -> None:
        """Requeue all of them."""
        with self._lock:
            held, self._held = self._held, []
        for item in held:
            self._do(item, item.requeue, 'returned')

    def disconnected(self) -> None:
        """The connection is gone, and the broker delivers again what was not acknowledged."""
        with self._lock:
            self._held.clear()
            self._timer.forget()

    def _do(self, item: _Retry, action: Callable[[], Any], event: str) -> None:
        self._count(event)
        try:
            action()
        except MemoryError:
            raise
        except Exception as error:  # each on its own
            logger.warning('Task %s is not %s: %r', item.name, event, error)
