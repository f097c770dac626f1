"""A node's requests (messages.py) as SQL on the agent's connection. Each is one transaction; all but Lead are one round trip."""
from __future__ import annotations

import datetime

from ..config import CoordinationConfig
from ..hashing import task_key
from ..messages import (
    Activate,
    Activated,
    Beat,
    Beaten,
    Drain,
    Give,
    Given,
    Holdings,
    Housekeep,
    Join,
    Joined,
    Lead,
    Leave,
    Mismatch,
    Observe,
    Observed,
    Occupied,
    Process,
    Range,
    Refresh,
    Reply,
    Request,
    Segment,
    Sign,
    Take,
    Taken,
)
from .connection import Connection
from .leading import fingerprint, lead, read_members, to_member
from .schema import Tables

__all__ = ['Control']

#: Longest list of names in a notification; PostgreSQL takes 8000 bytes.
_PAYLOAD_BYTES = 7000
#: What housekeeping keeps.
_REBALANCES_KEPT, _REBALANCE_DAYS, _BATCH = 1000, 90, 10_000


class Control:
    """Answers requests.

    Args:
        config: The cluster's settings.
        tables: Names of the tables.
        date: The date of claims and audit; None: they are not looked at.
    """

    def __init__(self, config: CoordinationConfig, tables: Tables, date: datetime.date | None) -> None:
        self.tables = tables
        self._config = config
        self._date = date
        self._fingerprint = fingerprint(tables)

    def handle(self, connection: Connection, request: Request) -> Reply:
        """Carry the request out and return its reply.

        Raises:
            DatabaseUnavailable: The connection is lost or too slow; the request may have been carried out.
            psycopg2.Error: The server refused it.
        """
        if isinstance(request, Beat):
            return self._beat(connection, request)
        if isinstance(request, Refresh):
            return self._refresh(connection, request)
        if isinstance(request, Give):
            return self._give(connection, request)
        if isinstance(request, Take):
            return self._take(connection, request)
        if isinstance(request, Observe):
            return self._observe(connection)
        if isinstance(request, Lead):
            return lead(connection, self.tables, self._config, request)
        if isinstance(request, Join):
            return self._join(connection, request)
        if isinstance(request, Activate):
            return self._activate(connection, request)
        if isinstance(request, Drain):
            return self._drain(connection, request)
        if isinstance(request, Leave):
            return self._leave(connection, request)
        if isinstance(request, Housekeep):
            return self._housekeep(connection)
        raise AssertionError(f'no request for a store: {request!r}')

    # --- membership ---

    def _join(self, connection: Connection, request: Join) -> Joined | Occupied | Mismatch:
        t, process = self.tables, request.process
        gone = [*request.reap]
        if request.replace is not None:
            gone.append(Sign(request.name, *request.replace))
        rows = connection.execute(
            f'''
            SELECT pg_advisory_xact_lock(%(lock_a)s, %(lock_b)s);
            DELETE FROM {t.node} AS n USING unnest(%(names)s::text[], %(incarnations)s::text[], %(beats)s::bigint[]) AS d (name, incarnation, beat)
                WHERE n.name = d.name AND n.incarnation = d.incarnation AND n.beat = d.beat;
            -- The first node of an empty cluster decides on its settings.
            DELETE FROM {t.assignment} USING {t.cluster} AS c
                WHERE (c.total_tokens, c.hash_function) <> (%(total)s, %(hash)s) AND NOT EXISTS (SELECT FROM {t.node});
            UPDATE {t.cluster} SET total_tokens = %(total)s, hash_function = %(hash)s, version = version + 1, planned = NULL
                WHERE (total_tokens, hash_function) <> (%(total)s, %(hash)s) AND NOT EXISTS (SELECT FROM {t.node});
            -- Later than every other row, even if the wall clock was set back: age is the order of joining.
            INSERT INTO {t.node} (name, created_on, last_heartbeat, incarnation, state, weight, lease_sec, host, boot_id, pid_namespace, pid, started)
                SELECT %(name)s, greatest(clock_timestamp(), (SELECT max(created_on) + interval '1 microsecond' FROM {t.node})), clock_timestamp(),
                       %(incarnation)s, %(state)s, %(weight)s, %(lease)s, %(host)s, %(boot_id)s, %(pid_namespace)s, %(pid)s, %(started)s
                FROM {t.cluster} AS c WHERE (c.total_tokens, c.hash_function) = (%(total)s, %(hash)s)
                ON CONFLICT (name) DO NOTHING;
            SELECT pg_notify(%(channel)s, %(payload)s) FROM {t.node} WHERE name = %(name)s AND incarnation = %(incarnation)s;
            SELECT c.version, c.total_tokens, c.hash_function, n.incarnation, n.beat, n.host, n.boot_id, n.pid_namespace, n.pid, n.started,
                   (SELECT coalesce(json_agg(json_build_array(o.name, o.incarnation, o.beat) ORDER BY o.name), '[]') FROM {t.node} AS o)
                FROM {t.cluster} AS c LEFT JOIN {t.node} AS n ON n.name = %(name)s
            ''',
            {
                'names': [sign.name for sign in gone], 'incarnations': [sign.incarnation for sign in gone], 'beats': [sign.beat for sign in gone],
                'name': request.name, 'incarnation': request.incarnation, 'state': 'active' if request.active else 'joining',
                'weight': request.weight, 'lease': self._config.lease_sec, 'total': self._config.total_tokens,
                'hash': self._config.hash_function, 'host': process.host, 'boot_id': process.boot_id,
                'pid_namespace': process.pid_namespace, 'pid': process.pid, 'started': process.started,
                'channel': t.channel, 'payload': f'join {request.name}', **self._advisory(),
            })
        version, total, hash_function, incarnation, beat, host, boot_id, namespace, pid, started, signs = rows[0]
        if incarnation == request.incarnation:
            return Joined(version)
        if incarnation is not None:
            return Occupied(Sign(request.name, incarnation, beat), Process(host, boot_id, namespace, pid, started))
        return Mismatch(total, hash_function, tuple(Sign(*sign) for sign in signs))

    def _activate(self, connection: Connection, request: Activate) -> Activated | None:
        t = self.tables
        alive = f'''(SELECT count(*) FROM {t.node} AS o WHERE NOT EXISTS (
            SELECT FROM unnest(%(names)s::text[], %(incarnations)s::text[], %(beats)s::bigint[]) AS d (name, incarnation, beat)
            WHERE o.name = d.name AND o.incarnation = d.incarnation AND o.beat = d.beat))'''
        rows = connection.execute(
            f'''
            UPDATE {t.node} SET state = 'active'
                WHERE name = %(name)s AND incarnation = %(incarnation)s AND state = 'joining' AND {alive} >= %(minimum)s;
            SELECT state <> 'joining', {alive}, pg_notify(%(channel)s, %(payload)s)
                FROM {t.node} WHERE name = %(name)s AND incarnation = %(incarnation)s
            ''',
            {
                'name': request.name, 'incarnation': request.incarnation, 'minimum': request.minimum_nodes,
                'names': [sign.name for sign in request.dead], 'incarnations': [sign.incarnation for sign in request.dead],
                'beats': [sign.beat for sign in request.dead], 'channel': t.channel, 'payload': f'join {request.name}',
            })
        return Activated(rows[0][0], rows[0][1]) if rows else None

    def _beat(self, connection: Connection, request: Beat) -> Beaten | None:
        t = self.tables
        rows = connection.execute(
            f'''
            WITH me AS (
                UPDATE {t.node} SET beat = beat + 1, last_heartbeat = clock_timestamp()
                WHERE name = %s AND incarnation = %s RETURNING name, created_on, state
            )
            SELECT c.version, me.state, (
                SELECT coalesce(json_agg(json_build_array(o.name, o.incarnation, o.beat) ORDER BY o.created_on, o.name), '[]')
                FROM {t.node} AS o WHERE (o.created_on, o.name) < (me.created_on, me.name))
            FROM me, {t.cluster} AS c
            ''', (request.name, request.incarnation))
        if not rows:
            return None
        version, state, older = rows[0]
        return Beaten(version, state, tuple(Sign(*sign) for sign in older))

    def _drain(self, connection: Connection, request: Drain) -> bool | None:
        t = self.tables
        rows = connection.execute(
            f'''
            WITH me AS (UPDATE {t.node} SET state = %s WHERE name = %s AND incarnation = %s RETURNING name)
            SELECT pg_notify(%s, 'drain ' || name) FROM me
            ''', ('draining' if request.draining else 'active', request.name, request.incarnation, t.channel))
        return True if rows else None

    def _leave(self, connection: Connection, request: Leave) -> bool:
        t = self.tables
        connection.execute(
            f'''
            SELECT pg_advisory_xact_lock_shared(%(lock_a)s, %(lock_b)s);
            WITH me AS (DELETE FROM {t.node} WHERE name = %(name)s AND incarnation = %(incarnation)s RETURNING name)
            SELECT pg_notify(%(channel)s, 'leave ' || name) FROM me
            ''', {'name': request.name, 'incarnation': request.incarnation, 'channel': t.channel, **self._advisory()})
        return True

    # --- assignment ---

    def _refresh(self, connection: Connection, request: Refresh) -> Holdings | None:
        t = self.tables
        rows = connection.execute(
            f'''
            SELECT c.version, n.state, c.planned IS NOT DISTINCT FROM ({self._fingerprint}),
                   (SELECT coalesce(sum(upper(a.tokens) - lower(a.tokens)), 0)::int FROM {t.assignment} AS a WHERE a.moving_to = n.name),
                   (SELECT coalesce(json_agg(json_build_array(lower(a.tokens), upper(a.tokens), a.moving, a.moving_to, a.blocked, a.version)
                                             ORDER BY a.tokens), '[]')
                    FROM {t.assignment} AS a WHERE a.node = n.name)
            FROM {t.node} AS n, {t.cluster} AS c WHERE n.name = %s AND n.incarnation = %s
            ''', (request.name, request.incarnation))
        if not rows:
            return None
        version, state, planned, incoming, segments = rows[0]
        return Holdings(
            version, state,
            tuple(Segment(lo, hi, request.name, moving, to, blocked, since) for lo, hi, moving, to, blocked, since in segments),
            planned, incoming)

    def _give(self, connection: Connection, request: Give) -> Given | None:
        t = self.tables
        mine = f'''a.node = %(name)s AND a.moving AND (a.moving_to IS NOT NULL OR a.blocked) AND a.version <= %(version)s
            AND a.tokens <@ %(ranges)s::int4multirange
            AND EXISTS (SELECT FROM {t.node} AS n WHERE n.name = %(name)s AND n.incarnation = %(incarnation)s)'''
        rows = connection.execute(
            f'''
            SELECT pg_advisory_xact_lock_shared(%(lock_a)s, %(lock_b)s);
            INSERT INTO {t.claim} AS c (node, task_id, date, token, incarnation)
                SELECT %(name)s, p.task_id, %(date)s, p.token, %(incarnation)s
                FROM unnest(%(tasks)s::text[], %(tokens)s::int[]) AS p (task_id, token)
                WHERE %(date)s IS NOT NULL AND EXISTS (SELECT FROM {t.node} AS n WHERE n.name = %(name)s AND n.incarnation = %(incarnation)s)
                ON CONFLICT (task_id, date) DO UPDATE
                    SET node = excluded.node, incarnation = excluded.incarnation, token = excluded.token, created_on = excluded.created_on
                    WHERE NOT EXISTS (SELECT FROM {t.node} AS n WHERE n.name = c.node AND n.incarnation = c.incarnation);
            UPDATE {t.cluster} SET version = version + 1 WHERE EXISTS (SELECT FROM {t.assignment} AS a WHERE {mine});
            WITH given AS (
                UPDATE {t.assignment} AS a
                SET node = a.moving_to, moving = false, moving_to = NULL, blocked = a.moving_to IS NULL,
                    version = (SELECT version FROM {t.cluster}), assigned_at = now()
                WHERE {mine}
                RETURNING a.node, upper(a.tokens) - lower(a.tokens) AS size
            ), told AS (
                SELECT CASE WHEN octet_length(names) > {_PAYLOAD_BYTES} THEN 'give' ELSE 'give ' || names END AS payload
                FROM (SELECT string_agg(DISTINCT node, ',') AS names FROM given) AS g WHERE names IS NOT NULL
            )
            SELECT (SELECT coalesce(sum(size), 0)::int FROM given), (SELECT count(pg_notify(%(channel)s, payload)) FROM told)
                FROM {t.node} AS n WHERE n.name = %(name)s AND n.incarnation = %(incarnation)s
            ''',
            {
                'name': request.name, 'incarnation': request.incarnation, 'version': request.version, 'ranges': _multirange(request.ranges),
                'tasks': [task for task, _ in request.promised], 'tokens': [token for _, token in request.promised],
                'date': self._date, 'channel': t.channel, **self._advisory(),
            })
        return Given(rows[0][0]) if rows else None

    def _take(self, connection: Connection, request: Take) -> Taken:
        if self._date is None:
            return Taken(frozenset())
        t = self.tables
        rows = connection.execute(
            f'''
            SELECT task_id FROM {t.audit} WHERE date = %(date)s AND token <@ ANY(%(ranges)s::int4range[])
            UNION
            SELECT c.task_id FROM {t.claim} AS c JOIN {t.node} AS n ON n.name = c.node AND n.incarnation = c.incarnation
            WHERE c.date = %(date)s AND c.node <> %(name)s AND c.token <@ ANY(%(ranges)s::int4range[])
            ''', {'date': self._date, 'name': request.name, 'ranges': [f'[{lo},{hi})' for lo, hi in request.ranges]})
        return Taken(frozenset(task_key(task_id) for task_id, in rows))

    # --- the leader's eyes and its broom ---

    def _observe(self, connection: Connection) -> Observed:
        t = self.tables
        rows = connection.execute(
            f'''
            SELECT c.version, c.planned IS DISTINCT FROM ({self._fingerprint}),
                   (SELECT extract(epoch FROM min(expires_at) - clock_timestamp())::float8 FROM {t.lock}), ({read_members(t)})
            FROM {t.cluster} AS c
            ''')
        version, stale, next_expiry, members = rows[0]
        return Observed(tuple(to_member(row) for row in members), version, stale, next_expiry)

    def _housekeep(self, connection: Connection) -> bool:
        t = self.tables
        connection.execute(
            f'''
            DELETE FROM {t.execution} WHERE key IN (
                SELECT key FROM {t.execution} WHERE expires_at < now() AND state <> 'running' LIMIT {_BATCH} FOR UPDATE SKIP LOCKED);
            DELETE FROM {t.rebalance} WHERE triggered_at < now() - interval '{_REBALANCE_DAYS} days'
                OR id <= (SELECT max(id) FROM {t.rebalance}) - {_REBALANCES_KEPT};
            DELETE FROM {t.claim} AS c WHERE NOT EXISTS (SELECT FROM {t.node} AS n WHERE n.name = c.node AND n.incarnation = c.incarnation)
            ''')
        return True

    def _advisory(self) -> dict[str, int]:
        return {'lock_a': self.tables.advisory[0], 'lock_b': self.tables.advisory[1]}


def _multirange(ranges: tuple[Range, ...]) -> str:
    return '{' + ','.join(f'[{lo},{hi})' for lo, hi in ranges) + '}'
