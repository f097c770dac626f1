"""Cold shutdown between two turns of the event loop.

Celery (5.5 and newer) does the whole of a cold shutdown in the signal handler, and waits there for
the pool's processes to end. Where the signal came while the loop was writing a task into a
process's pipe, that process waits for the other half of it, and the worker never ends: the messages
that it holds stay where they are for as long as it lives, since it is a living node. So the
handler's work is put off until the loop has done what it was at.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from celery import signals

__all__ = ['ColdShutdown']

_NUMBERS = signal.SIGQUIT, signal.SIGINT, signal.SIGTERM
#: How Celery names the handlers that it makes for these.
_HANDLER = 'worker_Cold'
_LOOP, _POLL = 'kombu.asynchronous.hub', 'kombu.utils.eventio'
_Handler = Callable[[int, FrameType | None], Any]


class ColdShutdown:
    """Puts off the cold shutdown of a worker.

    A second signal is answered at once, as by Celery, should the loop be stuck.

    Args:
        worker: Celery's `WorkController`, whose signal handlers are installed.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._due: Callable[[], Any] | None = None
        self._guard()
        # After Ctrl+C Celery installs the handler of the second one.
        signals.worker_shutting_down.connect(self._guard, weak=False)

    def follow(self, hub: Any) -> None:
        """The event loop begins, the first time or after a reconnect."""
        hub.on_tick.add(self.look)
        hub.on_close.add(self.look)

    def _guard(self, how: str = 'Warm', **other: Any) -> None:
        if how != 'Warm':
            return  # what Celery installs during a cold shutdown is to hasten it
        for number in _NUMBERS:
            handler = signal.getsignal(number)
            if callable(handler) and getattr(handler, '__name__', None) == _HANDLER:
                signal.signal(number, partial(self._received, handler))

    def _received(self, handler: _Handler, number: int, frame: FrameType | None) -> None:
        work = partial(handler, number, frame)
        if self._due is None and (_is_amid(frame) or self._is_writing()):
            self._due = work
        else:
            self._due = None
            work()

    def look(self, closed: Any = None) -> None:
        """Between two turns of the loop, or when its hub is closed: do what was put off."""
        if self._due is not None and (closed is not None or not self._is_writing()):
            work, self._due = self._due, None
            work()

    def _is_writing(self) -> bool:
        """A pipe is full, and holds part of a task."""
        pool = getattr(getattr(self._worker, 'pool', None), '_pool', None)
        return bool(getattr(pool, '_active_writes', None))


def _is_amid(frame: FrameType | None) -> bool:
    """Whether the event loop was doing something other than waiting."""
    if frame is not None and frame.f_globals.get('__name__') == _POLL:
        return False
    while frame is not None:
        if frame.f_globals.get('__name__') == _LOOP and frame.f_code.co_name == 'create_loop':
            return True
        frame = frame.f_back
    return False
