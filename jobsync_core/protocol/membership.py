"""A node's row in the node table: it joins, sends heartbeats, takes part, drains and leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from ..errors import ClusterNotFormed, ConfigMismatch, DuplicateNodeName, JobSyncError
from ..process import Process
from .agenda import NEVER, NOTHING, NOW, Due
from .effects import Effects
from .liveness import Liveness
from .messages.membership import (
    ELDERS,
    Activate,
    ActivateReply,
    Beat,
    Drain,
    HeartbeatReply,
    Join,
    Leave,
    Mismatch,
    Occupied,
)
from .messages.signs import Life, Sign
from .rhythm import beat_delay, spread
from .settings import Settings

__all__ = ['Membership', 'Phase']

#: Where many join at once, the cluster's row is busy: a join is tried again after about so many
#: seconds, twice as many each time.
_JOIN_FIRST, _JOIN_MOST = 0.1, 2.0
#: Heartbeats that prove a rival alive: one alone may be a dead process's last, which arrived late.
_RIVAL_BEATS = 2


class Phase(Enum):
    """Where a node is in its life."""

    JOINING = 'joining'  # not in the node table
    WAITING = 'waiting'  # in the table, grace period running
    ACTIVE = 'active'
    LEAVING = 'leaving'
    LEFT = 'left'
    FAILED = 'failed'


class Membership:
    """One node's membership.

    Args:
        name: The node's name.
        settings: Times and sizes.
        process: Identity of this process, for others to judge whether it is dead.
        liveness: What is known of other nodes' signs of life.
        effects: Where notes go.
        new_incarnation: Makes a fresh id for each life of the name.
        is_known_dead: Whether a process is certainly gone.

    Attributes:
        phase: Where the node is in its life.
        life: Its present life.
        state: What its row says.
        evictions: How often its row was deleted by others.
        beat_at: When the next heartbeat is due.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        process: Process,
        liveness: Liveness,
        effects: Effects,
        *,
        new_incarnation: Callable[[], str],
        is_known_dead: Callable[[Process], bool],
    ) -> None:
        self.phase = Phase.JOINING
        self.life = Life(name, new_incarnation())
        self.state = 'joining'
        self.evictions = 0
        self.beat_at = 0.0
        self._settings = settings
        self._process = process
        self._liveness = liveness
        self._effects = effects
        self._new_incarnation = new_incarnation
        self._is_known_dead = is_known_dead
        # every life of mine: a row of one of them is no rival's
        self._mine = {self.life.incarnation}
        self._join_at = 0.0
        self._join_failures = 0
        self._rival_beats = 0
        self._replace: tuple[str, int] | None = None
        self._reap: tuple[Sign, ...] = ()
        self._rejoins = False
        self._wait_until = NEVER
        self._gate_open = not settings.has_gate
        self._since = 0
        self._wants_drain: bool | None = None
        self._wants_by_itself = False
        #: It has drained itself, and nobody else has drained it, as far as is known.
        self._stands_aside = False

    @property
    def ended(self) -> bool:
        """Whether the node has nothing more to do."""
        return self.phase in (Phase.LEFT, Phase.FAILED)

    @property
    def may_have_a_row(self) -> bool:
        """Whether the node has a row, or had one that somebody may still count on."""
        return self.phase is not Phase.JOINING or self._rejoins

    def join(self, groups: tuple[str, ...]) -> Due:
        """The row is inserted; it names these queue groups."""
        return self._join_at, lambda: self._join(groups)

    def _join(self, groups: tuple[str, ...]) -> Join:
        active = self._rejoins and self._wait_until == NEVER
        return Join(
            *self.life,
            self._process,
            self._settings.weight,
            active,
            self._replace,
            self._reap,
            groups,
        )

    def beat(self, number: Callable[[], tuple[int, int]]) -> Due:
        """A heartbeat; `number` gives its number and that of the last one answered."""
        return self.beat_at, lambda: Beat(*self.life, self._since, *number())

    def activate(self, quarantined: bool, now: float) -> Due:
        """The grace period is over."""
        if self.phase is Phase.WAITING and self._gate_open:
            least = self._settings.minimum_nodes
            return self._wait_until, lambda: Activate(*self.life, least, self._liveness.dead(now))
        if self.phase is Phase.ACTIVE and self.state == 'joining' and not quarantined:
            # The database has forgotten the activation: a promoted standby, or a backup.
            return NOW, lambda: Activate(*self.life, 0)
        return NOTHING

    def drain(self) -> Due:
        """The row says what the user wants. It is asked for after a heartbeat, with nothing on its
        way: only then is it known what the row says.
        """
        if self._wants_drain == (self.state == 'draining') and (
            self._wants_by_itself or not self._stands_aside
        ):
            self._wants_drain = None  # it is so; from here on an operator may decide otherwise
        wanted = self._wants_drain
        if wanted is None or self.phase is not Phase.ACTIVE:
            return NOTHING
        return NOW, lambda: Drain(*self.life, wanted, self._wants_by_itself)

    def leave(self) -> Due:
        """The row is deleted."""
        return NOW, lambda: Leave(*self.life)

    def want_drain(self, draining: bool, by_itself: bool) -> None:
        """Give all tokens away and stay alive, or take part again."""
        self._wants_drain, self._wants_by_itself = draining, by_itself

    def drained(self, request: Drain, done: bool) -> None:
        """The row says what was asked for, or somebody's drain stays."""
        if not done and (self._wants_drain, self._wants_by_itself) == (request.draining, True):
            self._wants_drain = None
        self.told('draining' if request.draining or not done else 'active')
        self._stands_aside = request.draining and request.by_itself

    def open_gate(self) -> None:
        """The node may become active as soon as its grace period is over."""
        self._gate_open = True

    def told(self, state: str, held: bool = False) -> None:
        """What the row says; `held`: somebody else has drained the node."""
        self.state = state
        self._stands_aside = self._stands_aside and state == 'draining' and not held

    def connected(self, now: float) -> None:
        """There is a new connection."""
        self.beat_at = min(self.beat_at, now)
        self._join_at = min(self._join_at, now)
        self._since = 0

    def joined(self, request: Join, now: float) -> None:
        """The row is there."""
        self._replace, self._reap = None, ()
        self._since = 0
        self.beat_at = now
        self.told('active' if request.active else 'joining')
        if self.phase is Phase.LEAVING:
            return
        if request.active:
            self.phase = Phase.ACTIVE
        else:
            self.phase = Phase.WAITING
            if self._wait_until == NEVER:
                self._wait_until = now + self._settings.wait_on_enter
        self._effects.note('info', 'joined', incarnation=self.life.incarnation)

    def join_refused(self, now: float) -> None:
        """The server was too busy."""
        self._join_failures += 1
        delay = min(_JOIN_MOST, _JOIN_FIRST * 2 ** min(self._join_failures, 10))
        self._join_at = now + spread(delay, self.life.incarnation, self._join_failures)

    def occupied(self, reply: Occupied, entered: bool, now: float) -> JobSyncError | None:
        """Another incarnation has the name; the error that ends a node which has not entered."""
        sign, process = reply.sign, reply.process
        if sign.incarnation in self._mine or self._is_known_dead(process):
            self._replace = (sign.incarnation, sign.beat)
            self._join_at = now
            return None
        if self._seen_alive([sign]):
            if not entered:
                return DuplicateNodeName(
                    f'node name {self.life.name!r} is used by a live process (pid {process.pid} '
                    f'on {process.host}): give every process its own name'
                )
            self._rival_beats = 0
            self._effects.note(
                'error',
                'another live process took this node name; not claiming',
                host=process.host,
                pid=process.pid,
            )
        self._liveness.look([sign], now)
        dead = self._liveness.is_dead(sign, now)
        self._replace = (sign.incarnation, sign.beat) if dead else None
        self._join_at = now if dead else now + self._settings.poll
        return None

    def mismatched(self, reply: Mismatch, now: float) -> JobSyncError | None:
        """The cluster has nodes and other settings; the error, where one of these nodes lives."""
        if self._seen_alive(reply.nodes):
            mine = (self._settings.total_tokens, self._settings.hash_function)
            theirs = (reply.total_tokens, reply.hash_function)
            return ConfigMismatch(
                f'this node has total_tokens, hash_function = {mine}, the live cluster has '
                f'{theirs}: use the same, or stop all nodes first'
            )
        self._liveness.look(reply.nodes, now)
        dead = all(self._liveness.is_dead(sign, now) for sign in reply.nodes)
        self._reap = reply.nodes if dead else ()
        self._join_at = now if dead else now + self._settings.poll
        return None

    def _seen_alive(self, signs: Iterable[Sign]) -> bool:
        self._rival_beats += any(self._liveness.shows_life(sign) for sign in signs)
        return self._rival_beats >= _RIVAL_BEATS

    def beat_answered(self, reply: HeartbeatReply, sent_at: float, known: bool) -> None:
        """A heartbeat has counted; `known`: in the history of those before."""
        if known:
            self.beat_at = sent_at + self._beat_delay(reply.ages)
            self._since = reply.since
        else:
            self.beat_at = sent_at + self._settings.interval
            self._since = 0  # what was older than this in the other history says nothing
        self.told(reply.state, reply.held)

    def _beat_delay(self, ages: tuple[float, ...]) -> float:
        interval = self._settings.interval
        longest = interval + (self._settings.lease - interval) / 4
        return min(beat_delay(ages, interval), longest) if len(ages) < ELDERS else interval

    def activated(self, reply: ActivateReply) -> JobSyncError | None:
        """The node takes part; or the error, where too few nodes were there."""
        if not reply.ok:
            return ClusterNotFormed(
                f'{reply.nodes} of minimum_nodes={self._settings.minimum_nodes} nodes had '
                f'registered after wait_on_enter={self._settings.wait_on_enter:g} s: start the '
                'missing nodes, wait longer, or lower minimum_nodes'
            )
        self.phase = Phase.ACTIVE
        self._wait_until = NEVER
        self.told('active')
        return None

    def evicted(self, now: float) -> None:
        """The row is gone: the node comes back as somebody new."""
        self.evictions += 1
        if self.state == 'draining' and self._wants_drain is None:
            # a drain outlives the eviction, an operator's as such
            self.want_drain(True, self._stands_aside)
        self._effects.note('warning', 'evicted; joining again', incarnation=self.life.incarnation)
        self.life = Life(self.life.name, self._new_incarnation())
        self._mine.add(self.life.incarnation)
        self.phase = Phase.JOINING
        self._rejoins = True
        self._join_at = now

    def failed(self) -> None:
        """The node cannot go on. One that has a row must not stay in the table: the others would
        wait for it.
        """
        self.phase = Phase.LEAVING if self.phase in (Phase.WAITING, Phase.ACTIVE) else Phase.FAILED
