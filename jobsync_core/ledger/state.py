"""What is known of one attempt, from before its begin until its end is recorded."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from ..store.completions import PENDING, Completion
from .limits import describe

if TYPE_CHECKING:
    from ..store.executions import Holder
    from .keys import Former

__all__ = ['INTERRUPTED', 'Unsettled']

#: The failure of an attempt of which nothing else is known.
INTERRUPTED = 'interrupted before its end was known'


@dataclasses.dataclass(eq=False)
class Unsettled:
    """An attempt whose end is not recorded: what a ledger must know to record it, whenever that is
    possible.

    It refers to neither the attempt's driver nor the user's view of it: whoever records its end in
    the background keeps nothing else alive, and the last resort of a lost driver, its finalizer,
    comes in time.

    Args:
        key: The key.
        retention_sec: Seconds for which its end is remembered.
        former: Prefixes and keys under which earlier versions recorded the same call.
        awaits_result: Its result may come after its completion, when a transaction of the user's
            has carried that.
        pid: The process that it belongs to: a forked child leaves it alone.
        max_lost: How many attempts at the key may be lost; None: as the ledger says.

    Attributes:
        sent: The database has been asked to begin it.
        holder: As whom.
        began: It is known to have begun, with `fence`, as the attempt number `attempts`.
        result: What duplicates of the key get; `encoded` is the same as JSON text.
        completed: Its completion is recorded, or written into a transaction of the caller's.
        in_users_transaction: The caller commits the completion, or rolls it back.
        recorded: The result, as JSON text, that the completion carried.
        pending: What may be recorded is that its result is still to come: duplicates wait for that.
        succeeded: It has done its work, so that its end is a completion; otherwise a failure for
            the reason `error`.
        failure: What its work raised, until it is left.
        busy: A thread is asking the database about it right now.
        settled: Its end is recorded, or nothing has to be.
        left: Nobody settles it any more but the background.
        until: For an attempt that is not known to have begun: until when (in seconds of `clock`) it
            may still begin.
    """

    key: str
    retention_sec: float
    former: tuple[Former, ...] = ()
    awaits_result: bool = False
    pid: int = dataclasses.field(default_factory=os.getpid)
    max_lost: int | None = None
    sent: bool = False
    holder: Holder | None = None
    began: bool = False
    fence: int = 0
    attempts: int = 0
    result: Any = None
    encoded: str | None = None
    completed: bool = False
    in_users_transaction: bool = False
    recorded: str | None = None
    pending: bool = False
    succeeded: bool = False
    error: str = INTERRUPTED
    failure: BaseException | None = None
    busy: bool = False
    settled: bool = False
    left: bool = False
    until: float = 0.0

    def begin(self, fence: int, attempts: int) -> None:
        """It holds the key, by this fence."""
        self.fence, self.attempts = fence, attempts
        self.began = True

    def succeed(self) -> None:
        """It has done its work: from now on its completion is recorded, whatever happens."""
        self.succeeded = True

    def fail(self, error: BaseException) -> None:
        """Its work has failed."""
        self.failure = error
        self.error = describe(error)

    def complete(self, result: str | None, in_users_transaction: bool = False) -> None:
        """Its completion is recorded, or written into a transaction of the caller's, with this
        result.
        """
        if in_users_transaction:
            self.in_users_transaction = True
        self.recorded = result
        self.completed = True  # last: whatever strikes before it has the completion recorded again

    def leave(self) -> None:
        """Nobody settles it any more but the background."""
        self.left = True
        self.failure = None  # its traceback holds the frame that holds this attempt

    @property
    def completion(self) -> Completion:
        """What is recorded of it when it completes."""
        return Completion(self.key, self.fence, self.encoded, self.retention_sec)

    def complete_by_transaction(self) -> Completion:
        """What a transaction of the user's records: the result, or that it is still to come."""
        if self.encoded is not None or not self.awaits_result:
            return self.completion
        self.pending = True  # for good: nobody may learn which of several transactions went through
        return Completion(self.key, self.fence, PENDING, self.retention_sec)

    def put(self, result: str | None) -> None:
        """Its result, as JSON text, is recorded: this one, or that there is none."""
        self.recorded, self.pending = result, False

    @property
    def owes_result(self) -> bool:
        """Whether it is still to be recorded which result it has, or that it has none."""
        return self.pending or (self.completed and self.recorded != self.encoded)

    @property
    def size(self) -> int:
        """Bytes of memory that it holds, about."""
        return 500 + len(self.key) + len(self.error) + len(self.encoded or '')
