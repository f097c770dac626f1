"""The five parts of a node together: which of them goes first, and what concerns several."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..assignment.tokens import TokenSet
from ..process import Process
from .agenda import NEVER, Due
from .connection import Connection
from .effects import Effects, Failed, Left
from .enrollment import Enrollment
from .handover import HandOver
from .leadership import Leadership
from .liveness import Liveness
from .membership import Membership, Phase
from .ownership import Ownership
from .settings import Settings

__all__ = ['Parts']


class Parts:
    """A node's connection, membership, enrollment, hand-over and leadership. The arguments are
    those of `Protocol`.

    Attributes:
        effects: What the driver is asked to do.
        ownership: What `can_claim_task` reads.
        connection, membership, enrollment, handover, leadership: The parts.
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
        promises: Callable[[TokenSet], tuple[tuple[str, int], ...]],
    ) -> None:
        self.effects = Effects(name)
        liveness = Liveness(settings.timeout, settings.max_gap)
        self.connection = Connection(settings.timeout)
        self.membership = Membership(
            name,
            settings,
            process,
            liveness,
            self.effects,
            new_incarnation=new_incarnation,
            is_known_dead=is_known_dead,
        )
        self.enrollment = Enrollment(settings.groups, settings.total_tokens, settings.timeout / 8)
        self.handover = HandOver(name, settings, ownership, self.effects, promises)
        self.leadership = Leadership(liveness, settings.timeout, settings.max_gap, settings.poll)
        self.ownership = ownership
        self._settings = settings
        ownership.incarnation = self.membership.life.incarnation

    def agenda(self, now: float) -> Iterator[Due]:
        """All that there is to send, the most urgent first."""
        connection, membership, handover = self.connection, self.membership, self.handover
        life, seen = membership.life, connection.seen
        if membership.ended:
            return
        if not connection.connected:
            yield connection.connect()
            return
        if membership.phase is Phase.JOINING:
            yield membership.join(self.enrollment.wanted)
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
        yield self.enrollment.enroll(life)
        if not connection.quarantined:
            yield from handover.agenda(life, seen, now)
        yield from self.leadership.agenda(life, now, handover.has_lease(now))

    def pass_time(self, now: float) -> float:
        """What time alone changes; returns when the next such change is due."""
        connection, handover = self.connection, self.handover
        wake_at = NEVER
        for at, change in (
            (handover.release_until, handover.end_release),
            (connection.quarantine_until, self._end_quarantine),
            (handover.lease_until, handover.end_lease),
        ):
            if now >= at:
                change(now)
            elif at < wake_at:
                wake_at = at
        if not handover.has_lease(now):
            handover.announce(now)
        return wake_at

    def stop_claiming(self, now: float) -> None:
        """Claim nothing, from now on, and say so."""
        self.handover.stop_claiming()
        self.handover.announce(now)

    def evicted(self, now: float) -> None:
        """The row is gone: somebody saw this node dead. Clear first, then come back as somebody
        new.
        """
        if self.membership.phase is Phase.LEAVING:
            self.finish(Left())
            return
        self.handover.evicted(now)
        self.enrollment.evicted()
        self.membership.evicted(now)
        self.ownership.incarnation = self.membership.life.incarnation
        self.connection.begin_life()
        self.leadership.start_anew()

    def wait_for_old_leases(self, now: float) -> None:
        """A promoted standby may have forgotten the last hand-overs. Whoever still holds a lease
        from before the promotion will have lost it after one timeout; until then nothing is
        claimed, taken, given away or planned.
        """
        self.connection.begin_quarantine(now)
        self.handover.must_refresh = True
        self.stop_claiming(now)
        self.effects.note(
            'warning',
            'another history of the database; waiting until old leases have run out',
            wait_sec=self._settings.timeout,
        )

    def _end_quarantine(self, now: float) -> None:
        self.connection.end_quarantine()
        self.handover.must_refresh = True
        self.membership.beat_at = min(self.membership.beat_at, now)

    def finish(self, effect: Left | Failed) -> None:
        """The node has nothing more to do, or cannot go on."""
        self.handover.end()
        if isinstance(effect, Left):
            self.membership.phase = Phase.LEFT
        else:
            self.membership.failed()
        self.effects.add(effect)
