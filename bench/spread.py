"""How tokens are spread over nodes, what a change moves, and how long a first plan takes."""

from __future__ import annotations

import statistics
import time

from .nodes import FAST, ChildFailed, Cluster
from .peer import Side
from .rounds import Bench, eventually
from .table import Limit, Row

__all__ = ['distribution', 'first_distribution', 'locks', 'movement']

_TOKENS = 10_000
_ID_KINDS = ('int', 'text', 'path', 'stride')
#: Seconds for which nodes wait for each other, enough for all of them to register on a busy
#: machine.
_GRACE = 4


def distribution(bench: Bench) -> list[Row]:
    """Balance of 600 tasks over 7 nodes, for several kinds of ids."""

    def measure(side: Side) -> dict[str, float]:
        with Cluster(bench.databases, side, FAST) as cluster:
            for number in range(7):
                cluster.start(f'node-{number}', wait=_GRACE)
            cluster.enter()
            _settle(cluster, _TOKENS)
            tokens = [sum(high - low for low, high in node.ask('owned')) for node in cluster.nodes]
            counts = [
                [node.ask('claimable', kind=kind, count=600) for node in cluster.nodes]
                for kind in _ID_KINDS
            ]
        if any(sum(shares) != 600 for shares in counts):
            raise ChildFailed(
                f'600 tasks were claimable {[sum(shares) for shares in counts]} times'
            )
        return {
            'tokens': max(tokens) - min(tokens),
            'most': statistics.mean(max(shares) / (600 / 7) for shares in counts),
            'deviation': statistics.mean(statistics.pstdev(shares) / (600 / 7) for shares in counts)
            * 100,
        }

    samples = bench.run('distribution', measure)
    note = (
        f'Over {len(_ID_KINDS)} kinds of task ids. Chance alone gives a deviation of about 10 '
        '%: both sides hash in the same way.'
    )
    return [
        samples.row(
            'tokens',
            'balance, 10,000 tokens over 7 nodes: most less least',
            'tokens',
            limit=Limit(1),
        ),
        samples.row(
            'most', 'balance, 600 tasks over 7 nodes: busiest over mean', 'ratio', note=note
        ),
        samples.row(
            'deviation', 'balance, 600 tasks over 7 nodes: standard deviation', '%', note=note
        ),
    ]


def movement(bench: Bench) -> list[Row]:
    """Tokens that change owner when a fifth node joins four, and when one of five leaves."""

    def measure(side: Side) -> dict[str, float]:
        with Cluster(bench.databases, side, FAST) as cluster:
            for number in range(4):
                cluster.start(f'node-{number}', wait=_GRACE)
            cluster.enter()
            four = _settle(cluster, _TOKENS)
            began = time.monotonic()
            cluster.enter([cluster.start('node-4')])
            five = _settle(cluster, _TOKENS)
            joined = time.monotonic() - began
            leaver = cluster.nodes[2]
            began = time.monotonic()
            leaver.ask('leave')
            cluster.forget(leaver)
            rest = _settle(cluster, _TOKENS)
            left = time.monotonic() - began
            held = sum(owner == leaver.name for owner in five.values())
            return {
                'join': _moved(four, five) - _TOKENS // 5,
                'leave': _moved(five, rest) - held,
                'join seconds': joined,
                'leave seconds': left,
            }

    samples = bench.run('movement', measure)
    note = 'Polling intervals of 1 s on both sides; the defaults are longer.'
    return [
        samples.row(
            'join',
            'movement, join of a 5th node: tokens more than the least (2,000)',
            'tokens',
            limit=Limit(0),
        ),
        samples.row(
            'leave',
            'movement, leave of one of 5: tokens more than its own',
            'tokens',
            limit=Limit(0),
        ),
        samples.row('join seconds', 'join until every token has its new owner', 's', note=note),
        samples.row(
            'leave seconds', 'graceful leave until every token has its new owner', 's', note=note
        ),
    ]


def first_distribution(bench: Bench) -> list[Row]:
    """The first distribution of 1,000,000 tokens over 5 nodes."""
    tokens = 1_000_000

    def measure(side: Side) -> dict[str, float]:
        with Cluster(
            bench.databases, side, {**FAST, 'total_tokens': tokens, 'heartbeat_timeout_sec': 15}
        ) as cluster:
            for number in range(5):
                cluster.start(f'node-{number}', wait=_GRACE + 2)
            entries = cluster.enter()
            owned = sum(high - low for node in cluster.nodes for low, high in node.ask('owned'))
            if owned != tokens:
                raise ChildFailed(f'{owned:,} of {tokens:,} tokens are owned')
            grace = max(entry['began'] for entry in entries) + _GRACE + 2
            return {
                'seconds': max(entry['entered'] for entry in entries) - grace,
                'logged': _logged(cluster),
            }

    samples = bench.run('first distribution', measure)
    return [
        samples.row(
            'logged',
            'first distribution, 1,000,000 tokens, 5 nodes: the round as its leader logs it',
            's',
            limit=Limit(0.5),
        ),
        samples.row(
            'seconds',
            'first distribution, 1,000,000 tokens, 5 nodes: end of grace until all may claim',
            's',
            limit=Limit(0.5),
        ),
    ]


def locks(bench: Bench) -> list[Row]:
    """10,000 locks on 100,000 tokens: registering them in one call, and the first plan that takes
    them into account.
    """
    count = 2_000 if bench.quick else 10_000

    def measure(side: Side) -> dict[str, float]:
        with Cluster(
            bench.databases, side, {**FAST, 'total_tokens': 100_000, 'heartbeat_timeout_sec': 15}
        ) as cluster:
            cluster.start('gpu-0', wait=_GRACE, locks={'count': count, 'pattern': 'gpu-%'})
            cluster.start('cpu-0', wait=_GRACE)
            entries = cluster.enter()
            pinned = cluster.nodes[0].ask('claimable', kind='text', count=count)
            if pinned != count:
                raise ChildFailed(f'{pinned:,} of {count:,} pinned tasks are where they belong')
            return {'register': entries[0]['registered'], 'plan': _logged(cluster)}

    samples = bench.run('locks', measure)
    limit = None if bench.quick else Limit(0.5)  # the target is for 10,000
    return [
        samples.row('register', f'locks, register {count:,} in one call', 's', limit=limit),
        samples.row(
            'plan',
            f'locks, plan 100,000 tokens with {count:,} locks, as the leader logs it',
            's',
            limit=limit,
        ),
    ]


def _settle(cluster: Cluster, tokens: int) -> dict[int, str]:
    """Wait until each token has exactly one owner and each node owns some; the owners."""
    found: dict[int, list[str]] = {}

    def settled() -> bool:
        nonlocal found
        found = cluster.owners()
        return (
            len(found) == tokens
            and all(len(names) == 1 for names in found.values())
            and len({names[0] for names in found.values()}) == len(cluster.nodes)
        )

    eventually(settled, 120)
    return {token: names[0] for token, names in found.items()}


def _moved(before: dict[int, str], after: dict[int, str]) -> int:
    return sum(after[token] != owner for token, owner in before.items())


def _logged(cluster: Cluster) -> float:
    """Seconds of the first round that assigned tokens; both sides document the table."""
    rows = cluster.query(
        'select duration_ms from sync_rebalance where tokens_moved > 0 order by id limit 1'
    )
    if not rows or rows[0][0] is None:
        raise ChildFailed('the rebalance table has no first round')
    return float(rows[0][0]) / 1e3
