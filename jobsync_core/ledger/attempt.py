"""One attempt at a key from before its begin until its end is recorded: the only place that drives
this life cycle.

Whatever strikes in between, in whatever line (an exception of the user's, a signal, the end of a
coroutine that nobody awaits any more), the attempt is left in the end: what is not recorded then is
handed to the background, so that no key stays taken while its process lives. Leaving takes no lock
and does no I/O, as it may happen in the middle of anything, in a finalizer for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ..errors import NotEntered
from .execution import Execution, describe
from .interface import Ledger, Unsettled
from .keys import Former

__all__ = ['Attempt']


class Attempt:
    """An attempt at `key`.

    Use: `begin`, work, `succeed` or `fail`, `settle`; and `leave`, in a `finally` within a
    `finally`, so that an exception that strikes within the inner one meets the outer one.

    Args:
        ledger: Where it is recorded.
        key: The key.
        retention_sec: Seconds for which its completion is remembered.
        former: Keys under which earlier versions recorded the same call.

    Attributes:
        unsettled: What is left to do about it.
    """

    _ledger: Ledger | None = None  # for a finalizer that comes before __init__ is done

    def __init__(
        self, ledger: Ledger, key: str, retention_sec: float, former: tuple[Former, ...] = ()
    ) -> None:
        self.unsettled = Unsettled(key, retention_sec, former)
        self._gone = False
        self._ledger = ledger

    def __repr__(self) -> str:
        return f'<Attempt {self.unsettled.key!r}>'

    def __del__(self) -> None:
        # The last resort, where not even a `finally` was reached.
        self.leave()

    @property
    def key(self) -> str:
        """The key."""
        return self.unsettled.key

    @property
    def retention_sec(self) -> float:
        """Seconds for which its completion is remembered."""
        return self.unsettled.retention_sec

    @property
    def execution(self) -> Execution:
        """What the user sees, after `begin`."""
        assert self.unsettled.execution is not None
        return self.unsettled.execution

    def begin(self) -> Execution:
        """Begin it; see Ledger.begin."""
        if self._ledger is not None:
            self._ledger.begin_for(self.unsettled)
        return self.execution

    def succeed(self) -> None:
        """It has done its work: from now on its completion is recorded, whatever happens. Does no
        I/O.
        """
        self.unsettled.succeeded = True

    def fail(self, error: BaseException) -> None:
        """Its work has failed. Does no I/O."""
        self.unsettled.failure = error
        self.unsettled.error = describe(error)

    def settle(self) -> None:
        """Record its end; raises what Ledger.finish raises."""
        if self._ledger is not None:
            self._ledger.settle(self.unsettled)

    def leave(self) -> None:
        """Nobody will settle it here any more: what is not recorded is left to the background."""
        if self._ledger is not None:
            self._gone = True
            self.unsettled.failure = None  # whose traceback holds the frame that holds this
            if self.unsettled.execution is not None:
                self.unsettled.execution._ended = True
            self._ledger.leave(self.unsettled)

    def hand_over(self) -> Execution:
        """The caller settles it, by its execution."""
        execution, self._ledger = self.execution, None
        return execution

    # --- in a thread of its own, for coroutines ---

    async def begin_async(self) -> Execution:
        """`begin` in a thread. A caller that is cancelled or closed meanwhile leaves the attempt to
        that thread.
        """
        found: Execution = await asyncio.to_thread(self._in_thread, self.begin)
        return found

    async def settle_async(self) -> None:
        """`settle` in a thread, which goes on where the caller is cancelled meanwhile."""
        await asyncio.shield(asyncio.to_thread(self._in_thread, self.settle))

    def _in_thread(self, action: Callable[[], Any]) -> Any:
        try:
            try:
                self.unsettled.busy = True
                if self._gone:
                    raise NotEntered(f'nobody waits for {self.key!r} any more')
                return action()
            finally:
                self.unsettled.busy = False
        finally:
            self.unsettled.busy = False
            if self._gone:
                self.leave()
