"""Questions about the server itself, for `jobsync doctor`."""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .connection import Sessions
    from .schema import Tables

__all__ = [
    'RELATIONS', 'Replication', 'clock_offset', 'may_create', 'missing_rights', 'missing_tables', 'notify', 'pooling', 'read_only',
    'replication', 'schema_version', 'server_version',
]

#: Attributes of Tables, and what a node does to each.
RELATIONS = {
    **dict.fromkeys(
        ('node', 'assignment', 'lock', 'rebalance', 'claim', 'audit', 'execution', 'cluster', 'queue'),
        ('SELECT', 'INSERT', 'UPDATE', 'DELETE')),
    'token': ('SELECT',),
}


@dataclass(frozen=True)
class Replication:
    """synchronous: synchronous_standby_names. standbys: how many are connected."""

    synchronous: str
    standbys: int
    fsync: bool


def server_version(connection: PgConnection) -> tuple[int, str]:
    """The version as a number (140005) and as text."""
    number, text = _row(connection, "SELECT current_setting('server_version_num')::int, 'PostgreSQL ' || current_setting('server_version')")
    return number, text


def read_only(connection: PgConnection) -> str | None:
    """Why nothing can be written, if so."""
    standby, setting = _row(connection, "SELECT pg_is_in_recovery(), current_setting('transaction_read_only')")
    if standby:
        return 'this server is a standby'
    return 'transactions are read-only here' if setting == 'on' else None


def clock_offset(connection: PgConnection) -> float:
    """Seconds by which the server's clock is ahead of this machine's; the best of five looks."""
    looks = []
    for _ in range(5):
        before = time.time()
        server, = _row(connection, 'SELECT extract(epoch FROM clock_timestamp())::float8')
        after = time.time()
        looks.append((after - before, server - (before + after) / 2))
    return float(min(looks)[1])


def missing_tables(connection: PgConnection, tables: Tables) -> list[str]:
    """Tables and views that are not there."""
    return [name for name in RELATIONS if _row(connection, 'SELECT to_regclass(%s)', (getattr(tables, name),))[0] is None]


def schema_version(connection: PgConnection, tables: Tables) -> int | None:
    """The version of the tables; None before the first node."""
    with connection.cursor() as cursor:
        cursor.execute(f'SELECT schema_version FROM {tables.cluster}')
        row = cursor.fetchone()
        return int(row[0]) if row else None


def may_create(connection: PgConnection) -> bool:
    """Whether this user may create tables where they would go."""
    return bool(_row(connection, "SELECT coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)")[0])


def missing_rights(connection: PgConnection, tables: Tables) -> list[str]:
    """What a node would do and this user may not, as 'INSERT, UPDATE on "sync_node"'."""
    found = []
    for name, rights in RELATIONS.items():
        relation = getattr(tables, name)
        lacking = [right for right in rights if not _row(connection, 'SELECT has_table_privilege(%s, %s)', (relation, right))[0]]
        if lacking:
            found.append(f'{", ".join(lacking)} on {relation}')
    return found


def replication(connection: PgConnection) -> Replication:
    """How commits reach standbys."""
    return Replication(*_row(
        connection,
        '''
        SELECT current_setting('synchronous_standby_names'), (SELECT count(*)::int FROM pg_stat_replication),
               current_setting('fsync') = 'on'
        '''))


def notify(connection: PgConnection, channel: str, payload: str) -> None:
    """Send a notification when the transaction commits."""
    _row(connection, 'SELECT pg_notify(%s, %s)', (channel, payload))


def pooling(sessions: Sessions) -> str:
    """What stands between here and the server: 'none', 'session' or 'transaction'.

    A pooler answers the start-up with a process id of its own, so the one that the protocol told differs from the one that
    the server tells. With transaction pooling two clients at once get one server process in turn.
    """
    with sessions.session() as one:
        told = one.info.backend_pid
        first, = _row(one, 'SELECT pg_backend_pid()')
        one.commit()
        with sessions.session() as two:
            second, = _row(two, 'SELECT pg_backend_pid()')
            again, = _row(one, 'SELECT pg_backend_pid()')
    if told == first:
        return 'none'
    return 'transaction' if second == first or again != first else 'session'


def _row(connection: PgConnection, sql: str, params: tuple[object, ...] = ()) -> tuple[Any, ...]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        row: tuple[Any, ...] = cursor.fetchone() or ()
        return row
