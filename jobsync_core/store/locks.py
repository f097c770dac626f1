"""Rows of the lock table: which task ids are pinned to which nodes.

Every function runs in the transaction of the connection it is given. A change that could alter the
plan raises the cluster's lock_version and notifies, so that the leader replans at once; one that
could not leaves both alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .tables import Tables

__all__ = [
    'LOCKS',
    'clear_all',
    'clear_by_creator',
    'clear_kind',
    'clear_old_pins',
    'clear_tasks',
    'list_locks',
    'register',
    'show_locks',
]

#: Characters of a text, and bytes of the patterns, that people are shown of one lock.
_SHOWN, _SHOWN_PATTERNS = 200, 4000
#: Locks of one cluster.
LOCKS = 250_000


def register(
    connection: PgConnection,
    tables: Tables,
    rows: Sequence[tuple[str, tuple[str, ...], str | None, float | None]],
    created_by: str,
    pin: bool = False,
) -> int:
    """Write locks; one that exists is replaced, but keeps its age. Of several rows for one task the
    last counts.

    Args:
        connection: Where to write.
        tables: Names of the tables.
        rows: Task id as text, ordered patterns, reason, days until it expires (None: never).
        created_by: Who registers them; `clear_by_creator` finds them by it.
        pin: They are a worker's, for its pinned tasks.

    Returns:
        How many distinct tasks are locked by `rows`.

    Raises:
        ConfigurationError: There would be more than LOCKS locks.
    """
    if not rows:
        return 0
    encoded: dict[tuple[str, ...], str] = {}
    for _, patterns, _, _ in rows:
        if patterns not in encoded:
            encoded[patterns] = json.dumps(patterns)
    with connection.cursor() as cursor:
        _serialise(cursor, tables)
        cursor.execute(
            f"""
            WITH given AS (
                SELECT DISTINCT ON (task_id) task_id, node_patterns::jsonb AS node_patterns, reason,
                       now() + make_interval(secs => days * 86400) AS expires_at
                FROM unnest(%s::text[], %s::text[], %s::text[], %s::float8[])
                     WITH ORDINALITY AS row (task_id, node_patterns, reason, days, place)
                ORDER BY task_id, place DESC
            ), compared AS (
                SELECT given.*, old.task_id IS NULL OR old.expires_at <= now() AS fresh,
                       old.task_id IS NULL OR old.expires_at <= now() OR old.node_patterns <>
                           given.node_patterns AS replan,
                       (old.node_patterns, old.reason, old.created_by, old.expires_at, old.pin)
                       IS DISTINCT FROM (given.node_patterns, given.reason, %s, given.expires_at,
                           %s) AS differs
                FROM given LEFT JOIN {tables.lock} AS old USING (task_id)
            ), written AS (
                INSERT INTO {tables.lock} AS lock (task_id, node_patterns, reason, created_at,
                    created_by, expires_at, pin)
                SELECT task_id, node_patterns, reason, now(), %s, expires_at, %s FROM compared WHERE
                    replan OR differs
                ON CONFLICT (task_id) DO UPDATE SET
                    node_patterns = excluded.node_patterns, reason = excluded.reason, created_by =
                        excluded.created_by,
                    created_at = CASE WHEN lock.expires_at <= now() THEN excluded.created_at ELSE
                        lock.created_at END,
                    expires_at = excluded.expires_at, pin = excluded.pin
            )
            SELECT count(*), count(*) FILTER (WHERE replan), count(*) FILTER (WHERE differs) FROM
                compared
            """,
            (
                [row[0] for row in rows],
                [encoded[row[1]] for row in rows],
                [row[2] for row in rows],
                [row[3] for row in rows],
                created_by,
                pin,
                created_by,
                pin,
            ),
        )
        counts = cursor.fetchone() or (0, 0, 0)
        if counts[1]:
            _check_number(cursor, tables)
        if counts[1]:
            _changed(cursor, tables)
        elif counts[2]:
            cursor.execute("SELECT pg_notify(%s, 'locks')", (tables.channel,))
    return int(counts[0])


def _check_number(cursor: Any, tables: Tables) -> None:
    cursor.execute(f'SELECT count(*) FROM {tables.lock}')
    ((number,),) = cursor.fetchall()
    if number > LOCKS:
        raise ConfigurationError(
            f'there would be {number} locks, {LOCKS} at most, as each of them is looked at with '
            'every plan; nothing was registered: '
            'clear some, or pin with fewer keys'
        )


def list_locks(connection: PgConnection, tables: Tables) -> list[dict[str, Any]]:
    """The locks in force, oldest first: task_id, node_patterns (a list), reason, created_at,
    created_by, expires_at.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT task_id, node_patterns, reason, created_at, created_by, expires_at FROM
                {tables.lock}
            WHERE expires_at IS NULL OR expires_at > now() ORDER BY created_at, task_id
            """
        )
        names = [column.name for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def show_locks(
    connection: PgConnection, tables: Tables, limit: int | None
) -> tuple[int, list[dict[str, Any]]]:
    """How many locks are in force, and the oldest of them for people to look at: as `list_locks`,
    but long texts are cut by the server.

    Args:
        connection: Where to read.
        tables: Names of the tables.
        limit: How many rows; None: all.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f'SELECT count(*) FROM {tables.lock} WHERE expires_at IS NULL OR expires_at > now()'
        )
        ((number,),) = cursor.fetchall()
        cursor.execute(
            f"""
            SELECT left(task_id, {_SHOWN}) AS task_id,
                   CASE WHEN octet_length(node_patterns::text) <= {_SHOWN_PATTERNS} THEN
                       node_patterns
                        ELSE to_jsonb(left(node_patterns::text, {_SHOWN})) END AS node_patterns,
                   octet_length(node_patterns::text) AS size, left(reason, {_SHOWN}) AS reason,
                       created_at,
                   left(created_by, {_SHOWN}) AS created_by, expires_at
            FROM {tables.lock} WHERE expires_at IS NULL OR expires_at > now() ORDER BY created_at,
                task_id LIMIT %s
            """,
            (limit,),
        )
        names = [column.name for column in cursor.description or ()]
        return int(number), [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def clear_by_creator(connection: PgConnection, tables: Tables, creator: str) -> int:
    """Delete the locks that `creator` registered; returns how many."""
    return _delete(connection, tables, 'created_by = %s', (creator,))


def clear_all(connection: PgConnection, tables: Tables) -> int:
    """Delete every lock; returns how many."""
    return _delete(connection, tables, 'true', ())


def clear_kind(connection: PgConnection, tables: Tables, *, locks: bool, pins: bool) -> int:
    """Delete what somebody registered, the pins of workers, or both; returns how many."""
    return _delete(connection, tables, '(NOT pin AND %s) OR (pin AND %s)', (locks, pins))


def clear_tasks(connection: PgConnection, tables: Tables, task_ids: Iterable[str]) -> int:
    """Delete the locks on these tasks; returns how many there were."""
    return _delete(connection, tables, 'task_id = ANY(%s::text[])', (list(task_ids),))


def clear_old_pins(connection: PgConnection, tables: Tables, unpinned: Iterable[str]) -> int:
    """Delete the locks on the virtual keys (`name#3`) of tasks that were pinned once; returns how
    many there were.
    """
    return _delete(
        connection,
        tables,
        r"pin AND regexp_replace(task_id, '#[0-9]+$', '') = ANY(%s::text[])",
        (list(unpinned),),
    )


def _delete(
    connection: PgConnection, tables: Tables, condition: str, params: tuple[object, ...]
) -> int:
    with connection.cursor() as cursor:
        _serialise(cursor, tables)
        cursor.execute(f'DELETE FROM {tables.lock} WHERE {condition}', params)
        deleted = int(cursor.rowcount)
        if deleted:
            _changed(cursor, tables)
    return deleted


def _serialise(cursor: Any, tables: Tables) -> None:
    # Every node of a cluster registers the same locks when it starts: in turn they cannot deadlock,
    # and all but the first find nothing to change. It is another key than the leader's, which must
    # not wait while rows are written.
    first, second = tables.advisory
    cursor.execute('SELECT pg_advisory_xact_lock(%s, %s)', (first, second ^ 1))


def _changed(cursor: Any, tables: Tables) -> None:
    # A leader's round sees these rows wholly or not at all: one that read the old locks has
    # recorded the old lock_version by the time this raises it, and so plans again.
    cursor.execute(
        f"""
        SELECT pg_advisory_xact_lock_shared(%s, %s);
        UPDATE {tables.cluster} SET lock_version = lock_version + 1;
        SELECT pg_notify(%s, 'locks')
        """,
        (*tables.advisory, tables.channel),
    )
