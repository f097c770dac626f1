"""What must hold after every step of a simulation, and what must come true once the faults have
ceased.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobsync_core.assignment.model import Member, Segment
from jobsync_core.assignment.patterns import eligible
from jobsync_core.assignment.round import Decision, Pin
from jobsync_core.protocol.node import Phase

if TYPE_CHECKING:
    from .node import SimNode
    from .world import World

__all__ = ['Violation', 'check_one_claimer', 'check_plan', 'least_moves', 'unsettled']


class Violation(Exception):
    """An invariant does not hold."""


def tokens_in(mask: int) -> list[int]:
    """The tokens of a bit mask, for messages."""
    return [token for token in range(mask.bit_length()) if mask >> token & 1]


def check_one_claimer(world: World) -> None:
    """I1: at most one process answers True for a token, paused and partitioned ones included. I2:
    nobody holds a lease too long.
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
        if mask & seen:
            others = [
                str(n)
                for n in world.holders
                if n is not node and n.ownership.answers(n.local()) & mask
            ]
            raise Violation(
                f'I1: tokens {tokens_in(mask & seen)} are claimable on {node} and on '
                f'{", ".join(others)}'
            )
        seen |= mask
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
    """I4: a plan covers every token once, is balanced, and moves no more than balance forces."""
    receivers = {
        m.name: m.weight for m in members if m.state == 'active' or m.name in decision.activate
    }
    at = 0
    for segment in decision.segments:
        if segment.lo != at or segment.hi <= segment.lo:
            raise Violation(f'I4: the plan does not cover the tokens once: {decision.segments}')
        at = segment.hi
    if at != total:
        raise Violation(f'I4: the plan covers {at} of {total} tokens')
    names = {m.name for m in members}
    for segment in decision.segments:
        if (
            segment.node is not None
            and segment.node not in names
            or segment.moving_to is not None
            and segment.moving_to not in receivers
        ):
            raise Violation(f'I4: the plan names a node that is not there: {segment}')
    for lo, hi, owner in _pieces(before):
        for segment in decision.segments:
            if (
                owner is not None
                and owner in names
                and segment.lo < hi
                and lo < segment.hi
                and segment.node != owner
            ):
                raise Violation(f'I1: the plan takes {segment} from its live owner {owner}')
    if pins or not receivers:
        return
    planned = dict.fromkeys(receivers, 0)
    for segment in decision.segments:
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
        if holder in receivers:
            had[holder] += size
        elif holder in names:
            homeless += size  # of a draining node: every one of them moves
    order = sorted(receivers)
    least = (
        least_moves([had[name] for name in order], [receivers[name] for name in order], total)
        + homeless
    )
    moved = _moved(before, decision.segments, receivers, names)
    if moved != least:
        raise Violation(f'I4: the plan moves {moved} tokens, {least} would do; had {had}')


def _pieces(segments: Sequence[Segment]) -> list[tuple[int, int, str | None]]:
    return [(s.lo, s.hi, s.node) for s in segments]


def _moved(
    before: Sequence[Segment],
    after: Sequence[Segment],
    receivers: dict[str, float],
    names: set[str],
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
        for token in tokens_in(node.ownership.mask):
            claimable[token] = node
    for row in store.nodes.values():
        if row.incarnation not in lives:
            return f'the dead node {row.sign} is still in the table'
        if row.state == 'joining':
            return f'{row.sign} has entered and is still joining in the table'
    if store.planned != store.fingerprint():
        return 'the latest plan does not know the present nodes and locks'
    receivers = {row.name for row in store.nodes.values() if row.state == 'active'}
    locks: dict[int, list[tuple[str, ...]]] = {}
    for lock in store.locks.values():
        locks.setdefault(lock.token, []).append(lock.patterns)
    for token, segment in store.per_token().items():
        if segment.moving:
            return f'token {token} is still moving: {segment}'
        patterns = locks.get(token, [])
        if len(patterns) == 1:
            allowed = eligible(patterns[0], receivers)
            if segment.node is None and not allowed and segment.blocked:
                continue
            if segment.node not in allowed:
                return f'token {token} is pinned to {patterns[0]} and belongs to {segment.node}'
        elif segment.node is None and segment.blocked and (len(patterns) > 1 or not receivers):
            continue
        if segment.node is None:
            return f'token {token} has no owner: {segment}'
        if store.nodes[segment.node].state != 'active':
            return (
                f'token {token} belongs to {segment.node}, which is '
                f'{store.nodes[segment.node].state}'
            )
        if token not in claimable:
            return f'token {token} of {segment.node} is claimed by nobody'
    return None
