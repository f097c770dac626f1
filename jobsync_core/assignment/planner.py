"""Who should own which tokens: balanced by weight, locks respected, nothing moved without need.

Tokens fall into groups: one for each set of nodes that locks allow, and the free ones. A group's
share of each node is its weighted part rounded down or up, where those who hold the larger number
already keep it; given the shares, each node gives exactly what it holds beyond its share. Free
tokens fill the nodes up to one common level above what locks put on them (water-filling). All
arithmetic is on whole numbers, so that every leader computes the same plan.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from math import lcm
from typing import TypeAlias

__all__ = ['plan']

Owned: TypeAlias = 'tuple[int, int, str | None]'


def plan(
    owners: Sequence[Owned],
    nodes: Mapping[str, float],
    pins: Mapping[int, frozenset[str]],
    total_tokens: int,
) -> list[Owned]:
    """Give every token an owner, moving as few as balance and locks allow.

    Args:
        owners: Present owners as (first, end, node), disjoint; tokens not mentioned, and those of a
            name not in `nodes`, are unowned.
        nodes: Weight by name; a node of weight 0 receives nothing.
        pins: Nodes that may own a locked token.
        total_tokens: Tokens of the cluster.

    Returns:
        Sorted ranges that cover all tokens; None owns what no node may own.
    """
    weights = _whole(nodes)
    pieces, blocked = _grouped(_covered(owners, weights, total_tokens), pins, weights)
    total = total_tokens - sum(hi - lo for lo, hi, _ in blocked)
    free = pieces.pop(frozenset(weights), [])
    groups = [
        _Group.of(names, some, weights)
        for names, some in sorted((sorted(names), some) for names, some in pieces.items())
    ]
    held = _held(free)
    _round(groups, held, weights, total)
    _relieve(groups, weights, total)
    planned = list(blocked)
    pinned: Counter[str] = Counter()
    for group in groups:
        share = group.share
        pinned.update(share)
        planned += _redistributed(group.pieces, share)
    planned += _redistributed(free, _levelled(held, pinned, weights, total), planned)
    return _merged(planned)


def _whole(nodes: Mapping[str, float]) -> dict[str, int]:
    """Weights above zero as whole numbers, in the order of names."""
    # The decimal text of a weight is what its author meant: 0.1 is a tenth.
    exact = {name: Fraction(str(nodes[name])) for name in sorted(nodes) if nodes[name] > 0}
    scale = lcm(*(weight.denominator for weight in exact.values()))
    return {name: int(weight * scale) for name, weight in exact.items()}


def _covered(owners: Iterable[Owned], weights: Mapping[str, int], total_tokens: int) -> list[Owned]:
    """The owners sorted and merged, with gaps and unknown names as None."""
    found: list[Owned] = []
    at = 0
    for lo, hi, node in sorted(
        (owned for owned in owners if owned[0] < owned[1]), key=lambda owned: owned[:2]
    ):
        if lo < at:
            raise ValueError(f'token {lo} has two owners: pass disjoint ranges')
        if lo > at:
            found.append((at, min(lo, total_tokens), None))
        found.append((lo, min(hi, total_tokens), node if node in weights else None))
        at = hi
    if at < total_tokens:
        found.append((at, total_tokens, None))
    return _merged(found)


def _grouped(
    owners: list[Owned], pins: Mapping[int, frozenset[str]], weights: Mapping[str, int]
) -> tuple[dict[frozenset[str], list[Owned]], list[Owned]]:
    """Owners by the set of nodes that may own the tokens, and the tokens that none may own."""
    everybody = frozenset(weights)
    known: dict[frozenset[str], frozenset[str]] = {}
    locked: list[tuple[int, frozenset[str]]] = []
    for token in sorted(pins):
        names = pins[token]
        if names not in known:
            known[names] = names & everybody
        if known[names] != everybody:
            locked.append((token, known[names]))
    pieces: dict[frozenset[str], list[Owned]] = defaultdict(list)
    if not everybody:
        return pieces, [(lo, hi, None) for lo, hi, _ in owners]
    tokens = [token for token, _ in locked]
    for lo, hi, node in owners:
        at = lo
        for token, names in locked[bisect_left(tokens, lo) : bisect_left(tokens, hi)]:
            if at < token:
                pieces[everybody].append((at, token, node))
            pieces[names].append((token, token + 1, node if node in names else None))
            at = token + 1
        if at < hi:
            pieces[everybody].append((at, hi, node))
    blocked: list[Owned] = [(lo, hi, None) for lo, hi, _ in pieces.pop(frozenset(), [])]
    return pieces, blocked


def _held(pieces: Iterable[Owned]) -> Counter[str]:
    held: Counter[str] = Counter()
    for lo, hi, node in pieces:
        if node is not None:
            held[node] += hi - lo
    return held


@dataclass
class _Group:
    """Locked tokens with one set of eligible nodes.

    base: each node's weighted part, rounded down; nodes with none are left out.
    candidates: nodes whose part was cut; `spare` of them are rounded up instead: `chosen`.
    """

    pieces: list[Owned]
    held: Counter[str]
    base: dict[str, int]
    candidates: list[str]
    spare: int
    chosen: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, names: Sequence[str], pieces: list[Owned], weights: Mapping[str, int]) -> _Group:
        size = sum(hi - lo for lo, hi, _ in pieces)
        whole = sum(weights[name] for name in names)
        base = {name: count for name in names if (count := size * weights[name] // whole)}
        candidates = [name for name in names if size * weights[name] % whole]
        return cls(pieces, _held(pieces), base, candidates, size - sum(base.values()))

    @property
    def share(self) -> dict[str, int]:
        share = dict(self.base)
        for name in self.chosen:
            share[name] = share.get(name, 0) + 1
        return share

    def keepers(self) -> list[str]:
        """Candidates that hold the larger number already."""
        return [name for name in self.candidates if self.held[name] > self.base.get(name, 0)]


def _round(
    groups: Sequence[_Group], free: Counter[str], weights: Mapping[str, int], total: int
) -> None:
    """Choose who is rounded up: those who hold the token, else those with the most room below their
    part of the whole.
    """
    whole = sum(weights.values())
    load = Counter(free)
    for group in groups:
        load.update(group.base)
        load.update(group.keepers())

    def room(name: str) -> int:
        return total * weights[name] - load[name] * whole

    for group in groups:
        keepers = sorted(group.keepers(), key=room, reverse=True)
        group.chosen.update(keepers[: group.spare])
        load.subtract(keepers[group.spare :])
    for group in groups:
        if len(group.chosen) == group.spare:
            continue
        others = [name for name in group.candidates if name not in group.chosen]
        takers = heapq.nlargest(group.spare - len(group.chosen), others, key=room)
        group.chosen.update(takers)
        load.update(takers)


def _relieve(groups: Sequence[_Group], weights: Mapping[str, int], total: int) -> None:
    """Where locked tokens alone exceed a node's part of the whole, let other candidates be rounded
    up, directly or in a chain.
    """
    whole = sum(weights.values())
    multiple = lcm(*weights.values())
    inverse = {name: multiple // weight for name, weight in weights.items()}
    limit = {name: -(-total * weight // whole) for name, weight in weights.items()}
    load: Counter[str] = Counter()
    for group in groups:
        load.update(group.share)
    chosen_in: dict[str, dict[int, None]] = defaultdict(dict)
    for number, group in enumerate(groups):
        for name in group.chosen:
            chosen_in[name][number] = None

    def chain(start: str) -> list[tuple[str, str, int]]:
        """Steps (to, from, group), last one first, to a node with room, else to one where the token
        weighs less.
        """
        came: dict[str, tuple[str, int]] = {start: ('', -1)}
        queue = [start]
        for name in queue:
            for number in chosen_in[name]:
                group = groups[number]
                for other in group.candidates:
                    if other not in came and other not in group.chosen:
                        came[other] = (name, number)
                        queue.append(other)
                if len(came) == len(weights):
                    break
        end = min(
            queue,
            key=lambda name: (
                load[name] >= limit[name],
                (2 * load[name] + 1) * inverse[name],
                name,
            ),
        )
        if (
            load[end] >= limit[end]
            and (2 * load[end] + 1) * inverse[end] >= (2 * load[start] - 1) * inverse[start]
        ):
            return []
        steps = []
        while end != start:
            name, number = came[end]
            steps.append((end, name, number))
            end = name
        return steps

    improved = True
    while improved:
        improved = False
        for name in weights:
            while load[name] > limit[name]:
                steps = chain(name)
                if not steps:
                    break
                improved = True
                for taker, giver, number in steps:
                    groups[number].chosen.remove(giver)
                    groups[number].chosen.add(taker)
                    del chosen_in[giver][number]
                    chosen_in[taker][number] = None
                load[name] -= 1
                load[steps[0][0]] += 1


def _levelled(
    held: Counter[str], pinned: Counter[str], weights: Mapping[str, int], total: int
) -> dict[str, int]:
    """Each node's share of the free tokens: what lifts it to the common level, rounded; nothing
    where locks put it above.
    """
    level, width = total - sum(pinned.values()), 0
    below: list[str] = []
    for name in sorted(weights, key=lambda name: (Fraction(pinned[name], weights[name]), name)):
        if width and pinned[name] * width >= level * weights[name]:
            break
        below.append(name)
        level += pinned[name]
        width += weights[name]
    share = {name: level * weights[name] // width - pinned[name] for name in below}
    spare = level - sum(pinned[name] + share[name] for name in below)
    cut = [name for name in below if level * weights[name] % width]
    # Who holds one more already keeps it: any other choice would move a token for nothing.
    cut.sort(key=lambda name: (held[name] <= share[name], -(level * weights[name] % width), name))
    for name in cut[:spare]:
        share[name] += 1
    return share


def _redistributed(
    pieces: list[Owned], share: Mapping[str, int], beside: Sequence[Owned] = ()
) -> list[Owned]:
    """Move the pieces' surplus to those below their share, in runs as long as possible; best next
    to what they own `beside`.
    """
    held = _held(pieces)
    lacking = {name: count - held[name] for name, count in share.items() if count > held[name]}
    if not lacking:
        return pieces
    kept, loose = _released(
        pieces, {name: max(0, count - share.get(name, 0)) for name, count in held.items()}
    )
    kept, loose = _extended(kept, loose, lacking, beside)
    # Largest run to largest need: each step settles one of the two, so that few runs are cut.
    runs = [(lo - hi, lo) for lo, hi in loose]
    needs = [(-count, name) for name, count in lacking.items() if count]
    heapq.heapify(runs)
    heapq.heapify(needs)
    # Among runs of one size a node gets those that lie one behind the other: what is between them
    # may join them.
    before, need, name = 0, 0, ''
    while runs:
        size, lo = heapq.heappop(runs)
        if size != before or not need:
            if need:
                heapq.heappush(needs, (need, name))
            need, name = heapq.heappop(needs)
        before = size
        given = min(-size, -need)
        kept.append((lo, lo + given, name))
        if -size > given:
            heapq.heappush(runs, (size + given, lo + given))
        need += given
    return kept


def _released(
    pieces: list[Owned], surplus: Mapping[str, int]
) -> tuple[list[Owned], list[tuple[int, int]]]:
    """What stays with its owner, and the ranges to be given: unowned ones, and each owner's
    shortest runs up to its surplus.
    """
    kept: list[Owned] = []
    loose: list[tuple[int, int]] = []
    left = dict(surplus)
    for lo, hi, node in sorted(pieces, key=lambda piece: (piece[1] - piece[0], piece[0])):
        given = hi - lo if node is None else min(hi - lo, left[node])
        if given < hi - lo:
            kept.append((lo, hi - given, node))
        if given:
            loose.append((hi - given, hi))
        if node is not None:
            left[node] -= given
    return kept, loose


def _extended(
    kept: list[Owned],
    loose: list[tuple[int, int]],
    lacking: dict[str, int],
    beside: Sequence[Owned],
) -> tuple[list[Owned], list[tuple[int, int]]]:
    """Give loose ranges to the owner next to them where it lacks tokens; `lacking` is brought up to
    date.
    """
    ends = {hi: node for _, hi, node in chain(beside, kept)}
    starts = {lo: node for lo, _, node in chain(beside, kept)}
    rest: list[tuple[int, int]] = []
    for lo, hi in sorted(loose):
        for node, at_start in ((ends.get(lo), True), (starts.get(hi), False)):
            given = min(hi - lo, lacking.get(node, 0)) if node is not None else 0
            if not given:
                continue
            lacking[node] -= given  # type: ignore[index]  # a node of None is given nothing
            if at_start:
                kept.append((lo, lo + given, node))
                lo += given
                ends[lo] = node
            else:
                kept.append((hi - given, hi, node))
                hi -= given
        if lo < hi:
            rest.append((lo, hi))
    return kept, rest


def _merged(pieces: Iterable[Owned]) -> list[Owned]:
    """Sorted, with neighbours of one owner joined. The pieces are disjoint."""
    merged: list[Owned] = []
    for lo, hi, node in sorted(
        (piece for piece in pieces if piece[0] < piece[1]), key=lambda piece: piece[0]
    ):
        if merged and merged[-1][1] == lo and merged[-1][2] == node:
            merged[-1] = (merged[-1][0], hi, node)
        else:
            merged.append((lo, hi, node))
    return merged
