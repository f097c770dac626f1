"""How evenly a cluster would share its tasks, and how much moves when a node joins or leaves: the
real planner, no database.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from ..errors import ConfigurationError
from .hashing import HASH_FUNCTIONS
from .model import Range, Segment
from .planner import plan

__all__ = ['Change', 'Move', 'Share', 'Simulation', 'holder', 'moves', 'simulate']

Owners: TypeAlias = 'Sequence[tuple[int, int, str | None]]'


@dataclass(frozen=True)
class Move:
    """Tokens that change hands; None stands for nobody."""

    source: str | None
    target: str | None
    tokens: int


@dataclass(frozen=True)
class Share:
    """What one node holds."""

    node: str
    tokens: int
    tasks: int


@dataclass(frozen=True)
class Change:
    """A node joins or leaves: the shares afterwards, and how many tokens and tasks changed their
    node.
    """

    node: str
    shares: tuple[Share, ...]
    tokens_moved: int
    tasks_moved: int


@dataclass(frozen=True)
class Simulation:
    """A cluster as planned at first, then with one node more, then with one less. `left` is None
    for a single node.
    """

    total_tokens: int
    tasks: int
    shares: tuple[Share, ...]
    joined: Change
    left: Change | None


def holder(segment: Segment) -> str | None:
    """Who will own the tokens once every hand-over under way is done."""
    if segment.moving:
        return segment.moving_to
    return segment.node


def moves(before: Iterable[Segment], after: Iterable[Segment]) -> list[Move]:
    """What changes hands between two assignments, summed for each pair of nodes, the largest
    first. Tokens without a row are nobody's, as are those of a queue group without members.
    """
    return _moves(
        [(s.lo, s.hi, holder(s)) for s in before], [(s.lo, s.hi, holder(s)) for s in after]
    )


def simulate(
    nodes: int,
    tasks: int,
    total_tokens: int,
    hash_function: str = 'double_sha256',
    weights: Mapping[str, float] | None = None,
) -> Simulation:
    """Plan a cluster of `nodes` nodes over `total_tokens` tokens and hash the task ids 0 … tasks-1
    into it.

    Args:
        nodes: Number of nodes, named node-1, node-2 and so on.
        tasks: Number of tasks.
        total_tokens: Number of hash slots.
        hash_function: As in CoordinationConfig.
        weights: Weight by node name; 1 where none is given.

    Raises:
        ConfigurationError: A number is out of range, or the hash function is unknown.
    """
    for name, value, least, most in (
        ('nodes', nodes, 1, 10_000),
        ('tasks', tasks, 0, 10_000_000),
        ('total_tokens', total_tokens, 1, 1_000_000),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigurationError(
                f'{name}={value!r}: give a whole number from {least:,} to {most:,}'
            )
    if hash_function not in HASH_FUNCTIONS:
        raise ConfigurationError(
            f'hash_function={hash_function!r} is unknown: use one of '
            f'{", ".join(sorted(HASH_FUNCTIONS))}'
        )
    digest = HASH_FUNCTIONS[hash_function]
    placed = Counter(digest(str(task).encode()) % total_tokens for task in range(tasks))
    names = [f'node-{number}' for number in range(1, nodes + 2)]
    given = weights or {}
    present = {name: given.get(name, 1.0) for name in names[:-1]}
    first = plan([(0, total_tokens, None)], present, {}, total_tokens)
    return Simulation(
        total_tokens,
        tasks,
        _shares(first, present, placed),
        _change(
            first,
            names[-1],
            {**present, names[-1]: given.get(names[-1], 1.0)},
            placed,
            total_tokens,
        ),
        _change(
            first,
            names[-2],
            {name: weight for name, weight in present.items() if name != names[-2]},
            placed,
            total_tokens,
        )
        if nodes > 1
        else None,
    )


def _change(
    before: Owners,
    node: str,
    present: Mapping[str, float],
    placed: Mapping[int, int],
    total_tokens: int,
) -> Change:
    owners = [(lo, hi, owner if owner in present else None) for lo, hi, owner in before]
    after = plan(owners, present, {}, total_tokens)
    old, new = _lookup(before), _lookup(after)
    tasks_moved = sum(count for token, count in placed.items() if old(token) != new(token))
    return Change(
        node,
        _shares(after, present, placed),
        sum(move.tokens for move in _moves(before, after)),
        tasks_moved,
    )


def _shares(
    owners: Owners, present: Mapping[str, float], placed: Mapping[int, int]
) -> tuple[Share, ...]:
    tokens: Counter[str | None] = Counter()
    tasks: Counter[str | None] = Counter()
    for lo, hi, owner in owners:
        tokens[owner] += hi - lo
    owner_of = _lookup(owners)
    for token, count in placed.items():
        tasks[owner_of(token)] += count
    return tuple(Share(name, tokens[name], tasks[name]) for name in present)


def _lookup(owners: Owners) -> Callable[[int], str | None]:
    """A function that names the owner of a token; the ranges are sorted and cover everything."""
    starts = [lo for lo, _, _ in owners]
    return lambda token: owners[bisect_right(starts, token) - 1][2]


def _moves(before: Owners, after: Owners) -> list[Move]:
    found: Counter[tuple[str | None, str | None]] = Counter()
    ends = {end for lo, hi, _ in (*before, *after) for end in (lo, hi)}
    old, new = _pieces(before, ends), _pieces(after, ends)
    for piece in {**old, **new}:
        source, target = old.get(piece), new.get(piece)
        if source != target:
            found[source, target] += piece[1] - piece[0]
    return [
        Move(source, target, tokens)
        for (source, target), tokens in sorted(
            found.items(), key=lambda item: (-item[1], item[0][0] or '', item[0][1] or '')
        )
    ]


def _pieces(owners: Owners, ends: Collection[int]) -> dict[Range, str | None]:
    """The owners by range, cut wherever a range of either assignment ends."""
    cuts = sorted(ends)
    return {
        piece: owner
        for lo, hi, owner in owners
        for piece in pairwise(cuts[bisect_left(cuts, lo) : bisect_right(cuts, hi)])
    }
