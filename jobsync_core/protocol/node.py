"""A node's life as a state machine without I/O and without a clock.

Whoever drives it asks `next(now)` for the one request to send, hands the answer to `reply` (or
calls `failed`), passes on notifications, and runs the effects. The agent drives it against
PostgreSQL, the simulator against a simulated store in virtual time: it is the same code. The form
is that of sans-I/O protocols (httpcore's connection pool, psycopg 3's generators).

Four parts know what there is to do: the connection, the membership, the hand-over of tokens and the
leadership. Each gives `Due` values, a time and a request in one. `Protocol` puts them in order, and
tells each part what concerns it.

Why at most one node claims a token at any instant:
1. Only the owner named in the database has a token in its set, and the database names one.
2. A live owner loses a token in one way: it takes it out of its set first and gives the row away
   afterwards (`Give`).
3. A dead owner loses all in one way: its row is deleted by somebody who has seen no heartbeat for a
   whole timeout, while its lease, counted from the sending of its last answered heartbeat, lasts
   less than that.
4. Statements that arrive late carry an incarnation and a version, and find nothing to change.
5. All this holds within one history of the database. A promoted standby, which may lack the last
   writes, begins another one. Each heartbeat asks whether the database still holds the last one
   that was answered, and by which name its history goes. A node whose last heartbeat is missing, or
   that hears another name, claims nothing for a timeout, by when all leases of the history before
   are over. A node that knows nothing of the one before waits as well, unless the cluster's row has
   the present name: it is written by a node that has waited, and only where that node's last
   heartbeat is; or by the first node of all, and only where the server was never promoted. A
   standby has in its rows no name of a timeline that it did not follow, so that a name which two
   promotions share misleads nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..assignment.tokens import TokenSet
from ..process import Process
from .agenda import NEVER, Due, earliest, first_due
from .connection import Connection, History
from .effects import Effect, Effects, Failed, Left
from .handover import HandOver
from .leadership import Duty, Leadership
from .liveness import Liveness
from .membership import Membership, Phase
from .messages import Reply, Request
from .messages.connection import ConnectReply, RecordHistory
from .messages.handover import GiveReply, LivesReply, RefreshReply, Take, TakeReply
from .messages.leadership import (
    Evict,
    EvictReply,
    Lead,
    Observe,
    ObserveReply,
    RoundReply,
    StepDown,
)
from .messages.membership import (
    ActivateReply,
    Drain,
    HeartbeatReply,
    Join,
    JoinReply,
    Leave,
    Mismatch,
    Occupied,
)
from .ownership import Ownership
from .settings import Settings

__all__ = ['BESIDE', 'Phase', 'Protocol', 'Settings']

#: What the oldest nodes do beside their heartbeats: where it fails and the connection is good, all
#: the rest goes on.
BESIDE = (Observe, Evict, Lead, StepDown, RecordHistory)


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
        self._effects = Effects(name)
        liveness = Liveness(settings.timeout, settings.max_gap)
        self._connection = Connection(settings.timeout)
        self._membership = Membership(
            name,
            settings,
            process,
            liveness,
            self._effects,
            new_incarnation=new_incarnation,
            is_known_dead=is_known_dead,
        )
        self._handover = HandOver(name, settings, ownership, self._effects, promises)
        self._leadership = Leadership(liveness, settings.timeout, settings.max_gap, settings.poll)
        ownership.incarnation = self.incarnation
        self._pending: Request | None = None
        self._sent_at = 0.0

    @property
    def phase(self) -> Phase:
        """Where the node is in its life."""
        return self._membership.phase

    @property
    def incarnation(self) -> str:
        """The node's present life."""
        return self._membership.life.incarnation

    @property
    def state(self) -> str:
        """What the node's row says of it."""
        return self._membership.state

    @property
    def evictions(self) -> int:
        """How often others have seen this node dead."""
        return self._membership.evictions

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._connection.connected

    @property
    def history(self) -> str:
        """The name of the database's history; '' while unknown."""
        return self._connection.history

    @property
    def quarantined(self) -> bool:
        """Whether the database has another history than before, so that old leases must run out
        first.
        """
        return self._connection.quarantined

    @property
    def version(self) -> int:
        """That of the cluster, as this node has seen it last."""
        return self._handover.version

    @property
    def owned(self) -> TokenSet:
        """The tokens whose rows name this node."""
        return self._handover.owned

    @property
    def entered(self) -> bool:
        """Whether the user's code may run."""
        return self._handover.entered

    @property
    def drained(self) -> bool:
        """Whether this node is draining, has given everything away, and will be given nothing."""
        return self.state == 'draining' and self._handover.emptied

    def rank(self, now: float) -> int | None:
        """How many live nodes are older: 0 for the leader, 1 for its successor, None while
        unknown.
        """
        return self._leadership.rank(now)

    def has_lease(self, now: float) -> bool:
        """Whether the lease is valid."""
        return self._handover.has_lease(now)

    def leave(self, now: float) -> None:
        """Stop claiming at once; the row goes when `on_release` has run."""
        if self._membership.ended or self.phase is Phase.LEAVING:
            return
        tokens = self.ownership.tokens
        self._stop_claiming(now)
        if not self._membership.may_have_a_row and not isinstance(self._pending, Join):
            self._finish(Left())
            return
        self._membership.phase = Phase.LEAVING
        self._handover.leave(tokens, now)

    def open_gate(self) -> None:
        """The node may become active as soon as its grace period is over."""
        self._membership.open_gate()

    def drain(self, now: float) -> None:
        """Give all tokens away and stay alive."""
        self._membership.want_drain(True)

    def undrain(self, now: float) -> None:
        """Take part again."""
        self._membership.want_drain(False)

    def notified(self, payload: str, now: float) -> None:
        """A notification arrived. It only makes this node look earlier: all of them may be lost."""
        kind, _, detail = payload.partition(' ')
        if kind == 'plan' or (kind == 'give' and (not detail or self.name in detail.split(','))):
            self._handover.refresh_at = now
        elif kind != 'give':
            self._leadership.look_at = now

    def released(self, number: int, now: float) -> None:
        """`on_release` has returned."""
        self._handover.release_ended(number)

    def disconnected(self, now: float) -> None:
        """The control connection is gone."""
        self._connection.lost(now)
        self._handover.interrupted(self._pending)
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
            self._membership.join_refused(now)
        self._blame(request, now)

    def _blame(self, request: Request, now: float) -> None:
        if isinstance(request, Duty):
            self._leadership.failed(request, now)

    def recover(self, now: float) -> None:
        """Something unforeseen went wrong on the way: nothing is claimed until all has been read
        anew over a new connection.
        """
        self.disconnected(now)
        self._stop_claiming(now)

    def take_effects(self) -> list[Effect]:
        """What is to be done now, in order; each effect is handed out once."""
        return self._effects.take()

    def next(self, now: float) -> Request | None:
        """The request to send now, if any; there is never more than one under way."""
        for at, change in self._changes():
            if now >= at:
                change(now)
        if not self.has_lease(now):
            self._handover.announce(now)
        if self._pending is None:
            self._pending = first_due(self._agenda(now), now)
            self._sent_at = now
            return self._pending
        return None

    def wake_at(self, now: float) -> float:
        """When `next` has something to do if nothing happens before; the past means now."""
        if self._membership.ended:
            return NEVER
        return min(earliest(self._agenda(now)), *(at for at, _ in self._changes()))

    def _agenda(self, now: float) -> Iterator[Due]:
        """All that there is to send, the most urgent first."""
        connection, membership, handover = self._connection, self._membership, self._handover
        life, seen = membership.life, connection.seen
        if membership.ended:
            return
        if not connection.connected:
            yield connection.connect()
            return
        if membership.phase is Phase.JOINING:
            yield membership.join()
            return
        if membership.phase is Phase.LEAVING and handover.released:
            yield membership.leave()
        # A heartbeat goes first: it writes, and so it alone can tell whether all that follows is of
        # one history.
        yield membership.beat(connection.number_heartbeat)
        if membership.phase is Phase.LEAVING:
            return
        if not connection.quarantined:
            yield handover.reread(life, seen)
            yield connection.record_history(life)
        yield membership.activate(connection.quarantined, now)
        yield membership.drain()
        if not connection.quarantined:
            yield from handover.agenda(life, seen, now)
        yield from self._leadership.agenda(life, now, handover.has_lease(now))

    def _changes(self) -> Iterator[tuple[float, Callable[[float], None]]]:
        """What time alone changes, and when."""
        yield self._handover.release_until, self._handover.end_release
        yield self._connection.quarantine_until, self._end_quarantine
        yield self.ownership.deadline or NEVER, self._handover.end_lease

    def reply(self, request: Request, reply: Reply, now: float) -> None:
        """The answer to `request`."""
        self._pending = None
        if isinstance(request, Join):
            self._on_join(request, reply, now)
        elif isinstance(request, Leave):
            self._finish(Left())
        elif reply is None:
            self._on_evicted(now)
        elif isinstance(reply, ConnectReply):
            self._on_connected(reply, now)
        elif isinstance(reply, HeartbeatReply):
            self._on_heartbeat(reply, now)
        elif self.phase is Phase.LEAVING:
            pass  # asked before the decision to leave; of no use now
        elif isinstance(reply, RefreshReply):
            self._on_refreshed(reply, now)
        elif isinstance(request, Take) and isinstance(reply, TakeReply):
            self._handover.taken(request, reply, self._sent_at, now)
        elif isinstance(reply, LivesReply):
            self._handover.lives_over(reply)
        elif isinstance(reply, GiveReply):
            self._handover.given(now)
        elif isinstance(reply, ActivateReply):
            self._on_activated(reply, now)
        elif isinstance(reply, ObserveReply):
            self._on_observed(reply, now)
        elif isinstance(request, Evict) and isinstance(reply, EvictReply):
            self._on_evicted_others(request, reply, now)
        elif isinstance(reply, RoundReply):
            self._on_round(reply, now)
        elif isinstance(request, StepDown):
            self._on_stepped_down(now)
        elif isinstance(request, Drain):
            self._membership.told('draining' if request.draining else 'active')
            self._handover.drain_changed(now)

    def _on_connected(self, reply: ConnectReply, now: float) -> None:
        self._handover.must_refresh = True
        self._membership.connected(now)
        self._leadership.look_at = now
        if self._connection.opened(reply, now):
            self._wait_for_old_leases(now)

    def _on_join(self, request: Join, reply: Reply, now: float) -> None:
        error = None
        if isinstance(reply, JoinReply):
            self._handover.joined(reply.version, now)
            self._leadership.start_anew()
            self._leadership.look_at = now
            self._membership.joined(request, now)
        elif isinstance(reply, Occupied):
            error = self._membership.occupied(reply, self.entered, now)
        elif isinstance(reply, Mismatch):
            error = self._membership.mismatched(reply, now)
        if error is not None:
            self._finish(Failed(error))

    def _on_heartbeat(self, reply: HeartbeatReply, now: float) -> None:
        history = self._connection.heard(reply)
        if history is not History.KNOWN:
            self._wait_for_old_leases(now)
        known = history is not History.CHANGED
        self._membership.beat_answered(reply, self._sent_at, known)
        if known:
            self._leadership.heard(reply.older, now)
        else:
            self._leadership.start_anew()
        self._handover.beat_answered(reply.version, now)
        if self.phase is not Phase.LEAVING and not self.quarantined:
            self._handover.grant(self._sent_at + self.settings.lease, now)

    def _on_refreshed(self, reply: RefreshReply, now: float) -> None:
        if self._connection.is_of_another_history(reply):
            self._handover.must_refresh = True
            self._membership.beat_at = now
            return
        self._membership.told(reply.state)
        self._handover.refreshed(reply, self._membership.life, now)

    def _on_activated(self, reply: ActivateReply, now: float) -> None:
        error = self._membership.activated(reply)
        if error is not None:
            self._finish(Failed(error))
            return
        self._handover.activated(now)
        self._leadership.look_at = now

    def _on_evicted(self, now: float) -> None:
        """The row is gone: somebody saw this node dead. Clear first, then come back as somebody
        new.
        """
        if self.phase is Phase.LEAVING:
            self._finish(Left())
            return
        self._handover.evicted(now)
        self._membership.evicted(now)
        self.ownership.incarnation = self.incarnation
        self._connection.begin_life()
        self._leadership.start_anew()

    def _on_observed(self, reply: ObserveReply, now: float) -> None:
        if not self._leadership.observed(reply, self.incarnation, now, now - self._sent_at):
            self._membership.beat_at = now  # evicted: the heartbeat will tell
        self._handover.heard_of(reply.version, now + self.settings.interval)

    def _on_evicted_others(self, request: Evict, reply: EvictReply, now: float) -> None:
        self._leadership.evicted(request, reply, now)
        if reply.names:
            self._effects.note('info', 'evicted', names=list(reply.names))

    def _on_round(self, reply: RoundReply, now: float) -> None:
        self._leadership.led(reply, now)
        self._handover.heard_of(reply.version, now)
        for conflict in reply.conflicts:
            self._effects.note('warning', 'locks in conflict', conflict=conflict)
        if reply.moved:
            self._effects.note(
                'info',
                'led a rebalance',
                version=reply.version,
                moved=reply.moved,
                blocked=reply.blocked,
            )

    def _on_stepped_down(self, now: float) -> None:
        self._leadership.start_anew()
        self._membership.beat_at = now
        self._effects.note(
            'error',
            'stepped down: its rounds failed for a heartbeat timeout; the next oldest node leads',
        )

    def _wait_for_old_leases(self, now: float) -> None:
        """A promoted standby may have forgotten the last hand-overs. Whoever still holds a lease
        from before the promotion will have lost it after one timeout; until then nothing is
        claimed, taken, given away or planned.
        """
        self._connection.begin_quarantine(now)
        self._handover.must_refresh = True
        self._stop_claiming(now)
        self._effects.note(
            'warning',
            'another history of the database; waiting until old leases have run out',
            wait_sec=self.settings.timeout,
        )

    def _end_quarantine(self, now: float) -> None:
        self._connection.end_quarantine()
        self._handover.must_refresh = True
        self._membership.beat_at = min(self._membership.beat_at, now)

    def _stop_claiming(self, now: float) -> None:
        self._handover.stop_claiming()
        self._handover.announce(now)

    def _finish(self, effect: Left | Failed) -> None:
        self._handover.end()
        if isinstance(effect, Left):
            self._membership.phase = Phase.LEFT
        else:
            self._membership.failed()
        self._effects.add(effect)
