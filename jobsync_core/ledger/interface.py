"""What a ledger is to those who use it: the cluster's in the database, that of a single process,
one in memory for tests.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from .execution import Execution

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..store.executions import Holder, Steps
    from .keys import Former

__all__ = ['INTERRUPTED', 'Ledger', 'Unsettled']

#: The failure of an attempt of which nothing else is known.
INTERRUPTED = 'interrupted before its end was known'


@dataclasses.dataclass(eq=False)
class Unsettled:
    """An attempt whose end is not recorded: what a ledger must know to record it, whenever that is
    possible.

    Args:
        key: The key.
        retention_sec: Seconds for which its end is remembered.
        former: Prefixes and keys under which earlier versions recorded the same call.
        pid: The process that it belongs to: a forked child leaves it alone.

    Attributes:
        sent: The database has been asked to begin it.
        holder: As whom.
        execution: What the user sees; None where it is not known to have begun.
        succeeded: It has done its work, so that its end is a completion; otherwise a failure for
            the reason `error`.
        failure: What its work raised, until it is left.
        busy: A thread is asking the database about it right now.
        settled: Its end is recorded, or nothing has to be.
        until: For an attempt that is not known to have begun: until when (in seconds of `clock`) it
            may still begin.
    """

    key: str
    retention_sec: float
    former: tuple[Former, ...] = ()
    pid: int = dataclasses.field(default_factory=os.getpid)
    sent: bool = False
    holder: Holder | None = None
    execution: Execution | None = None
    succeeded: bool = False
    error: str = INTERRUPTED
    failure: BaseException | None = None
    busy: bool = False
    settled: bool = False
    until: float = 0.0

    @property
    def size(self) -> int:
        """Bytes of memory that it holds, about."""
        encoded = self.execution._encoded if self.execution is not None else None
        return 500 + len(self.key) + len(self.error) + len(encoded or '')


class Ledger(Protocol):
    """Who executes a key, and that it completes once.

    An attempt is begun, settled and left by what is known of it, so that whatever strikes in
    between finds that up to date. `begin`, `finish`, `fail` and `abandon` do the same for a caller
    that holds the execution alone.
    """

    def begin_for(self, mine: Unsettled) -> None:
        """Begin an attempt; see `begin`. What was done before an exception strikes is known from
        `mine`.
        """

    def settle(self, mine: Unsettled) -> None:
        """Record the end of an attempt; see `finish` and `fail`."""

    def leave(self, mine: Unsettled) -> None:
        """Nobody settles the attempt here any more. Without a lock or I/O, for finalizers; any
        number of times.
        """

    def begin(self, key: str, retention_sec: float) -> Execution:
        """Begin an attempt; the caller ends it by `finish`, `fail` or `abandon`.

        Args:
            key: The key, at most 2000 bytes.
            retention_sec: Seconds for which its completion is remembered.

        Raises:
            DuplicateExecution: The key was completed; `.result` is its stored result.
            ExecutionRunning: Another attempt is running.
            ClaimLost: This node was evicted; it rejoins by itself. Nothing was begun.
            DatabaseUnavailable: Nothing was begun. DatabaseRefused, which is one, tells why the
                server refused.
        """

    def finish(self, execution: Execution) -> None:
        """Record that the attempt completed, unless `transaction` or `complete` did.

        Raises:
            Fenced: Another attempt has taken the key over.
            DatabaseUnavailable: The completion is not known to be recorded; it is recorded later,
                and until then the key may run again.
            NotCommitted: The transaction that `complete` wrote into was rolled back, or is still
                open.
        """

    def fail(self, execution: Execution, error: BaseException) -> None:
        """Record that the attempt failed, so that anybody may begin the next one at once. Raises
        nothing: `error` goes on.
        """

    def abandon(self, execution: Execution) -> None:
        """Let go of an attempt that will not run, without waiting for the database."""

    def release(self, pid: int) -> int:
        """Let others take over what a lost child of this node was executing; returns how many keys.

        Args:
            pid: The child's process id; the caller knows that it is dead.

        Raises:
            DatabaseUnavailable: Nothing is known to be released; call it again.
        """

    def for_messages(self) -> Ledger:
        """The ledger for a message that an adapter's worker is about to process.

        Raises:
            ClaimLost: The node's lease ran out. The database is most likely out of reach, and to
                ask it would take seconds for each message that had been handed to the pool before.
            DatabaseRefused: The database refuses to begin anything, and is not asked before the
                pause is over.
        """

    def close(self) -> None:
        """Try once more to record what could not be recorded, then stop trying."""

    @property
    def unsettled(self) -> int:
        """How many attempts of this process wait in the background for the database to record their
        end.
        """

    def transaction_of(self, execution: Execution) -> AbstractContextManager[PgConnection]:
        """What `Execution.transaction` gives."""

    def steps_of(self, execution: Execution) -> Steps | None:
        """The statements of `Execution.complete`; None where nothing is recorded."""

    def outcome_of(self, execution: Execution) -> tuple[str, Any] | None:
        """State and result of the execution as everybody sees them; None where another attempt
        holds the key, or nothing is recorded.
        """
