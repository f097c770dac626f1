"""A node's own row: heartbeat, looks, joining and leaving."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ..assignment.model import Segment
from ..config import CoordinationConfig
from ..process import Process
from ..protocol.messages.connection import RecordHistory
from ..protocol.messages.groups import Enroll, EnrollReply, Ids
from ..protocol.messages.handover import Refresh, RefreshReply
from ..protocol.messages.leadership import StepDown
from ..protocol.messages.membership import (
    ELDERS,
    Activate,
    ActivateReply,
    Beat,
    Drain,
    HeartbeatReply,
    Join,
    JoinReply,
    Leave,
    Mismatch,
    Occupied,
)
from ..protocol.messages.signs import Sign
from .cluster_transaction import ClusterTransaction, lock_key
from .connection import FIRST_TIMELINE, Connection
from .epochs import Epochs
from .layout import SCHEMA_VERSION
from .tables import Tables

__all__ = ['NodeStore']


class NodeStore:
    """What a node asks about itself.

    Args:
        config: The cluster's settings.
        tables: Names of the tables.
        epochs: Told of whom a node finds as it joins.
    """

    def __init__(self, config: CoordinationConfig, tables: Tables, epochs: Epochs) -> None:
        self._config = config
        self._tables = tables
        self._epochs = epochs

    def beat(self, connection: Connection, request: Beat) -> HeartbeatReply | None:
        """A heartbeat; None where this incarnation is not in the node table."""
        rows = connection.execute(
            self._tables.sql('node.beat', history=connection.history_sql),
            {**dataclasses.asdict(request), 'elders': ELDERS},
        )
        if not rows or rows[0][0] is None:
            return None
        version, state, created, text, history, recorded, same, held, groups = rows[0]
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
            held,
            tuple(json.loads(groups or '[]')),
        )

    def refresh(self, connection: Connection, request: Refresh) -> RefreshReply | None:
        """What the node owns; None as for `beat`."""
        rows = connection.execute(
            self._tables.sql('node.refresh', history=connection.history_sql),
            dataclasses.asdict(request),
        )
        if not rows:
            return None
        version, state, planned, incoming, segments, history, same, groups, ids = rows[0]
        return RefreshReply(
            version,
            state,
            tuple(Segment(*values) for values in json.loads(segments or '[]')),
            planned,
            incoming,
            history,
            same,
            tuple(json.loads(groups or '[]')),
            _ids(ids),
        )

    def join(self, connection: Connection, request: Join) -> JoinReply | Occupied | Mismatch:
        """Register the node."""
        if request.replace is None and not request.reap:
            joined = self._join_at_once(connection, request)
            if joined is not None:
                return joined
        config = self._config
        with ClusterTransaction(connection, self._tables, exclusive=False) as steps:
            ((version, total, hash_function),) = steps.run(
                'node.open_cluster',
                {
                    'total': config.total_tokens,
                    'hash': config.hash_function,
                    'schema': SCHEMA_VERSION,
                },
                history=connection.history_sql,
            )
            steps.delete_unchanged(request.reap)
            members = steps.run('node.all')
            signs = {row[0]: Sign(*row[:3]) for row in members}
            mine = signs.get(request.name)
            if mine is not None and mine.incarnation == request.incarnation:
                return JoinReply(version, self._ids_of(steps, request))
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
                version = self._form(steps, anew=not request.active and not self._epochs.resumes)
            steps.run('node.give_ids', {'groups': list(request.groups)})
            steps.run('node.insert', self._row(request))
            self._epochs.joined(others, request.active, version)
            return JoinReply(version, self._ids_of(steps, request))

    def _ids_of(self, steps: ClusterTransaction, request: Join) -> Ids:
        rows = steps.run('node.ids', {'name': request.name, 'incarnation': request.incarnation})
        return tuple((name, number) for name, number in rows)

    def _join_at_once(self, connection: Connection, request: Join) -> JoinReply | None:
        """The usual case in one message: the cluster's row is held for no round trip, so that many
        nodes may start together.

        None where there is more to look at: no other node is there, the name is taken, or the
        settings are others.
        """
        sql = self._tables.sql('node.join_at_once', history=connection.history_sql)
        rows = connection.execute(
            f'{connection.local_limits}; {sql}',
            {
                **self._row(request),
                **lock_key(self._tables),
                'total': self._config.total_tokens,
                'hash': self._config.hash_function,
            },
        )
        if not rows:
            return None
        version, others, ids = rows[0]
        self._epochs.joined(
            [Sign(*values) for values in json.loads(others)], request.active, version
        )
        return JoinReply(version, _ids(ids))

    def _form(self, steps: ClusterTransaction, anew: bool) -> int:
        """The first node of an empty cluster sets what the others must agree with; the cluster's
        version.

        Where it begins `anew`, what was audited before counts no longer; nor where tasks have other
        tokens from now on.
        """
        rows = steps.run(
            'node.form',
            {'total': self._config.total_tokens, 'hash': self._config.hash_function, 'anew': anew},
        )
        self._epochs.begun = self._epochs.begun or anew
        return int(rows[0][0])

    def _row(self, request: Join) -> dict[str, object]:
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
            'groups': list(request.groups),
            'channel': self._tables.channel,
        }

    def activate(self, connection: Connection, request: Activate) -> ActivateReply | None:
        """Let the node take part, if there are enough; None as for `beat`."""
        rows = connection.execute(
            self._tables.sql('node.activate'),
            {
                'name': request.name,
                'incarnation': request.incarnation,
                'minimum': request.minimum_nodes,
                'channel': self._tables.channel,
                'names': [sign.name for sign in request.dead],
                'lives': [sign.incarnation for sign in request.dead],
                'beats': [sign.beat for sign in request.dead],
            },
        )
        nodes, present, included, _ = rows[0]
        # The first plan has included this node: the cluster had formed, even if others have done
        # their share and left since.
        return ActivateReply(included or nodes >= request.minimum_nodes, nodes) if present else None

    def drain(self, connection: Connection, request: Drain) -> bool | None:
        """Have the node's tokens given away, or take part again; whether its row says so now, or
        None as for `beat`.
        """
        rows = connection.execute(
            self._tables.sql('node.set_state'),
            {
                **self._who(request),
                'state': 'draining' if request.draining else 'active',
                'by_itself': request.by_itself,
            },
        )
        return bool(rows[0][0]) if rows else None

    def enroll(self, connection: Connection, request: Enroll) -> EnrollReply | None:
        """Let the node's row name queue groups; None as for `beat`."""
        sql = self._tables.sql('node.enroll')
        rows = connection.execute(
            f'{connection.local_limits}; {sql}',
            {**self._who(request), **lock_key(self._tables), 'groups': list(request.groups)},
        )
        return EnrollReply(_ids(rows[0][0])) if rows else None

    def leave(self, connection: Connection, request: Leave) -> bool:
        """Remove the node."""
        connection.execute(
            f'{connection.local_limits}; {self._tables.sql("node.leave")}',
            {**self._who(request), **lock_key(self._tables)},
        )
        return True

    def step_down(self, connection: Connection, request: StepDown) -> bool | None:
        """Let the next node lead; None as for `beat`."""
        rows = connection.execute(self._tables.sql('node.step_down'), self._who(request))
        return True if rows else None

    def record_history(self, connection: Connection, request: RecordHistory) -> bool:
        """Record the database's history, if it is still the one that the node knows."""
        connection.execute(
            self._tables.sql('node.record_history', history=connection.history_sql),
            dataclasses.asdict(request),
        )
        return True

    def _who(self, request: Drain | Enroll | Leave | StepDown) -> dict[str, object]:
        return {
            'name': request.name,
            'incarnation': request.incarnation,
            'channel': self._tables.channel,
        }


def _is_settled(history: str, recorded: str | None) -> bool:
    """What HeartbeatReply.settled tells. Where the server was ever promoted, a row without a name
    may be a standby's that lacks the last writes.
    """
    return (
        not history or recorded == history or recorded is None and history.endswith(FIRST_TIMELINE)
    )


def _ids(text: str | None) -> Ids:
    return tuple((name, number) for name, number in json.loads(text or '[]'))


def _process(values: Sequence[Any]) -> Process:
    host, boot_id, pid_namespace, pid, started = values
    return Process(host or '', boot_id or '', pid_namespace or '', pid or 0, started or '')
