"""One attempt at a key, as the function sees it that runs it."""
from __future__ import annotations

import datetime
import importlib
import inspect
import json
import os
import re
from collections.abc import Awaitable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ConfigurationError, Fenced, NotEntered

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

__all__ = [
    'DEFAULT_RETENTION', 'MAX_RESULT_BYTES', 'Execution', 'check_key', 'current_execution', 'describe', 'retention_seconds', 'running',
]

#: How long a completed key is remembered, unless the caller says otherwise.
DEFAULT_RETENTION = datetime.timedelta(days=7)
#: Longest key, in bytes of UTF-8: it is a primary key.
MAX_KEY_BYTES = 2000
#: Longest result that is stored, in bytes of JSON.
MAX_RESULT_BYTES = 1_000_000
_MAX_RETENTION_SEC = 36_500 * 86_400.0
_ERROR_LENGTH = 2000
# PostgreSQL's jsonb has no NUL character; an even number of backslashes before it is an escaped backslash.
_NUL_ESCAPE = re.compile(r'(?<!\\)(?:\\\\)*\\u0000')


class _Recorder(Protocol):
    """What an execution asks of the ledger that began it."""

    def transaction_of(self, execution: Execution) -> AbstractContextManager[PgConnection]:
        """A transaction whose commit carries the completion."""

    def completion_of(self, execution: Execution) -> tuple[str, tuple[object, ...]] | None:
        """The statement that completes it, and its parameters; None where nothing is recorded."""


def check_key(key: object) -> str:
    """The key, if the ledger can hold it.

    Raises:
        ConfigurationError: It is no string, empty, too long, or has characters that PostgreSQL cannot store.
    """
    if not isinstance(key, str):
        raise ConfigurationError(f'execution key {key!r} is a {type(key).__name__}: give a string')
    if not key or '\0' in key:
        raise ConfigurationError(f'execution key {key!r}: give a non-empty string without NUL characters')
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise ConfigurationError(f'execution key {key!r} has lone surrogates: give text that UTF-8 can encode') from None
    if size > MAX_KEY_BYTES:
        raise ConfigurationError(f'execution key {key[:40]!r}... has {size} bytes, {MAX_KEY_BYTES} are allowed: use a hash of it')
    return key


def retention_seconds(retention: datetime.timedelta | float) -> float:
    """Seconds of a retention that is given as a timedelta or as seconds.

    Raises:
        ConfigurationError: It is not more than zero, or more than 100 years.
    """
    seconds = retention.total_seconds() if isinstance(retention, datetime.timedelta) else retention
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= _MAX_RETENTION_SEC:
        raise ConfigurationError(f'retention={retention!r}: give a timedelta or seconds, more than zero, at most 100 years')
    return float(seconds)


def _encode(result: object) -> str:
    try:
        text = json.dumps(result, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f'a result of type {type(result).__name__} is no JSON ({error}): '
            'return what json.dumps takes, or use store_result=False') from None
    if len(text) > MAX_RESULT_BYTES:
        raise ConfigurationError(
            f'a result has {len(text)} bytes of JSON, {MAX_RESULT_BYTES} are stored at most: store it elsewhere and return where it is')
    if _NUL_ESCAPE.search(text):
        raise ConfigurationError('a result has a NUL character, which PostgreSQL cannot store: remove it, or use store_result=False')
    return text


def describe(error: BaseException) -> str:
    """An exception as text that PostgreSQL can store."""
    text = f'{type(error).__name__}: {error}'.replace('\0', '?')[:_ERROR_LENGTH]
    return text.encode(errors='replace').decode()


class Execution:
    """One attempt to execute a key.

    Args:
        ledger: Where it was begun.
        key: The key.
        fence: Greater than the fence of any earlier attempt of the key; 0 in single-node mode.
        attempts: Attempts so far, this one included.
        retention_sec: Seconds for which the completion is remembered.
    """

    def __init__(self, ledger: _Recorder, key: str, fence: int, attempts: int, retention_sec: float) -> None:
        self.key = key
        self.fence = fence
        self.attempts = attempts
        self.retention_sec = retention_sec
        self._ledger = ledger
        self._pid = os.getpid()
        self._completed = False
        self._foreign = False
        self._result: Any = None
        self._encoded: str | None = None
        self._recorded: str | None = None

    def __repr__(self) -> str:
        return f'<Execution {self.key!r} fence={self.fence} attempts={self.attempts}>'

    @property
    def completed(self) -> bool:
        """The completion is recorded, or written into a transaction of the caller's by `complete`."""
        return self._completed

    @property
    def result(self) -> Any:
        """What duplicates of the key get. Set it to anything that json.dumps takes.

        Raises:
            ConfigurationError: On setting: it is no JSON, longer than 1 MB, or has a NUL character.
        """
        return self._result

    @result.setter
    def result(self, value: Any) -> None:
        self._encoded = None if value is None else _encode(value)
        self._result = value

    def transaction(self) -> AbstractContextManager[PgConnection]:
        """A transaction whose commit carries the completion: `with execution.transaction() as connection:`.

        What the block writes on the connection (psycopg2's) happens exactly once, or not at all. Do not commit in the block.

        Raises:
            Fenced: Another attempt has taken the key over; the transaction was rolled back.
            DatabaseUnavailable: The transaction was rolled back, or it is unknown whether it was committed; another attempt
                of the key finds out.
            ConfigurationError: In single-node mode, where there is no database.
        """
        return self._ledger.transaction_of(self)

    def complete(self, cursor: Any, result: Any = None) -> None:
        """Write the completion into a transaction that the caller has, and commits.

        Args:
            cursor: A DB-API cursor (psycopg2, psycopg, Django), a psycopg connection, or a SQLAlchemy Connection or Session, on
                the database that holds JobSync's tables. It may see the key only if its snapshot is younger than this attempt.
            result: What duplicates of the key get.

        Raises:
            Fenced: Another attempt has taken the key over. Roll back.
            ConfigurationError: The result cannot be stored, or the cursor is an asynchronous one (use `acomplete`).
        """
        if result is not None:
            self.result = result
        statement = self._ledger.completion_of(self)
        if statement is None:
            self._completed = True
            return
        target, outcome = _send(cursor, *statement)
        if inspect.isawaitable(outcome):
            if inspect.iscoroutine(outcome):
                outcome.close()
            raise ConfigurationError(f'{type(cursor).__name__} is asynchronous: use `await execution.acomplete(cursor)`')
        self._count(target, outcome)

    async def acomplete(self, cursor: Any, result: Any = None) -> None:
        """`complete` for the asynchronous cursors and connections of psycopg 3 and SQLAlchemy."""
        if result is not None:
            self.result = result
        statement = self._ledger.completion_of(self)
        if statement is None:
            self._completed = True
            return
        target, outcome = _send(cursor, *statement)
        self._count(target, await outcome if isinstance(outcome, Awaitable) else outcome)

    def _count(self, target: Any, outcome: Any) -> None:
        changed = getattr(outcome, 'rowcount', None)
        if changed is None:
            changed = target.rowcount
        if changed != 1:
            raise Fenced(f'another attempt has taken the key {self.key!r} over (or the transaction is older than this attempt): roll back')
        self._completed = self._foreign = True
        self._recorded = self._encoded


def _send(cursor: Any, sql: str, parameters: tuple[object, ...]) -> tuple[Any, Any]:
    if any(base.__module__.partition('.')[0] == 'sqlalchemy' for base in type(cursor).__mro__):
        names = ('result', 'retention', 'key', 'fence')
        text = importlib.import_module('sqlalchemy').text(sql % tuple(f':{name}' for name in names))
        return cursor, cursor.execute(text, dict(zip(names, parameters, strict=True)))
    if not callable(getattr(cursor, 'execute', None)) and callable(getattr(cursor, 'cursor', None)):
        cursor = cursor.cursor()
    if not callable(getattr(cursor, 'execute', None)):
        raise ConfigurationError(f'{type(cursor).__name__} has no execute(): give a DB-API cursor, or a SQLAlchemy connection or session')
    return cursor, cursor.execute(sql, parameters)


#: The attempt that is running in this context.
running: ContextVar[Execution | None] = ContextVar('jobsync_execution', default=None)


def current_execution() -> Execution:
    """The attempt that is running here: inside of an `exactly_once` function, or of a `job.once(...)` block.

    Raises:
        NotEntered: Nothing of the kind is running in this context.
    """
    execution = running.get()
    if execution is None:
        raise NotEntered('no execution is running here: call this inside of an @exactly_once function or a job.once() block')
    return execution
