"""The duties of the oldest nodes: to watch the node table, to evict the dead, and to ask for a plan
when something has changed.

The leader and its successor look at the whole table. The few that come next know of the nodes
before them from their heartbeats; all others do nothing. Each duty fails for itself, and is tried
again on its own clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..assignment.model import Member
from .agenda import NEVER, NOW, Due
from .liveness import Liveness
from .messages.leadership import (
    DEATHS,
    Evict,
    EvictReply,
    Lead,
    Observe,
    ObserveReply,
    RoundReply,
    StepDown,
)
from .messages.membership import ELDERS
from .messages.signs import Life, Sign
from .rhythm import Backoff

__all__ = ['Duty', 'Leadership']

Duty = Observe | Evict | Lead | StepDown

#: Joins within this many seconds are planned together.
_JOIN_WINDOW = 0.1
#: Two clocks that disagree on when a lock expires must not make a node look in a tight loop.
_SHORTEST_WAIT = 0.02
#: A look is followed by a rest of at least so many times its own duration.
_REST = 3


class Leadership:
    """What one node knows of the others, and what it has to do about it.

    Args:
        liveness: What is known of the others' signs of life.
        timeout: Seconds without a heartbeat after which a node is dead.
        max_gap: Seconds without a look after which waits begin anew.
        poll: Seconds between two looks.
    """

    def __init__(self, liveness: Liveness, timeout: float, max_gap: float, poll: float) -> None:
        self.liveness = liveness
        self.look_at = 0.0
        self._timeout = timeout
        self._poll = poll
        self._most_rest = max_gap / 2
        self._older: tuple[Sign, ...] | None = None
        self._may_be_more = False  # a heartbeat names no more than ELDERS of them
        self._known: frozenset[str] = frozenset()
        self._lead_at = NEVER
        self._have_died = False  # since the last plan
        self._must_look = (
            False  # the last round did not go as expected: look again before the next one
        )
        self._must_step_down = False
        self._stuck: frozenset[Sign] = frozenset()  # whom an eviction that failed was meant for
        # evictions failed so often: one node at a time, so that one row that cannot be deleted
        # holds up no other
        self._singly = 0
        first, most = min(poll, 0.25), timeout / 8
        self._retries: dict[type[Duty], Backoff] = {
            kind: Backoff(first, most) for kind in (Observe, Evict, Lead, StepDown)
        }

    def rank(self, now: float) -> int | None:
        """How many live nodes are older: 0 for the leader, 1 for its successor, None while
        unknown.
        """
        older = self._older  # once: other threads ask too, and the agent may begin anew meanwhile
        if older is None:
            return None
        living = sum(not self.liveness.is_dead(sign, now) for sign in older)
        if self._may_be_more:
            return len(older) if living else None
        return living

    def watches(self, now: float) -> bool:
        """Whether this node looks at the whole table: as the leader or its successor, or because
        all that it knows to be older are dead.
        """
        rank = self.rank(now)
        return rank <= 1 if rank is not None else self._older is not None

    def agenda(self, life: Life, now: float, has_lease: bool) -> Iterator[Due]:
        """What there is to do, the most urgent first. Without a lease nobody leads."""
        if self._older is None:
            return
        yield self.liveness.next_death(now), _nothing  # then this node has another place
        if not self.watches(now):
            return
        # To look comes first: whatever else takes its time must not make a gap in the watch.
        yield self._due(Observe, self.look_at, Observe)
        if self.rank(now) != 0 or not has_lease:
            return
        if self._must_step_down:
            yield self._due(StepDown, NOW, lambda: StepDown(*life))
        if self._must_look:
            return
        dead = self.liveness.dead(now)
        if dead:
            only = dead[self._singly % len(dead)] if self._singly else None
            yield self._due(Evict, NOW, lambda: Evict(*life, dead, only))
        reason = DEATHS if self._have_died else 'nodes or locks changed'
        yield self._due(Lead, self._lead_at, lambda: Lead(*life, dead, reason))

    def _due(self, kind: type[Duty], at: float, request: Callable[[], Duty]) -> Due:
        return max(at, self._retries[kind].not_before), request

    def start_anew(self) -> None:
        """This node has another place among the others, which is not known yet."""
        self._older = None
        self._lead_at = NEVER
        self._must_step_down = False
        for retry in self._retries.values():
            retry.reset()

    def heard(self, older: tuple[Sign, ...], now: float) -> None:
        """A heartbeat's answer named the oldest nodes before this one."""
        self._older = older
        self._may_be_more = len(older) >= ELDERS
        self.liveness.look(older, now)
        if not self.watches(now):
            self.liveness.keep([sign.name for sign in older])

    def observed(
        self, reply: ObserveReply, incarnation: str, now: float, took: float = 0.0
    ) -> bool:
        """A look at the whole node table, which took so many seconds; whether this node is in
        it.
        """
        me = next((m for m in reply.members if m.incarnation == incarnation), None)
        others = [m for m in reply.members if m is not me]
        self.liveness.look(_signs(others), now)
        self.liveness.keep([m.name for m in others])
        if me is not None:
            self._older = _signs(
                [m for m in others if (m.created_on, m.name) < (me.created_on, me.name)]
            )
            self._may_be_more = False
        self._must_look = False
        self._retries[Observe].reset()
        if self._stuck and not self._stuck & set(_signs(others)):
            self._free_evictions()
        self.look_at = now + max(self._poll, min(_REST * took, self._most_rest))
        if reply.next_expiry is not None and reply.next_expiry > 0:
            self.look_at = min(self.look_at, now + max(reply.next_expiry, _SHORTEST_WAIT))
        known, self._known = self._known, frozenset(m.incarnation for m in reply.members)
        if not reply.stale and (reply.next_expiry is None or reply.next_expiry > 0):
            self._lead_at = NEVER
            self._have_died = False
            self._retries[Lead].reset()
        elif self._lead_at == NEVER:
            self._lead_at = now + (_JOIN_WINDOW if known < self._known else 0.0)
        return me is not None

    def evicted(self, request: Evict, reply: EvictReply, now: float) -> None:
        """An eviction has been carried out, or refused."""
        if reply.led and reply.names:
            self._lead_at = now
            self._have_died = True
        missed = frozenset(sign for sign in request.targets if sign.name not in reply.names)
        # Somebody older is alive, or one of the dead is: without a fresh look the same would be
        # sent over and over.
        if missed:
            self._must_look = True
            self.look_at = now
        if reply.led and missed:
            self._retries[Evict].failed(
                now
            )  # alive, or its row is locked by somebody: then it is not the last time
            self._stuck = missed
        elif reply.led:
            self._free_evictions()
        self.liveness.forget(reply.names)
        if self._older is not None:
            self._older = tuple(sign for sign in self._older if sign.name not in reply.names)

    def _free_evictions(self) -> None:
        self._retries[Evict].reset()
        self._stuck = frozenset()
        self._singly = 0

    def led(self, reply: RoundReply, now: float) -> None:
        """A round has been carried out, or refused."""
        self._lead_at = now if reply.more else NEVER
        self._have_died = self._have_died and reply.more
        self._must_step_down = False
        self._retries[Lead].reset()
        self._must_look = not reply.led
        self.look_at = now if self._must_look else now + self._poll

    def failed(self, duty: Duty, now: float) -> None:
        """The database refused this, or took too long over it. The others have nothing to wait
        for.
        """
        retry = self._retries[type(duty)]
        retry.failed(now)
        if isinstance(duty, Evict):
            self._singly += 1
            self._stuck = frozenset(duty.targets)
        # Another node may be able to. Alone, or where stepping down is what fails, there is nothing
        # to be had from it.
        if (
            retry.failing_for >= self._timeout
            and not isinstance(duty, StepDown)
            and len(self._known) != 1
        ):
            self._must_step_down = True


def _signs(members: Sequence[Member]) -> tuple[Sign, ...]:
    return tuple(Sign(m.name, m.incarnation, m.beat) for m in members)


def _nothing() -> None:
    """There is nothing to send, but there may be from then on."""
