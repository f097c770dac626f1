"""What an answer means to each part of a node."""

from __future__ import annotations

from .connection import History
from .effects import Failed, Left
from .membership import Phase
from .messages import Reply, Request
from .messages.connection import ConnectReply
from .messages.groups import Enroll, EnrollReply
from .messages.handover import Give, GiveReply, LivesReply, RefreshReply, Take, TakeReply
from .messages.leadership import Evict, EvictReply, ObserveReply, RoundReply, StepDown
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
from .parts import Parts
from .settings import Settings

__all__ = ['Answers']


class Answers:
    """Tells the parts what an answer tells of each.

    Args:
        parts: The node's parts.
        settings: Times and sizes.
    """

    def __init__(self, parts: Parts, settings: Settings) -> None:
        self.parts = parts
        self.settings = settings

    def take(self, request: Request, reply: Reply, sent_at: float, now: float) -> None:
        """The answer to a request.

        Args:
            request: The request.
            reply: Its answer.
            sent_at: When the request was sent.
            now: The time.
        """
        if isinstance(request, Join):
            self._on_join(request, reply, now)
        elif isinstance(request, Leave):
            self.parts.finish(Left())
        elif reply is None:
            self.parts.evicted(now)
        elif isinstance(reply, ConnectReply):
            self._on_connected(reply, now)
        elif isinstance(reply, HeartbeatReply):
            self._on_heartbeat(reply, sent_at, now)
        elif self.parts.membership.phase is Phase.LEAVING:
            pass  # asked before the decision to leave; of no use now
        elif isinstance(reply, RefreshReply):
            self._on_refreshed(reply, now)
        elif isinstance(request, Take) and isinstance(reply, TakeReply):
            self.parts.handover.taken(request, reply, sent_at, now)
        elif isinstance(reply, LivesReply):
            self.parts.handover.lives_over(reply)
        elif isinstance(request, Give) and isinstance(reply, GiveReply):
            self.parts.handover.given(request, now)
        elif isinstance(reply, ActivateReply):
            self._on_activated(reply, now)
        elif isinstance(reply, ObserveReply):
            self._on_observed(reply, sent_at, now)
        elif isinstance(request, Evict) and isinstance(reply, EvictReply):
            self._on_evicted_others(request, reply, now)
        elif isinstance(reply, RoundReply):
            self._on_round(reply, now)
        elif isinstance(request, StepDown):
            self._on_stepped_down(now)
        elif isinstance(request, Drain):
            self.parts.membership.drained(request, bool(reply))
            self.parts.handover.state_changed(now)
        elif isinstance(request, Enroll) and isinstance(reply, EnrollReply):
            self.parts.enrollment.enrolled(request, reply)
            self.parts.handover.state_changed(now)

    def _on_connected(self, reply: ConnectReply, now: float) -> None:
        self.parts.handover.must_refresh = True
        self.parts.membership.connected(now)
        self.parts.leadership.look_at = now
        if self.parts.connection.opened(reply, now):
            self.parts.wait_for_old_leases(now)

    def _on_join(self, request: Join, reply: Reply, now: float) -> None:
        error = None
        if isinstance(reply, JoinReply):
            self.parts.handover.joined(reply.version, now)
            self.parts.enrollment.joined(reply)
            self.parts.leadership.start_anew()
            self.parts.leadership.look_at = now
            self.parts.membership.joined(request, now)
        elif isinstance(reply, Occupied):
            error = self.parts.membership.occupied(reply, self.parts.handover.entered, now)
        elif isinstance(reply, Mismatch):
            error = self.parts.membership.mismatched(reply, now)
        if error is not None:
            self.parts.finish(Failed(error))

    def _on_heartbeat(self, reply: HeartbeatReply, sent_at: float, now: float) -> None:
        history = self.parts.connection.heard(reply)
        if history is not History.KNOWN:
            self.parts.wait_for_old_leases(now)
        known = history is not History.CHANGED
        self.parts.membership.beat_answered(reply, sent_at, known)
        if known:
            self.parts.leadership.heard(reply.older, now)
        else:
            self.parts.leadership.start_anew()
        self.parts.handover.beat_answered(reply.version, now)
        self.parts.enrollment.heard(reply)
        if (
            self.parts.membership.phase is not Phase.LEAVING
            and not self.parts.connection.quarantined
        ):
            self.parts.handover.grant(sent_at + self.settings.lease, now)

    def _on_refreshed(self, reply: RefreshReply, now: float) -> None:
        if self.parts.connection.is_of_another_history(reply):
            self.parts.handover.must_refresh = True
            self.parts.membership.beat_at = now
            return
        self.parts.membership.told(reply.state)
        self.parts.enrollment.refreshed(reply)
        claimable = self.parts.enrollment.tokens
        self.parts.handover.refreshed(reply, self.parts.membership.life, claimable, now)

    def _on_activated(self, reply: ActivateReply, now: float) -> None:
        error = self.parts.membership.activated(reply)
        if error is not None:
            self.parts.finish(Failed(error))
            return
        self.parts.handover.activated(now)
        self.parts.leadership.look_at = now

    def _on_observed(self, reply: ObserveReply, sent_at: float, now: float) -> None:
        incarnation = self.parts.membership.life.incarnation
        if not self.parts.leadership.observed(reply, incarnation, now, now - sent_at):
            self.parts.membership.beat_at = now  # evicted: the heartbeat will tell
        self.parts.handover.heard_of(reply.version, now + self.settings.interval)

    def _on_evicted_others(self, request: Evict, reply: EvictReply, now: float) -> None:
        self.parts.leadership.evicted(request, reply, now)
        if reply.names:
            self.parts.effects.note('info', 'evicted', names=list(reply.names))

    def _on_round(self, reply: RoundReply, now: float) -> None:
        self.parts.leadership.led(reply, now)
        self.parts.handover.heard_of(reply.version, now)
        for conflict in reply.conflicts:
            self.parts.effects.note('warning', 'locks in conflict', conflict=conflict)
        if reply.moved:
            nobody = ': no node may own any token now' if reply.for_nobody else ''
            self.parts.effects.note(
                'info',
                f'led a rebalance{nobody}',
                version=reply.version,
                moved=reply.moved,
                blocked=reply.blocked,
            )

    def _on_stepped_down(self, now: float) -> None:
        self.parts.leadership.start_anew()
        self.parts.membership.beat_at = now
        self.parts.effects.note(
            'error',
            'stepped down: its rounds failed for a heartbeat timeout; the next oldest node leads',
        )
