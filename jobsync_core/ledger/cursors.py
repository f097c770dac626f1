"""What users give to `Execution.complete`: cursors, connections and sessions of several drivers."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..store.completions import Statement

__all__ = ['count', 'elsewhere', 'send']

#: SQLSTATEs of a table, or its schema, that is not there.
_NO_TABLE = frozenset({'42P01', '3F000'})


def send(cursor: Any, statement: Statement) -> tuple[Any, Any]:
    """Execute a statement; returns what executed it, and what it answered: with an asynchronous
    cursor, something to await.

    Raises:
        ConfigurationError: It is nothing that executes statements.
    """
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


def count(target: Any, outcome: Any, fetch: Callable[[Any], Any]) -> Any:
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


def elsewhere(key: str, cursor: Any, error: BaseException, place: str) -> ConfigurationError | None:
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
