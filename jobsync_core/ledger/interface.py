"""What a ledger is to those who use it: the cluster's in the database, that of a single process,
one in memory for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from .state import Unsettled

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..store.completions import Steps

__all__ = ['Ledger']


class Ledger(Protocol):
    """Who executes a key, and that it completes once.

    An attempt is begun, settled and left by what is known of it, so that whatever strikes in
    between finds that up to date. `Attempt` drives this; nobody else does.
    """

    def begin(self, mine: Unsettled) -> None:
        """Begin an attempt. What was done before an exception strikes is known from `mine`.

        Raises:
            DuplicateExecution: The key was completed; `.result` is its stored result.
            ExecutionRunning: Another attempt is running.
            AttemptsExhausted: Too many attempts at the key were lost.
            ClaimLost: This node was evicted; it rejoins by itself. Nothing was begun.
            DatabaseUnavailable: Nothing was begun. DatabaseRefused, which is one, tells why the
                server refused.
        """

    def settle(self, mine: Unsettled) -> None:
        """Record the end of an attempt.

        That it completed, unless a transaction of the user's recorded that; or that it failed, so
        that anybody may begin the next one at once. A failure raises nothing: the error of the
        work goes on.

        Raises:
            Fenced: Another attempt has taken the key over.
            DatabaseUnavailable: The completion is not known to be recorded; it is recorded later,
                and until then the key may run again.
            NotCommitted: The transaction that `complete` wrote into was rolled back, or is still
                open.
        """

    def leave(self, mine: Unsettled) -> None:
        """Nobody settles the attempt here any more. Without a lock or I/O, for finalizers; any
        number of times.
        """

    def release(self, pid: int) -> int:
        """Let others take over what a lost child of this node was executing; returns how many keys.

        Args:
            pid: The child's process id; the caller knows that it is dead.

        Raises:
            DatabaseUnavailable: Nothing is known to be released; call it again.
        """

    def keep(self, key: str, message: str) -> bool:
        """Keep the message of a dead key, so that it can be sent again, unless one is kept; False
        where the key is not dead any more.

        Args:
            key: The key.
            message: A JSON document.

        Raises:
            DatabaseUnavailable: It is not known to be kept.
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

    def transaction_of(self, mine: Unsettled) -> AbstractContextManager[PgConnection]:
        """What `Execution.transaction` gives."""

    def steps_of(self, mine: Unsettled) -> Steps | None:
        """The statements of `Execution.complete`; None where nothing is recorded."""

    def outcome_of(self, mine: Unsettled) -> tuple[str, Any] | None:
        """State and result of the attempt as everybody sees them; None where another attempt
        holds the key, or nothing is recorded.
        """
