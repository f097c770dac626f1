"""The tables of a cluster: their names, their creation and their versions."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import psycopg2.errors

from ..errors import SchemaConflict

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..config import CoordinationConfig

__all__ = ['SCHEMA_VERSION', 'Tables', 'create_schema', 'render_schema']

SCHEMA_VERSION = 1
#: SQL that brings tables of version n to n + 1, by n.
MIGRATIONS: dict[int, str] = {}
_NAMES = ('node', 'assignment', 'token', 'lock', 'rebalance', 'claim', 'audit', 'execution', 'cluster', 'queue')


def _key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'big', signed=True)


@dataclass(frozen=True)
class Tables:
    """Names of the tables under one prefix, quoted as identifiers.

    Args:
        appname: The prefix; CoordinationConfig has checked it.

    Attributes:
        channel: Notification channel, not quoted.
        advisory: Keys of the advisory lock that a leader's round takes exclusively.
    """

    appname: str
    node: str = field(init=False)
    assignment: str = field(init=False)
    token: str = field(init=False)
    lock: str = field(init=False)
    rebalance: str = field(init=False)
    claim: str = field(init=False)
    audit: str = field(init=False)
    execution: str = field(init=False)
    cluster: str = field(init=False)
    queue: str = field(init=False)

    def __post_init__(self) -> None:
        for name in _NAMES:
            object.__setattr__(self, name, f'"{self.appname}{name}"')

    @property
    def channel(self) -> str:
        return f'{self.appname}events'

    @property
    def advisory(self) -> tuple[int, int]:
        return _key('jobsync'), _key(self.appname)


def render_schema(appname: str) -> str:
    """The SQL that creates the tables under the prefix, for whoever may not let a program do it."""
    tables = Tables(appname)
    text = files(__package__).joinpath('schema.sql').read_text(encoding='utf-8')
    return text.format(schema_version=SCHEMA_VERSION, **{name: getattr(tables, name) for name in _NAMES})


def create_schema(connection: PgConnection, config: CoordinationConfig) -> None:
    """Create the tables, or bring them to this version. Many nodes may do so at once; one does it.

    Args:
        connection: An open connection; the caller commits.
        config: Names the tables.

    Raises:
        SchemaConflict: Tables of this prefix belong to something else, or to a newer version; or they are missing
            and this role may not create them.
    """
    tables = Tables(config.appname)
    with connection.cursor() as cursor:
        if _version(cursor, tables) == SCHEMA_VERSION:
            return  # without a lock and without rights to create anything
        cursor.execute('SELECT pg_advisory_xact_lock(%s, %s)', (_key('jobsync schema'), _key(config.appname)))
        version = _version(cursor, tables)
        try:
            if version is None:
                _refuse_strangers(cursor, tables)
                cursor.execute(render_schema(config.appname))
                return
            while version < SCHEMA_VERSION:
                cursor.execute(MIGRATIONS[version])
                version += 1
                cursor.execute(f'UPDATE {tables.cluster} SET schema_version = %s', (version,))
        except psycopg2.errors.InsufficientPrivilege as error:
            raise SchemaConflict(
                f'tables {config.appname}* are missing or old, and user {config.user!r} may not create them: GRANT CREATE ON SCHEMA '
                f'to it, or have the output of `jobsync schema --sql --appname {config.appname}` run by a role that may') from error


def _version(cursor: Any, tables: Tables) -> int | None:
    """Version of the tables that are there; None where there are none of ours."""
    cursor.execute(
        "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = 'schema_version' AND NOT attisdropped)",
        (tables.cluster,))
    if not cursor.fetchone()[0]:
        return None
    cursor.execute(f'SELECT schema_version FROM {tables.cluster}')
    row = cursor.fetchone()
    if row is None:
        raise SchemaConflict(f'table {tables.cluster} is empty: restore its row with INSERT INTO {tables.cluster} (schema_version) '
                             f'VALUES ({SCHEMA_VERSION})')
    if row[0] > SCHEMA_VERSION:
        raise SchemaConflict(f'the tables {tables.appname}* have version {row[0]}, this program knows {SCHEMA_VERSION}: '
                             f'upgrade JobSync here, or choose another appname')
    return int(row[0])


def _refuse_strangers(cursor: Any, tables: Tables) -> None:
    for name in _NAMES:
        cursor.execute('SELECT relkind FROM pg_class WHERE oid = to_regclass(%s)', (getattr(tables, name),))
        if cursor.fetchone() is not None:
            raise SchemaConflict(
                f'there is a relation {getattr(tables, name)} which is not this program\'s (the PyPI package `jobsync` has such): '
                f'choose another appname than {tables.appname!r}, or stop the other program and drop its tables')
