"""A node's life as a state machine without I/O and without a clock.

Whoever drives it asks `next(now)` for the one request to send, hands the answer to `reply` (or
calls `failed`), passes on notifications, and runs the effects. The agent drives it against
PostgreSQL, the simulator against a simulated store in virtual time: it is the same code. The form
is that of sans-I/O protocols (httpcore's connection pool, psycopg 3's generators); that a range is
granted only after its old owner has let go of it is Kafka's incremental rebalance protocol.

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

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from ..assignment.tokens import TokenSet
from ..errors import ClusterNotFormed, ConfigMismatch, DuplicateNodeName
from ..process import Process
from .effects import Effect, Entered, Failed, Left, Note, RebalanceEvent, Release
from .leadership import Duty, Leadership
from .messages import (
    ELDERS,
    Activate,
    ActivateReply,
    Beat,
    Connect,
    ConnectReply,
    Drain,
    Evict,
    EvictReply,
    Give,
    GiveReply,
    HeartbeatReply,
    Join,
    JoinReply,
    Lead,
    Leave,
    LivesReply,
    Mismatch,
    Observe,
    ObserveReply,
    Occupied,
    RecordHistory,
    Refresh,
    RefreshReply,
    Reply,
    Request,
    RoundReply,
    Sign,
    StepDown,
    Take,
    TakeReply,
)
from .ownership import Ownership
from .rhythm import beat_delay, spread
from .takings import Takings

__all__ = ['BESIDE', 'Phase', 'Protocol', 'Settings']

_NEVER = float('inf')
_BACKOFF_FIRST, _BACKOFF_MOST = 0.1, 1.0
#: Seconds after which a connection counts as one that works: what ends it then is a first failure.
_STEADY_SEC = 0.5
#: While a node enters, it looks for its first tokens again after so many seconds, then less and
#: less often: notifications may be lost.
_ENTRY_POLL = 0.25
#: Where many join at once, the cluster's row is busy: a join is tried again after about so many
#: seconds, twice as many each time.
_JOIN_FIRST, _JOIN_MOST = 0.1, 2.0
#: What the oldest nodes do beside their heartbeats: where it fails and the connection is good, all
#: the rest goes on.
BESIDE = (Observe, Evict, Lead, StepDown, RecordHistory)
#: Heartbeats that prove a rival alive: one alone may be a dead process's last, which arrived late.
_RIVAL_BEATS = 2


@dataclass(frozen=True)
class Settings:
    """What the protocol must know of a CoordinationConfig and a Job.

    All times in seconds; `lease` counts from the sending of a heartbeat. has_release: somebody
    wants to be told before tokens are handed over. has_gate: the grace period does not end before
    `open_gate` is called (locks are registered first).
    """

    interval: float = 5.0
    timeout: float = 15.0
    lease: float = 13.5
    check_interval: float = 30.0
    release_timeout: float = 5.0
    wait_on_enter: float = 0.0
    minimum_nodes: int = 1
    weight: float = 1.0
    total_tokens: int = 10_000
    hash_function: str = 'double_sha256'
    has_release: bool = False
    has_gate: bool = False

    @property
    def poll(self) -> float:
        """Seconds between two looks of the leader and its successor at the node table."""
        return min(0.75, self.timeout / 8)

    @property
    def max_gap(self) -> float:
        """Seconds without a look after which an observer starts its waits anew."""
        return max(2 * self.poll, 1.5 * self.interval, (self.timeout - self.interval) / 2)


class Phase(Enum):
    """Where a node is in its life."""

    JOINING = 'joining'  # not in the node table
    WAITING = 'waiting'  # in the table, grace period running
    ACTIVE = 'active'
    LEAVING = 'leaving'
    LEFT = 'left'
    FAILED = 'failed'


@dataclass
class _Batch:
    """Tokens on their way out: already out of the local set, given away once `ready`."""

    number: int
    tokens: TokenSet
    version: int
    ready: bool
    deadline: float


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
        self.phase = Phase.JOINING
        self.incarnation = new_incarnation()
        self.version = 0
        self.state = 'joining'
        self.connected = False
        self.entered = False
        self.evictions = 0
        self.owned = TokenSet()
        self._process = process
        self._new_incarnation = new_incarnation
        self._is_known_dead = is_known_dead
        self._promises = promises
        ownership.incarnation = self.incarnation
        self._mine = {self.incarnation}  # every life of mine: a row of one of them is no rival's
        self._effects: list[Effect] = []
        self._pending: Request | None = None
        self._sent_at = 0.0
        # connection
        self._server = ''
        self._history = ''
        self._waits = False  # in this history old leases have been waited out, or are
        self._must_record = False
        self._number = self._seen = (
            0  # of the last heartbeat that was sent; what its row held at the last answer
        )
        self._granted = (
            0.0  # the lease that the last answered heartbeat gives, as soon as its tokens are known
        )
        self._retry_at = 0.0
        self._backoff = _BACKOFF_FIRST
        self._connected_at = 0.0
        # membership
        self._join_at = 0.0
        self._join_failures = 0
        self._entry_looks = 0
        self._rival_beats = 0
        self._replace: tuple[str, int] | None = None
        self._reap: tuple[Sign, ...] = ()
        self._rejoins = False
        self._wait_until = _NEVER
        self._entry_looks = 0
        self._settle_until = _NEVER
        self._gate_open = not settings.has_gate
        self._beat_at = 0.0
        self._since = 0
        # assignment
        self._must_refresh = True  # nothing may be claimed before the next Refresh
        self._refresh_at = 0.0
        self._takings = Takings(name, ownership)
        self._batch: _Batch | None = None
        self._batches = 0
        self._quarantine_until: float | None = None
        self._announced: TokenSet = TokenSet()
        self._initial_announced = False
        self._wants_drain: bool | None = None
        # the last Refresh showed nothing here or on its way here, and a plan that knows of the
        # drain
        self._emptied = False
        # leadership
        self._leadership = Leadership(settings.timeout, settings.max_gap, settings.poll)

    # --- questions ---

    def rank(self, now: float) -> int | None:
        """How many live nodes are older: 0 for the leader, 1 for its successor, None while
        unknown.
        """
        return self._leadership.rank(now)

    def has_lease(self, now: float) -> bool:
        """Whether the lease is valid."""
        return now < self.ownership.deadline

    @property
    def drained(self) -> bool:
        """Whether this node is draining, has given everything away, and will be given nothing."""
        return self.state == 'draining' and self._emptied

    @property
    def quarantined(self) -> bool:
        """Whether the database has another history than before, so that old leases must run out
        first.
        """
        return self._quarantine_until is not None

    # --- commands ---

    def leave(self, now: float) -> None:
        """Stop claiming at once; the row goes when `on_release` has run."""
        if self.phase in (Phase.LEFT, Phase.FAILED, Phase.LEAVING):
            return
        tokens = self.ownership.tokens
        self._stop_claiming()
        self._announce(now)
        if (
            self.phase is Phase.JOINING
            and not self._rejoins
            and not isinstance(self._pending, Join)
        ):
            self._finish(Left())
            return
        self.phase = Phase.LEAVING
        # A release that runs already goes on; callbacks run in order, so that a further one ends
        # after it.
        if tokens:
            self._batch = self._start_batch(tokens, now)

    def open_gate(self) -> None:
        """The node may become active as soon as its grace period is over."""
        self._gate_open = True

    def drain(self, now: float) -> None:
        """Give all tokens away and stay alive."""
        self._wants_drain = True

    def undrain(self, now: float) -> None:
        """Take part again."""
        self._wants_drain = False

    # --- events ---

    def notified(self, payload: str, now: float) -> None:
        """A notification arrived. It only makes this node look earlier: all of them may be lost."""
        kind, _, detail = payload.partition(' ')
        if kind == 'plan' or (kind == 'give' and (not detail or self.name in detail.split(','))):
            self._refresh_at = now
        elif kind != 'give':
            self._leadership.look_at = now

    def released(self, number: int, now: float) -> None:
        """`on_release` has returned."""
        if self._batch is not None and self._batch.number == number:
            self._batch.ready = True

    def disconnected(self, now: float) -> None:
        """The control connection is gone."""
        if self.connected and now - self._connected_at >= _STEADY_SEC:
            self._backoff = _BACKOFF_FIRST
        self.connected = False
        self._must_refresh = True
        self._takings.interrupted(self._pending)
        self._pending = None
        self._retry_at = now + self._backoff
        self._backoff = min(2 * self._backoff, _BACKOFF_MOST)

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
            self._join_failures += 1
            delay = min(_JOIN_MOST, _JOIN_FIRST * 2 ** min(self._join_failures, 10))
            self._join_at = now + spread(delay, self.incarnation, self._join_failures)
        self._blame(request, now)

    def _blame(self, request: Request, now: float) -> None:
        if isinstance(request, Duty):
            self._leadership.failed(request, now)

    def recover(self, now: float) -> None:
        """Something unforeseen went wrong on the way: nothing is claimed until all has been read
        anew over a new connection.
        """
        self.disconnected(now)
        self._stop_claiming()
        self._announce(now)

    def take_effects(self) -> list[Effect]:
        """What is to be done now, in order; each effect is handed out once."""
        effects, self._effects = self._effects, []
        return effects

    # --- what to send ---

    def next(self, now: float) -> Request | None:
        """The request to send now, if any; there is never more than one under way."""
        self._pass_time(now)
        if self._pending is None:
            self._pending = self._choose(now)
            self._sent_at = now
            return self._pending
        return None

    @property
    def wake_at(self) -> float:
        """When `next` has something to do if nothing happens before; the past means now."""
        if self.phase in (Phase.LEFT, Phase.FAILED):
            return _NEVER
        times = [self.ownership.deadline or _NEVER]
        if self._batch is not None and not self._batch.ready:
            times.append(self._batch.deadline)
        if self._quarantine_until is not None:
            times.append(self._quarantine_until)
        if not self.connected:
            return min([*times, self._retry_at])
        if self.phase is Phase.JOINING:
            return min([*times, self._join_at])
        times.append(self._beat_at)
        if self.phase is Phase.LEAVING:
            return min(times)
        if not self.quarantined:
            times += (self._refresh_at, self._takings.wake_at)
        if self.phase is Phase.WAITING and self._gate_open:
            times.append(self._wait_until)
        return min(*times, self._leadership.wake_at(self._sent_at, self.has_lease(self._sent_at)))

    def _pass_time(self, now: float) -> None:
        batch = self._batch
        if batch is not None and not batch.ready and now >= batch.deadline:
            batch.ready = True
            self._note(
                'warning',
                'handing over, though on_release or work on these tokens has not ended',
                limit_sec=self.settings.release_timeout,
            )
        if self._quarantine_until is not None and now >= self._quarantine_until:
            self._quarantine_until = None
            self._must_refresh = True
            self._beat_at = min(self._beat_at, now)
        if not self.has_lease(now):
            if self.ownership.deadline:
                self.ownership.suspend()
                self._note('warning', 'lease ran out; claiming stopped', version=self.version)
            self._announce(now)

    def _choose(self, now: float) -> Request | None:
        if self.phase in (Phase.LEFT, Phase.FAILED):
            return None
        if not self.connected:
            return Connect() if now >= self._retry_at else None
        if self.phase is Phase.JOINING:
            return self._join() if now >= self._join_at else None
        if self.phase is Phase.LEAVING and (self._batch is None or self._batch.ready):
            return Leave(self.name, self.incarnation)
        # A heartbeat goes first: it writes, and so it alone can tell whether all that follows is of
        # one history.
        if now >= self._beat_at:
            self._number += 2
            return Beat(self.name, self.incarnation, self._since, self._number, self._seen)
        if self.phase is Phase.LEAVING:
            return None
        if self._must_refresh and not self.quarantined:
            return Refresh(self.name, self.incarnation, self._seen)
        if self._must_record and not self.quarantined:
            self._must_record = False  # the next heartbeat tells whether it is still to be done
            return RecordHistory(self.name, self.incarnation, self._seen, self._history)
        if self.phase is Phase.WAITING and self._gate_open and now >= self._wait_until:
            return Activate(
                self.name,
                self.incarnation,
                self.settings.minimum_nodes,
                self._leadership.liveness.dead(now),
            )
        if self.phase is Phase.ACTIVE and self.state == 'joining' and not self.quarantined:
            # The database has forgotten the activation: a promoted standby, or a backup.
            return Activate(self.name, self.incarnation, 0)
        if self._wants_drain == (self.state == 'draining'):
            self._wants_drain = None  # it is so; from here on an operator may decide otherwise
        elif self._wants_drain is not None and self.phase is Phase.ACTIVE:
            return Drain(self.name, self.incarnation, self._wants_drain)
        if not self.quarantined:
            if self._takings.gain:
                return self._takings.next(now)
            if self._batch is not None and self._batch.ready:
                batch = self._batch
                return Give(
                    self.name,
                    self.incarnation,
                    batch.tokens.ranges,
                    batch.version,
                    self._promises(batch.tokens),
                )
            if now >= self._refresh_at:
                return Refresh(self.name, self.incarnation, self._seen)
            if now >= self._takings.wake_at:
                return self._takings.next(now)
        return self._leadership.duty(self.name, self.incarnation, now, self.has_lease(now))

    def _join(self) -> Join:
        active = self._rejoins and self._wait_until == _NEVER
        return Join(
            self.name,
            self.incarnation,
            self._process,
            self.settings.weight,
            active,
            self._replace,
            self._reap,
        )

    # --- answers ---

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
            self._on_beaten(reply, now)
        elif self.phase is Phase.LEAVING:
            pass  # asked before the decision to leave; of no use now
        elif isinstance(reply, RefreshReply):
            self._on_holdings(reply, now)
        elif isinstance(request, Take) and isinstance(reply, TakeReply):
            self._on_taken(request, reply, now)
        elif isinstance(reply, LivesReply):
            self._takings.gone(reply)
        elif isinstance(reply, GiveReply):
            self._batch = None
            self._refresh_at = now
        elif isinstance(reply, ActivateReply):
            self._on_activated(reply, now)
        elif isinstance(reply, ObserveReply):
            self._on_observed(reply, now)
        elif isinstance(request, Evict) and isinstance(reply, EvictReply):
            self._on_evicted_others(request, reply, now)
        elif isinstance(reply, RoundReply):
            self._on_led(reply, now)
        elif isinstance(request, StepDown):
            self._on_stepped_down(now)
        elif isinstance(request, Drain):
            self.state = 'draining' if request.draining else 'active'
            self._emptied = False
            self._refresh_at = now

    def _on_connected(self, reply: ConnectReply, now: float) -> None:
        self.connected, self._connected_at = True, now
        self._must_refresh = True
        self._beat_at = min(self._beat_at, now)
        self._join_at = min(self._join_at, now)
        self._leadership.look_at = now
        self._since = 0
        if self._server and reply.server and self._server != reply.server:
            self._wait_for_old_leases(now)
        self._server = reply.server

    def _on_history(self, reply: HeartbeatReply, now: float) -> bool:
        """What a heartbeat's answer tells of the database's history; whether that is the history
        which this node knows.
        """
        self._seen = self._number if reply.same else self._number + 1
        changed = not reply.same or bool(reply.history) and self._history not in ('', reply.history)
        self._history = reply.history or self._history
        if changed or not (reply.settled or self._waits):
            self._waits = True
            self._wait_for_old_leases(now)
        self._must_record = not reply.settled
        return not changed

    def _is_of_another_history(self, reply: RefreshReply) -> bool:
        return not reply.same or reply.history not in ('', self._history)

    def _wait_for_old_leases(self, now: float) -> None:
        """A promoted standby may have forgotten the last hand-overs. Whoever still holds a lease
        from before the promotion

        will have lost it after one timeout; until then nothing is claimed, taken, given away or
        planned.
        """
        self._quarantine_until = now + self.settings.timeout
        self._must_refresh = True
        self._stop_claiming()
        self._announce(now)
        self._note(
            'warning',
            'another history of the database; waiting until old leases have run out',
            wait_sec=self.settings.timeout,
        )

    def _on_join(self, request: Join, reply: Reply, now: float) -> None:
        if isinstance(reply, JoinReply):
            self.version = reply.version
            self.state = 'active' if request.active else 'joining'
            self._must_refresh = False
            self._beat_at = self._refresh_at = self._leadership.look_at = now
            self._replace, self._reap = None, ()
            self._since = 0
            self._leadership.start_anew()
            if self.phase is Phase.LEAVING:
                return
            if request.active:
                self.phase = Phase.ACTIVE
            else:
                self.phase = Phase.WAITING
                if self._wait_until == _NEVER:
                    self._wait_until = now + self.settings.wait_on_enter
            self._note('info', 'joined', incarnation=self.incarnation)
        elif isinstance(reply, Occupied):
            self._on_occupied(reply, now)
        elif isinstance(reply, Mismatch):
            self._on_mismatch(reply, now)

    def _on_occupied(self, reply: Occupied, now: float) -> None:
        sign = reply.sign
        if sign.incarnation in self._mine or self._is_known_dead(reply.process):
            self._replace = (sign.incarnation, sign.beat)
            self._join_at = now
            return
        if self._seen_alive([sign]) and not self.entered:
            self._finish(
                Failed(
                    DuplicateNodeName(
                        f'node name {self.name!r} is used by a live process (pid '
                        f'{reply.process.pid} on {reply.process.host}): '
                        f'give every process its own name'
                    )
                )
            )
            return
        if self._rival_beats >= _RIVAL_BEATS:
            self._rival_beats = 0
            self._note(
                'error',
                'another live process took this node name; not claiming',
                host=reply.process.host,
                pid=reply.process.pid,
            )
        self._leadership.liveness.look([sign], now)
        self._replace = (
            (sign.incarnation, sign.beat) if self._leadership.liveness.is_dead(sign, now) else None
        )
        self._join_at = now if self._replace else now + self.settings.poll

    def _seen_alive(self, signs: Iterable[Sign]) -> bool:
        self._rival_beats += any(self._leadership.liveness.shows_life(sign) for sign in signs)
        return self._rival_beats >= _RIVAL_BEATS

    def _on_mismatch(self, reply: Mismatch, now: float) -> None:
        if self._seen_alive(reply.nodes):
            mine, theirs = (
                (self.settings.total_tokens, self.settings.hash_function),
                (reply.total_tokens, reply.hash_function),
            )
            self._finish(
                Failed(
                    ConfigMismatch(
                        f'this node has total_tokens, hash_function = {mine}, the live cluster '
                        f'has {theirs}: '
                        f'use the same, or stop all nodes first'
                    )
                )
            )
            return
        self._leadership.liveness.look(reply.nodes, now)
        dead = all(self._leadership.liveness.is_dead(sign, now) for sign in reply.nodes)
        self._reap = reply.nodes if dead else ()
        self._join_at = now if dead else now + self.settings.poll

    def _on_beaten(self, reply: HeartbeatReply, now: float) -> None:
        if self._on_history(reply, now):
            self._beat_at = self._sent_at + self._beat_delay(reply.ages)
            self._since = reply.since
            self._leadership.heard(reply.older, now)
        else:
            self._beat_at = self._sent_at + self.settings.interval
            self._since = 0  # what was older than this in the other history says nothing
            self._leadership.start_anew()
        self.state = reply.state
        if reply.version != self.version:
            self._refresh_at = now
        elif self.entered and self._refresh_at > now:
            # The version says that nothing has changed: as good as a look at the rows.
            self._refresh_at = max(self._refresh_at, now + self.settings.check_interval)
        if self.phase is not Phase.LEAVING and not self.quarantined:
            self._granted = self._sent_at + self.settings.lease
            if not self._must_refresh:
                self._extend(now)
                self._consider_entered(False, now)

    def _extend(self, now: float) -> None:
        if now < self._granted:
            self.ownership.extend(self._granted)
        self._announce(now)

    def _beat_delay(self, ages: tuple[float, ...]) -> float:
        interval = self.settings.interval
        longest = interval + (self.settings.lease - interval) / 4
        return min(beat_delay(ages, interval), longest) if len(ages) < ELDERS else interval

    def _on_activated(self, reply: ActivateReply, now: float) -> None:
        if not reply.ok:
            self._finish(
                Failed(
                    ClusterNotFormed(
                        f'{reply.nodes} of minimum_nodes={self.settings.minimum_nodes} nodes had '
                        'registered after wait_on_enter='
                        f'{self.settings.wait_on_enter:g} s: start the missing nodes, wait '
                        'longer, or lower minimum_nodes'
                    )
                )
            )
            return
        self.phase = Phase.ACTIVE
        self.state = 'active'
        self._wait_until = _NEVER
        self._settle_until = now + 2 * self.settings.timeout + self.settings.release_timeout
        self._refresh_at = self._leadership.look_at = now

    def _on_evicted(self, now: float) -> None:
        """The row is gone: somebody saw this node dead. Clear first, then come back as somebody
        new.
        """
        if self.phase is Phase.LEAVING:
            self._finish(Left())
            return
        self.evictions += 1
        if self.state == 'draining' and self._wants_drain is None:
            self._wants_drain = True  # an operator's drain outlives the eviction
        self._stop_claiming()
        self.owned = TokenSet()
        self._emptied = False
        self._batch = None
        self._announce(now)
        self._note('warning', 'evicted; joining again', incarnation=self.incarnation)
        self.incarnation = self.ownership.incarnation = self._new_incarnation()
        self._seen = 0
        self._waits = False  # the database may be another one by the time of the next answer
        self._mine.add(self.incarnation)
        self.phase = Phase.JOINING
        self._rejoins = True
        self._leadership.start_anew()
        self._join_at = now

    def _on_holdings(self, reply: RefreshReply, now: float) -> None:
        if self._is_of_another_history(reply):
            self._must_refresh = True
            self._beat_at = now
            return
        if self.version != reply.version:
            self._takings.plan_changed()
        self.version = reply.version
        self.state = reply.state
        self._must_refresh = False
        self._refresh_at = now + (
            self.settings.check_interval if self.entered else self._entry_poll()
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
        self._emptied = (
            reply.state == 'draining'
            and reply.planned
            and not reply.segments
            and not reply.incoming
        )
        self._shrink(kept)
        self._follow_moves(moving, now)
        self._takings.owns(kept)
        self._extend(now)
        self._consider_entered(reply.planned and not reply.incoming, now)

    def _entry_poll(self) -> float:
        """Seconds until a node that has not entered looks for its tokens again. A heartbeat tells
        of a plan as well.
        """
        if self.phase is not Phase.ACTIVE:
            return (
                self.settings.check_interval
            )  # there is nothing for it before its grace period is over
        self._entry_looks += 1
        longest = max(self.settings.interval, _ENTRY_POLL)
        return spread(
            min(longest, _ENTRY_POLL * 2 ** min(self._entry_looks - 1, 10)),
            self.incarnation,
            self._entry_looks,
        )

    def _shrink(self, kept: TokenSet) -> None:
        """Take out of the local set what is leaving, before anybody else can be told."""
        if not self.ownership.tokens <= kept:
            self.ownership.replace(self.ownership.tokens & kept)

    def _follow_moves(self, moving: TokenSet, now: float) -> None:
        batch = self._batch
        if batch is not None:
            batch.tokens &= moving
            batch.version = self.version
            if not batch.tokens:
                batch = self._batch = None
        if batch is None and moving:
            self._batch = self._start_batch(moving, now)

    def _start_batch(self, tokens: TokenSet, now: float) -> _Batch:
        self._batches += 1
        if self.settings.has_release:
            self._effects.append(Release(self._batches, tokens))
        return _Batch(
            self._batches,
            tokens,
            self.version,
            not self.settings.has_release,
            now + self.settings.release_timeout,
        )

    def _on_taken(self, request: Take, reply: TakeReply, now: float) -> None:
        known = self._takings.taken(
            request, reply, now, now - self._sent_at, self.settings.interval / 4
        )
        if known:
            self.ownership.replace(self.ownership.tokens | known)
        if not self._takings.gain:
            self._announce(now)
            if not self.entered:
                self._refresh_at = now

    def _on_observed(self, reply: ObserveReply, now: float) -> None:
        if not self._leadership.observed(reply, self.incarnation, now, now - self._sent_at):
            self._beat_at = now  # evicted: the heartbeat will tell
        if reply.version != self.version:
            self._refresh_at = min(self._refresh_at, now + self.settings.interval)

    def _on_evicted_others(self, request: Evict, reply: EvictReply, now: float) -> None:
        self._leadership.evicted(request, reply, now)
        if reply.names:
            self._note('info', 'evicted', names=list(reply.names))

    def _on_led(self, reply: RoundReply, now: float) -> None:
        self._leadership.led(reply, now)
        if reply.version != self.version:
            self._refresh_at = now
        for conflict in reply.conflicts:
            self._note('warning', 'locks in conflict', conflict=conflict)
        if reply.moved:
            self._note(
                'info',
                'led a rebalance',
                version=reply.version,
                moved=reply.moved,
                blocked=reply.blocked,
            )

    def _on_stepped_down(self, now: float) -> None:
        self._leadership.start_anew()
        self._beat_at = now
        self._note(
            'error',
            'stepped down: its rounds failed for a heartbeat timeout; the next oldest node leads',
        )

    # --- consequences ---

    def _stop_claiming(self) -> None:
        self._granted = 0.0
        self.ownership.suspend()
        self.ownership.replace(TokenSet())
        self._takings.reset()

    def _consider_entered(self, settled: bool, now: float) -> None:
        if self.entered or self.phase is not Phase.ACTIVE or not self.has_lease(now):
            return
        if (settled and not self._takings.gain) or now >= self._settle_until:
            if not settled:
                self._note('warning', 'entered before the first plan had settled')
            self.entered = True
            self._announce(now)
            self._effects.append(Entered())

    def _announce(self, now: float) -> None:
        """Tell the user about tokens that became claimable, or ceased to be."""
        claimable = self.ownership.tokens if self.has_lease(now) else TokenSet()
        initial = not self._initial_announced and self.entered
        if claimable == self._announced and not initial:
            return
        if not self._initial_announced and not self.entered:
            return  # the first event tells of all that was gained while entering
        added, removed = len(claimable - self._announced), len(self._announced - claimable)
        self._announced = claimable
        self._initial_announced = True
        self._effects.append(RebalanceEvent(initial, self.version, added, removed))

    def _finish(self, effect: Left | Failed) -> None:
        self._stop_claiming()
        self._batch = None
        # A node that fails after it joined must not stay in the table: the others would wait for
        # it.
        if isinstance(effect, Failed) and self.phase in (Phase.WAITING, Phase.ACTIVE):
            self.phase = Phase.LEAVING
            self._effects.append(effect)
            return
        self.phase = Phase.LEFT if isinstance(effect, Left) else Phase.FAILED
        self._effects.append(effect)

    def _note(self, level: str, event: str, **fields: object) -> None:
        self._effects.append(Note(level, event, {'node': self.name, **fields}))
