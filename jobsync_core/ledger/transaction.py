"""A transaction of the user's whose commit carries the completion: `with execution.transaction() as
connection:`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, DatabaseUnavailable, Fenced, JobSyncError
from .execution import completed_already
from .state import Unsettled

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..store.executions import Began
    from ..store.transactions import TransactionConnection, Transactions

__all__ = ['CompletingTransaction']


class CompletingTransaction(AbstractContextManager['PgConnection']):
    """What `Execution.transaction` gives.

    Args:
        transactions: Gives the connection.
        outcome_of: Tells what has become of an attempt, as everybody sees it.
        mine: The attempt that it completes.
    """

    def __init__(
        self,
        transactions: Transactions,
        outcome_of: Callable[[Unsettled], tuple[str, Any] | None],
        mine: Unsettled,
    ) -> None:
        self._transactions = transactions
        self._outcome_of = outcome_of
        self._mine = mine
        self._connection: TransactionConnection | None = None
        self._began: Began | None = None

    def __enter__(self) -> PgConnection:
        mine = self._mine
        if mine.completed:
            raise ConfigurationError(
                f'{mine.key!r} is completed already: use one transaction() for all of its writes'
            )
        connection = self._transactions.take()
        try:
            self._began = self._transactions.begin(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        connection.in_block = True
        return connection

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        connection = self._connection
        if connection is None:
            return
        kept = False
        try:
            try:
                connection.end_block()
                # A generator or coroutine that is thrown away, perhaps in the middle of a call to
                # the database: nothing is said to the server but that the connection ends, which
                # rolls back.
                if kind is None:
                    self._commit(connection)
                    kept = True
                elif not issubclass(kind, GeneratorExit):
                    self._roll_back(connection, error)
                    kept = True
            finally:
                self._let_go(connection, kept)
        finally:
            self._let_go(connection, kept)

    def _let_go(self, connection: TransactionConnection, kept: bool) -> None:
        if self._connection is None:
            return
        self._connection = None
        if kept:
            self._transactions.give_back(connection)
        else:
            connection.end_block()
            connection.close()

    def _roll_back(self, connection: TransactionConnection, error: BaseException | None) -> None:
        lost = self._transactions.roll_back(connection, error)
        if lost is not None:
            raise lost from error

    def _commit(self, connection: TransactionConnection) -> None:
        mine, encoded = self._mine, self._mine.encoded
        completion = mine.complete_by_transaction()

        def complete() -> None:
            if not self._transactions.complete(connection, completion, self._began):
                raise self._why_not(connection)
            connection.commit()

        self._transactions.end(connection, mine.key, complete)
        mine.complete(encoded)

    def _why_not(self, connection: TransactionConnection) -> JobSyncError:
        mine = self._mine
        if not self._transactions.is_same(connection, self._began):
            return JobSyncError(
                f'{mine.key!r}: the block of execution.transaction() committed or rolled '
                'back by itself, so its writes '
                'are not those of the completion: leave that to the end of the block'
            )
        connection.rollback()
        outcome = self._outcome_of(mine)
        if outcome is not None and outcome[0] == 'done':
            return completed_already(mine, outcome[1])
        if outcome is not None and outcome[0] == 'running':
            return DatabaseUnavailable(
                f'{mine.key!r}: another transaction was completing it; this one is rolled back'
            )
        return Fenced(
            f'another attempt has taken the key {mine.key!r} over; the transaction is rolled back'
        )
