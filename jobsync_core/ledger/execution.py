"""One attempt at a key, as the function sees it that runs it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Generator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ..errors import CompletedAlready, ConfigurationError, Fenced, JobSyncError, NotEntered
from .cursors import count, elsewhere, send
from .interface import Ledger
from .results import encode_result, is_plain
from .state import Unsettled

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..store.completions import Statement, Steps

__all__ = ['Execution', 'completed_already', 'current_execution', 'running']


class Execution:
    """One attempt to execute a key.

    Args:
        ledger: Where it was begun.
        mine: What is known of it, which it shares with those who record its end.

    Attributes:
        key: The key.
        fence: Greater than the fence of any earlier attempt of the key; 0 in single-node mode.
        attempts: Attempts so far, this one included.
        retention_sec: Seconds for which the completion is remembered.
    """

    def __init__(self, ledger: Ledger, mine: Unsettled) -> None:
        self.key = mine.key
        self.fence = mine.fence
        self.attempts = mine.attempts
        self.retention_sec = mine.retention_sec
        self._ledger = ledger
        self._mine = mine

    def __repr__(self) -> str:
        return f'<Execution {self.key!r} fence={self.fence} attempts={self.attempts}>'

    @property
    def completed(self) -> bool:
        """The completion is recorded, or written into a transaction of the caller's by
        `complete`.
        """
        return self._mine.completed

    @property
    def result(self) -> Any:
        """What duplicates of the key get: it comes back equal. Set it to anything that json.dumps
        takes, and to dates, times, Decimal, UUID and bytes; tuples stay tuples.

        Raises:
            ConfigurationError: On setting: it is no JSON (NaN and infinity are none), or longer
                than 1 MB.
        """
        return self._mine.result

    @result.setter
    def result(self, value: Any) -> None:
        self._mine.encoded = None if value is None else encode_result(value)
        self._mine.result = value

    @property
    def is_plain(self) -> bool:
        """The result is plain JSON, or there is none."""
        return self._mine.encoded is None or is_plain(self._mine.encoded)

    def transaction(self) -> AbstractContextManager[PgConnection]:
        """A transaction whose commit carries the completion: `with execution.transaction() as
        connection:`.

        What the block writes on the connection (psycopg2's) happens exactly once, or not at all.
        The end of the block is the end of the transaction: commit(), rollback(), close(),
        autocommit and the like are refused within; savepoints are not. What the block sets (SET,
        ROLE, search_path) ends with it, and the completion does not depend on it.

        Raises:
            Fenced: Another attempt has taken the key over; the transaction was rolled back.
            CompletedAlready: An earlier transaction of this attempt, whose commit was not answered,
                went through; this one was rolled back.
            NotCommitted: A statement failed and the block went on; the transaction was rolled back.
            DatabaseUnavailable: The transaction was rolled back, or it is unknown whether it was
                committed; another attempt of the key finds out.
            ConfigurationError: In single-node mode, where there is no database; or the block does
                what is refused.
        """
        return self._ledger.transaction_of(self._mine)

    def complete(self, cursor: Any, result: Any = None) -> None:
        """Write the completion into a transaction that the caller has, and commits before the
        function returns.

        Args:
            cursor: A DB-API cursor (psycopg2, psycopg, Django), a psycopg connection, or a
                SQLAlchemy Connection or Session, on the database that holds JobSync's tables. It
                may see the key only if its snapshot is younger than this attempt.
            result: What duplicates of the key get.

        Raises:
            Fenced: Another attempt has taken the key over. Roll back.
            CompletedAlready: An earlier transaction of this attempt, whose commit was not answered,
                went through. Roll back.
            ConfigurationError: The connection is to another database, it is in autocommit mode, the
                result cannot be stored, or the cursor is an asynchronous one (use `acomplete`).
                Nothing was written.
        """
        if result is not None:
            self.result = result
        statements = self._ledger.steps_of(self._mine)
        if statements is None:
            self._mine.complete(None)
            return
        try:
            steps = self._completing(statements)
            statement = next(steps)
            while True:
                target, outcome = send(cursor, statement)
                if inspect.isawaitable(outcome):
                    if inspect.iscoroutine(outcome):
                        outcome.close()
                    raise ConfigurationError(
                        f'{type(cursor).__name__} is asynchronous: use `await '
                        'execution.acomplete(cursor)`'
                    )
                statement = steps.send(count(target, outcome, lambda rows: len(rows.fetchall())))
        except StopIteration as end:
            if end.value is not None:
                raise self._why_not(end.value, self._ledger.outcome_of(self._mine)) from None
        except Exception as error:
            told = elsewhere(self.key, cursor, error, statements.place)
            if told is None:
                raise
            raise told from error

    async def acomplete(self, cursor: Any, result: Any = None) -> None:
        """`complete` for the asynchronous cursors and connections of psycopg 3 and SQLAlchemy."""
        if result is not None:
            self.result = result
        statements = self._ledger.steps_of(self._mine)
        if statements is None:
            self._mine.complete(None)
            return
        steps = self._completing(statements)
        try:
            statement = next(steps)
            while True:
                target, outcome = send(cursor, statement)
                counted = count(
                    target,
                    await outcome if isinstance(outcome, Awaitable) else outcome,
                    lambda rows: rows.fetchall(),
                )
                statement = steps.send(counted if isinstance(counted, int) else len(await counted))
        except StopIteration as end:
            reason = end.value
        except Exception as error:
            told = elsewhere(self.key, cursor, error, statements.place)
            if told is None:
                raise
            raise told from error
        if reason is not None:
            raise self._why_not(
                reason, await asyncio.to_thread(self._ledger.outcome_of, self._mine)
            )

    def _completing(self, steps: Steps) -> Generator[Statement, int, str | None]:
        """What to run, one after the other; it is sent how many rows each concerned. Returns why
        nothing was completed.
        """
        yield steps.mark
        if (yield steps.complete) == 1:
            self._mine.complete(self._mine.encoded, in_users_transaction=True)
            return None
        return 'refused' if (yield steps.look) == 1 else 'autocommit'

    def _why_not(self, reason: str, outcome: tuple[str, Any] | None) -> JobSyncError:
        """The error of a completion that was not written."""
        if outcome is not None and outcome[0] == 'done':
            return completed_already(self._mine, outcome[1])
        if reason == 'autocommit':
            return ConfigurationError(
                f'{self.key!r}: the connection is in autocommit mode, so what complete() writes '
                'would not be in one transaction with '
                'anything: begin one (Django: `with transaction.atomic():`, psycopg: autocommit '
                'off or `with connection.transaction():`), '
                'and call complete() in it'
            )
        if outcome is not None and outcome[0] == 'running':
            return Fenced(
                f'{self.key!r}: the transaction is older than this attempt, and does not see it: '
                'roll back, and begin one later'
            )
        return Fenced(f'another attempt has taken the key {self.key!r} over: roll back')


def completed_already(mine: Unsettled, result: Any) -> CompletedAlready:
    """The error that tells that this attempt has completed before, with this result; from now on it
    counts as complete.
    """
    mine.complete(mine.encoded)
    error = CompletedAlready(
        f'this attempt has completed {mine.key!r} before: a commit whose answer was lost went '
        'through. What was written after it is '
        'rolled back'
    )
    error.key, error.result = mine.key, result
    return error


#: The attempt that is running in this context.
running: ContextVar[Execution | None] = ContextVar('jobsync_execution', default=None)


def current_execution() -> Execution:
    """The attempt that is running here: inside of an `exactly_once` function, or of a
    `job.once(...)` block.

    Raises:
        NotEntered: Nothing of the kind is running in this context.
    """
    execution = running.get()
    if execution is None or execution._mine.left:
        raise NotEntered(
            'no execution is running here: call this inside of an @exactly_once function or a '
            'job.once() block'
        )
    return execution
