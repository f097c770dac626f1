"""One attempt at a key, as the function sees it that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import importlib
import inspect
import os
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CompletedAlready, ConfigurationError, Fenced, JobSyncError, NotEntered
from ..store.executions import Completion
from .results import MAX_RESULT_BYTES, encode_result

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..store.executions import Statement, Steps

__all__ = [
    'DEFAULT_RETENTION',
    'MAX_RESULT_BYTES',
    'Execution',
    'check_key',
    'completion_of',
    'current_execution',
    'describe',
    'retention_seconds',
    'running',
]

#: How long a completed key is remembered, unless the caller says otherwise.
DEFAULT_RETENTION = datetime.timedelta(days=7)
#: Longest key, in bytes of UTF-8: it is a primary key.
MAX_KEY_BYTES = 2000
#: SQLSTATEs of a table, or its schema, that is not there.
_NO_TABLE = frozenset({'42P01', '3F000'})
_MAX_RETENTION_SEC = 36_500 * 86_400.0
_ERROR_LENGTH = 2000


class _Recorder(Protocol):
    """What an execution asks of the ledger that began it."""

    def transaction_of(self, execution: Execution) -> AbstractContextManager[PgConnection]:
        """A transaction whose commit carries the completion."""

    def steps_of(self, execution: Execution) -> Steps | None:
        """The statements that complete it in a transaction of the user's; None where nothing is
        recorded.
        """

    def outcome_of(self, execution: Execution) -> tuple[str, Any] | None:
        """State and result of the execution as everybody sees them; None where another attempt
        holds the key.
        """


def check_key(key: object) -> str:
    """The key, if the ledger can hold it.

    Raises:
        ConfigurationError: It is no string, empty, too long, or has characters that PostgreSQL
            cannot store.
    """
    if not isinstance(key, str):
        raise ConfigurationError(f'execution key {key!r} is a {type(key).__name__}: give a string')
    if not key or '\0' in key:
        raise ConfigurationError(
            f'execution key {key!r}: give a non-empty string without NUL characters'
        )
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise ConfigurationError(
            f'execution key {key!r} has lone surrogates: give text that UTF-8 can encode'
        ) from None
    if size > MAX_KEY_BYTES:
        raise ConfigurationError(
            f'execution key {key[:40]!r}... has {size} bytes, {MAX_KEY_BYTES} are allowed: use a '
            'hash of it'
        )
    return key


def retention_seconds(retention: datetime.timedelta | float) -> float:
    """Seconds of a retention that is given as a timedelta or as seconds.

    Raises:
        ConfigurationError: It is not more than zero, or more than 100 years.
    """
    seconds = retention.total_seconds() if isinstance(retention, datetime.timedelta) else retention
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, (int, float))
        or not 0 < seconds <= _MAX_RETENTION_SEC
    ):
        raise ConfigurationError(
            f'retention={retention!r}: give a timedelta or seconds, more than zero, at most 100 '
            'years'
        )
    return float(seconds)


def describe(error: BaseException) -> str:
    """An exception as text that PostgreSQL can store, also where it cannot tell its text."""
    try:
        text = str(error)
    except Exception as trouble:  # whatever the user's __str__ raises
        text = f'(its text cannot be made: {type(trouble).__name__})'
    return (
        f'{type(error).__name__}: {text}'[:_ERROR_LENGTH]
        .replace('\0', '?')
        .encode(errors='replace')
        .decode()
    )


class Execution:
    """One attempt to execute a key.

    Args:
        ledger: Where it was begun.
        key: The key.
        fence: Greater than the fence of any earlier attempt of the key; 0 in single-node mode.
        attempts: Attempts so far, this one included.
        retention_sec: Seconds for which the completion is remembered.
    """

    def __init__(
        self, ledger: _Recorder, key: str, fence: int, attempts: int, retention_sec: float
    ) -> None:
        self.key = key
        self.fence = fence
        self.attempts = attempts
        self.retention_sec = retention_sec
        self._ledger = ledger
        self._pid = os.getpid()
        self._completed = False
        self._foreign = False
        self._ended = False
        self._result: Any = None
        self._encoded: str | None = None
        self._recorded: str | None = None

    def __repr__(self) -> str:
        return f'<Execution {self.key!r} fence={self.fence} attempts={self.attempts}>'

    @property
    def completed(self) -> bool:
        """The completion is recorded, or written into a transaction of the caller's by
        `complete`.
        """
        return self._completed

    @property
    def result(self) -> Any:
        """What duplicates of the key get: it comes back equal. Set it to anything that json.dumps
        takes; tuples stay tuples.

        Raises:
            ConfigurationError: On setting: it is no JSON (NaN and infinity are none), or longer
                than 1 MB.
        """
        return self._result

    @result.setter
    def result(self, value: Any) -> None:
        self._encoded = None if value is None else encode_result(value)
        self._result = value

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
        return self._ledger.transaction_of(self)

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
        statements = self._ledger.steps_of(self)
        if statements is None:
            self._completed = True
            return
        try:
            steps = self._completing(statements)
            statement = next(steps)
            while True:
                target, outcome = _send(cursor, statement)
                if inspect.isawaitable(outcome):
                    if inspect.iscoroutine(outcome):
                        outcome.close()
                    raise ConfigurationError(
                        f'{type(cursor).__name__} is asynchronous: use `await '
                        'execution.acomplete(cursor)`'
                    )
                statement = steps.send(_count(target, outcome, lambda rows: len(rows.fetchall())))
        except StopIteration as end:
            if end.value is not None:
                raise self._why_not(end.value, self._ledger.outcome_of(self)) from None
        except Exception as error:
            told = _elsewhere(self.key, cursor, error, statements.place)
            if told is None:
                raise
            raise told from error

    async def acomplete(self, cursor: Any, result: Any = None) -> None:
        """`complete` for the asynchronous cursors and connections of psycopg 3 and SQLAlchemy."""
        if result is not None:
            self.result = result
        statements = self._ledger.steps_of(self)
        if statements is None:
            self._completed = True
            return
        steps = self._completing(statements)
        try:
            statement = next(steps)
            while True:
                target, outcome = _send(cursor, statement)
                counted = _count(
                    target,
                    await outcome if isinstance(outcome, Awaitable) else outcome,
                    lambda rows: rows.fetchall(),
                )
                statement = steps.send(counted if isinstance(counted, int) else len(await counted))
        except StopIteration as end:
            reason = end.value
        except Exception as error:
            told = _elsewhere(self.key, cursor, error, statements.place)
            if told is None:
                raise
            raise told from error
        if reason is not None:
            raise self._why_not(reason, await asyncio.to_thread(self._ledger.outcome_of, self))

    def _completing(self, steps: Steps) -> Generator[Statement, int, str | None]:
        """What to run, one after the other; it is sent how many rows each concerned. Returns why
        nothing was completed.
        """
        yield steps.mark
        if (yield steps.complete) == 1:
            self._completed = self._foreign = True
            self._recorded = self._encoded
            return None
        return 'refused' if (yield steps.look) == 1 else 'autocommit'

    def _why_not(self, reason: str, outcome: tuple[str, Any] | None) -> JobSyncError:
        """The error of a completion that was not written."""
        if outcome is not None and outcome[0] == 'done':
            return self.completed_already(outcome[1])
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

    def completed_already(self, result: Any) -> CompletedAlready:
        """The error that tells that this attempt has completed before, with this result; from now
        on it counts as complete.
        """
        self._completed = True
        self._recorded = self._encoded
        error = CompletedAlready(
            f'this attempt has completed {self.key!r} before: a commit whose answer was lost went '
            'through. What was written after it is '
            'rolled back'
        )
        error.key, error.result = self.key, result
        return error


def completion_of(execution: Execution) -> Completion:
    """What is recorded of an execution that completes."""
    return Completion(execution.key, execution.fence, execution._encoded, execution.retention_sec)


def _send(cursor: Any, statement: Statement) -> tuple[Any, Any]:
    sql, parameters = statement
    if _is_sqlalchemy(cursor):
        names = [f'jobsync_{place}' for place in range(len(parameters))]
        text = importlib.import_module('sqlalchemy').text(sql % tuple(f':{name}' for name in names))
        return cursor, cursor.execute(text, dict(zip(names, parameters, strict=True)))
    if not callable(getattr(cursor, 'execute', None)) and callable(getattr(cursor, 'cursor', None)):
        cursor = cursor.cursor()
    if not callable(getattr(cursor, 'execute', None)):
        raise ConfigurationError(
            f'{type(cursor).__name__} has no execute(): give a DB-API cursor, or a SQLAlchemy '
            'connection or session'
        )
    return cursor, cursor.execute(sql, parameters)


def _count(target: Any, outcome: Any, fetch: Callable[[Any], Any]) -> Any:
    """How many rows a statement concerned; what `fetch` gives where the driver does not know before
    they are fetched (a pipeline).
    """
    counted = outcome if getattr(outcome, 'rowcount', None) is not None else target
    rows = int(counted.rowcount)
    if rows < 0:
        return fetch(counted)
    if _is_sqlalchemy(outcome):
        outcome.close()  # nobody reads it
    return rows


def _elsewhere(
    key: str, cursor: Any, error: BaseException, place: str
) -> ConfigurationError | None:
    """What an error of the statement means where the database lacks its table; None: something
    else.
    """
    told: BaseException | None = error
    # SQLAlchemy and Django have errors of their own around those of the driver.
    while told is not None and _NO_TABLE.isdisjoint(
        (getattr(told, 'pgcode', None), getattr(told, 'sqlstate', None))
    ):
        told = told.__cause__
    if told is None:
        return None
    return ConfigurationError(
        f"{key!r}: complete() needs a connection to the database that holds JobSync's tables, "
        f'{place}; this one is to '
        f'{_database_of(cursor)}, which lacks them. Write the effect there, or give JobSync the '
        'database of the effect'
    )


def _database_of(cursor: Any) -> str:
    """The database of what a user gave; the transaction has failed, so that the server cannot be
    asked.
    """
    finders: tuple[Callable[[], object], ...] = (
        lambda: cursor.connection.info.dbname,
        lambda: cursor.info.dbname,
        lambda: cursor.engine.url.database,
        lambda: cursor.get_bind().engine.url.database,
    )
    for find in finders:
        with contextlib.suppress(Exception):  # not one of these
            name = find()
            if isinstance(name, str):
                return f'database {name!r}'
    return 'another one'


def _is_sqlalchemy(thing: object) -> bool:
    return any(base.__module__.partition('.')[0] == 'sqlalchemy' for base in type(thing).__mro__)


#: The attempt that is running in this context.
running: ContextVar[Execution | None] = ContextVar('jobsync_execution', default=None)


def current_execution() -> Execution:
    """The attempt that is running here: inside of an `exactly_once` function, or of a
    `job.once(...)` block.

    Raises:
        NotEntered: Nothing of the kind is running in this context.
    """
    execution = running.get()
    if execution is None or execution._ended:
        raise NotEntered(
            'no execution is running here: call this inside of an @exactly_once function or a '
            'job.once() block'
        )
    return execution
