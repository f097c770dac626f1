"""A connection for an administrator's statements, such as CREATE DATABASE: with no settings of
JobSync's, and no cluster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg2

from ..errors import DatabaseUnavailable
from .deadline import GuardedConnection
from .refusals import refused

__all__ = ['administrate']


@contextlib.contextmanager
def administrate(**parameters: Any) -> Iterator[GuardedConnection]:
    """Lend a connection of its own in autocommit mode, closed at the end.

    Args:
        parameters: libpq's.

    Raises:
        DatabaseUnavailable: There is none.
        StatementRefused: The server refused a statement.
    """
    try:
        connection = psycopg2.connect(connection_factory=GuardedConnection, **parameters)
    except psycopg2.Error as error:
        raise DatabaseUnavailable(str(error)) from error
    connection.translate = lambda error, _: refused(error)
    with contextlib.closing(connection):
        connection.autocommit = True
        yield connection
