"""What the stores of all subjects have in common: they run named statements on a connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import JobSyncError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .tables import Tables

__all__ = ['Store']

#: By name; by their order where a statement says so.
Parameters: TypeAlias = 'Mapping[str, object] | Sequence[object] | None'


class Store:
    """The rows of one subject, in the transaction of a connection.

    Args:
        connection: Where to read and write; the caller commits.
        tables: Names of the tables.
    """

    def __init__(self, connection: PgConnection, tables: Tables) -> None:
        self.connection = connection
        self._tables = tables

    def _rows(self, name: str, params: Parameters = None, **pieces: str) -> list[tuple[Any, ...]]:
        """Run a statement that returns rows."""
        with self.connection.cursor() as cursor:
            cursor.execute(self._tables.sql(name, **pieces), params or {})
            return cursor.fetchall()

    def _row(self, name: str, params: Parameters = None, **pieces: str) -> tuple[Any, ...] | None:
        """Run a statement that returns one row at most."""
        rows = self._rows(name, params, **pieces)
        return rows[0] if rows else None

    def _dicts(self, name: str, params: Parameters = None) -> list[dict[str, Any]]:
        """Run a statement that returns rows; each by the names of its columns.

        Raises:
            JobSyncError: One of them cannot be read.
        """
        with self.connection.cursor() as cursor:
            cursor.execute(self._tables.sql(name), params or {})
            names = [column.name for column in cursor.description or ()]
            try:
                rows = cursor.fetchall()
            except ValueError as error:  # of the driver: a date that Python has not, for one
                raise JobSyncError(
                    f'a row of the tables cannot be read, as somebody has changed it: {error}'
                ) from None
            return [dict(zip(names, row, strict=True)) for row in rows]

    def _run(self, name: str, params: Parameters = None) -> int:
        """Run a statement that changes rows; how many it changed."""
        with self.connection.cursor() as cursor:
            cursor.execute(self._tables.sql(name), params or {})
            return int(cursor.rowcount)
