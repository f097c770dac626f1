"""Group commit: what several threads ask of the database at about the same time goes in one
statement and one commit.

The first caller sends its item to the database, a batch of one; who comes meanwhile waits for that
batch to complete, and then one of them sends all that wait as the next. So a lone caller loses
nothing, and the more callers, the more share a trip. As PostgreSQL's `commit_delay` does it for its
log, after DeWitt et al., "Implementation Techniques for Main Memory Database Systems" (1984).
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from ..errors import DatabaseRefused, DatabaseUnavailable, StoreTimeout

__all__ = ['GroupCommit']

#: Nobody waits for longer than that for the batch before its own: where a trip takes longer,
#: several are under way at once.
_PATIENCE_SEC = 0.005
#: The most items of a batch.
_MOST = 64

Item = TypeVar('Item')
Outcome = TypeVar('Outcome')


class _Entry(Generic[Item, Outcome]):
    """One caller's item in a batch. It waits at a lock of its own, so that a caller that is struck
    by a time limit locks nobody out.
    """

    __slots__ = ('completed', 'error', 'item', 'outcome', 'taken', 'woken')

    def __init__(self, item: Item) -> None:
        self.item = item
        self.taken = False
        self.completed = False
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self.woken = threading.Lock()
        self.woken.acquire()

    def wake(self) -> None:
        """Let its caller look again. Under the lock of all."""
        if self.woken.locked():
            self.woken.release()


class GroupCommit(Generic[Item, Outcome]):
    """Sends the items of concurrent callers in batches.

    Args:
        one: Sends an item by itself.
        many: Sends several in one transaction; returns what became of each, None where it has to be
            asked for by itself. If it raises DatabaseRefused, nothing was done: then each goes by
            itself, so that a bad one fails alone; unless the server would refuse all of them.
        limit: Seconds after which no trip can be under way any more.
    """

    def __init__(
        self,
        one: Callable[[Item], Outcome],
        many: Callable[[Sequence[Item]], Sequence[Outcome | None]],
        limit: float,
    ) -> None:
        self._one = one
        self._many = many
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: list[_Entry[Item, Outcome]] = []
        # Whose caller sent the newest batch, until that is complete; and when it did.
        self._sender: _Entry[Item, Outcome] | None = None
        self._sent_at = 0.0

    @property
    def waiting(self) -> int:
        """How many callers wait for a batch that is under way."""
        return len(self._waiting)

    def send(self, item: Item) -> Outcome:
        """Send an item, with those of others where there are any.

        Raises:
            DatabaseUnavailable: Nobody knows what became of it.
            Exception: What `one` raises.
        """
        mine = _Entry[Item, Outcome](item)
        try:
            batch = self._join(mine)
            if not batch:
                mine.woken.acquire(timeout=_PATIENCE_SEC)
                batch = self._join(mine, impatient=True)
            if batch:
                self._send(mine, batch)
            while not mine.completed:
                if not mine.woken.acquire(timeout=self._limit):
                    raise StoreTimeout(
                        'the thread that asked the database for this one as well was lost'
                    )
        except BaseException:
            with self._lock:
                if mine in self._waiting:
                    self._waiting.remove(mine)
            raise
        if mine.error is not None:
            raise mine.error
        return mine.outcome if mine.outcome is not None else self._one(item)

    def _join(
        self, mine: _Entry[Item, Outcome], impatient: bool = False
    ) -> list[_Entry[Item, Outcome]]:
        """The batch that this caller has to send; empty while another sends, or may send, its
        item.
        """
        now = time.monotonic()
        with self._lock:
            if mine.taken:
                return []
            if self._sender is not None and not impatient and now - self._sent_at < _PATIENCE_SEC:
                self._waiting.append(mine)
                return []
            batch = [mine, *(other for other in self._waiting if other is not mine)]
            batch, self._waiting = batch[:_MOST], batch[_MOST:]
            for each in batch:
                each.taken = True
            self._sender, self._sent_at = mine, now
            return batch

    def _send(self, mine: _Entry[Item, Outcome], batch: list[_Entry[Item, Outcome]]) -> None:
        outcomes: Sequence[Outcome | None] = [None] * len(batch)
        error: Exception | None = DatabaseUnavailable(
            'the thread that asked the database for this one as well was interrupted'
        )
        try:
            outcomes = (
                [self._one(mine.item)]
                if len(batch) == 1
                else self._many([each.item for each in batch])
            )
            error = None
        except DatabaseUnavailable as trouble:
            if isinstance(trouble, DatabaseRefused) and not trouble.pause and len(batch) > 1:
                error = None
                return
            error = trouble
            raise
        finally:
            self._complete(mine, batch, outcomes, error)

    def _complete(
        self,
        mine: _Entry[Item, Outcome],
        batch: list[_Entry[Item, Outcome]],
        outcomes: Sequence[Outcome | None],
        error: Exception | None,
    ) -> None:
        with self._lock:
            if self._sender is mine:
                self._sender = None
            for each, outcome in zip(batch, outcomes, strict=True):
                each.outcome = outcome
                each.error = copy.copy(error)  # each its own, as a raised one gets a traceback
                each.completed = True
                if each is not mine:
                    each.wake()
            if self._sender is None and self._waiting:
                self._waiting[0].wake()
