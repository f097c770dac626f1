"""A node's requests, answered by PostgreSQL.

Whatever changes who owns what holds the cluster's row, so that such changes come one after the
other; leaders hold the cluster's advisory lock besides. Heartbeats take neither, and wait for
nobody.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from typing import Any

from ..assignment.model import Range, Segment
from ..config import CoordinationConfig
from ..process import Process
from ..protocol.messages import (
    ELDERS,
    Activate,
    ActivateReply,
    Beat,
    Drain,
    Evict,
    Give,
    GiveReply,
    HeartbeatReply,
    Join,
    JoinReply,
    Lead,
    Leave,
    Lives,
    Mismatch,
    Observe,
    ObserveReply,
    Occupied,
    RecordHistory,
    Refresh,
    RefreshReply,
    Reply,
    Request,
    Sign,
    StepDown,
    Take,
    TakeReply,
)
from .connection import FIRST_TIMELINE, Connection
from .epochs import Epochs
from .leading import Leading
from .rounds import Round, fingerprint, members_json, read_members, take_turn
from .schema import SCHEMA_VERSION
from .tables import Tables
from .taken import read_lives, read_taken

__all__ = ['Control']

#: A notification holds less than 8000 bytes.
_NOTIFY_BYTES = 7000
#: Whether a node's row `n` holds the heartbeat that was last answered, or a later one that
#: continued it (see messages.Beat).
_CONTINUES = '(n.beat = %(seen)s OR n.beat > %(seen)s AND n.beat %% 2 = 0)'


class Control:
    """Answers each request of protocol/messages.py on the agent's connection.

    Args:
        config: The cluster's settings.
        tables: Names of the tables.
        date: The date whose audit and claims count; None: none do.
        resume: What a cluster has audited counts for the next one too, if this node is its first.
    """

    def __init__(
        self,
        config: CoordinationConfig,
        tables: Tables,
        date: datetime.date | None,
        resume: bool = False,
    ) -> None:
        self.tables = tables
        self._config = config
        self._date = date
        self.epochs = Epochs(tables, resume)
        self._leading = Leading(config, tables, self.epochs)

    def handle(self, connection: Connection, request: Request) -> Reply:
        """Carry the request out, wholly or not at all.

        Raises:
            DatabaseUnavailable: The connection is lost; the request may have been carried out.
            StoreTimeout: No answer in time; likewise.
            psycopg2.Error: The server refused; nothing was changed.
        """
        if isinstance(request, Beat):
            return self._beat(connection, request)
        if isinstance(request, Refresh):
            return self._refresh(connection, request)
        if isinstance(request, Observe):
            return self._observe(connection)
        if isinstance(request, Evict):
            return self._leading.evict(connection, request)
        if isinstance(request, Lead):
            return self._leading.lead(connection, request)
        if isinstance(request, Take):
            return self._take(connection, request)
        if isinstance(request, Lives):
            return read_lives(connection, self.tables, request)
        if isinstance(request, Give):
            return self._give(connection, request)
        if isinstance(request, Join):
            return self._join(connection, request)
        if isinstance(request, Activate):
            return self._activate(connection, request)
        if isinstance(request, Drain):
            return self._drain(connection, request)
        if isinstance(request, Leave):
            return self._leave(connection, request)
        if isinstance(request, StepDown):
            return self._step_down(connection, request)
        if isinstance(request, RecordHistory):
            return self._record_history(connection, request)
        raise TypeError(f'{type(request).__name__} is no request for the store')

    # --- heartbeat and looks: one statement each ---

    def _beat(self, connection: Connection, request: Beat) -> HeartbeatReply | None:
        # What it reads must not grow with the number of nodes, nor with row versions that
        # somebody's open transaction keeps: its own row by name, and from `since` on a few by age.
        tables = self.tables
        rows = connection.execute(
            f"""
            UPDATE {tables.node} AS n
            SET beat = greatest(n.beat, CASE WHEN {_CONTINUES} THEN %(number)s ELSE %(number)s + 1
                END), last_heartbeat = clock_timestamp()
            WHERE n.name = %(name)s AND n.incarnation = %(incarnation)s
            RETURNING (SELECT c.version FROM {tables.cluster} AS c), n.state, {_microseconds('n')},
                (SELECT json_agg(json_build_array(o.name, o.incarnation, o.beat, o.age, o.created)
                    ORDER BY o.created, o.name)::text FROM (
                    SELECT o.name, o.incarnation, o.beat, {_microseconds('o')} AS created,
                        extract(epoch FROM clock_timestamp() - o.last_heartbeat)::float8 AS age
                    FROM {tables.node} AS o
                    WHERE (o.created_on, o.name) < (n.created_on, n.name)
                        AND o.created_on >= timestamptz 'epoch' + %(since)s * interval
                            '1 microsecond'
                    ORDER BY o.created_on, o.name LIMIT {ELDERS}) AS o),
                {connection.history_sql}, (SELECT c.history FROM {tables.cluster} AS c), n.beat %% 2
                    = 0
            """,
            dataclasses.asdict(request),
        )
        if not rows or rows[0][0] is None:
            return None
        version, state, created, text, history, recorded, same = rows[0]
        older = json.loads(text or '[]')
        return HeartbeatReply(
            version,
            state,
            tuple(Sign(*values[:3]) for values in older),
            tuple(values[3] for values in older),
            older[0][4] if older else created,
            history,
            _is_settled(history, recorded),
            same,
        )

    def _refresh(self, connection: Connection, request: Refresh) -> RefreshReply | None:
        tables = self.tables
        rows = connection.execute(
            f"""
            SELECT c.version, n.state, c.planned IS NOT DISTINCT FROM {fingerprint(tables)},
                (SELECT coalesce(sum(upper(i.tokens) - lower(i.tokens)), 0)::bigint FROM
                    {tables.assignment} AS i
                 WHERE i.moving_to = n.name AND i.node IS DISTINCT FROM n.name),
                (SELECT json_agg(json_build_array(lower(a.tokens), upper(a.tokens), a.node,
                    a.moving, a.moving_to, a.blocked, a.version)
                                 ORDER BY a.tokens)::text
                 FROM {tables.assignment} AS a WHERE a.node = n.name),
                {connection.history_sql}, {_CONTINUES}
            FROM {tables.node} AS n CROSS JOIN {tables.cluster} AS c WHERE n.name = %(name)s AND
                n.incarnation = %(incarnation)s
            """,
            dataclasses.asdict(request),
        )
        if not rows:
            return None
        version, state, planned, incoming, segments, history, same = rows[0]
        return RefreshReply(
            version,
            state,
            tuple(Segment(*values) for values in json.loads(segments or '[]')),
            planned,
            incoming,
            history,
            same,
        )

    def _observe(self, connection: Connection) -> ObserveReply | None:
        tables = self.tables
        rows = connection.execute(
            f"""
            SELECT c.version, c.planned IS DISTINCT FROM {fingerprint(tables)},
                {self._leading.gap_sql()},
                (SELECT extract(epoch FROM min(l.expires_at) - clock_timestamp())::float8 FROM
                    {tables.lock} AS l
                 WHERE l.expires_at > '-infinity' AND l.expires_at < 'infinity'),
                {members_json(tables)}
            FROM {tables.cluster} AS c
            """
        )
        if not rows:
            return None
        version, stale, gap, next_expiry, members = rows[0]
        self._leading.checked_gap(gap)
        return ObserveReply(read_members(members), version, stale or gap, next_expiry)

    def _take(self, connection: Connection, request: Take) -> TakeReply:
        if self._date is None or not request.ranges:
            return TakeReply(request.ranges)
        return read_taken(connection, self.tables, self._config, self._date, request)

    # --- membership ---

    def _join(self, connection: Connection, request: Join) -> JoinReply | Occupied | Mismatch:
        if request.replace is None and not request.reap:
            joined = self._join_at_once(connection, request)
            if joined is not None:
                return joined
        tables, config = self.tables, self._config
        with Round(connection, tables, exclusive=False) as steps:
            ((version, total, hash_function),) = steps.run(
                f"""
                INSERT INTO {tables.cluster} (total_tokens, hash_function, schema_version)
                    SELECT %s, %s, %s WHERE NOT EXISTS (SELECT FROM {tables.cluster}) ON CONFLICT DO
                        NOTHING;
                UPDATE {tables.cluster} SET history = {connection.history_sql} WHERE history IS NULL
                    AND {_first(connection)};
                SELECT version, total_tokens, hash_function FROM {tables.cluster} FOR UPDATE
                """,
                (config.total_tokens, config.hash_function, SCHEMA_VERSION),
            )
            steps.delete_unchanged(request.reap)
            members = steps.run(
                'SELECT name, incarnation, beat, host, boot_id, pid_namespace, pid, started FROM '
                f'{tables.node} ORDER BY created_on, name'
            )
            signs = {row[0]: Sign(*row[:3]) for row in members}
            mine = signs.get(request.name)
            if mine is not None and mine.incarnation == request.incarnation:
                return JoinReply(version)
            if mine is not None and request.replace != (mine.incarnation, mine.beat):
                return Occupied(
                    mine, next(_process(row[3:]) for row in members if row[0] == request.name)
                )
            others = tuple(sign for sign in signs.values() if sign is not mine)
            if others and (total, hash_function) != (config.total_tokens, config.hash_function):
                return Mismatch(total, hash_function, others)
            if mine is not None:
                steps.delete_unchanged([mine])
            if not others:
                version = self._form(steps, anew=not request.active and not self.epochs.resumes)
            steps.run(self._insert_sql(), self._insert_params(request))
            self.epochs.joined(others, request.active, version)
            return JoinReply(version)

    def _join_at_once(self, connection: Connection, request: Join) -> JoinReply | None:
        """The usual case in one message: the cluster's row is held for no round trip, so that many
        nodes may start together.

        None where there is more to look at: no other node is there, the name is taken, or the
        settings are others.
        """
        tables, config = self.tables, self._config
        rows = connection.execute(
            f"""
            {take_turn(connection, tables)};
            WITH inserted AS (
                INSERT INTO {tables.node} {self._node_columns()}
                SELECT {self._node_values()} FROM {tables.cluster} AS c
                WHERE (c.total_tokens, c.hash_function) = (%(total)s, %(hash)s) AND (c.history IS
                    NOT NULL OR NOT {_first(connection)})
                    AND EXISTS (SELECT FROM {tables.node})
                ON CONFLICT (name) DO NOTHING
                RETURNING {self._told('state')}
            )
            SELECT c.version, (SELECT json_agg(json_build_array(o.name, o.incarnation,
                o.beat))::text FROM {tables.node} AS o)
            FROM {tables.cluster} AS c, inserted
            """,
            {
                **self._insert_params(request),
                'total': config.total_tokens,
                'hash': config.hash_function,
            },
        )
        if not rows:
            return None
        version, others = rows[0]
        self.epochs.joined(
            [Sign(*values) for values in json.loads(others)], request.active, version
        )
        return JoinReply(version)

    def _form(self, steps: Round, anew: bool) -> int:
        """The first node of an empty cluster sets what the others must agree with; the cluster's
        version.

        Where it begins `anew`, what was audited before counts no longer; nor where tasks have other
        tokens from now on.
        """
        tables, config = self.tables, self._config
        rows = steps.run(
            f"""
            DELETE FROM {tables.assignment} WHERE upper(tokens) > %(total)s
                OR EXISTS (SELECT FROM {tables.cluster} WHERE (total_tokens, hash_function) <>
                    (%(total)s, %(hash)s));
            UPDATE {tables.cluster} SET total_tokens = %(total)s, hash_function = %(hash)s, planned
                = NULL,
                version = version + CASE WHEN (total_tokens, hash_function) <> (%(total)s, %(hash)s)
                    THEN 1 ELSE 0 END,
                epoch = epoch + CASE WHEN %(anew)s OR (total_tokens, hash_function) <> (%(total)s,
                    %(hash)s) THEN 1 ELSE 0 END
            RETURNING version
            """,
            {'total': config.total_tokens, 'hash': config.hash_function, 'anew': anew},
        )
        self.epochs.begun = self.epochs.begun or anew
        return int(rows[0][0])

    def _insert_sql(self) -> str:
        node = self.tables.node
        return (
            f'INSERT INTO {node} {self._node_columns()} VALUES ({self._node_values()}) '
            f'RETURNING {self._told("state")}'
        )

    def _node_columns(self) -> str:
        return (
            '(name, created_on, last_heartbeat, incarnation, state, weight, lease_sec, host, '
            'boot_id, pid_namespace, pid, started)'
        )

    def _node_values(self) -> str:
        # Nodes are ordered by the moment of joining, even where the server's clock has been set
        # back meanwhile.
        return f"""
            %(name)s, {_youngest(self.tables.node)}, clock_timestamp(), %(incarnation)s,
            %(state)s, %(weight)s, %(lease)s,
            %(host)s, %(boot_id)s, %(pid_namespace)s, %(pid)s, %(started)s"""

    def _told(self, state: str) -> str:
        """SQL that notifies of a node that takes part at once. One that waits is seen soon enough:
        hundreds that start wake nobody.
        """
        return (
            f"CASE WHEN {state} = 'active' THEN pg_notify(%(channel)s, 'join ' || "
            '%(name)s)::text END'
        )

    def _insert_params(self, request: Join) -> dict[str, object]:
        process = request.process
        return {
            'name': request.name,
            'incarnation': request.incarnation,
            'state': 'active' if request.active else 'joining',
            'weight': request.weight,
            'lease': self._config.lease_sec,
            'host': process.host,
            'boot_id': process.boot_id,
            'pid_namespace': process.pid_namespace,
            'pid': process.pid,
            'started': process.started,
            'channel': self.tables.channel,
        }

    def _activate(self, connection: Connection, request: Activate) -> ActivateReply | None:
        node = self.tables.node
        rows = connection.execute(
            f"""
            WITH counted AS (
                SELECT count(*)::int AS nodes, coalesce(bool_or(n.name = %(name)s AND n.incarnation
                    = %(incarnation)s), false) AS present,
                    coalesce(bool_or(n.name = %(name)s AND n.state = 'active'), false) AS included
                FROM {node} AS n
                WHERE (n.name, n.incarnation, n.beat) NOT IN (
                    SELECT * FROM unnest(%(names)s::text[], %(lives)s::text[], %(beats)s::bigint[]))
            ), activated AS (
                UPDATE {node} AS n SET state = 'active' FROM counted
                WHERE n.name = %(name)s AND n.incarnation = %(incarnation)s AND n.state = 'joining'
                    AND counted.nodes >= %(minimum)s
                RETURNING pg_notify(%(channel)s, 'join ' || n.name)::text
            )
            SELECT nodes, present, included, (SELECT count(*) FROM activated) FROM counted
            """,
            {
                'name': request.name,
                'incarnation': request.incarnation,
                'minimum': request.minimum_nodes,
                'channel': self.tables.channel,
                'names': [sign.name for sign in request.dead],
                'lives': [sign.incarnation for sign in request.dead],
                'beats': [sign.beat for sign in request.dead],
            },
        )
        nodes, present, included, _ = rows[0]
        # The first plan has included this node: the cluster had formed, even if others have done
        # their share and left since.
        return ActivateReply(included or nodes >= request.minimum_nodes, nodes) if present else None

    def _drain(self, connection: Connection, request: Drain) -> bool | None:
        rows = connection.execute(
            f"""
            UPDATE {self.tables.node} SET state = %s WHERE name = %s AND incarnation = %s RETURNING
                pg_notify(%s, 'drain ' || name)::text
            """,
            (
                'draining' if request.draining else 'active',
                request.name,
                request.incarnation,
                self.tables.channel,
            ),
        )
        return True if rows else None

    def _leave(self, connection: Connection, request: Leave) -> bool:
        connection.execute(
            f"""
            {take_turn(connection, self.tables)};
            DELETE FROM {self.tables.node} WHERE name = %s AND incarnation = %s RETURNING
                pg_notify(%s, 'leave ' || name)::text
            """,
            (request.name, request.incarnation, self.tables.channel),
        )
        return True

    def _step_down(self, connection: Connection, request: StepDown) -> bool | None:
        node = self.tables.node
        rows = connection.execute(
            f"""
            UPDATE {node} SET created_on = {_youngest(node)} WHERE name = %s AND incarnation = %s
            RETURNING pg_notify(%s, 'step ' || name)::text
            """,
            (request.name, request.incarnation, self.tables.channel),
        )
        return True if rows else None

    def _record_history(self, connection: Connection, request: RecordHistory) -> bool:
        tables = self.tables
        connection.execute(
            f"""
            UPDATE {tables.cluster} SET history = %(history)s
            WHERE history IS DISTINCT FROM %(history)s AND {connection.history_sql} = %(history)s
                AND EXISTS (SELECT FROM {tables.node} AS n WHERE n.name = %(name)s AND n.incarnation
                    = %(incarnation)s AND {_CONTINUES})
            """,
            dataclasses.asdict(request),
        )
        return True

    # --- hand-over ---

    def _give(self, connection: Connection, request: Give) -> GiveReply | None:
        params: dict[str, object] = {
            'name': request.name,
            'incarnation': request.incarnation,
            'version': request.version,
            'channel': self.tables.channel,
            'date': self._date,
            'texts': [text for text, _ in request.promised],
            'tokens': [token for _, token in request.promised],
            **_split(request.ranges),
        }
        promise = f'{self._promise_sql()};' if request.promised and self._date is not None else ''
        ((present, tokens, _),) = connection.execute(
            f'{take_turn(connection, self.tables)}; {promise} {self._give_sql()}', params
        )
        return GiveReply(tokens) if present else None

    def _promise_sql(self) -> str:
        tables = self.tables
        return f"""
            INSERT INTO {tables.claim} AS c (node, task_id, created_on, date, token, incarnation,
                promised)
            SELECT DISTINCT ON (w.task_id) n.name, w.task_id, now(), %(date)s::date, w.token,
                n.incarnation, true
            FROM unnest(%(texts)s::text[], %(tokens)s::int[]) AS w (task_id, token)
                JOIN {tables.node} AS n ON n.name = %(name)s AND n.incarnation = %(incarnation)s
                JOIN {tables.assignment} AS a ON a.tokens @> w.token AND a.node = n.name
            WHERE NOT EXISTS (SELECT FROM {tables.audit} AS d WHERE d.task_id = w.task_id AND d.date
                = %(date)s
                              AND d.epoch >= (SELECT epoch FROM {tables.cluster}))
            ORDER BY w.task_id
            ON CONFLICT (task_id, date) DO UPDATE
                SET node = excluded.node, created_on = excluded.created_on, token = excluded.token,
                    incarnation = excluded.incarnation,
                    promised = true, child = NULL
                WHERE NOT EXISTS (SELECT FROM {tables.node} AS n WHERE n.name = c.node AND
                    n.incarnation = c.incarnation)
            """

    def _give_sql(self) -> str:
        tables = self.tables
        return f"""
            WITH me AS (
                SELECT name FROM {tables.node} WHERE name = %(name)s AND incarnation =
                    %(incarnation)s
            ), given AS (
                UPDATE {tables.assignment} AS a
                SET node = a.moving_to, moving = false, moving_to = NULL, blocked = a.moving_to IS
                    NULL, version = c.version + 1,
                    assigned_at = now()
                FROM {tables.cluster} AS c, me
                WHERE a.node = me.name AND a.moving AND (a.moving_to IS NOT NULL OR a.blocked) AND
                    a.version <= %(version)s
                  AND a.tokens <@ (SELECT range_agg(int4range(r.lo, r.hi)) FROM
                      unnest(%(los)s::int[], %(his)s::int[]) AS r (lo, hi))
                RETURNING a.tokens, a.node
            ), bumped AS (
                UPDATE {tables.cluster} SET version = version + 1 WHERE EXISTS (SELECT FROM given)
                    RETURNING version
            ), told AS (
                SELECT tokens, CASE WHEN octet_length(names) > {_NOTIFY_BYTES} THEN '' ELSE names
                    END AS names
                FROM (SELECT sum(upper(tokens) - lower(tokens))::bigint AS tokens,
                    coalesce(string_agg(DISTINCT node, ','), '') AS names
                      FROM given) AS g
            ), sent AS (
                SELECT pg_notify(%(channel)s, rtrim('give ' || told.names))::text AS payload FROM
                    told, bumped
            )
            SELECT EXISTS (SELECT FROM me), coalesce(told.tokens, 0), (SELECT count(payload) FROM
                sent) FROM told
            """


def _first(connection: Connection) -> str:
    """SQL for whether the database's history is its first one; not so where the role may not
    ask.
    """
    return f"{connection.history_sql} LIKE '%%{FIRST_TIMELINE}'"


def _is_settled(history: str, recorded: str | None) -> bool:
    """See HeartbeatReply.settled. Where the server was ever promoted, a row without a name may be a
    standby's that lacks the last writes.
    """
    return (
        not history or recorded == history or recorded is None and history.endswith(FIRST_TIMELINE)
    )


def _microseconds(row: str) -> str:
    return f'(extract(epoch FROM {row}.created_on) * 1000000)::bigint'


def _youngest(node: str) -> str:
    """SQL for a moment later than that of every node, even where the server's clock has been set
    back meanwhile.
    """
    return (
        "greatest(clock_timestamp(), (SELECT max(created_on) + interval '1 microsecond' FROM "
        f'{node}))'
    )


def _split(ranges: Sequence[Range]) -> dict[str, object]:
    return {'los': [lo for lo, _ in ranges], 'his': [hi for _, hi in ranges]}


def _process(values: Sequence[Any]) -> Process:
    host, boot_id, pid_namespace, pid, started = values
    return Process(host or '', boot_id or '', pid_namespace or '', pid or 0, started or '')
