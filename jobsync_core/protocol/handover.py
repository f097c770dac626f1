"""What a node owns, claims and hands over.

That a range is granted only after its old owner has let go of it is Kafka's incremental rebalance
protocol. Tokens that leave go in three steps: out of the local set, `on_release`, the row. Tokens
that come go in two: ask what others have taken of them, into the set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..assignment.groups import PLAIN, window
from ..assignment.tokens import TokenSet
from .agenda import NEVER, NOW, Due
from .effects import Effects, Entered, RebalanceEvent, Release
from .messages import Request
from .messages.handover import Give, LivesReply, Refresh, RefreshReply, Take, TakeReply
from .messages.signs import Life
from .ownership import Ownership
from .rhythm import spread
from .settings import Settings
from .taken_tasks import TakenTasks

__all__ = ['HandOver']

#: While a node enters, it looks for its first tokens again after so many seconds, then less and
#: less often: notifications may be lost.
_ENTRY_POLL = 0.25
#: Seconds for which a node that enters, and has tokens, waits for those that others still use.
_REST_SEC = 0.5


@dataclass
class _Outgoing:
    """Tokens on their way out: already out of the local set, given away once `ready`, but for those
    that are still in use.
    """

    number: int
    tokens: TokenSet
    version: int
    ready: bool
    deadline: float
    used: TokenSet = field(default_factory=TokenSet)

    @property
    def free(self) -> TokenSet:
        """What can be given now."""
        return self.tokens - self.used if self.ready else TokenSet()

    @property
    def released(self) -> bool:
        """Whether nothing of it is waited for."""
        return self.ready and not self.tokens & self.used


class HandOver:
    """One node's tokens, from the row in the database to the claim, and back.

    Args:
        name: The node's name.
        settings: Times and sizes.
        ownership: What `can_claim_task` reads; this object alone writes the set and the lease.
        effects: Where events go.
        promises: Takes a set of tokens that have just left the local set and names the (task_id,
            token) pairs of them that this node has answered True for and not yet recorded.

    Attributes:
        version: That of the cluster, as the node's rows showed it last.
        owned: The tokens whose rows name this node.
        entered: Whether the user's code may run.
        emptied: Whether the last look showed nothing here or on its way here, and a plan that knows
            of the drain.
        must_refresh: Nothing may be claimed before the rows have been read again.
        refresh_at: When they are read again in any case.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        ownership: Ownership,
        effects: Effects,
        promises: Callable[[TokenSet], tuple[tuple[str, int], ...]],
    ) -> None:
        self.version = 0
        self.owned = TokenSet()
        self.entered = False
        self.emptied = False
        self.must_refresh = True
        self.refresh_at = 0.0
        self._settings = settings
        self._ownership = ownership
        self._effects = effects
        self._promises = promises
        self._taken_tasks = TakenTasks(name, ownership)
        self._plain = TokenSet([window(PLAIN, settings.total_tokens)])
        self._outgoing: list[_Outgoing] = []
        self._releases = 0
        # the lease that the last answered heartbeat gives, as soon as the node's tokens are known
        self._granted = 0.0
        self._settle_until: float | None = None  # None: the node does not take part yet
        self._entry_looks = 0
        self._rest_until: float | None = None  # None: nothing has come yet
        self._announced = TokenSet()
        self._initial_announced = False

    def has_lease(self, now: float) -> bool:
        """Whether the lease is valid."""
        return now < self._ownership.deadline

    @property
    def released(self) -> bool:
        """Whether nothing waits for `on_release`."""
        return all(outgoing.released for outgoing in self._outgoing)

    def reread(self, life: Life, seen: int) -> Due:
        """The rows, before anything is claimed."""
        return NOW if self.must_refresh else NEVER, lambda: Refresh(*life, seen)

    def agenda(self, life: Life, seen: int, now: float) -> Iterator[Due]:
        """All else, the most urgent first."""

        def ask() -> Request | None:
            return self._taken_tasks.next(now)

        free = next((outgoing for outgoing in self._outgoing if outgoing.free), None)
        yield NOW if self._taken_tasks.gain else NEVER, ask
        if free is not None:
            yield NOW, lambda: self._give(life, free)
        yield self.refresh_at, lambda: Refresh(*life, seen)
        yield self._taken_tasks.wake_at, ask

    def _give(self, life: Life, outgoing: _Outgoing) -> Give:
        tokens = outgoing.free
        return Give(*life, tokens.ranges, outgoing.version, self._promises(tokens))

    @property
    def release_until(self) -> float:
        """When `on_release` is waited for no longer."""
        waits = (outgoing.deadline for outgoing in self._outgoing if not outgoing.released)
        return min(waits, default=NEVER)

    def end_release(self, now: float) -> None:
        """The hand-over waits no longer."""
        for outgoing in self._outgoing:
            if now >= outgoing.deadline:
                outgoing.ready, outgoing.used = True, TokenSet()
        self._effects.note(
            'warning',
            'handing over, though on_release or work on these tokens has not ended',
            limit_sec=self._settings.release_timeout,
        )

    @property
    def lease_until(self) -> float:
        """When the lease ends; NEVER where there is none."""
        return self._ownership.deadline or NEVER

    def end_lease(self, now: float) -> None:
        """It has run out."""
        self._ownership.suspend()
        self._effects.note('warning', 'lease ran out; claiming stopped', version=self.version)

    def heard_of(self, version: int, look_at: float) -> None:
        """The cluster has this version; if it is news, the rows are looked at by then."""
        if version != self.version:
            self.refresh_at = min(self.refresh_at, look_at)

    def beat_answered(self, version: int, now: float) -> None:
        """A heartbeat tells the version as well. If it is news, the lease counts when the rows
        have been read: whose rows somebody has deleted must not claim for longer for having heard
        of it.
        """
        if version != self.version:
            self.must_refresh = True
        elif self.entered and self.refresh_at > now:
            # The version says that nothing has changed: as good as a look at the rows.
            self.refresh_at = max(self.refresh_at, now + self._settings.check_interval)

    def grant(self, deadline: float, now: float) -> None:
        """A heartbeat gives a lease, which counts as soon as the node's tokens are known."""
        self._granted = deadline
        if not self.must_refresh:
            self._extend(now)
            self._consider_entered(False, now)

    def joined(self, version: int, now: float) -> None:
        """A new row owns nothing: there is nothing to read."""
        self.version = version
        self.must_refresh = False
        self.refresh_at = now

    def activated(self, now: float) -> None:
        """The node takes part: plans give it tokens."""
        self._settle_until = now + 2 * self._settings.timeout + self._settings.release_timeout
        self.refresh_at = now

    def refreshed(self, reply: RefreshReply, life: Life, claimable: TokenSet, now: float) -> None:
        """What the rows say. Of the tokens that they give this node it claims those alone that are
        claimable: of its queue groups.
        """
        if self.version != reply.version:
            self._taken_tasks.plan_changed()
        self.version = reply.version
        self.must_refresh = False
        self.refresh_at = now + (
            self._settings.check_interval if self.entered else self._entry_poll(life)
        )
        # A row whose receiver has gone stays here, out of the set, until the next plan says where
        # to.
        moving = TokenSet(
            (s.lo, s.hi)
            for s in reply.segments
            if s.moving and (s.moving_to is not None or s.blocked)
        )
        kept = TokenSet((s.lo, s.hi) for s in reply.segments if not s.moving)
        self.owned = TokenSet((s.lo, s.hi) for s in reply.segments)
        self.emptied = (
            reply.state == 'draining'
            and reply.planned
            and not reply.segments
            and not reply.incoming
        )
        kept &= claimable
        self._shrink(kept)
        self._follow_moves(moving, now)
        self._take_in(kept)
        self._extend(now)
        if reply.planned and kept and not self.entered:
            self._await_rest(now)
        self._consider_entered(reply.planned and not reply.incoming, now)

    def _await_rest(self, now: float) -> None:
        """Some tokens have come, and work for them may wait. Those that are in use elsewhere may
        come much later.
        """
        if self._rest_until is None:
            self._rest_until = now + _REST_SEC
        if now < self._rest_until:
            self.refresh_at = min(self.refresh_at, self._rest_until)

    def _entry_poll(self, life: Life) -> float:
        """Seconds until a node that has not entered looks for its tokens again. A heartbeat tells
        of a plan as well.
        """
        if self._settle_until is None:
            # there is nothing for it before its grace period is over
            return self._settings.check_interval
        self._entry_looks += 1
        longest = max(self._settings.interval, _ENTRY_POLL)
        return spread(
            min(longest, _ENTRY_POLL * 2 ** min(self._entry_looks - 1, 10)),
            life.incarnation,
            self._entry_looks,
        )

    def _shrink(self, kept: TokenSet) -> None:
        """Take out of the local set what is leaving, before anybody else can be told."""
        if not self._ownership.tokens <= kept:
            self._ownership.replace(self._ownership.tokens & kept)

    def _take_in(self, kept: TokenSet) -> None:
        """What others have taken is asked of the plain Job's tokens, before they are claimed.
        Those of queue groups are for messages, which have the ledger.
        """
        plain = kept & self._plain
        self._taken_tasks.owns(plain)
        if not kept - plain <= self._ownership.tokens:
            self._ownership.replace(self._ownership.tokens | (kept - plain))

    def _follow_moves(self, moving: TokenSet, now: float) -> None:
        for outgoing in self._outgoing:
            outgoing.tokens &= moving
            outgoing.version = self.version
            moving -= outgoing.tokens
        self._forget_given()
        # What is in use may hold up others for long: those do not wait for it.
        if moving and all(outgoing.ready for outgoing in self._outgoing):
            self._send_out(moving, now)

    def _forget_given(self) -> None:
        self._outgoing = [outgoing for outgoing in self._outgoing if outgoing.tokens]

    def _send_out(self, tokens: TokenSet, now: float) -> None:
        self._releases += 1
        if self._settings.has_release:
            self._effects.add(Release(self._releases, tokens))
        self._outgoing.append(
            _Outgoing(
                self._releases,
                tokens,
                self.version,
                not self._settings.has_release,
                now + self._settings.release_timeout,
            )
        )

    def taken(self, request: Take, reply: TakeReply, sent_at: float, now: float) -> None:
        """It is known what others have taken of some tokens: these may be claimed."""
        patience = self._settings.interval / 4
        known = self._taken_tasks.taken(request, reply, now, now - sent_at, patience)
        if known:
            self._ownership.replace(self._ownership.tokens | known)
        if not self._taken_tasks.gain:
            self.announce(now)
            if not self.entered:
                self.refresh_at = now

    def lives_over(self, reply: LivesReply) -> None:
        """Nodes are gone that had taken tasks."""
        self._taken_tasks.gone(reply)

    def release_ended(self, number: int, now: float) -> None:
        """`on_release` has returned."""
        self.release_went_on(number, TokenSet(), now)

    def release_went_on(self, number: int, used: TokenSet, now: float) -> None:
        """These tokens are still in use; the others can go. It comes too late where they are waited
        for no longer.
        """
        for outgoing in self._outgoing:
            if outgoing.number == number:
                late = now >= outgoing.deadline
                outgoing.ready, outgoing.used = True, TokenSet() if late else used

    def given(self, request: Give, now: float) -> None:
        """The rows of these tokens are given away; what is still in use goes later."""
        for outgoing in self._outgoing:
            outgoing.tokens -= TokenSet(request.ranges)
        self._forget_given()
        self.refresh_at = now

    def state_changed(self, now: float) -> None:
        """The row says something else about draining, or about the node's queue groups."""
        self.emptied = False
        self.refresh_at = now

    def interrupted(self, request: Request | None) -> None:
        """The connection was lost, with this request under way."""
        self.must_refresh = True
        self._taken_tasks.interrupted(request)

    def evicted(self, now: float) -> None:
        """All rows are gone."""
        self.stop_claiming()
        self.owned = TokenSet()
        self.emptied = False
        self._outgoing = []
        self.announce(now)

    def leave(self, tokens: TokenSet, now: float) -> None:
        """`on_release` for what was claimable until now. One that runs already goes on; callbacks
        run in order, so that a further one ends after it.
        """
        if tokens:
            self._send_out(tokens, now)

    def end(self) -> None:
        """The node has nothing more to hand over."""
        self.stop_claiming()
        self._outgoing = []

    def stop_claiming(self) -> None:
        """Claim nothing, from now on."""
        self._granted = 0.0
        self._ownership.suspend()
        self._ownership.replace(TokenSet())
        self._taken_tasks.reset()

    def _extend(self, now: float) -> None:
        if now < self._granted:
            self._ownership.extend(self._granted)
        self.announce(now)

    def _consider_entered(self, settled: bool, now: float) -> None:
        if self.entered or self._settle_until is None or not self.has_lease(now):
            return
        some = self._rest_until is not None and now >= self._rest_until
        if ((settled or some) and not self._taken_tasks.gain) or now >= self._settle_until:
            if not settled and not some:
                self._effects.note('warning', 'entered before the first plan had settled')
            self.entered = True
            self.announce(now)
            self._effects.add(Entered())

    def announce(self, now: float) -> None:
        """Tell the user about tokens that became claimable, or ceased to be."""
        claimable = self._ownership.tokens if self.has_lease(now) else TokenSet()
        initial = not self._initial_announced and self.entered
        if claimable == self._announced and not initial:
            return
        if not self._initial_announced and not self.entered:
            return  # the first event tells of all that was gained while entering
        added, removed = len(claimable - self._announced), len(self._announced - claimable)
        self._announced = claimable
        self._initial_announced = True
        self._effects.add(RebalanceEvent(initial, self.version, added, removed))
