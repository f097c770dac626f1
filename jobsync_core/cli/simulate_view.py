"""`jobsync simulate`: balance and movement as bars."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.console import Console

from ..assignment.hashing import HASH_FUNCTIONS
from ..assignment.simulate import Change, Share, Simulation, simulate
from .context import console, printable
from .status_view import table

__all__ = ['simulate_command']

_BAR = 40
_NODES_SHOWN = 40


@click.command('simulate')
@click.option(
    '--nodes',
    default=5,
    show_default=True,
    type=click.IntRange(1, 10_000),
    help='Nodes of the cluster.',
)
@click.option(
    '--tasks',
    default=1_000,
    show_default=True,
    type=click.IntRange(0, 10_000_000),
    help='Tasks with ids 0, 1, 2 …',
)
@click.option(
    '--tokens',
    default=10_000,
    show_default=True,
    type=click.IntRange(1, 1_000_000),
    help='total_tokens.',
)
@click.option(
    '--hash-function',
    default='double_sha256',
    show_default=True,
    type=click.Choice(sorted(HASH_FUNCTIONS)),
)
@click.option(
    '--group',
    'groups',
    multiple=True,
    metavar='NAME=NODES',
    help='A queue group, and how many of the nodes consume it; may be given again. Each has tokens '
    'of its own, and as many tasks.',
)
def simulate_command(
    nodes: int, tasks: int, tokens: int, hash_function: str, groups: tuple[str, ...]
) -> None:
    """Show how evenly tasks would spread and how much would move, without a database."""
    out = console()
    members = [_group(text, nodes) for text in groups]
    if len({name for name, _ in members}) < len(members):
        raise click.UsageError('--group: give each name once')
    for name, consuming in members:
        # Each group is planned by itself, over its own members.
        _print(out, consuming, tasks, tokens, hash_function, f'queue group {name}: ')
    if not members:
        _print(out, nodes, tasks, tokens, hash_function)


def _group(text: str, nodes: int) -> tuple[str, int]:
    name, _, number = text.rpartition('=')
    if not name or not (number.isascii() and number.isdecimal()) or not 0 < int(number) <= nodes:
        raise click.UsageError(
            f'--group {text!r}: give NAME=NODES, such as gpu=2, with no more nodes than --nodes '
            f'says ({nodes})'
        )
    return name, int(number)


def _print(
    out: Console, nodes: int, tasks: int, tokens: int, hash_function: str, what: str = ''
) -> None:
    found = simulate(nodes, tasks, tokens, hash_function)
    out.print(
        f'{printable(what)}{nodes} nodes, {tasks:,} tasks, {tokens:,} tokens, {hash_function}'
    )
    _print_shares(out, found)
    _print_change(out, found, found.joined, 'joins', tokens // (nodes + 1))
    if found.left is not None:
        _print_change(
            out,
            found,
            found.left,
            'leaves',
            next(share.tokens for share in found.shares if share.node == found.left.node),
        )


def _print_shares(out: Console, found: Simulation) -> None:
    block = '█' if (out.encoding or '').lower().startswith('utf') else '#'
    most = max((share.tasks for share in found.shares), default=0) or 1
    result = table('node', 'tokens', 'tasks', '', right=('tokens', 'tasks'))
    for share in found.shares[:_NODES_SHOWN]:
        result.add_row(
            share.node,
            f'{share.tokens:,}',
            f'{share.tasks:,}',
            block * round(_BAR * share.tasks / most),
        )
    out.print(result)
    if len(found.shares) > _NODES_SHOWN:
        out.print(f'and {len(found.shares) - _NODES_SHOWN:,} more nodes')
    out.print(f'tasks per node: {_spread(found.shares)}')
    if found.tasks > found.total_tokens:
        out.print(
            'More tasks than tokens: tasks share tokens and move together; ten tokens a task is '
            'the rule of thumb.'
        )


def _print_change(out: Console, found: Simulation, change: Change, verb: str, least: int) -> None:
    tasks = f'{change.tasks_moved:,} of {found.tasks:,} tasks'
    if found.tasks:
        tasks += f' ({change.tasks_moved / found.tasks:.1%})'
    out.print(
        f'{change.node} {verb}: {change.tokens_moved:,} tokens move '
        f'({change.tokens_moved / found.total_tokens:.1%}; '
        f'the least possible is {least:,}), {tasks}; then tasks per node: {_spread(change.shares)}'
    )


def _spread(shares: Sequence[Share]) -> str:
    counts = [share.tasks for share in shares]
    mean = sum(counts) / len(counts)
    text = f'{min(counts):,} to {max(counts):,}, mean {mean:,.1f}'
    if mean:
        text += f', busiest {max(counts) / mean - 1:+.1%}'
    return text
