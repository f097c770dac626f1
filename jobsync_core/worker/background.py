"""Runs a function for callers that must not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from .. import clock

__all__ = ['Background']


@dataclass
class _Call:
    """A call of the function.

    Attributes:
        began: When it began.
        over: Set when it has ended.
        went_well: What it returned.
    """

    began: float
    over: threading.Event = field(default_factory=threading.Event)
    went_well: bool = False


class Background:
    """Runs a function in a thread, one call at a time. What does not answer in time is waited for
    once: the next ones wait again when a call has gone well, and was no slower than they wait.

    There is a thread for as long as a call takes. So none is left in a process that asks nothing,
    and none keeps an interpreter from ending. Threads may share the object; a forked child makes
    its own.

    Args:
        run: The function: whether it went well. It raises nothing.
        name: The thread's name.
        wait_sec: Seconds for which a call is waited for at most.
    """

    def __init__(self, run: Callable[[], bool], name: str, wait_sec: float) -> None:
        self._run = run
        self._name = name
        self._wait_sec = wait_sec
        self._lock = threading.Lock()
        self._call: _Call | None = None
        #: A call failed, or took too long, and none has gone well in time since.
        self._late = False

    def ask(self, wait: bool) -> bool:
        """Begin a call, or join the one that is under way.

        Args:
            wait: Whether to wait for its end.

        Returns:
            Whether it has ended and went well.
        """
        call = self._begin()
        if wait and not self._late:
            # Whoever comes later waits for the rest alone.
            left = call.began + self._wait_sec - clock.now()
            if not (call.over.is_set() or (left > 0 and call.over.wait(left))):
                self._late = True
        return call.went_well

    def _begin(self) -> _Call:
        with self._lock:
            call = self._call
            if call is None:
                call = self._call = _Call(clock.now())
                thread = threading.Thread(
                    target=self._work, args=(call,), name=self._name, daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # no thread can be had, or the interpreter ends
                    self._end(call, went_well=False)
                except BaseException:
                    # What a signal or a time limit raises here must not leave a call that nobody
                    # ends: none would ever be made again.
                    self._end(call, went_well=False)
                    raise
            return call

    def _work(self, call: _Call) -> None:
        went_well = False
        try:
            went_well = self._run()
        finally:
            self._end(call, went_well)

    def _end(self, call: _Call, went_well: bool) -> None:
        self._late = not went_well or clock.now() - call.began > self._wait_sec
        call.went_well = went_well
        if self._call is call:
            self._call = None
        call.over.set()
