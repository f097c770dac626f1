"""What an operator sees: nodes, ownership, plans and why a task is where it is. Display only; no
decision rests on it.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, cast

from ..assignment.groups import GROUP_SPAN, PLAIN, cut_by_group
from ..assignment.hashing import HASH_FUNCTIONS
from ..assignment.model import Member, Segment
from ..assignment.patterns import PATTERN_BYTES, check_patterns, matched_pattern, read_patterns
from ..assignment.round import Pin, decide
from ..assignment.simulate import Move, holder, moves
from ..config import LEASE_FRACTION
from ..errors import ConfigurationError, JobSyncError
from ..results import ExecutionInfo, Explanation, NodeInfo
from .base import Store
from .locks import LOCKS, LockStore
from .tasks import TaskStore

__all__ = ['BlockedRange', 'BlockingLock', 'ClusterRow', 'GroupRow', 'RebalanceRow', 'StatusStore']


class ClusterRow(TypedDict):
    """The cluster's settings and counters."""

    total_tokens: int
    hash_function: str
    version: int
    schema_version: int
    lock_version: int


class RebalanceRow(TypedDict):
    """A plan that changed something."""

    id: int
    triggered_at: datetime.datetime
    trigger_reason: str
    leader_node: str
    nodes_before: int
    nodes_after: int
    tokens_moved: int
    duration_ms: int


class BlockingLock(TypedDict):
    """A lock that keeps live nodes from a range."""

    task_id: str
    node_patterns: list[str]


class BlockedRange(TypedDict):
    """A range that no live node may have, and why."""

    lo: int
    hi: int
    node: str | None
    locks: list[BlockingLock]


class GroupRow(TypedDict):
    """A queue group: the nodes that consume its queues, and what they own of its tokens.

    Its tokens are counted as those of the plain Job: `nodes` are the members, oldest first, and
    whoever owns something still; a group without a live member routes nothing.
    """

    queue_group: str
    members: list[str]
    nodes: dict[str, int]
    unowned_tokens: int
    moving_tokens: int
    blocked_tokens: int


class StatusStore(Store):
    """What there is, for people."""

    def nodes(self, timeout: float | None = None) -> list[NodeInfo]:
        """The node table, oldest first, with what each node owns.

        Args:
            timeout: Seconds without a heartbeat after which a node is shown as dead; None: each
                node's own.
        """
        rows = cast(
            list[NodeInfo],
            self._dicts('status.nodes', {'timeout': timeout, 'lease': LEASE_FRACTION}),
        )
        leader = next((row for row in rows if row['alive']), None)
        if leader is not None:
            leader['is_leader'] = True
        return rows

    def assignment(self) -> list[Segment]:
        """Every row of the assignment table, by token."""
        return [Segment(**row) for row in self._dicts('status.assignment')]

    def groups(self) -> list[GroupRow]:
        """The queue groups, by name, but for those that nobody belongs to and that own nothing."""
        ids, nodes, cluster = self._groups(), self.nodes(), self.cluster()
        if not ids or cluster is None:
            return []
        rings = cut_by_group(self._ring(), cluster['total_tokens'])
        found = [
            _group_row(name, nodes, rings.get(number, ()), cluster['total_tokens'])
            for name, number in ids.items()
        ]
        return [row for row in found if row['nodes']]

    def _groups(self) -> dict[str, int]:
        return dict(self._rows('status.groups'))

    def _ring(self) -> list[Segment]:
        """Every row of all queue groups, by token."""
        return [Segment(**row) for row in self._dicts('status.ring')]

    def group_id(self, group: str) -> int:
        """The id of a queue group.

        Raises:
            JobSyncError: There is none of that name.
        """
        ids = self._groups()
        if group and group not in ids:
            names = ', '.join(map(repr, ids)) or 'none, as no node consumes a queue'
            raise JobSyncError(
                f'there is no queue group {group!r}; there are: {names}. It has the name of its '
                'queue, unless the setting queue_groups gives it another'
            )
        return ids.get(group, PLAIN)

    def rebalances(self, limit: int = 20) -> list[RebalanceRow]:
        """The last plans, newest first."""
        return cast(list[RebalanceRow], self._dicts('status.rebalances', {'limit': limit}))

    def cluster(self) -> ClusterRow | None:
        """The cluster's settings and counters; None before the first node has registered."""
        return next(iter(cast(list[ClusterRow], self._dicts('status.cluster'))), None)

    def blocked(self) -> list[BlockedRange]:
        """Ranges that no live node may have, with the locks that say so."""
        segments = [segment for segment in self.assignment() if segment.blocked]
        if not segments:
            return []
        pins = [pin for pin in self._pins() if pin.group in (None, PLAIN)]
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

    def owner(self, token: int) -> str | None:
        """The node that the database names for the token."""
        row = self._row('status.owner', {'token': token})
        return row[0] if row else None

    def explain(self, text: str, token: int, group: str = '') -> Explanation:
        """Who owns a task and why.

        Args:
            text: The task's id as text.
            token: What it hashes to.
            group: The queue group in which it is asked for; '': that of the plain Job.

        Raises:
            JobSyncError: There is no such group.

        Returns:
            task_id, token, owner, since, version, blocked, moving_to, lock (its row, or None),
                pattern (the pattern of the lock that decides with the present nodes, or None),
                others (further locked tasks on the same token), next (who would own it if the owner
                went), owner_silent_sec (where the owner missed its lease), ledger (the row of a key
                of that text, or None), audit and claim (as TaskStore.history tells them).
        """
        number = self.group_id(group)
        place = number * GROUP_SPAN + token
        found = self._dicts('status.ownership', {'token': place})
        row: Mapping[str, Any] = found[0] if found else {}
        members = [member for member in self._members() if number in member.groups]
        pins = [pin for pin in self._pins() if pin.group in (None, number)]
        lock = LockStore(self.connection, self._tables).of_task(text)
        if lock is not None and lock['queue'] not in (None, group):
            lock = None  # it counts in another group
        node = row.get('node')
        audit, claim = TaskStore(self.connection, self._tables).history(text)
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
            'ledger': self._execution(text),
            'owner_silent_sec': self._silence(node),
            'others': [pin.task_id for pin in pins if pin.token == token and pin.task_id != text],
            'next': self._next_owner(place, row.get('moving_to') or node),
            'audit': audit,
            'claim': claim,
        }

    def _execution(self, key: str) -> ExecutionInfo | None:
        rows = cast(list[ExecutionInfo], self._dicts('status.execution', {'key': key}))
        return rows[0] if rows else None

    def _silence(self, name: str | None) -> float | None:
        """Seconds since a node's last heartbeat, if it has missed its lease: it is dead, or about
        to be found so.
        """
        return next(
            (row['age_sec'] for row in self.nodes() if row['name'] == name and not row['alive']),
            None,
        )

    def set_drain(self, name: str, draining: bool) -> bool:
        """Make a node give all its tokens away and stay alive, or take part again.

        Returns:
            Whether that changed anything.

        Raises:
            JobSyncError: There is no such node, or it has not become active yet.
        """
        found = dict(self._rows('status.states'))
        _check_name(found, name)
        if found[name] == 'joining':
            raise JobSyncError(
                f'node {name!r} is still joining and owns nothing yet: try again when it is '
                'active, or stop it'
            )
        first, second = self._tables.advisory
        return bool(
            self._rows(
                'status.change_state',
                {
                    'first': first,
                    'second': second,
                    'name': name,
                    'from': 'active' if draining else 'draining',
                    'to': 'draining' if draining else 'active',
                    'channel': self._tables.channel,
                },
            )
        )

    def plan_without(self, name: str) -> list[Move]:
        """What would move, and where, if the node were drained now. Nothing is written.

        Raises:
            JobSyncError: There is no such node.
        """
        settings = self.cluster()
        members = self._members(keep=name)
        _check_name({member.name: member.state for member in members}, name)
        if settings is None:
            return []
        before = self._ring()
        return moves(before, _without(members, before, self._pins(), settings, name))

    def _next_owner(self, token: int, current: str | None) -> str | None:
        settings = self.cluster()
        if settings is None or current is None:
            return None
        after = _without(self._members(), self._ring(), self._pins(), settings, current)
        return next(
            (holder(segment) for segment in after if segment.lo <= token < segment.hi), None
        )

    def _members(self, keep: str | None = None) -> list[Member]:
        ids = self._groups()
        return [
            Member(
                row['name'],
                row['incarnation'],
                row['beat'],
                row['created_on'].timestamp(),
                row['state'],
                row['weight'],
                (PLAIN, *sorted(ids[name] for name in row['groups'] if name in ids)),
            )
            for row in self.nodes()
            if row['alive'] or row['name'] == keep
        ]

    def _pins(self) -> list[Pin]:
        settings = self.cluster()
        if settings is None:
            return []
        hash_function, total = HASH_FUNCTIONS[settings['hash_function']], settings['total_tokens']
        pins: list[Pin] = []
        ids = self._groups()
        for text, encoded, created_at, queue, loose in self._rows(
            'status.pins', {'size': PATTERN_BYTES, 'most': LOCKS}
        ):
            if queue is not None and queue not in ids:
                continue  # it counts in a group that no node has named
            # The leader ignores a row that is none as well, and says so.
            with contextlib.suppress(ConfigurationError):
                patterns = read_patterns(encoded)
                token = hash_function(text.encode()) % total
                pins.append(
                    Pin(text, token, patterns, created_at.timestamp(), ids.get(queue), loose)
                )
        return pins


def _matched(patterns: object, names: Sequence[str]) -> str | None:
    try:
        return matched_pattern(check_patterns(patterns), names)
    except ConfigurationError:  # the leader ignores such a lock
        return None


def _without(
    members: Sequence[Member],
    before: Sequence[Segment],
    pins: Sequence[Pin],
    settings: ClusterRow,
    name: str,
) -> tuple[Segment, ...]:
    rest = [
        member if member.name != name else replace(member, state='draining') for member in members
    ]
    return decide(rest, before, pins, settings['total_tokens'], settings['version'] + 1).segments


def _group_row(
    name: str, nodes: Sequence[NodeInfo], rows: Sequence[Segment], total: int
) -> GroupRow:
    members = [node['name'] for node in nodes if name in node['groups']]
    owned = dict.fromkeys(members, 0)
    for row in rows:
        if row.node is not None:
            owned[row.node] = owned.get(row.node, 0) + row.hi - row.lo
    return {
        'queue_group': name,
        'members': members,
        'nodes': owned,
        'unowned_tokens': total - sum(owned.values()),
        'moving_tokens': sum(row.hi - row.lo for row in rows if row.moving),
        'blocked_tokens': sum(row.hi - row.lo for row in rows if row.blocked),
    }


def _check_name(found: Mapping[str, object], name: str) -> None:
    if name not in found:
        names = ', '.join(sorted(found)) or 'none: no node is registered'
        raise JobSyncError(f'there is no node {name!r}; the nodes are: {names}')
