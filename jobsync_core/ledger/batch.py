"""Group commit: what several threads ask of the database at about the same time goes in one
statement and one commit.

The first caller carries its item to the database (a flight); who comes meanwhile waits for that
flight's end, and then one of them takes all that wait along in the next. So a lone caller loses
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

#: Nobody waits for longer than that for a flight before its own: where a trip takes longer, several
#: are under way at once.
_PATIENCE_SEC = 0.005
_MOST = 64

Item = TypeVar('Item')
Outcome = TypeVar('Outcome')


class _Seat(Generic[Item, Outcome]):
    """One caller's place. It waits at a lock of its own, so that a caller that is struck by a time
    limit locks nobody out.
    """

    __slots__ = ('error', 'item', 'outcome', 'settled', 'taken', 'woken')

    def __init__(self, item: Item) -> None:
        self.item = item
        self.taken = False
        self.settled = False
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self.woken = threading.Lock()
        self.woken.acquire()

    def wake(self) -> None:
        """Let its caller look again. Under the lock of all."""
        if self.woken.locked():
            self.woken.release()


class GroupCommit(Generic[Item, Outcome]):
    """Carries the items of concurrent callers together.

    Args:
        one: Carries an item by itself.
        many: Carries several in one transaction; returns what became of each, None where it has to
            be asked for by itself. If it raises DatabaseRefused, nothing was done: then each goes
            by itself, so that a bad one fails alone; unless the server would refuse all of them.
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
        self._waiting: list[_Seat[Item, Outcome]] = []
        self._flight: _Seat[Item, Outcome] | None = None
        self._departed = 0.0

    def carry(self, item: Item) -> Outcome:
        """Carry an item, with those of others where there are any.

        Raises:
            DatabaseUnavailable: Nobody knows what became of it.
            Exception: What `one` raises.
        """
        seat = _Seat[Item, Outcome](item)
        try:
            group = self._board(seat)
            if not group:
                seat.woken.acquire(timeout=_PATIENCE_SEC)
                group = self._board(seat, impatient=True)
            if group:
                self._fly(seat, group)
            while not seat.settled:
                if not seat.woken.acquire(timeout=self._limit):
                    raise StoreTimeout(
                        'the thread that asked the database for this one as well was lost'
                    )
        except BaseException:
            with self._lock:
                if seat in self._waiting:
                    self._waiting.remove(seat)
            raise
        if seat.error is not None:
            raise seat.error
        return seat.outcome if seat.outcome is not None else self._one(item)

    def _board(
        self, seat: _Seat[Item, Outcome], impatient: bool = False
    ) -> list[_Seat[Item, Outcome]]:
        """The group that this caller has to carry; empty while another carries, or may carry, its
        item.
        """
        now = time.monotonic()
        with self._lock:
            if seat.taken:
                return []
            if self._flight is not None and not impatient and now - self._departed < _PATIENCE_SEC:
                self._waiting.append(seat)
                return []
            group = [seat, *(other for other in self._waiting if other is not seat)]
            group, self._waiting = group[:_MOST], group[_MOST:]
            for each in group:
                each.taken = True
            self._flight, self._departed = seat, now
            return group

    def _fly(self, seat: _Seat[Item, Outcome], group: list[_Seat[Item, Outcome]]) -> None:
        outcomes: Sequence[Outcome | None] = [None] * len(group)
        error: Exception | None = DatabaseUnavailable(
            'the thread that asked the database for this one as well was interrupted'
        )
        try:
            outcomes = (
                [self._one(seat.item)]
                if len(group) == 1
                else self._many([each.item for each in group])
            )
            error = None
        except DatabaseUnavailable as trouble:
            if isinstance(trouble, DatabaseRefused) and not trouble.pause and len(group) > 1:
                error = None
                return
            error = trouble
            raise
        finally:
            self._land(seat, group, outcomes, error)

    def _land(
        self,
        seat: _Seat[Item, Outcome],
        group: list[_Seat[Item, Outcome]],
        outcomes: Sequence[Outcome | None],
        error: Exception | None,
    ) -> None:
        with self._lock:
            if self._flight is seat:
                self._flight = None
            for each, outcome in zip(group, outcomes, strict=True):
                each.outcome = outcome
                each.error = copy.copy(error)  # each its own, as a raised one gets a traceback
                each.settled = True
                if each is not seat:
                    each.wake()
            if self._flight is None and self._waiting:
                self._waiting[0].wake()
