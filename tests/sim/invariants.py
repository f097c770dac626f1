"""What must hold after every step of a simulation, and what must come true once the faults have
ceased.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

from jobsync_core.assignment.groups import GROUP_SPAN, PLAIN, cut_by_group
from jobsync_core.assignment.model import Member, Segment
from jobsync_core.assignment.patterns import eligible
from jobsync_core.assignment.round import Decision, Pin
from jobsync_core.protocol.node import Phase

from .masks import tokens_in

if TYPE_CHECKING:
    from .node import SimNode
    from .world import World

__all__ = ['Violation', 'check_one_claimer', 'check_plan', 'least_moves', 'unsettled']


class Violation(Exception):
    """An invariant does not hold."""


def check_one_claimer(world: World) -> None:
    """I1: at most one process answers True for a token of a queue group, paused and partitioned
    ones included. I2: nobody holds a lease too long. Groups: nobody claims in one whose queue it
    does not consume.
    """
    seen = 0
    now = world.now
    for node in world.holders:
        local = node.offset + node.rate * now
        mask = node.ownership.answers(local)
        if local < node.waits_until - 1e-6 and node.ownership.lease[0] > local:
            raise Violation(
                f'quarantine: {node} has a lease although leases of another history may be valid'
            )
        if not mask:
            continue
        if local > node.lease_bound + 1e-6 and world.leases_checked:
            raise Violation(
                f'I2: {node} answers True at {local:.3f}, its last answered heartbeat entitled it '
                f'until {node.lease_bound:.3f}'
            )
        named = world.named(node, mask)
        if named & seen:
            others = [
                str(n)
                for n in world.holders
                if n is not node and world.named(n, n.ownership.answers(n.local())) & named
            ]
            raise Violation(
                f'I1: tokens {world.tokens_in(named & seen)} are claimable on {node} and on '
                f'{", ".join(others)}'
            )
        seen |= named
        if named & ~node.consumed:
            raise Violation(
                f'groups: {node} claims {world.tokens_in(named & ~node.consumed)} and consumes '
                f'{sorted(node.consumes)}'
            )
        if world.owner_checked:
            row = world.store.nodes.get(node.name)
            owned = (
                world.owned(node.name)
                if row is not None and row.incarnation == node.protocol.incarnation
                else 0
            )
            if mask & ~owned:
                raise Violation(
                    f'I1: {node} claims tokens {tokens_in(mask & ~owned)} that the database does '
                    'not give it'
                )


def least_moves(had: Sequence[int], weights: Sequence[float], total: int) -> int:
    """`Σ max(0, had − target)` for the best choice of targets that differ from the exact shares by
    less than one token.
    """
    whole = sum(weights)
    shares = [total * weight / whole for weight in weights]
    floors = [int(share + 1e-9) for share in shares]
    left = total - sum(floors)
    # Each of the tokens that are left saves a move where the node has more than its floor.
    may_grow = [index for index, share in enumerate(shares) if share - floors[index] > 1e-9]
    grow = sorted(may_grow, key=lambda index: had[index] <= floors[index])[:left]
    return sum(max(0, count - floors[index] - (index in grow)) for index, count in enumerate(had))


def check_plan(
    members: Sequence[Member],
    before: Sequence[Segment],
    pins: Sequence[Pin],
    decision: Decision,
    total: int,
) -> None:
    """I4: the plan of each group covers every token once, is balanced over its members, and moves
    no more than balance forces. A group with neither members nor owners has no rows.
    """
    old, new = cut_by_group(before, total), cut_by_group(decision.segments, total)
    names = {member.name for member in members}
    taking_part = [m for m in members if m.state == 'active' or m.name in decision.activate]
    if sum(row.hi - row.lo for row in decision.segments) != sum(
        row.hi - row.lo for rows in new.values() for row in rows
    ):
        raise Violation(f'I4: rows of the plan lie beside all groups: {decision.segments}')
    for group in sorted({PLAIN, *old, *new, *(g for m in members for g in m.groups)}):
        receivers = {m.name: m.weight for m in taking_part if group in m.groups}
        rows = old.get(group, [])
        has_owner = any(row.node in names for row in rows)
        planned = new.get(group, [])
        if bool(planned) != (group in decision.formed):
            raise Violation(f'groups: {group} has rows {planned}, formed: {decision.formed}')
        if group == PLAIN or receivers or has_owner:
            locks = [pin for pin in pins if pin.group in (None, group)]
            _check_ring(receivers, names, rows, planned, locks, total)
        elif planned:
            raise Violation(f'I4: group {group}, which has nobody, has rows: {planned}')


def _check_ring(
    receivers: Mapping[str, float],
    names: Set[str],
    before: Sequence[Segment],
    after: Sequence[Segment],
    pins: Sequence[Pin],
    total: int,
) -> None:
    """The plan of one group, whose tokens count from 0."""
    for row in before:
        for token in range(row.lo, row.hi) if row.node in names else ():
            if not any(s.lo <= token < s.hi and s.node == row.node for s in after):
                raise Violation(f'I1: the plan takes {token} of {row} from its live owner: {after}')
    at = 0
    for segment in after:
        if segment.lo != at or segment.hi <= segment.lo:
            raise Violation(f'I4: the plan does not cover the tokens once: {after}')
        at = segment.hi
    if at != total:
        raise Violation(f'I4: the plan covers {at} of {total} tokens')
    for segment in after:
        target = segment.moving_to if segment.moving else segment.node
        if target is not None and target not in receivers:
            raise Violation(f'groups: {segment} goes to who takes no part: {sorted(receivers)}')
    if pins or not receivers:
        return
    planned = dict.fromkeys(receivers, 0)
    for segment in after:
        target = segment.moving_to if segment.moving else segment.node
        if target is None:
            raise Violation(
                f'I4: {segment} goes to nobody although {sorted(receivers)} could take it'
            )
        planned[target] = planned.get(target, 0) + segment.hi - segment.lo
    whole = sum(receivers.values())
    for name, weight in receivers.items():
        if abs(planned[name] - total * weight / whole) >= 1 + 1e-9:
            raise Violation(
                f'I4: {name} with weight {weight:g} of {whole:g} gets {planned[name]} of {total} '
                'tokens'
            )
    # A token on its way counts as being where it goes, if that node still takes part.
    had = dict.fromkeys(receivers, 0)
    homeless = 0
    for segment in before:
        holder = segment.moving_to if segment.moving_to in receivers else segment.node
        size = segment.hi - segment.lo
        if holder is not None and holder in receivers:
            had[holder] += size
        elif holder in names:
            homeless += size  # of a node that takes no part any more: every one of them moves
    order = sorted(receivers)
    least = (
        least_moves([had[name] for name in order], [receivers[name] for name in order], total)
        + homeless
    )
    moved = _moved(before, after, receivers, names)
    if moved != least:
        raise Violation(f'I4: the plan moves {moved} tokens, {least} would do; had {had}')


def _moved(
    before: Sequence[Segment],
    after: Sequence[Segment],
    receivers: Mapping[str, float],
    names: Set[str],
) -> int:
    count = 0
    for old in before:
        holder = old.moving_to if old.moving_to in receivers else old.node
        if holder not in names:
            continue
        for new in after:
            target = new.moving_to if new.moving else new.node
            if target != holder:
                count += max(0, min(old.hi, new.hi) - max(old.lo, new.lo))
    return count


def unsettled(world: World) -> str | None:
    """I3: why the cluster is not whole yet; None when it is."""
    store = world.store
    claimable: dict[int, SimNode] = {}
    live = [node for node in world.nodes if node.running]
    lives = {node.protocol.incarnation for node in live}
    for node in live:
        protocol = node.protocol
        if protocol.phase is Phase.LEAVING:
            return f'{node} is still leaving'
        row = store.nodes.get(node.name)
        if (
            row is not None
            and row.incarnation in lives
            and row.incarnation != protocol.incarnation
            and protocol.entered
        ):
            continue  # another live process has its name; this one waits, without tokens
        if not protocol.entered:
            return f'{node} has not entered (phase {protocol.phase.value}, state {protocol.state})'
        if row is None or row.incarnation != protocol.incarnation:
            return f'{node} is not in the node table'
        if node.connection is None or not world.has_connection(node.connection):
            return f'{node} is not connected'
        if node.local() >= node.ownership.lease[0]:
            return f'{node} has no lease'
        if {*row.groups} != node.wants or node.consumes != {'', *node.wants}:
            return (
                f'{node} wants the groups {sorted(node.wants)}, its row names {row.groups}, and it '
                f'consumes {sorted(node.consumes)}'
            )
        for name in node.wants:
            if protocol.groups.get(name) != store.groups[name]:
                return f'{node} knows the groups {protocol.groups}, they are {store.groups}'
        for token in tokens_in(node.ownership.mask):
            claimable[token] = node
    for row in store.nodes.values():
        if row.incarnation not in lives:
            return f'the dead node {row.sign} is still in the table'
        if row.state == 'joining':
            return f'{row.sign} has entered and is still joining in the table'
    if store.planned != store.fingerprint():
        return 'the latest plan does not know the present nodes and locks'
    members = store.members()
    present = cut_by_group(store.segments, store.total_tokens)
    for name, group in store.groups.items():
        receivers = {m.name: m.weight for m in members if m.state == 'active' and group in m.groups}
        rows = present.get(group, [])
        ring = {token: row for row in rows for token in range(row.lo, row.hi)}
        first = group * GROUP_SPAN
        owners = {token - first: node for token, node in claimable.items() if token >= first}
        reason = _unsettled_ring(world, name, receivers, ring, owners)
        if reason is not None:
            return f'group {name!r}: {reason}'
    return None


def _unsettled_ring(
    world: World,
    group: str,
    receivers: Mapping[str, float],
    ring: Mapping[int, Segment],
    claimable: Mapping[int, SimNode],
) -> str | None:
    """Why one group, whose tokens count from 0, is not whole."""
    store = world.store
    locks: dict[int, list[tuple[str, ...]]] = {}
    for lock in store.locks.values():
        if lock.group in (None, group):
            locks.setdefault(lock.token, []).append(lock.patterns)
    if group and not receivers:
        owned = [row for row in ring.values() if row.node is not None]
        return f'it has no members, and {owned[0]}' if owned else None
    for token in range(store.total_tokens):
        if token not in ring:
            return f'token {token} has no row'
        segment = ring[token]
        if segment.moving:
            return f'token {token} is still moving: {segment}'
        patterns = locks.get(token, [])
        if len(patterns) == 1:
            allowed = eligible(patterns[0], [*receivers])
            if segment.node is None and not allowed and segment.blocked:
                continue
            if segment.node not in allowed:
                return f'token {token} is pinned to {patterns[0]} and belongs to {segment.node}'
        elif segment.node is None and segment.blocked and (len(patterns) > 1 or not receivers):
            continue
        if segment.node is None:
            return f'token {token} has no owner: {segment}'
        if segment.node not in receivers:
            return f'token {token} belongs to {segment.node}, which takes no part'
        if token not in claimable:
            return f'token {token} of {segment.node} is claimed by nobody'
    whole = sum(receivers.values())
    for name, weight in receivers.items() if not locks else ():
        count = sum(row.node == name for row in ring.values())
        if abs(count - store.total_tokens * weight / whole) >= 1 + 1e-9:
            return f'{name} with weight {weight:g} of {whole:g} has {count} tokens'
    return None
