"""What a cluster costs and does with the default settings: the steady state, a node's death, a
join.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from itertools import combinations

from .meter import Meter
from .nodes import ChildFailed, Cluster, Node
from .peer import Side
from .rounds import Bench, Samples, eventually
from .table import Limit, Row

__all__ = ['failover', 'follower', 'join']

_TOKENS = 10_000
_GRACE = 4
#: In the order in which the nodes are made, which is that of their age.
_ROLES = ('leader', 'successor', 'follower')
_PHASE = (
    'The peer polls tokens every 5 s, and every 30 s once 300 s have passed without a '
    'change: then it takes up to 25 s longer.'
)


def follower(bench: Bench) -> list[Row]:
    """Traffic per minute of each node in a cluster of three in which nothing happens: the leader,
    its successor, a follower.
    """
    seconds = 30 if bench.quick else 120
    samples = Samples()
    with contextlib.ExitStack() as stack:
        meters: dict[tuple[str, str], Meter] = {}
        for side in bench.sides:
            try:
                # The longer interval at once: the peer takes it after 300 s without a change.
                cluster = stack.enter_context(
                    Cluster(bench.databases, side, {'token_refresh_initial_interval_sec': 30})
                )
                for role in _ROLES:
                    meter = stack.enter_context(
                        Meter(cluster.database['host'], cluster.database['port'])
                    )
                    cluster.start(role, wait=_GRACE, host='127.0.0.1', port=meter.port)
                    meters[side.key, role] = meter
                cluster.enter_by_age()
            except ChildFailed as failure:
                samples.failures[side.key] = str(failure)
        time.sleep(10)  # what entering sets off has come to an end by then
        before = {key: meter.counts.copy() for key, meter in meters.items()}
        time.sleep(seconds)
        passed = {key: meter.counts.since(before[key]) for key, meter in meters.items()}
    for side in bench.sides:
        for role in _ROLES:
            if side.key not in samples.failures:
                samples.add(
                    side,
                    {
                        f'{role} {name}': value * 60 / seconds
                        for name, value in passed[side.key, role].items()
                    },
                )
    bench.raw['follower'] = samples.values
    note = (
        f'Counted on the wire for {seconds} s, with the default settings, and the peer with the '
        'interval that it takes after 300 s. '
        'Statements without BEGIN and COMMIT; round trips with them.'
    )
    rows = [
        samples.row(
            'follower statements',
            'steady follower, statements',
            '1/min',
            note=note,
            limit=Limit(13),
        )
    ]
    rows += [
        samples.row(f'follower {name}', f'steady follower, {label}', '1/min', note=note)
        for name, label in (
            ('round_trips', 'round trips'),
            ('rows', 'rows received'),
            ('bytes', 'bytes both ways'),
        )
    ]
    successor = (
        'The second oldest node: it looks after the leader. The peer has no such role; '
        'its second node is a follower.'
    )
    rows.append(
        samples.row('successor statements', 'steady successor, statements', '1/min', note=successor)
    )
    rows.append(
        samples.row('successor bytes', 'steady successor, bytes both ways', '1/min', note=successor)
    )
    rows.append(samples.row('leader statements', 'steady leader, statements', '1/min', note=note))
    rows.append(samples.row('leader bytes', 'steady leader, bytes both ways', '1/min', note=note))
    return rows


def failover(bench: Bench) -> list[Row]:
    """SIGKILL of a follower and then of the leader, of three nodes with the default settings, until
    every token has a live owner.
    """

    def measure(side: Side) -> dict[str, float]:
        with Cluster(bench.databases, side, {}) as cluster:
            for number in range(3):
                cluster.start(f'node-{number}', wait=_GRACE)
            cluster.enter_by_age()
            eventually(lambda: len(cluster.owners()) == _TOKENS, 60)
            figures = {}
            for role, node in (('follower', cluster.nodes[1]), ('leader', cluster.nodes[0])):
                began = time.monotonic()
                node.kill()
                cluster.forget(node)
                figures[role] = eventually(lambda: len(cluster.owners()) == _TOKENS, 180) - began
            return figures

    samples = bench.run('failover', measure)
    return [
        samples.row(
            'follower',
            'failover, SIGKILL of a follower until all tokens are owned',
            's',
            note=_PHASE,
            limit=Limit(16),
        ),
        samples.row(
            'leader',
            'failover, SIGKILL of the leader until all tokens are owned',
            's',
            note=_PHASE,
            limit=Limit(16),
        ),
    ]


def join(bench: Bench) -> list[Row]:
    """A third node joins two, with the default settings: who may claim 100 tasks, at every
    moment.
    """

    def measure(side: Side) -> dict[str, float]:
        with Cluster(bench.databases, side, {}) as cluster:
            for number in range(2):
                cluster.start(f'node-{number}', wait=_GRACE)
            cluster.enter()
            eventually(lambda: len(cluster.owners()) == _TOKENS, 60)
            joiner = cluster.start('node-2')
            for node in cluster.nodes:
                node.ask('watch', count=100)
            time.sleep(0.5)
            began = time.monotonic()
            cluster.enter([joiner])
            entered = time.monotonic()
            eventually(lambda: _single(cluster), 60)
            time.sleep(0.5)
            overlap, gap = _overlap_and_gap(cluster.nodes, began)
            return {'overlap': overlap, 'gap': gap, 'entered': entered - began}

    samples = bench.run('join', measure)
    note = (
        'The longest of 100 tasks, each sampled about every 5 ms; overlaps err on the short '
        'side, gaps on the long side.'
    )
    return [
        samples.row(
            'overlap',
            'join, longest time for which two nodes may claim one task',
            's',
            note=note,
            limit=Limit(0),
        ),
        samples.row('gap', 'join, longest time for which no node may claim a task', 's', note=note),
        samples.row(
            'entered', 'join, begin of entering until the node may claim', 's', note=_PHASE
        ),
    ]


def _single(cluster: Cluster) -> bool:
    owners = cluster.owners()
    return len(owners) == _TOKENS and all(len(names) == 1 for names in owners.values())


def _overlap_and_gap(nodes: Sequence[Node], began: float) -> tuple[float, float]:
    """Seconds: the longest total overlap of a task's spans on different nodes, and the longest time
    without a span since `began`.
    """
    watched = [node.ask('watched') for node in nodes]
    overlaps, gaps = [], []
    for spans in zip(*watched, strict=True):
        overlaps.append(
            sum(
                max(0.0, min(one[1], two[1]) - max(one[0], two[0]))
                for mine, others in combinations(spans, 2)
                for one in mine
                for two in others
            )
        )
        end = began
        longest = 0.0
        for low, high in sorted(span for node in spans for span in node):
            if low > end:
                longest = max(longest, low - end)
            end = max(end, high)
        gaps.append(longest)
    return max(overlaps), max(gaps)
