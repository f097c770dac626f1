"""One attempt at a key from before its begin until its end is recorded: the only place that drives
this life cycle, for a block, a function and a coroutine.

Whatever strikes in between, in whatever line (an exception of the user's, a signal, the end of a
coroutine that nobody awaits any more), the attempt is left in the end: what is not recorded then is
handed to the background, so that no key stays taken while its process lives. Leaving takes no lock
and does no I/O, as it may happen in the middle of anything, in a finalizer for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..errors import NotEntered
from .execution import Execution, running
from .interface import Ledger
from .keys import Former
from .state import Unsettled

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
        awaits_result: Its result may come after its completion.
        max_lost: How many attempts at the key may be lost; None: as the ledger says.

    Attributes:
        unsettled: What is known of it, and left to do about it.
    """

    # For a finalizer that comes before __init__ is done.
    _ledger: Ledger | None = None
    _execution: Execution | None = None

    def __init__(
        self,
        ledger: Ledger,
        key: str,
        retention_sec: float,
        former: tuple[Former, ...] = (),
        awaits_result: bool = False,
        max_lost: int | None = None,
    ) -> None:
        self.unsettled = Unsettled(key, retention_sec, former, awaits_result, max_lost=max_lost)
        self._before: Execution | None = None
        self._ledger = ledger

    def __repr__(self) -> str:
        return f'<Attempt {self.key!r}>'

    def __del__(self) -> None:
        # The last resort, where not even a `finally` was reached.
        self.leave()

    @property
    def key(self) -> str:
        """The key."""
        return self.unsettled.key

    @property
    def execution(self) -> Execution:
        """What the user sees, after `begin`."""
        assert self._execution is not None
        return self._execution

    def begin(self) -> Execution:
        """Begin it: from now on it is what runs here.

        Raises:
            JobSyncError: What `Ledger.begin` raises.
        """
        self._begin()
        return self._enter()

    def succeed(self) -> None:
        """It has done its work: from now on its completion is recorded, whatever happens; and what
        follows is no part of the work. Does no I/O.
        """
        self.unsettled.succeed()
        self._step_out()

    def fail(self, error: BaseException) -> None:
        """Its work has failed; what follows is no part of it. Does no I/O."""
        self.unsettled.fail(error)
        self._step_out()

    def settle(self) -> None:
        """Record its end.

        Raises:
            JobSyncError: What `Ledger.settle` raises.
        """
        if self._ledger is not None:
            self._ledger.settle(self.unsettled)

    def leave(self) -> None:
        """Nobody will settle it here any more: what is not recorded is left to the background."""
        if self._ledger is not None:
            self.unsettled.leave()
            self._ledger.leave(self.unsettled)
            self._step_out()

    def _begin(self) -> None:
        if self._ledger is not None:
            self._ledger.begin(self.unsettled)

    def _enter(self) -> Execution:
        assert self._ledger is not None
        execution = Execution(self._ledger, self.unsettled)
        self._before = running.get()
        self._execution = execution
        running.set(execution)
        return execution

    def _step_out(self) -> None:
        # A generator around a block may be thrown away while another attempt is running in this
        # context.
        if self._execution is not None and running.get() is self._execution:
            self.step_back()

    def step_back(self) -> None:
        """What ran before is what runs here again, whatever the work has left behind: a generator
        that it suspended inside of a block, for one.
        """
        if self._execution is not None:
            running.set(self._before)

    # For coroutines, what waits does so in a thread of its own.

    async def begin_async(self) -> Execution:
        """`begin` in a thread. A caller that is cancelled or closed meanwhile leaves the attempt to
        that thread.
        """
        await asyncio.to_thread(self._in_thread, self._begin)
        return self._enter()

    async def settle_async(self) -> None:
        """`settle` in a thread, which goes on where the caller is cancelled meanwhile."""
        await asyncio.shield(asyncio.to_thread(self._in_thread, self.settle))

    def _in_thread(self, action: Callable[[], None]) -> None:
        unsettled = self.unsettled
        try:
            try:
                unsettled.busy = True
                if unsettled.left:
                    raise NotEntered(f'nobody waits for {self.key!r} any more')
                action()
            finally:
                unsettled.busy = False
        finally:
            unsettled.busy = False
            if unsettled.left:
                self.leave()
