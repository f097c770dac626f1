"""Questions about the server itself, for `jobsync doctor`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..assignment.patterns import PATTERN_BYTES, read_patterns

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .connection import Sessions
    from .tables import Tables

__all__ = [
    'HISTORY_FUNCTIONS',
    'Replication',
    'bad_locks',
    'clock_offset',
    'everybody_creates',
    'is_superuser',
    'may_create',
    'missing_tables',
    'notify',
    'pooling',
    'read_only',
    'replication',
    'schema_version',
    'server_version',
    'try_write',
    'unasked_history',
]


@dataclass(frozen=True)
class Replication:
    """synchronous: synchronous_standby_names. standbys: how many are connected."""

    synchronous: str
    standbys: int
    fsync: bool


def server_version(connection: PgConnection) -> tuple[int, str]:
    """The version as a number (140005) and as text."""
    number, text = _row(
        connection,
        "SELECT current_setting('server_version_num')::int, 'PostgreSQL ' || "
        "current_setting('server_version')",
    )
    return number, text


def read_only(connection: PgConnection) -> str | None:
    """Why nothing can be written, if so."""
    standby, setting = _row(
        connection, "SELECT pg_is_in_recovery(), current_setting('transaction_read_only')"
    )
    if standby:
        return 'this server is a standby'
    return 'transactions are read-only here' if setting == 'on' else None


def try_write(connection: PgConnection, tables: Tables) -> None:
    """Write a row of a quarter of a megabyte, which takes new pages of the disk, and roll back.

    Raises:
        psycopg2.Error: What the server says to any node that writes now.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            INSERT INTO {tables.execution} (key, state, fence, error)
            SELECT 'jobsync doctor ' || gen_random_uuid(), 'failed', 1,
                string_agg(gen_random_uuid()::text, '')
            FROM generate_series(1, 7000)
            """
        )
    connection.rollback()


def bad_locks(connection: PgConnection, tables: Tables) -> list[str]:
    """Tasks whose lock has patterns that the leader ignores."""
    found = []
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT DISTINCT node_patterns::text FROM {tables.lock}
            WHERE octet_length(node_patterns::text) <= {PATTERN_BYTES} AND (expires_at IS NULL OR
                expires_at > now())
            """
        )
        for (text,) in cursor.fetchall():
            try:
                read_patterns(text)
            except Exception:  # whatever is wrong with it
                found.append(text)
        cursor.execute(
            f"""
            SELECT task_id FROM {tables.lock}
            WHERE (octet_length(node_patterns::text) > {PATTERN_BYTES} OR node_patterns::text =
                ANY(%s::text[])
                   OR octet_length(task_id) > 2000)
              AND (expires_at IS NULL OR expires_at > now()) ORDER BY task_id
            """,
            (found,),
        )
        return [task_id for (task_id,) in cursor.fetchall()]


def clock_offset(connection: PgConnection) -> float:
    """Seconds by which the server's clock is ahead of this machine's; the best of five looks."""
    looks = []
    for _ in range(5):
        before = time.time()
        (server,) = _row(connection, 'SELECT extract(epoch FROM clock_timestamp())::float8')
        after = time.time()
        looks.append((after - before, server - (before + after) / 2))
    return float(min(looks)[1])


def missing_tables(connection: PgConnection, tables: Tables) -> list[str]:
    """Tables and views that are not there."""
    with connection.cursor() as cursor:
        # By the catalog, which everybody may read.
        cursor.execute(
            'SELECT c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace '
            'WHERE n.nspname = %s',
            (tables.schema,),
        )
        there = {name for (name,) in cursor.fetchall()}
    return [name for name in tables.all if tables.appname + name not in there]


def schema_version(connection: PgConnection, tables: Tables) -> int | None:
    """The version of the tables; None before the first node."""
    with connection.cursor() as cursor:
        cursor.execute(f'SELECT schema_version FROM {tables.cluster}')
        row = cursor.fetchone()
        return int(row[0]) if row else None


def may_create(connection: PgConnection, tables: Tables) -> bool:
    """Whether this user may create tables where they would go."""
    return bool(
        _row(
            connection,
            """
        SELECT CASE WHEN EXISTS (SELECT FROM pg_namespace WHERE nspname = %(schema)s)
            THEN (SELECT has_schema_privilege(oid, 'USAGE') AND has_schema_privilege(oid, 'CREATE')
                  FROM pg_namespace WHERE nspname = %(schema)s)
            ELSE has_database_privilege(current_database(), 'CREATE') END
        """,
            {'schema': tables.schema},
        )[0]
    )


def everybody_creates(connection: PgConnection, tables: Tables) -> bool:
    """Whether every role of the server may create things in the schema of the tables."""
    return bool(
        _row(
            connection,
            """
        SELECT EXISTS (SELECT FROM pg_namespace AS n CROSS JOIN LATERAL aclexplode(n.nspacl) AS a
                       WHERE n.nspname = %s AND a.grantee = 0 AND a.privilege_type = 'CREATE')
        """,
            (tables.schema,),
        )[0]
    )


#: What tells the history of a database: its system identifier and its timeline.
HISTORY_FUNCTIONS = (
    'pg_control_system()',
    'pg_is_in_recovery()',
    'pg_current_wal_lsn()',
    'pg_walfile_name(pg_lsn)',
)


def unasked_history(connection: PgConnection) -> list[str]:
    """Functions of HISTORY_FUNCTIONS that this user may not call."""
    with connection.cursor() as cursor:
        cursor.execute(
            'SELECT name FROM unnest(%s) AS f (name) WHERE NOT '
            "has_function_privilege(to_regprocedure(name), 'EXECUTE')",
            (list(HISTORY_FUNCTIONS),),
        )
        return [name for (name,) in cursor.fetchall()]


def is_superuser(connection: PgConnection) -> bool:
    """Whether this user may do everything."""
    return bool(_row(connection, 'SELECT rolsuper FROM pg_roles WHERE rolname = current_user')[0])


def replication(connection: PgConnection) -> Replication:
    """How commits reach standbys."""
    return Replication(
        *_row(
            connection,
            """
        SELECT current_setting('synchronous_standby_names'), (SELECT count(*)::int FROM
            pg_stat_replication),
               current_setting('fsync') = 'on'
        """,
        )
    )


def notify(connection: PgConnection, channel: str, payload: str) -> None:
    """Send a notification when the transaction commits."""
    _row(connection, 'SELECT pg_notify(%s, %s)', (channel, payload))


def pooling(sessions: Sessions) -> str:
    """What stands between here and the server: 'none', 'session' or 'transaction'.

    A pooler answers the start-up with a process id of its own, so the one that the protocol told
    differs from the one that the server tells. With transaction pooling two clients at once get one
    server process in turn.
    """
    with sessions.session() as one:
        told = one.info.backend_pid
        (first,) = _row(one, 'SELECT pg_backend_pid()')
        one.commit()
        with sessions.session() as two:
            (second,) = _row(two, 'SELECT pg_backend_pid()')
            (again,) = _row(one, 'SELECT pg_backend_pid()')
    if told == first:
        return 'none'
    return 'transaction' if second == first or again != first else 'session'


def _row(
    connection: PgConnection, sql: str, params: tuple[object, ...] | Mapping[str, object] = ()
) -> tuple[Any, ...]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        row: tuple[Any, ...] = cursor.fetchone() or ()
        return row
