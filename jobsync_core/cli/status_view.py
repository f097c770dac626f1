"""The picture that `jobsync status` draws of a cluster, and its JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from rich import box
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..assignment.patterns import NodeNames
from ..results import NodeInfo
from ..store.queues import QueueStore
from ..store.status import BlockedRange, ClusterRow, GroupRow, RebalanceRow, StatusStore
from ..worker.queue_groups import REMEDY, disagreements
from .context import printable

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..store.tables import Tables

__all__ = [
    'as_json',
    'left_to_nobody',
    'patterns',
    'rebalance_table',
    'render',
    'snapshot',
    'table',
    'takers',
]

_LOCKS_SHOWN = 5


class Snapshot(TypedDict):
    """Everything that `status` shows."""

    cluster: ClusterRow | None
    leader: str | None
    nodes: list[NodeInfo]
    groups: list[GroupRow]
    disagreements: list[str]
    unowned_tokens: int
    moving_tokens: int
    blocked_tokens: int
    blocked: list[BlockedRange]
    rebalances: list[RebalanceRow]


def snapshot(connection: PgConnection, tables: Tables, rebalances: int = 5) -> Snapshot:
    """Read it, in one transaction."""
    nodes = StatusStore(connection, tables).nodes()
    segments = StatusStore(connection, tables).assignment()
    cluster = StatusStore(connection, tables).cluster()
    owned = sum(s.hi - s.lo for s in segments if s.node is not None)
    return {
        'cluster': cluster,
        'leader': next((node['name'] for node in nodes if node['is_leader']), None),
        'nodes': nodes,
        'groups': StatusStore(connection, tables).groups(),
        'disagreements': disagreements(QueueStore(connection, tables).divided()),
        # Tokens without any row are nobody's, too.
        'unowned_tokens': max(0, cluster['total_tokens'] - owned)
        if cluster and (segments or nodes)
        else 0,
        'moving_tokens': sum(s.hi - s.lo for s in segments if s.moving),
        'blocked_tokens': sum(s.hi - s.lo for s in segments if s.blocked),
        'blocked': StatusStore(connection, tables).blocked(),
        'rebalances': StatusStore(connection, tables).rebalances(rebalances),
    }


def as_json(value: object, indent: int | None = 2) -> str:
    """JSON with times in ISO 8601."""
    return json.dumps(value, indent=indent, default=_plain)


def _plain(value: object) -> object:
    return (
        value.isoformat() if isinstance(value, (datetime.date, datetime.datetime)) else str(value)
    )


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table in the house style; columns named in `right` are numbers."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        result.add_column(column, justify='right' if column in right else 'left', overflow='fold')
    return result


def render(found: Snapshot, appname: str) -> RenderableType:
    """The snapshot as tables."""
    cluster = found['cluster']
    if cluster is None:
        return Text(f'cluster {appname}: no node has registered yet')
    parts: list[RenderableType] = [
        Text(
            f'cluster {appname}: {cluster["total_tokens"]:,} tokens, {cluster["hash_function"]}, '
            f'version {cluster["version"]}, '
            f'leader {printable(found["leader"] or "none")}'
        )
    ]
    parts.append(
        _node_table(found['nodes'], cluster['total_tokens'])
        if found['nodes']
        else Text('no node is registered')
    )
    for count, what, style in (
        (found['moving_tokens'], 'on their way to another node', ''),
        (found['unowned_tokens'], 'without an owner', 'yellow'),
        (found['blocked_tokens'], _why_blocked(found), 'red'),
    ):
        if count:
            parts.append(Text(f'{count:,} tokens {what}', style=style))
    if _locks_block(found):
        parts += _blocked_lines(found['blocked'])
    if found['groups']:
        parts += [
            Text('\nqueue groups: the nodes that consume a queue own the keys in it'),
            _group_table(found['groups'], cluster['total_tokens']),
            *_group_lines(found['groups'], found['nodes']),
            *(
                Text(f'{printable(problem)}: {REMEDY}', style='red')
                for problem in found['disagreements']
            ),
        ]
    if found['rebalances']:
        parts += [Text('\nlast rebalances'), rebalance_table(found['rebalances'])]
    return Stack(*parts)


def _node_table(nodes: Sequence[NodeInfo], total: int) -> Table:
    result = table(
        'node',
        'state',
        'tokens',
        'share',
        'weight',
        'heartbeat',
        'lease',
        'host',
        'pid',
        right=('tokens', 'share', 'weight', 'heartbeat', 'lease', 'pid'),
    )
    for node in nodes:
        state = ('leader, ' if node['is_leader'] else '') + (
            node['state'] if node['alive'] else 'silent'
        )
        if node['alive'] and node['silent']:
            state += ', without its broker'
        result.add_row(
            printable(node['name']),
            state,
            f'{node["tokens"]:,}',
            f'{node["tokens"] / total:.1%}',
            f'{node["weight"]:g}',
            f'{node["age_sec"]:.1f} s ago',
            f'{max(0.0, node["lease_sec"] - node["age_sec"]):.1f} s left',
            printable(node['host']),
            str(node['pid']),
            style='' if node['alive'] else 'red',
        )
    return result


def _group_table(groups: Sequence[GroupRow], total: int) -> Table:
    result = table('queue group', 'node', 'tokens', 'share', right=('tokens', 'share'))
    for group in groups:
        name = printable(group['queue_group'])
        for number, (node, tokens) in enumerate(group['nodes'].items()):
            leaves = '' if node in group['members'] else ' (gives them away)'
            result.add_row(
                '' if number else name,
                printable(node) + leaves,
                f'{tokens:,}',
                f'{tokens / total:.1%}',
            )
    return result


def _group_lines(groups: Sequence[GroupRow], nodes: Sequence[NodeInfo]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for group in groups:
        name = printable(group['queue_group'])
        live = [node for node in nodes if node['alive'] and node['name'] in group['members']]
        if not live:
            lines.append(
                Text(f'{name}: no live node consumes it: its messages stay in their queue')
            )
            continue
        if group['moving_tokens']:
            lines.append(
                Text(f'{name}: {group["moving_tokens"]:,} tokens on their way to another node')
            )
        if not any(node['state'] == 'active' for node in live):
            lines.append(
                Text(
                    f'{name}: every live node that consumes it is draining or still joining: its '
                    'messages wait; `jobsync undrain NODE` lets one take them',
                    style='red',
                )
            )
            continue
        for count, what, style in (
            (group['unowned_tokens'], 'without an owner', 'yellow'),
            (group['blocked_tokens'], 'blocked: no live node of it matches their locks', 'red'),
        ):
            if count:
                lines.append(Text(f'{name}: {count:,} tokens {what}', style=style))
    return lines


def takers(nodes: Sequence[NodeInfo], node: str) -> list[NodeInfo]:
    """The other nodes that may own tokens."""
    return [
        row for row in nodes if row['alive'] and row['state'] == 'active' and row['name'] != node
    ]


def left_to_nobody(nodes: Sequence[NodeInfo], node: str) -> list[str]:
    """The queue groups of a node of which no other member may own tokens."""
    others = {group for row in takers(nodes, node) for group in row['groups']}
    mine = (group for row in nodes if row['name'] == node for group in row['groups'])
    return sorted(set(mine) - others)


def patterns(value: object) -> str:
    """A lock's patterns, whatever is in its row."""
    return (
        ', '.join(map(str, value))
        if isinstance(value, list)
        else f'{value} (no list of patterns: this lock is ignored)'
    )


def _why_blocked(found: Snapshot) -> str:
    live = [node for node in found['nodes'] if node['alive']]
    if not live:
        return (
            'blocked by the last plan: no node is alive, and the first that starts makes a new one'
        )
    # Before the locks: such a plan blocks every token, those with a lock among them.
    if not _locks_block(found):
        return (
            'blocked: every live node is draining or still joining, `jobsync undrain NODE` '
            'lets one take them'
        )
    locks = [lock for item in found['blocked'] for lock in item['locks']]
    draining = NodeNames(node['name'] for node in live if node['state'] == 'draining')
    matching = sorted({name for lock in locks for name in draining.eligible(lock['node_patterns'])})
    if matching:
        return (
            'blocked: the nodes that match their locks are draining: '
            f'{", ".join(map(printable, matching[:_LOCKS_SHOWN]))}'
        )
    return 'blocked: no live node matches their locks'


def _locks_block(found: Snapshot) -> bool:
    takes_part = any(node['alive'] and node['state'] == 'active' for node in found['nodes'])
    return takes_part and any(item['locks'] for item in found['blocked'])


def _blocked_lines(blocked: Sequence[BlockedRange]) -> list[RenderableType]:
    locks = [lock for item in blocked for lock in item['locks']]
    lines: list[RenderableType] = [
        Text(
            f'  task {printable(lock["task_id"])} wants '
            f'{", ".join(map(printable, lock["node_patterns"]))}',
            style='red',
        )
        for lock in locks[:_LOCKS_SHOWN]
    ]
    if len(locks) > _LOCKS_SHOWN:
        lines.append(Text(f'  and {len(locks) - _LOCKS_SHOWN:,} more', style='red'))
    return lines


def rebalance_table(rows: Sequence[RebalanceRow]) -> Table:
    """Plans, newest first."""
    result = table('when', 'reason', 'leader', 'nodes', 'moved', 'took', right=('moved', 'took'))
    for row in rows:
        result.add_row(
            f'{row["triggered_at"]:%Y-%m-%d %H:%M:%S}',
            printable(row['trigger_reason']),
            printable(row['leader_node']),
            f'{row["nodes_before"]} → {row["nodes_after"]}',
            f'{row["tokens_moved"]:,}',
            f'{row["duration_ms"]} ms',
        )
    return result
