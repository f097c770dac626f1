"""A leader's duties against PostgreSQL: evict the dead; plan if anything changed, and write the difference only."""
from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import CoordinationConfig
from ..errors import ConfigurationError, InvalidTaskId
from ..hashing import task_to_token
from ..leader import Decision, Pin, decide
from ..messages import DEATHS, Evict, Evicted, Lead, Led, Member, Segment, Sign
from ..patterns import check_patterns
from .connection import Connection
from .rounds import Round, fingerprint, members_json, read_members
from .schema import Tables

__all__ = ['Leading']

#: The part of the heartbeat timeout that a round may take: what is left of the lease covers the next heartbeat.
_ROUND = 0.4


@dataclass(frozen=True)
class _State:
    """What the cluster's row says before the plan."""

    version: int
    total_tokens: int
    hash_function: str
    planned: bool


@dataclass(frozen=True)
class _Owned:
    """A row of the assignment, and since when its node has owned it (as PostgreSQL's text)."""

    segment: Segment
    since: str


class Leading:
    """Carries out Evict and Lead.

    Args:
        config: The cluster's settings.
        tables: Names of the tables.
    """

    def __init__(self, config: CoordinationConfig, tables: Tables) -> None:
        self._config = config
        self._tables = tables
        # A lock's token and patterns, by its row: most locks are there for many plans.
        self._tokens: dict[str, int] = {}
        self._patterns: dict[str, tuple[str, ...]] = {}
        self._hashed: tuple[int, str] = (0, '')

    def lead(self, connection: Connection, request: Lead) -> Led | None:
        """One round, in one transaction; None where this incarnation is not in the node table."""
        with Round(connection, self._tables, exclusive=True, seconds=_ROUND * self._config.heartbeat_timeout_sec) as steps:
            version, members = self._begin(steps)
            if not any(member.incarnation == request.incarnation for member in members):
                return None
            if not _is_eldest(request, members):
                return Led(False, version)
            state = self._prepare(steps)
            if state.planned:
                return Led(True, state.version)
            return self._replan(steps, request, state)

    def evict(self, connection: Connection, request: Evict) -> Evicted | None:
        """Delete the dead, in a transaction of its own, so that it stands whatever comes of the plan; None as for `lead`."""
        with Round(connection, self._tables, exclusive=False, seconds=_ROUND * self._config.heartbeat_timeout_sec) as steps:
            _, members = self._begin(steps)
            if not any(member.incarnation == request.incarnation for member in members):
                return None
            if not _is_eldest(request, members):
                return Evicted(False)
            return Evicted(True, steps.delete_unlocked(request.dead))

    def _begin(self, steps: Round) -> tuple[int, tuple[Member, ...]]:
        """Take the cluster's row; its version, and the nodes, the oldest first."""
        found = steps.run(
            f'''
            SELECT FROM {self._tables.cluster} FOR UPDATE;
            SELECT version, {members_json(self._tables)} FROM {self._tables.cluster}
            ''')
        return (found[0][0], read_members(found[0][1])) if found else (0, ())

    def _prepare(self, steps: Round) -> _State:
        """Delete expired locks, then look whether there is anything to plan."""
        tables = self._tables
        # SKIP LOCKED: whoever is writing locks waits for the cluster's row, which this transaction holds.
        rows = steps.run(
            f'''
            WITH expired AS (
                DELETE FROM {tables.lock} WHERE task_id IN (
                    SELECT task_id FROM {tables.lock} WHERE expires_at <= clock_timestamp() FOR UPDATE SKIP LOCKED)
                RETURNING task_id
            )
            UPDATE {tables.cluster} SET lock_version = lock_version + 1 WHERE EXISTS (SELECT FROM expired);
            SELECT c.version, c.total_tokens, c.hash_function, c.planned IS NOT DISTINCT FROM {fingerprint(tables)}
            FROM {tables.cluster} AS c
            ''')
        return _State(*rows[0])

    def _replan(self, steps: Round, request: Lead, state: _State) -> Led:
        # What was read, not what is there at the end: a node may change its state meanwhile.
        (text, seen), = steps.run(f'SELECT {members_json(self._tables)}, {fingerprint(self._tables)} FROM {self._tables.cluster} AS c')
        members = read_members(text)
        before = self._assignment(steps)
        pins, broken = self._pins(steps, state)
        version = state.version + 1
        decision = decide(members, [row.segment for row in before], pins, state.total_tokens, version)
        self._write(steps, request, before, decision, len(members), seen, version)
        return Led(
            True, version, decision.moved + decision.assigned, decision.blocked, (*broken, *decision.conflicts))

    def _assignment(self, steps: Round) -> list[_Owned]:
        rows = steps.run(
            f'''
            SELECT lower(tokens), upper(tokens), node, moving, moving_to, blocked, version, assigned_at::text
            FROM {self._tables.assignment} ORDER BY tokens
            ''')
        return [_Owned(Segment(*row[:7]), row[7]) for row in rows]

    def _pins(self, steps: Round, state: _State) -> tuple[list[Pin], list[str]]:
        """The locks, and complaints about rows that are none."""
        rows = steps.run(
            f'''
            SELECT task_id, node_patterns::text, extract(epoch FROM created_at)::float8 FROM {self._tables.lock}
            WHERE expires_at IS NULL OR expires_at > clock_timestamp() ORDER BY created_at, task_id
            ''')
        if self._hashed != (state.total_tokens, state.hash_function):
            self._tokens, self._hashed = {}, (state.total_tokens, state.hash_function)
        pins, broken = [], []
        tokens: dict[str, int] = {}
        patterns: dict[str, tuple[str, ...]] = {}
        for text, encoded, created_at in rows:
            try:
                token = self._tokens[text] if text in self._tokens else task_to_token(text, state.total_tokens, state.hash_function)
                known = self._patterns[encoded] if encoded in self._patterns else check_patterns(json.loads(encoded))
            except (InvalidTaskId, ConfigurationError) as error:
                broken.append(f'the lock on task {text!r} is ignored: {error}; clear it, or register it again')
                continue
            tokens[text], patterns[encoded] = token, known
            pins.append(Pin(text, token, known, created_at))
        self._tokens, self._patterns = tokens, patterns
        return pins, broken

    def _write(
        self, steps: Round, request: Lead, before: Sequence[_Owned], decision: Decision, nodes: int, seen: str, version: int,
    ) -> None:
        tables = self._tables
        as_seen = fingerprint(tables, "CASE WHEN f.name = ANY(%(activate)s::text[]) AND f.state = 'active' THEN 'joining' ELSE f.state END")
        old, new = {row.segment for row in before}, set(decision.segments)
        gone = [row.segment.lo for row in before if row.segment not in new]
        fresh = [segment for segment in decision.segments if segment not in old]
        since = _since(before, fresh)
        steps.run(
            f'''
            DELETE FROM {tables.assignment} WHERE lower(tokens) = ANY(%(gone)s::int[]);
            INSERT INTO {tables.assignment} (tokens, node, moving, moving_to, blocked, version, assigned_at)
                SELECT int4range(lo, hi), node, moving, moving_to, blocked, version, coalesce(since, now())
                FROM unnest(%(lo)s::int[], %(hi)s::int[], %(node)s::text[], %(moving)s::bool[], %(to)s::text[], %(blocked)s::bool[],
                            %(versions)s::bigint[], %(since)s::timestamptz[])
                    AS t (lo, hi, node, moving, moving_to, blocked, version, since);
            UPDATE {tables.node} SET state = 'active' WHERE name = ANY(%(activate)s::text[]) AND state = 'joining';
            UPDATE {tables.cluster} AS c SET version = %(version)s,
                planned = CASE WHEN {as_seen} = %(seen)s THEN {fingerprint(tables)} END;
            WITH last AS (SELECT coalesce((SELECT nodes_after FROM {tables.rebalance} ORDER BY id DESC LIMIT 1), 0) AS nodes)
            INSERT INTO {tables.rebalance} (trigger_reason, leader_node, nodes_before, nodes_after, tokens_moved, duration_ms)
                SELECT %(reason)s, %(leader)s, last.nodes, %(nodes)s, %(moved)s, extract(epoch FROM clock_timestamp() - now()) * 1000
                FROM last WHERE last.nodes <> %(nodes)s OR %(moved)s > 0 OR %(evicted)s;
            SELECT pg_notify(%(channel)s, %(payload)s)
            ''',
            {'gone': gone, 'lo': [s.lo for s in fresh], 'hi': [s.hi for s in fresh], 'node': [s.node for s in fresh],
             'moving': [s.moving for s in fresh], 'to': [s.moving_to for s in fresh], 'blocked': [s.blocked for s in fresh],
             'versions': [s.version for s in fresh], 'since': since, 'activate': list(decision.activate), 'version': version, 'seen': seen,
             'reason': request.reason, 'leader': request.name, 'nodes': nodes, 'moved': decision.moved + decision.assigned,
             'evicted': request.reason == DEATHS, 'channel': tables.channel, 'payload': f'plan {version}'})


def _is_eldest(request: Lead | Evict, members: Sequence[Member]) -> bool:
    living = [member for member in members if Sign(member.name, member.incarnation, member.beat) not in request.dead]
    return bool(living) and living[0].incarnation == request.incarnation


def _since(before: Sequence[_Owned], fresh: Sequence[Segment]) -> list[str | None]:
    """For each new row, since when its node has owned the first of its tokens; None where it did not."""
    starts = [row.segment.lo for row in before]
    found: list[str | None] = []
    for segment in fresh:
        place = bisect_right(starts, segment.lo) - 1
        row = before[place] if place >= 0 else None
        same = row is not None and segment.lo < row.segment.hi and row.segment.node == segment.node
        found.append(row.since if row is not None and same else None)
    return found
