"""What an operator sees: nodes, ownership, plans and why a task is where it is. Display only; no
decision rests on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..assignment.hashing import HASH_FUNCTIONS
from ..assignment.model import Member, Segment
from ..assignment.patterns import PATTERN_BYTES, check_patterns, matched_pattern, read_patterns
from ..assignment.round import Pin, decide
from ..assignment.simulate import Move, holder, moves
from ..config import LEASE_FRACTION
from ..errors import ConfigurationError, JobSyncError
from .locks import LOCKS
from .tasks import history

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .tables import Tables

__all__ = [
    'assignment',
    'blocked',
    'cluster',
    'explain',
    'nodes',
    'owner',
    'plan_without',
    'rebalances',
    'set_drain',
]


def nodes(
    connection: PgConnection, tables: Tables, timeout: float | None = None
) -> list[dict[str, Any]]:
    """The node table, oldest first, with what each node owns.

    Args:
        connection: Where to read.
        tables: Names of the tables.
        timeout: Seconds without a heartbeat after which a node is shown as dead; None: each node's
            own.
    """
    rows = _rows(
        connection,
        f"""
        SELECT n.name, n.created_on, n.last_heartbeat, n.state, n.weight, n.incarnation, n.beat,
            n.lease_sec, n.host, n.pid,
               extract(epoch FROM clock_timestamp() - n.last_heartbeat)::float8 AS age_sec,
               clock_timestamp() - n.last_heartbeat < make_interval(secs => coalesce(%s, n.lease_sec
                   / %s)) AS alive,
               coalesce(a.tokens, 0) AS tokens, coalesce(a.leaving, 0) AS leaving, false AS
                   is_leader
        FROM {tables.node} AS n LEFT JOIN (
            SELECT node, sum(upper(tokens) - lower(tokens))::int AS tokens,
                   coalesce(sum(upper(tokens) - lower(tokens)) FILTER (WHERE moving), 0)::int AS
                       leaving
            FROM {tables.assignment} GROUP BY node
        ) AS a ON a.node = n.name
        ORDER BY n.created_on, n.name
        """,
        (timeout, LEASE_FRACTION),
    )
    leader = next((row for row in rows if row['alive']), None)
    if leader is not None:
        leader['is_leader'] = True
    return rows


def assignment(connection: PgConnection, tables: Tables) -> list[Segment]:
    """Every row of the assignment table, by token."""
    rows = _rows(
        connection,
        f"""
        SELECT lower(tokens) AS lo, upper(tokens) AS hi, node, moving, moving_to, blocked, version
        FROM {tables.assignment} ORDER BY tokens
        """,
    )
    return [Segment(**row) for row in rows]


def rebalances(connection: PgConnection, tables: Tables, limit: int = 20) -> list[dict[str, Any]]:
    """The last plans, newest first."""
    return _rows(
        connection,
        f"""
        SELECT id, triggered_at, trigger_reason, leader_node, nodes_before, nodes_after,
            tokens_moved, duration_ms
        FROM {tables.rebalance} ORDER BY id DESC LIMIT %s
        """,
        (limit,),
    )


def cluster(connection: PgConnection, tables: Tables) -> dict[str, Any] | None:
    """The cluster's settings and counters; None before the first node has registered."""
    rows = _rows(
        connection,
        'SELECT total_tokens, hash_function, version, schema_version, lock_version FROM '
        f'{tables.cluster}',
    )
    return rows[0] if rows else None


def blocked(connection: PgConnection, tables: Tables) -> list[dict[str, Any]]:
    """Ranges that no live node may have, with the locks that say so: {'lo', 'hi', 'node', 'locks':
    [{'task_id', 'node_patterns'}]}.
    """
    segments = [segment for segment in assignment(connection, tables) if segment.blocked]
    if not segments:
        return []
    pins = _pins(connection, tables)
    return [
        {
            'lo': segment.lo,
            'hi': segment.hi,
            'node': segment.node,
            'locks': [
                {'task_id': pin.task_id, 'node_patterns': list(pin.patterns)}
                for pin in pins
                if segment.lo <= pin.token < segment.hi
            ],
        }
        for segment in segments
    ]


def owner(connection: PgConnection, tables: Tables, token: int) -> str | None:
    """The node that the database names for the token."""
    rows = _rows(
        connection, f'SELECT node FROM {tables.assignment} WHERE tokens @> %s::int', (token,)
    )
    return rows[0]['node'] if rows else None


def explain(connection: PgConnection, tables: Tables, text: str, token: int) -> dict[str, Any]:
    """Who owns a task and why.

    Args:
        connection: Where to read.
        tables: Names of the tables.
        text: The task's id as text.
        token: What it hashes to.

    Returns:
        task_id, token, owner, since, version, blocked, moving_to, lock (its row, or None), pattern
            (the pattern of the lock
        that decides with the present nodes, or None), others (further locked tasks on the same
            token), next (who would own
        it if the owner went), owner_silent_sec (where the owner missed its lease), ledger (the row
            of a key of that text, or None),
        audit and claim (see tasks.history).
    """
    found = _rows(
        connection,
        f"""
        SELECT node, assigned_at, version, blocked, moving, moving_to FROM {tables.assignment} WHERE
            tokens @> %s::int
        """,
        (token,),
    )
    row: Mapping[str, Any] = found[0] if found else {}
    lock = next(
        iter(
            _rows(
                connection,
                f"""
        SELECT task_id, node_patterns, reason, created_at, created_by, expires_at FROM {tables.lock}
        WHERE task_id = %s AND (expires_at IS NULL OR expires_at > now())
        """,
                (text,),
            )
        ),
        None,
    )
    members = _members(connection, tables)
    pins = _pins(connection, tables)
    node = row.get('node')
    receivers = [member.name for member in members if member.state == 'active']
    return {
        'task_id': text,
        'token': token,
        'owner': node,
        'since': row.get('assigned_at') if node else None,
        'version': row.get('version'),
        'blocked': bool(row.get('blocked')),
        'moving_to': row.get('moving_to'),
        'lock': lock,
        'pattern': _matched(lock['node_patterns'], receivers) if lock else None,
        'ledger': _execution(connection, tables, text),
        'owner_silent_sec': _silence(connection, tables, node),
        'others': [pin.task_id for pin in pins if pin.token == token and pin.task_id != text],
        'next': _next_owner(connection, tables, members, pins, token, row.get('moving_to') or node),
        **history(connection, tables, text),
    }


def _matched(patterns: object, names: Sequence[str]) -> str | None:
    try:
        return matched_pattern(check_patterns(patterns), names)
    except ConfigurationError:  # the leader ignores such a lock
        return None


def _silence(connection: PgConnection, tables: Tables, name: str | None) -> float | None:
    """Seconds since a node's last heartbeat, if it has missed its lease: it is dead, or about to be
    found so.
    """
    return next(
        (
            row['age_sec']
            for row in nodes(connection, tables)
            if row['name'] == name and not row['alive']
        ),
        None,
    )


def _execution(connection: PgConnection, tables: Tables, key: str) -> dict[str, Any] | None:
    """The ledger's row of a key."""
    found = _rows(
        connection,
        'SELECT key, state, node, attempts, started_at, finished_at, error FROM '
        f'{tables.execution} WHERE key = %s',
        (key,),
    )
    return found[0] if found else None


def set_drain(connection: PgConnection, tables: Tables, name: str, draining: bool) -> bool:
    """Make a node give all its tokens away and stay alive, or take part again.

    Returns:
        Whether that changed anything.

    Raises:
        JobSyncError: There is no such node, or it has not become active yet.
    """
    found = {
        row['name']: row['state']
        for row in _rows(connection, f'SELECT name, state FROM {tables.node} ORDER BY name')
    }
    _check_name(found, name)
    if found[name] == 'joining':
        raise JobSyncError(
            f'node {name!r} is still joining and owns nothing yet: try again when it is active, '
            'or stop it'
        )
    with connection.cursor() as cursor:
        # Not during a leader's round, which would take the change into the plan's fingerprint and
        # not into the plan.
        cursor.execute(
            f"""
            SELECT pg_advisory_xact_lock_shared(%s, %s);
            WITH me AS (UPDATE {tables.node} SET state = %s WHERE name = %s AND state = %s RETURNING
                name)
            SELECT pg_notify(%s, 'drain ' || name) FROM me
            """,
            (
                *tables.advisory,
                *(('draining', name, 'active') if draining else ('active', name, 'draining')),
                tables.channel,
            ),
        )
        return cursor.fetchone() is not None


def plan_without(connection: PgConnection, tables: Tables, name: str) -> list[Move]:
    """What would move, and where, if the node were drained now. Nothing is written.

    Raises:
        JobSyncError: There is no such node.
    """
    settings = cluster(connection, tables)
    members = _members(connection, tables, keep=name)
    _check_name({member.name: member.state for member in members}, name)
    if settings is None:
        return []
    before = assignment(connection, tables)
    pins = _pins(connection, tables)
    return moves(before, _without(members, before, pins, settings, name))


def _next_owner(
    connection: PgConnection,
    tables: Tables,
    members: Sequence[Member],
    pins: Sequence[Pin],
    token: int,
    current: str | None,
) -> str | None:
    settings = cluster(connection, tables)
    if settings is None or current is None:
        return None
    after = _without(members, assignment(connection, tables), pins, settings, current)
    return next((holder(segment) for segment in after if segment.lo <= token < segment.hi), None)


def _without(
    members: Sequence[Member],
    before: Sequence[Segment],
    pins: Sequence[Pin],
    settings: Mapping[str, Any],
    name: str,
) -> tuple[Segment, ...]:
    rest = [
        member
        if member.name != name
        else Member(
            member.name,
            member.incarnation,
            member.beat,
            member.created_on,
            'draining',
            member.weight,
        )
        for member in members
    ]
    return decide(rest, before, pins, settings['total_tokens'], settings['version'] + 1).segments


def _members(connection: PgConnection, tables: Tables, keep: str | None = None) -> list[Member]:
    return [
        Member(
            row['name'],
            row['incarnation'],
            row['beat'],
            row['created_on'].timestamp(),
            row['state'],
            row['weight'],
        )
        for row in nodes(connection, tables)
        if row['alive'] or row['name'] == keep
    ]


def _pins(connection: PgConnection, tables: Tables) -> list[Pin]:
    settings = cluster(connection, tables)
    if settings is None:
        return []
    hash_function, total = HASH_FUNCTIONS[settings['hash_function']], settings['total_tokens']
    rows = _rows(
        connection,
        f"""
        SELECT task_id, CASE
                WHEN octet_length(node_patterns::text) <= {PATTERN_BYTES} THEN node_patterns::text
            END AS encoded,
               created_at
        FROM (SELECT * FROM {tables.lock} ORDER BY task_id LIMIT {LOCKS}) AS l  -- as the leader
        WHERE expires_at IS NULL OR expires_at > now() ORDER BY created_at, task_id
        """,
    )
    pins: list[Pin] = []
    for row in rows:
        with contextlib.suppress(
            ConfigurationError
        ):  # the leader ignores such a row as well, and says so
            patterns = read_patterns(row['encoded'])
            pins.append(
                Pin(
                    row['task_id'],
                    hash_function(row['task_id'].encode()) % total,
                    patterns,
                    row['created_at'].timestamp(),
                )
            )
    return pins


def _check_name(found: Mapping[str, object], name: str) -> None:
    if name not in found:
        names = ', '.join(sorted(found)) or 'none: no node is registered'
        raise JobSyncError(f'there is no node {name!r}; the nodes are: {names}')


def _rows(
    connection: PgConnection, sql: str, params: tuple[object, ...] = ()
) -> list[dict[str, Any]]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        names = [column.name for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
