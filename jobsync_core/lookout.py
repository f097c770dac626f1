"""The duty of the leader and its successor: to watch the node table, and to ask for a round when something has changed."""
from __future__ import annotations

from collections.abc import Sequence

from .liveness import Liveness
from .messages import Lead, Led, Member, Observe, Observed, Sign

__all__ = ['Lookout']

_NEVER = float('inf')
#: Joins within this many seconds are planned together.
_JOIN_WINDOW = 0.1
#: Two clocks that disagree on when a lock expires must not make a node look in a tight loop.
_SHORTEST_WAIT = 0.02


class Lookout:
    """What one node knows of the others, and what it has to do about it.

    Args:
        timeout: Seconds without a heartbeat after which a node is dead.
        max_gap: Seconds without a look after which waits begin anew.
        poll: Seconds between two looks.
    """

    def __init__(self, timeout: float, max_gap: float, poll: float) -> None:
        self.liveness = Liveness(timeout, max_gap)
        self.look_at = 0.0
        self._poll = poll
        self._older: tuple[Sign, ...] | None = None
        self._known: frozenset[str] = frozenset()
        self._lead_at = _NEVER
        self._must_look = False  # the last round did not go as expected: look again before the next one

    def rank(self, now: float) -> int | None:
        """How many live nodes are older: 0 for the leader, 1 for its successor, None while unknown."""
        if self._older is None:
            return None
        return sum(not self.liveness.is_dead(sign, now) for sign in self._older)

    def watches(self, now: float) -> bool:
        """Whether this node is the leader or its successor."""
        rank = self.rank(now)
        return rank is not None and rank <= 1

    def duty(self, name: str, incarnation: str, now: float, has_lease: bool) -> Lead | Observe | None:
        """What to send now, if anything. Without a lease nobody leads."""
        if not self.watches(now):
            return None
        if self.rank(now) == 0 and has_lease and not self._must_look:
            dead = self.liveness.dead(now)
            if dead or now >= self._lead_at:
                return Lead(name, incarnation, dead, 'nodes died' if dead else 'nodes or locks changed')
        return Observe() if now >= self.look_at else None

    def wake_at(self, now: float, has_lease: bool) -> float:
        """When there may be something to do next."""
        if not self.watches(now):
            return _NEVER
        leads = self.rank(now) == 0 and has_lease
        return min(self.look_at, self.liveness.next_death(now), self._lead_at if leads else _NEVER)

    def start_anew(self) -> None:
        """This node has a new life: its age among the others is not known yet."""
        self._older = None
        self._lead_at = _NEVER

    def heard(self, older: tuple[Sign, ...], now: float) -> None:
        """A heartbeat's answer named all older nodes."""
        self._older = older
        self.liveness.look(older, now)

    def observed(self, reply: Observed, incarnation: str, now: float) -> bool:
        """A look at the whole node table; whether this node is in it."""
        me = next((m for m in reply.members if m.incarnation == incarnation), None)
        others = [m for m in reply.members if m is not me]
        self.liveness.look(_signs(others), now)
        self.liveness.keep([m.name for m in others])
        if me is not None:
            self._older = _signs([m for m in others if (m.created_on, m.name) < (me.created_on, me.name)])
        self._must_look = False
        self.look_at = now + self._poll
        if reply.next_expiry is not None and reply.next_expiry > 0:
            self.look_at = min(self.look_at, now + max(reply.next_expiry, _SHORTEST_WAIT))
        known, self._known = self._known, frozenset(m.incarnation for m in reply.members)
        if not reply.stale and (reply.next_expiry is None or reply.next_expiry > 0):
            self._lead_at = _NEVER
        elif self._lead_at == _NEVER:
            self._lead_at = now + (_JOIN_WINDOW if known < self._known else 0.0)
        return me is not None

    def led(self, request: Lead, reply: Led, now: float) -> None:
        """A round has been carried out, or refused."""
        self._lead_at = _NEVER
        # Somebody older is alive, or one of the dead is: without a fresh look the same round would be sent over and over.
        self._must_look = not reply.led or len(reply.evicted) < len(request.dead)
        self.look_at = now if self._must_look else now + self._poll
        self.liveness.forget(reply.evicted)
        if self._older is not None:
            self._older = tuple(sign for sign in self._older if sign.name not in reply.evicted)


def _signs(members: Sequence[Member]) -> tuple[Sign, ...]:
    return tuple(Sign(m.name, m.incarnation, m.beat) for m in members)
