"""One leader's round: bury the dead, plan, write what differs. One transaction under an exclusive advisory lock."""
from __future__ import annotations

import datetime
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..config import CoordinationConfig
from ..hashing import task_to_token
from ..leader import Decision, Pin, decide
from ..messages import Lead, Led, Member, Segment, Sign
from .connection import Connection
from .schema import Tables

__all__ = ['fingerprint', 'lead', 'read_members', 'to_member']


def fingerprint(tables: Tables) -> str:
    """SQL for what a plan depends on: the nodes, and the version of the locks."""
    return _fingerprint(f'{tables.node} AS n', f'(SELECT lock_version FROM {tables.cluster})')


def _fingerprint(nodes: str, lock_version: str) -> str:
    return (f"SELECT md5(coalesce(string_agg(concat_ws(' ', n.name, n.incarnation, n.state, n.weight), E'\\n' ORDER BY n.name), '')) "
            f"|| ' ' || {lock_version} FROM {nodes}")


def read_members(tables: Tables) -> str:
    """SQL for the node table as one JSON value, for `to_member`. Age in whole microseconds, which a float holds exactly."""
    return (f"SELECT coalesce(json_agg(json_build_array(n.name, n.incarnation, n.beat, (extract(epoch FROM n.created_on) * 1000000)::bigint, "
            f"n.state, n.weight) ORDER BY n.created_on, n.name), '[]') FROM {tables.node} AS n")


def to_member(row: Sequence[Any]) -> Member:
    """One element of `read_members`."""
    name, incarnation, beat, created, state, weight = row
    return Member(name, incarnation, beat, float(created), state, float(weight))


def lead(connection: Connection, tables: Tables, config: CoordinationConfig, request: Lead) -> Led:
    """Carry a round out.

    Whatever goes wrong, the agent closes the connection, and the server rolls back.
    """
    began = time.monotonic()
    lock_a, lock_b = tables.advisory
    rows = connection.execute(
        f'BEGIN; SELECT pg_advisory_xact_lock(%s, %s); SELECT c.version, ({read_members(tables)}) FROM {tables.cluster} AS c', (lock_a, lock_b))
    version, found = rows[0]
    members = [to_member(row) for row in found]
    dead = {sign for sign in request.dead if sign in {Sign(m.name, m.incarnation, m.beat) for m in members}}
    eldest = next((m for m in members if Sign(m.name, m.incarnation, m.beat) not in dead), None)
    if eldest is None or eldest.incarnation != request.incarnation:
        connection.execute('ROLLBACK')
        return Led(False, version)
    evicted = _bury(connection, tables, sorted(dead, key=lambda sign: sign.name))
    state = connection.execute(
        f'''
        SELECT c.version, c.planned IS NOT DISTINCT FROM ({fingerprint(tables)}), ({read_members(tables)}),
               c.lock_version, coalesce((SELECT nodes_after FROM {tables.rebalance} ORDER BY id DESC LIMIT 1), 0)
        FROM {tables.cluster} AS c
        ''')
    version, planned, found, lock_version, nodes_before = state[0]
    if planned:
        connection.execute('COMMIT')
        return Led(True, version, evicted)
    members = [to_member(row) for row in found]
    segments, since = _read_assignment(connection, tables)
    decision = decide(members, segments, _read_pins(connection, tables, config), config.total_tokens, version + 1)
    planned_for = [replace(m, state='active') if m.name in decision.activate else m for m in members]
    _write(connection, tables, request, decision, segments, since, planned_for, lock_version, nodes_before, began)
    return Led(True, version + 1, evicted, decision.moved, decision.blocked, decision.conflicts)


def _bury(connection: Connection, tables: Tables, dead: Sequence[Sign]) -> tuple[str, ...]:
    """Delete nodes that still look as they did when they were found dead, and locks that have expired."""
    rows = connection.execute(
        f'''
        WITH expired AS (DELETE FROM {tables.lock} WHERE expires_at <= clock_timestamp() RETURNING task_id)
        UPDATE {tables.cluster} SET lock_version = lock_version + 1 WHERE EXISTS (SELECT FROM expired);
        DELETE FROM {tables.node} AS n USING unnest(%s::text[], %s::text[], %s::bigint[]) AS d (name, incarnation, beat)
            WHERE n.name = d.name AND n.incarnation = d.incarnation AND n.beat = d.beat RETURNING n.name
        ''', ([sign.name for sign in dead], [sign.incarnation for sign in dead], [sign.beat for sign in dead]))
    return tuple(sorted(name for name, in rows))


def _read_assignment(connection: Connection, tables: Tables) -> tuple[list[Segment], list[datetime.datetime]]:
    rows = connection.execute(
        f'SELECT lower(tokens), upper(tokens), node, moving, moving_to, blocked, version, assigned_at FROM {tables.assignment} ORDER BY tokens')
    return [Segment(*row[:7]) for row in rows], [row[7] for row in rows]


def _read_pins(connection: Connection, tables: Tables, config: CoordinationConfig) -> list[Pin]:
    rows = connection.execute(f'SELECT task_id, node_patterns, extract(epoch FROM created_at)::float8 FROM {tables.lock}')
    return [
        Pin(task_id, task_to_token(task_id, config.total_tokens, config.hash_function),
            (patterns,) if isinstance(patterns, str) else tuple(patterns), created)
        for task_id, patterns, created in rows]


def _write(
    connection: Connection, tables: Tables, request: Lead, decision: Decision, old: Sequence[Segment], since: Sequence[datetime.datetime],
    members: Sequence[Member], lock_version: int, nodes_before: int, began: float,
) -> None:
    present, wanted = set(old), set(decision.segments)
    gone = [row for row in old if row not in wanted]
    new = [row for row in decision.segments if row not in present]
    nodes_after = sum(member.state == 'active' for member in members)
    changed = nodes_before != nodes_after or decision.moved or decision.assigned
    # Not what the tables say by now: a node that has changed its state meanwhile was not planned for.
    planned = _fingerprint(
        'unnest(%(names)s::text[], %(incarnations)s::text[], %(states)s::text[], %(weights)s::float8[]) AS n (name, incarnation, state, weight)',
        '%(lock_version)s::bigint')
    connection.execute(
        f'''
        UPDATE {tables.node} SET state = 'active' WHERE name = ANY(%(activate)s::text[]) AND state = 'joining';
        DELETE FROM {tables.assignment} WHERE tokens = ANY(%(gone)s::int4range[]);
        INSERT INTO {tables.assignment} (tokens, node, moving, moving_to, blocked, version, assigned_at)
            SELECT tokens, node, moving, moving_to, blocked, version, coalesce(since, now())
            FROM unnest(%(tokens)s::int4range[], %(node)s::text[], %(moving)s::boolean[], %(moving_to)s::text[], %(blocked)s::boolean[],
                        %(version)s::bigint[], %(since)s::timestamptz[])
                AS r (tokens, node, moving, moving_to, blocked, version, since);
        UPDATE {tables.cluster} SET version = version + 1, planned = ({planned});
        INSERT INTO {tables.rebalance} (trigger_reason, leader_node, nodes_before, nodes_after, tokens_moved, duration_ms)
            SELECT %(reason)s, %(leader)s, %(before)s, %(after)s, %(moved)s, %(duration)s WHERE %(changed)s;
        SELECT pg_notify(%(channel)s, 'plan ' || version) FROM {tables.cluster};
        COMMIT
        ''',
        {
            'activate': list(decision.activate), 'gone': [f'[{row.lo},{row.hi})' for row in gone],
            'tokens': [f'[{row.lo},{row.hi})' for row in new], 'node': [row.node for row in new], 'moving': [row.moving for row in new],
            'moving_to': [row.moving_to for row in new], 'blocked': [row.blocked for row in new], 'version': [row.version for row in new],
            'since': _since(new, old, since), 'reason': request.reason, 'leader': request.name, 'before': nodes_before, 'after': nodes_after,
            'moved': decision.moved + decision.assigned, 'duration': round((time.monotonic() - began) * 1000),
            'changed': bool(changed), 'channel': tables.channel, 'lock_version': lock_version,
            'names': [m.name for m in members], 'incarnations': [m.incarnation for m in members],
            'states': [m.state for m in members], 'weights': [m.weight for m in members],
        })


def _since(new: Sequence[Segment], old: Sequence[Segment], since: Sequence[datetime.datetime]) -> list[datetime.datetime | None]:
    """When the owner of each new row got it: a row cut out of an old one of the same owner is as old as that one."""
    starts = [row.lo for row in old]
    found: list[datetime.datetime | None] = []
    for row in new:
        at = bisect_right(starts, row.lo) - 1
        kept = at >= 0 and old[at].hi >= row.hi and old[at].node == row.node
        found.append(since[at] if kept else None)
    return found
