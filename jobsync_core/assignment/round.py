"""One leader's round as a function of values: from what the tables hold to what they should
hold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .groups import GROUP_SPAN, PLAIN, cut_by_group, shifted
from .model import Member, Segment
from .patterns import NodeNames
from .planner import Owned, plan

__all__ = ['Decision', 'Pin', 'decide']


@dataclass(frozen=True)
class Pin:
    """A lock as the planner sees it. `created_at` orders locks by age; it is compared with others
    of its kind only.

    token: where its task hashes to, counted within each group. group: the one in which it counts;
    None: it counts in all. loose: a pin of workers, whose gates hold what it pins: in a queue group
    of which no member matches it the token goes to anybody, as it has other tasks as well.
    """

    task_id: str
    token: int
    patterns: tuple[str, ...]
    created_at: float
    group: int | None = None
    loose: bool = False


@dataclass(frozen=True)
class Decision:
    """The whole new assignment, and what changes.

    Args:
        segments: Sorted. Of a group that has rows they cover all tokens, so that tokens without a
            row are missing rows there; in other groups nobody owns anything. Rows that stay as
            they were keep their version.
        activate: Joining nodes that become active.
        moved: Tokens that a live owner is newly asked to give away, or whose receiver changed.
        assigned: Unowned tokens that get an owner at once.
        blocked: Tokens that no live node may own.
        conflicts: What is wrong with the locks, and the remedy, for people.
        formed: Groups that have rows.
    """

    segments: tuple[Segment, ...]
    activate: tuple[str, ...]
    moved: int
    assigned: int
    blocked: int
    conflicts: tuple[str, ...]
    formed: tuple[int, ...] = (0,)

    @property
    def is_for_nobody(self) -> bool:
        """Whether no token of any group may have an owner."""
        return 0 < self.blocked == sum(row.hi - row.lo for row in self.segments)


def decide(
    members: Sequence[Member],
    segments: Sequence[Segment],
    pins: Sequence[Pin],
    total_tokens: int,
    version: int,
    names: Mapping[int, str] | None = None,
) -> Decision:
    """Plan for the live members, each queue group by itself.

    A live owner keeps a token until it gives it: its row is marked as moving. Tokens without a live
    owner change hands at once.

    Args:
        members: The node table without the dead.
        segments: The assignment table.
        pins: All locks.
        total_tokens: Tokens of each group.
        version: Stamped on each row that changes.
        names: Of groups by id, for people.
    """
    live = frozenset(member.name for member in members)
    present = cut_by_group(segments, total_tokens)
    activate = _activated(members, present.get(PLAIN, ()))
    weights = _weights(members, activate)
    locks = sorted(pins, key=lambda pin: (pin.created_at, pin.task_id))
    rings = {
        group: _plan_ring(
            present.get(group, ()),
            live,
            weights.get(group, {}),
            [pin for pin in locks if pin.group is None or pin.group == group],
            total_tokens,
            version,
            _described(group, names or {}),
            loose=group != PLAIN,
        )
        for group in sorted({PLAIN, *present, *weights})
        if group in weights or _has_rows(group, present.get(group, ()), live)
    }
    return Decision(
        tuple(
            shifted(row, group * GROUP_SPAN) for group, ring in rings.items() for row in ring.rows
        ),
        activate,
        sum(ring.moved for ring in rings.values()),
        sum(ring.assigned for ring in rings.values()),
        sum(ring.blocked for ring in rings.values()),
        tuple(conflict for ring in rings.values() for conflict in ring.conflicts),
        tuple(rings),
    )


@dataclass(frozen=True)
class _Ring:
    """What a Decision says, of one group alone."""

    rows: tuple[Segment, ...]
    moved: int
    assigned: int
    blocked: int
    conflicts: tuple[str, ...]


def _plan_ring(
    segments: Iterable[Segment],
    live: frozenset[str],
    weights: Mapping[str, float],
    pins: Iterable[Pin],
    total_tokens: int,
    version: int,
    where: str,
    *,
    loose: bool,
) -> _Ring:
    """Plan one group, whose tokens count from 0, for those of its members that take part.

    Where none does its live owners are still asked to give what they have, to nobody.
    """
    allowed, conflicts = _allowed(pins, weights, total_tokens, where, loose)
    present = _present(segments, live, total_tokens)
    owners = list(_owners(present, live, weights, allowed))
    planned = plan(owners, weights, allowed, total_tokens)
    rows: list[Segment] = []
    moved = assigned = blocked = 0
    for lo, hi, row, owner, target in _overlaid(present, owners, planned):
        wanted = _wanted(row.node if row.node in live else None, target)
        changed = wanted != (row.node, row.moving, row.moving_to, row.blocked)
        tokens = hi - lo
        if target is None:
            blocked += tokens
        elif row.node not in live:
            assigned += tokens
        if changed and row.node in live and target != owner:
            moved += tokens
        _append(rows, Segment(lo, hi, *wanted, version if changed else row.version))
    return _Ring(tuple(rows), moved, assigned, blocked, conflicts)


def _weights(members: Iterable[Member], activate: tuple[str, ...]) -> dict[int, dict[str, float]]:
    """The weights of the members that take part, by group."""
    found: dict[int, dict[str, float]] = {}
    for member in members:
        if (member.state == 'active' or member.name in activate) and member.weight > 0:
            for group in member.groups:
                found.setdefault(group, {})[member.name] = member.weight
    return found


def _has_rows(group: int, rows: Iterable[Segment], live: frozenset[str]) -> bool:
    """Whether a group in which nobody takes part has rows: while somebody who lives owns tokens.
    Without rows they would count as new, and go to the next member at once. The plain Job's tokens
    always have rows.
    """
    return group == PLAIN or any(row.node in live for row in rows)


def _described(group: int, names: Mapping[int, str]) -> str:
    """Which group is meant, for people who may know of none."""
    return '' if group == PLAIN else f' of queue group {names.get(group, str(group))!r}'


def _activated(members: Iterable[Member], segments: Iterable[Segment]) -> tuple[str, ...]:
    """The first plan of a cluster includes everybody who has registered by then; later joiners wait
    for their own time.
    """
    names = {member.name for member in members if member.state != 'joining'}
    if any(segment.node in names for segment in segments) or not any(
        member.state == 'active' for member in members
    ):
        return ()
    return tuple(sorted(member.name for member in members if member.state == 'joining'))


def _allowed(
    pins: Iterable[Pin], weights: Mapping[str, float], total_tokens: int, where: str, loose: bool
) -> tuple[dict[int, frozenset[str]], tuple[str, ...]]:
    """The nodes that may own each locked token, and the conflicts among locks, the oldest first."""
    live = NodeNames(weights)
    known: dict[tuple[str, ...], frozenset[str]] = {}
    allowed: dict[int, frozenset[str]] = {}
    first: dict[int, Pin] = {}
    conflicts: list[str] = []
    for pin in pins:
        if not 0 <= pin.token < total_tokens:
            continue
        if pin.patterns not in known:
            known[pin.patterns] = live.eligible(pin.patterns)
        names = known[pin.patterns]
        if loose and pin.loose and not names:
            continue
        older = first.setdefault(pin.token, pin)
        if older is pin:
            allowed[pin.token] = names
        elif allowed[pin.token] & names:
            allowed[pin.token] &= names
        elif allowed[pin.token] or names:
            conflicts.append(
                f'token {pin.token}{where}: no live node may own both task {older.task_id!r} (lock '
                f'{", ".join(older.patterns)}) and task '
                f'{pin.task_id!r} (lock {", ".join(pin.patterns)}), which hash to it; the older '
                f'lock, of {older.task_id!r}, counts: '
                f'clear one of the locks, or give both a pattern that matches the same live node'
            )
    return allowed, tuple(conflicts)


def _present(segments: Iterable[Segment], live: frozenset[str], total_tokens: int) -> list[Segment]:
    """The rows in order, with gaps as rows of nobody that no plan has written."""
    found: list[Segment] = []
    at = 0
    for row in sorted(segments, key=lambda row: row.lo):
        lo, hi = max(row.lo, at), min(row.hi, total_tokens)
        if lo >= hi:
            continue
        if lo > at:
            found.append(Segment(at, lo, None))
        found.append(row if (lo, hi) == (row.lo, row.hi) else replace(row, lo=lo, hi=hi))
        at = hi
    if at < total_tokens:
        found.append(Segment(at, total_tokens, None))
    return found


def _owners(
    present: Iterable[Segment],
    live: frozenset[str],
    weights: Mapping[str, float],
    allowed: Mapping[int, frozenset[str]],
) -> Iterator[Owned]:
    """Whom the planner takes for the owner: the receiver of tokens on their way, else the live node
    that has them.
    """
    locked = sorted(allowed)
    for row in present:
        owner = row.node if row.node in live else None
        if not row.moving or row.moving_to not in weights:
            yield row.lo, row.hi, owner
            continue
        at = row.lo
        for token in _within(locked, row):
            if row.moving_to not in allowed[token]:
                if at < token:
                    yield at, token, row.moving_to
                yield token, token + 1, owner
                at = token + 1
        if at < row.hi:
            yield at, row.hi, row.moving_to


def _within(locked: Sequence[int], row: Segment) -> Sequence[int]:
    return locked[bisect_left(locked, row.lo) : bisect_left(locked, row.hi)]


def _overlaid(
    present: Sequence[Segment], owners: Sequence[Owned], planned: Sequence[Owned]
) -> Iterator[tuple[int, int, Segment, str | None, str | None]]:
    """Ranges in which row, planner's owner and target are each the same. All three sequences cover
    all tokens.
    """
    i = j = k = lo = 0
    while i < len(present):
        row, (_, owners_end, owner), (_, planned_end, target) = present[i], owners[j], planned[k]
        hi = min(row.hi, owners_end, planned_end)
        yield lo, hi, row, owner, target
        i += row.hi == hi
        j += owners_end == hi
        k += planned_end == hi
        lo = hi


def _wanted(owner: str | None, target: str | None) -> tuple[str | None, bool, str | None, bool]:
    """node, moving, moving_to and blocked of the row that takes tokens from their live owner to the
    target.
    """
    if owner is None or owner == target:
        return target, False, None, target is None
    return owner, True, target, target is None


def _append(rows: list[Segment], row: Segment) -> None:
    if rows and _contents(rows[-1]) == _contents(row):
        rows[-1] = replace(rows[-1], hi=row.hi)
    else:
        rows.append(row)


def _contents(row: Segment) -> tuple[object, ...]:
    return row.node, row.moving, row.moving_to, row.blocked, row.version
