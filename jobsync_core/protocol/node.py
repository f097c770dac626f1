"""A node's life as a state machine.

Whoever drives it asks `next(now)` for the one request to send, hands the answer to `reply` (or
calls `failed`), passes on notifications, and runs the effects. The agent drives it against
PostgreSQL, the simulator against a simulated store in virtual time: it is the same code. The form
is that of sans-I/O protocols (httpcore's connection pool, psycopg 3's generators).

Five parts know what there is to do: the connection, the membership, the enrollment in queue
groups, the hand-over of tokens and the leadership. Each gives `Due` values, a time and a request in
one; parts.py puts them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ..assignment.tokens import TokenSet
from ..process import Process
from .agenda import first_due
from .answers import Answers
from .effects import Effect, Left
from .leadership import Duty
from .membership import Phase
from .messages import Reply, Request
from .messages.connection import RecordHistory
from .messages.groups import Enroll
from .messages.leadership import Evict, Lead, Observe, StepDown
from .messages.membership import Join
from .ownership import Ownership
from .parts import Parts
from .settings import Settings

__all__ = ['BESIDE', 'Phase', 'Protocol', 'Settings']

#: What nodes, above all the oldest, do beside their heartbeats: where it fails and the connection
#: is good, all the rest goes on.
BESIDE = (Observe, Evict, Lead, StepDown, RecordHistory, Enroll)


class Protocol:
    """One node.

    Args:
        name: The node's name.
        settings: Times and sizes.
        process: Identity of this process, for others to judge whether it is dead.
        ownership: What `can_claim_task` reads; this object alone writes it.
        new_incarnation: Makes a fresh id for each life of the name.
        is_known_dead: Whether a process is certainly gone.
        promises: Takes a set of tokens that have just left the local set and names the (task_id,
            token) pairs of them that this node has answered True for and not yet recorded.

    Attributes:
        wake_at: When `next` has something to do if nothing happens before, as its last call found;
            the past means now.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        process: Process,
        ownership: Ownership,
        *,
        new_incarnation: Callable[[], str],
        is_known_dead: Callable[[Process], bool],
        promises: Callable[[TokenSet], tuple[tuple[str, int], ...]] = lambda tokens: (),
    ) -> None:
        self.name = name
        self.settings = settings
        self.ownership = ownership
        self.wake_at = 0.0
        self._parts = parts = Parts(
            name,
            settings,
            process,
            ownership,
            new_incarnation=new_incarnation,
            is_known_dead=is_known_dead,
            promises=promises,
        )
        self._answers = Answers(parts, settings)
        self._pending: Request | None = None
        self._sent_at = 0.0

    @property
    def phase(self) -> Phase:
        """Where the node is in its life."""
        return self._parts.membership.phase

    @property
    def incarnation(self) -> str:
        """The node's present life."""
        return self._parts.membership.life.incarnation

    @property
    def state(self) -> str:
        """What the node's row says of it."""
        return self._parts.membership.state

    @property
    def evictions(self) -> int:
        """How often others have seen this node dead."""
        return self._parts.membership.evictions

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._parts.connection.connected

    @property
    def history(self) -> str:
        """The name of the database's history; '' while unknown."""
        return self._parts.connection.history

    @property
    def quarantined(self) -> bool:
        """Whether the database has another history than before, so that old leases must run out
        first.
        """
        return self._parts.connection.quarantined

    @property
    def version(self) -> int:
        """That of the cluster, as this node has seen it last."""
        return self._parts.handover.version

    @property
    def owned(self) -> TokenSet:
        """The tokens whose rows name this node."""
        return self._parts.handover.owned

    @property
    def groups(self) -> Mapping[str, int]:
        """The queue groups that this node knows of, by name: where their tokens are on the number
        line, as its rows showed it last.
        """
        return self._parts.enrollment.ids

    @property
    def entered(self) -> bool:
        """Whether the user's code may run."""
        return self._parts.handover.entered

    @property
    def drained(self) -> bool:
        """Whether this node is draining, has given everything away, and will be given nothing."""
        return self.state == 'draining' and self._parts.handover.emptied

    def rank(self, now: float) -> int | None:
        """How many live nodes are older: 0 for the leader, 1 for its successor, None while
        unknown.
        """
        return self._parts.leadership.rank(now)

    def has_lease(self, now: float) -> bool:
        """Whether the lease is valid."""
        return self._parts.handover.has_lease(now)

    def leave(self, now: float) -> None:
        """Stop claiming at once; the row goes when `on_release` has run."""
        if self._parts.membership.ended or self.phase is Phase.LEAVING:
            return
        tokens = self.ownership.tokens
        self._parts.stop_claiming(now)
        if not self._parts.membership.may_have_a_row and not isinstance(self._pending, Join):
            self._parts.finish(Left())
            return
        self._parts.membership.phase = Phase.LEAVING
        self._parts.handover.leave(tokens, now)

    def open_gate(self) -> None:
        """The node may become active as soon as its grace period is over."""
        self._parts.membership.open_gate()

    def drain(self, now: float, by_itself: bool = False) -> None:
        """Give all tokens away and stay alive.

        Args:
            now: The time.
            by_itself: The node does so by what it finds itself, as in `undrain`.
        """
        self._parts.membership.want_drain(True, by_itself)

    def undrain(self, now: float, by_itself: bool = False) -> None:
        """Take part again; by itself only where nobody else has drained it."""
        self._parts.membership.want_drain(False, by_itself)

    def enroll(self, groups: Iterable[str], now: float) -> None:
        """Belong to these queue groups, and no others; the plain Job's is always one of them."""
        self._parts.enrollment.want(groups)
        if self._parts.enrollment.is_told:
            # What was wanted before was not asked for, so that no answer comes: the rows tell that
            # nothing of it is held.
            self._parts.handover.refresh_at = now

    def holds(self, group: str) -> bool:
        """Whether this node has tokens of the queue group, or may get some: as long as it belongs
        to it, and after it has left, until all is given away.
        """
        return not self._parts.membership.ended and self._parts.enrollment.holds(group)

    def notified(self, payload: str, now: float) -> None:
        """A notification arrived. It only makes this node look earlier: all of them may be lost."""
        kind, _, detail = payload.partition(' ')
        if kind == 'plan' or (kind == 'give' and (not detail or self.name in detail.split(','))):
            self._parts.handover.refresh_at = now
        elif kind != 'give':
            self._parts.leadership.look_at = now

    def released(self, number: int, now: float) -> None:
        """`on_release` has returned."""
        self._parts.handover.release_ended(number, now)

    def release_went_on(self, number: int, used: TokenSet, now: float) -> None:
        """`on_release` runs still, and these tokens are in use: the others can go."""
        self._parts.handover.release_went_on(number, used, now)

    def disconnected(self, now: float) -> None:
        """The control connection is gone."""
        self._parts.connection.lost(now)
        self._parts.handover.interrupted(self._pending)
        self._pending = None

    def failed(self, request: Request, now: float) -> None:
        """The request failed, and the connection with it; it may have been carried out, or may be
        later.
        """
        self.disconnected(now)
        self._blame(request, now)

    def refused(self, request: Request, now: float) -> None:
        """The server refused one of BESIDE or a Join, or took too long over it; the connection is
        good, and the next heartbeat goes on.
        """
        self._pending = None
        if isinstance(request, Join):
            self._parts.membership.join_refused(now)
        elif isinstance(request, Enroll):
            self._parts.enrollment.refused(now)
        self._blame(request, now)

    def _blame(self, request: Request, now: float) -> None:
        if isinstance(request, Duty):
            self._parts.leadership.failed(request, now)

    def recover(self, now: float) -> None:
        """Something unforeseen went wrong on the way: nothing is claimed until all has been read
        anew over a new connection.
        """
        self.disconnected(now)
        self._parts.stop_claiming(now)

    def take_effects(self) -> list[Effect]:
        """What is to be done now, in order; each effect is handed out once."""
        return self._parts.effects.take()

    def next(self, now: float) -> Request | None:
        """The request to send now, if any; there is never more than one under way."""
        next_change = self._parts.pass_time(now)
        if self._pending is not None:
            return None
        self._pending, next_due = first_due(self._parts.agenda(now), now)
        self._sent_at = now
        self.wake_at = min(next_change, next_due)
        return self._pending

    def reply(self, request: Request, reply: Reply, now: float) -> None:
        """The answer to `request`."""
        self._pending = None
        self._answers.take(request, reply, self._sent_at, now)
