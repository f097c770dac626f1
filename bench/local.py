"""What one node costs: claims, memory, recording tasks, the ledger."""

from __future__ import annotations

import contextlib
from functools import partial

from .nodes import FAST, ChildFailed, Cluster
from .peer import Side
from .rounds import Bench, Samples
from .table import Limit, Row

__all__ = ['claims', 'ledger', 'memory', 'tasks']

_HASHES = ('double_sha256', 'sha256', 'md5')
_SIZES = (10_000, 1_000_000)
_CPU = (
    'CPU time of the calling thread, which other work on the machine disturbs less than wall time.'
)

_BARE = (
    'In a process of its own, for comparison: entering contains it. It includes the import of the '
    'driver where the library imports it '
    'late, and what libpq takes for password authentication.'
)


def claims(bench: Bench) -> list[Row]:
    """`can_claim_task(Task(id))` for each hash function, of tasks that are this node's, and of some
    that are not.
    """
    rows = []
    for tokens in _SIZES:
        for name in _HASHES[:1] if bench.quick and tokens > _SIZES[0] else _HASHES:
            samples = _claims(bench, tokens, name, others=False)
            for kind in ('int', 'text'):
                rows.append(
                    samples.row(
                        f'True {kind}',
                        f'claim, {name}, {tokens:,} tokens, {kind} id',
                        'ns',
                        note=_CPU,
                        limit=Limit(0.75, ratio=True),
                    )
                )
    samples = _claims(bench, _SIZES[0], _HASHES[0], others=True)
    rows.append(
        samples.row(
            'False int',
            f'claim refused, {_HASHES[0]}, {_SIZES[0]:,} tokens',
            'ns',
            note=_CPU,
            limit=Limit(0.75, ratio=True),
        )
    )
    return rows


def _claims(bench: Bench, tokens: int, name: str, others: bool) -> Samples:
    """Both sides live at once and are asked in turns, for short bursts."""
    samples = Samples()
    settings = {**FAST, 'total_tokens': tokens, 'hash_function': name}
    with contextlib.ExitStack() as stack:
        nodes = {}
        for side in bench.sides:
            try:
                cluster = stack.enter_context(Cluster(bench.databases, side, settings))
                for number in range(2 if others else 1):
                    cluster.start(f'node-{number}', wait=3 if others else 0)
                cluster.enter()
                nodes[side.key] = cluster.nodes[0]
            except ChildFailed as failure:
                samples.failures[side.key] = str(failure)
        count = 20_000 if bench.quick else 50_000
        for side in [*bench.sides, *bench.turns(rounds=5)]:
            if side.key in samples.failures:
                continue
            for kind, expected in (('int', False),) if others else (('int', True), ('text', True)):
                try:
                    cost = nodes[side.key].ask('claims', kind=kind, count=count, expected=expected)
                    samples.add(side, {f'{expected} {kind}': cost})
                except ChildFailed as failure:
                    samples.failures[side.key] = str(failure)
                    break
    bench.raw[f'claims {name} {tokens} {"others" if others else "own"}'] = samples.values
    return samples


def memory(bench: Bench) -> list[Row]:
    """Resident memory that a single node's process gains between the import of the library and the
    end of entering a Job.
    """
    found = {}
    for tokens in _SIZES:
        found[tokens] = bench.run(f'memory {tokens}', partial(_memory, bench, tokens))
    small, large = (
        found[tokens].row('MB', f'memory added by entering, {tokens:,} tokens', 'MB')
        for tokens in _SIZES
    )
    more = [
        None if one is None or two is None else two - one
        for one, two in ((small.ours, large.ours), (small.peer, large.peer))
    ]
    return [
        Row(small.label, small.unit, small.ours, small.peer, small.note, Limit(3)),
        large,
        Row(
            'memory, what 1,000,000 tokens add to that of 10,000',
            'MB',
            more[0],
            more[1],
            large.note,
            Limit(2),
        ),
        found[_SIZES[0]].row(
            'bare', 'memory, what one connection of the bare driver adds', 'MB', note=_BARE
        ),
    ]


def _memory(bench: Bench, tokens: int, side: Side) -> dict[str, float]:
    with Cluster(bench.databases, side, {**FAST, 'total_tokens': tokens}) as cluster:
        node = cluster.spawn('node-0')
        before = node.ask('memory')
        cluster.start('node-0', node=node)
        cluster.enter()
        added = node.ask('memory') - before
        bare = cluster.spawn('bare')
        before = bare.ask('memory')
        bare.ask('connect', driver=side.driver, database=cluster.database)
        return {'MB': added / 1e6, 'bare': (bare.ask('memory') - before) / 1e6}


def tasks(bench: Bench) -> list[Row]:
    """Recording tasks: add_task for each, then one write_audit."""
    count = 100 if bench.quick else 500

    def measure(side: Side) -> dict[str, float]:
        with Cluster(bench.databases, side, FAST) as cluster:
            node = cluster.start('node-0')
            cluster.enter()
            figures: dict[str, float] = node.ask('tasks', count=count)
            return figures

    samples = bench.run('tasks', measure)
    return [
        samples.row('add', 'add_task', 'ms'),
        samples.row('audit', f'write_audit of {count} tasks', 'ms'),
    ]


def ledger(bench: Bench) -> list[Row]:
    """An execution begun and finished: `with job.once(key): pass`."""
    count = 400 if bench.quick else 2_000
    samples = Samples()
    with Cluster(bench.databases, bench.sides[0], FAST) as cluster:
        try:
            node = cluster.start('node-0')
            cluster.enter()
            for number in range(1 if bench.quick else 4):
                for threads in (1, 8):
                    figures = node.ask(
                        'ledger', count=count, threads=threads, prefix=f'{number}-{threads}'
                    )
                    samples.add(
                        bench.sides[0],
                        {f'{metric} {threads}': value for metric, value in figures.items()},
                    )
        except ChildFailed as failure:
            samples.failures['ours'] = str(failure)
    bench.raw['ledger'] = samples.values
    why = 'The peer has no record of completed executions.'
    return [
        samples.row('ms 1', 'ledger, begin and finish, 1 thread', 'ms', note=why),
        samples.row('rate 1', 'ledger, executions, 1 thread', '1/s', note=why, more=True),
        samples.row('rate 8', 'ledger, executions, 8 threads', '1/s', note=why, more=True),
    ]
