"""The store of the simulation: answers each request of protocol/messages at one instant, as
store/cluster.py does in one transaction.
"""

from __future__ import annotations

import copy
import itertools
from array import array
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise

from jobsync_core.assignment.groups import PLAIN, group_of, window
from jobsync_core.assignment.hashing import task_digest
from jobsync_core.assignment.model import Member, Segment
from jobsync_core.assignment.round import Decision, Pin, decide
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.process import Process
from jobsync_core.protocol.messages import Reply, Request
from jobsync_core.protocol.messages.connection import RecordHistory
from jobsync_core.protocol.messages.groups import Enroll, EnrollReply, Ids
from jobsync_core.protocol.messages.handover import (
    Give,
    GiveReply,
    Lives,
    LivesReply,
    Refresh,
    RefreshReply,
    Take,
    TakeReply,
)
from jobsync_core.protocol.messages.leadership import (
    Evict,
    EvictReply,
    Lead,
    Observe,
    ObserveReply,
    RoundReply,
    StepDown,
)
from jobsync_core.protocol.messages.membership import (
    ELDERS,
    Activate,
    ActivateReply,
    Beat,
    Drain,
    HeartbeatReply,
    Join,
    JoinReply,
    Leave,
    Occupied,
)
from jobsync_core.protocol.messages.signs import Sign

from .drafts import Draft
from .masks import mask_of

__all__ = ['Lock', 'Overlap', 'Row', 'SimStore', 'task_key', 'token_of']

#: Rows after which the answer to a Take ends: small, so that most gains come in pieces.
_ROWS = 3


class Overlap(Exception):
    """Two rows of the assignment table share a token: the exclusion constraint refuses them."""


def task_key(text: str, total_tokens: int) -> int:
    """The key of exclusions.Exclusions; the tasks of the simulation are named `token.number`."""
    bits = (total_tokens - 1).bit_length()
    return token_of(text) << 64 - bits | task_digest(text) >> bits


def token_of(text: str) -> int:
    """Token of a simulated task."""
    return int(text.partition('.')[0])


@dataclass
class Row:
    """One row of the node table."""

    name: str
    incarnation: str
    process: Process
    created_on: float
    state: str
    weight: float
    groups: tuple[str, ...] = ()
    beat: int = 0
    last_heartbeat: float = 0.0
    is_old: bool = False
    held: bool = False

    @property
    def sign(self) -> Sign:
        return Sign(self.name, self.incarnation, self.beat)


@dataclass(frozen=True)
class Lock:
    """One row of the lock table; `expires_at` by the database's clock. group: the queue group in
    which it counts; None: it counts in all.
    """

    token: int
    patterns: tuple[str, ...]
    created_at: float
    expires_at: float | None = None
    group: str | None = None


def microseconds(created_on: float) -> int:
    """As Beat.since tells it."""
    return int(created_on * 1e6)


#: What a plan depends on: nodes with their lives, states, weights and queue groups, and the version
#: of the locks.
Fingerprint = tuple[tuple[tuple[str, str, str, float, tuple[str, ...]], ...], int]


@dataclass
class SimStore:
    """All tables of one cluster.

    `clock` is the database's wall clock, which the world sets before each request; it may jump.
    `outbox` holds the notifications of the last request. `on_plan` is told of each plan before it
    is written. `server` names the history of the database itself, as far as its timeline does;
    `recorded` is the one that the cluster's row names. `groups` are the ids of queue groups, and
    `formed` those that a plan has written rows of.

    `piece` is how many rows of a plan one request writes; None: all of them at once. `drafts` are
    the plans that leaders write, each in its process.

    Of the process that asks: `asker_clock` measures durations, `asker_is_old` tells that it knows
    of no groups. `old_rows_locked` tells that rows of such nodes stay as they are when a new one
    joins. `gaps` is what leaders remember of rows that are missing, each in its process. `timeout`
    is that of heartbeats.
    """

    total_tokens: int
    hash_function: str = 'double_sha256'
    clock: float = 0.0
    version: int = 0
    lock_version: int = 0
    planned: Fingerprint | None = None
    nodes: dict[str, Row] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    locks: dict[str, Lock] = field(default_factory=dict)
    claims: dict[str, tuple[str, str]] = field(default_factory=dict)
    audits: set[str] = field(default_factory=set)
    promises: set[str] = field(default_factory=set)
    outbox: list[str] = field(default_factory=list)
    changes: int = 0
    server: str = 'history-1'
    tells_history: bool = True
    recorded: str | None = None
    groups: dict[str, int] = field(default_factory=lambda: {'': PLAIN})
    formed: frozenset[int] = frozenset()
    asker_clock: float = 0.0
    asker_is_old: bool = False
    old_rows_locked: bool = False
    gaps: dict[str, tuple[int, TokenSet, float]] = field(default_factory=dict)
    timeout: float = 0.0
    piece: int | None = None
    drafts: dict[str, Draft] = field(default_factory=dict)
    on_plan: Callable[[list[Member], list[Segment], list[Pin], Decision], None] | None = None

    def __post_init__(self) -> None:
        self.segments = self.segments or [Segment(0, self.total_tokens, None)]

    def handle(self, request: Request) -> Reply:
        """Answer one request."""
        if isinstance(request, Beat):
            return self.beat(request)
        if isinstance(request, Observe):
            return self.observe()
        if isinstance(request, Refresh):
            return self.refresh(request)
        if isinstance(request, Lead):
            return self.lead(request)
        if isinstance(request, Give):
            return self.give(request)
        if isinstance(request, Take):
            return self.take(request)
        if isinstance(request, Lives):
            lives = {row.incarnation for row in self.nodes.values()}
            return LivesReply(tuple(life for life in request.incarnations if life not in lives))
        if isinstance(request, Join):
            return self.join(request)
        if isinstance(request, Activate):
            return self.activate(request)
        if isinstance(request, Drain):
            return self.drain(request)
        if isinstance(request, Enroll):
            return self.enroll(request)
        if isinstance(request, Evict):
            return self.evict(request)
        if isinstance(request, StepDown):
            return self.step_down(request)
        if isinstance(request, RecordHistory):
            if request.history == self.server and self.holds(request):
                self.recorded = self.server
            return True
        assert isinstance(request, Leave)
        row = self._row(request.name, request.incarnation)
        if row is not None:
            self._delete(row.name)
            self.outbox.append(f'leave {row.name}')
        return True

    def add_lock(self, task: str, lock: Lock) -> None:
        self.locks[task] = lock
        self._locks_changed()

    def clear_lock(self, task: str) -> None:
        if self.locks.pop(task, None) is not None:
            self._locks_changed()

    def set_draining(self, name: str, draining: bool) -> None:
        """What the command line's `drain NODE` does."""
        row = self.nodes.get(name)
        if row is not None and row.state != 'joining':
            row.state, row.held = ('draining' if draining else 'active'), draining
            self.outbox.append(f'drain {name}')

    def claim(self, name: str, incarnation: str, task: str) -> bool:
        """store/tasks.claim for one task."""
        if self._row(name, incarnation) is None or task in self.audits:
            return False
        held = self.live_claim(task)
        if held == (name, incarnation):
            self.promises.discard(task)
            return True
        if held is not None or not self.owned_mask(name) >> token_of(task) & 1:
            return False
        self.claims[task] = (name, incarnation)
        self.promises.discard(task)
        return True

    def audit(self, name: str, tasks: Iterable[str]) -> None:
        for task in tasks:
            self.audits.add(task)
            if self.claims.get(task, ('', ''))[0] == name:
                del self.claims[task]

    def is_taken(self, name: str, task: str) -> bool:
        held = self.live_claim(task)
        return task in self.audits or (held is not None and held[0] != name)

    def insert(self, segment: Segment) -> None:
        """A session that knows nothing of the protocol inserts a row."""
        self.write([*self.segments, segment])

    def erase(self, lo: int) -> None:
        """A session that knows nothing of the protocol deletes the row that begins here."""
        self.write(segment for segment in self.segments if segment.lo != lo)

    def owned_mask(self, name: str) -> int:
        """The tokens whose owner is `name`, as bits."""
        return mask_of((s.lo, s.hi) for s in self.segments if s.node == name)

    def snapshot(self) -> SimStore:
        """A copy of all tables, as a standby may have it."""
        other = copy.copy(self)
        other.nodes = {name: replace(row) for name, row in self.nodes.items()}
        other.segments, other.outbox = list(self.segments), []
        other.locks, other.claims, other.audits = (
            dict(self.locks),
            dict(self.claims),
            set(self.audits),
        )
        other.promises = set(self.promises)
        other.groups, other.gaps, other.drafts = dict(self.groups), dict(self.gaps), {}
        return other

    @property
    def _history(self) -> str:
        return self.server if self.tells_history else ''

    @property
    def _settled(self) -> bool:
        return (
            self.recorded == self.server
            or self.recorded is None
            and self.is_first
            or not self.tells_history
        )

    @property
    def is_first(self) -> bool:
        """Whether this server was never promoted, as its timeline tells."""
        return not self.server.endswith("'")

    def holds(self, request: RecordHistory) -> bool:
        """Whether the last answered heartbeat of the node that asks is here: if not, it speaks of
        another database.
        """
        row = self._row(request.name, request.incarnation)
        return row is not None and self.continues(row, request)

    @staticmethod
    def continues(row: Row, request: Beat | Refresh | RecordHistory) -> bool:
        """An odd number is a break of which the node has not heard."""
        return row.beat == request.seen or row.beat > request.seen and row.beat % 2 == 0

    def _row(self, name: str, incarnation: str) -> Row | None:
        row = self.nodes.get(name)
        return row if row is not None and row.incarnation == incarnation else None

    def _looks_so(self, sign: Sign) -> bool:
        row = self.nodes.get(sign.name)
        return row is not None and row.sign == sign

    def live_claim(self, task: str) -> tuple[str, str] | None:
        held = self.claims.get(task)
        return held if held is not None and self._row(*held) is not None else None

    def fingerprint(self, *, of_groups: bool = True) -> Fingerprint:
        """What the nodes and locks are. A leader that knows of no groups leaves them out."""
        rows = sorted(self.nodes.values(), key=lambda row: row.name)
        return tuple(
            (
                row.name,
                row.incarnation,
                row.state,
                row.weight,
                row.groups if of_groups and not self.asker_is_old else ('unknown',),
            )
            for row in rows
        ), self.lock_version

    def members(self) -> list[Member]:
        """All rows of the node table, the oldest first."""
        rows = sorted(self.nodes.values(), key=lambda row: (row.created_on, row.name))
        return [
            Member(
                row.name,
                row.incarnation,
                row.beat,
                row.created_on,
                row.state,
                row.weight,
                tuple(sorted(number for _, number in self._ids(('', *row.groups)))),
            )
            for row in rows
        ]

    def missing(self) -> TokenSet:
        """Tokens of groups that are formed, and yet have no row."""
        formed = self.formed & {PLAIN} if self.asker_is_old else self.formed
        return TokenSet(window(group, self.total_tokens) for group in formed) - TokenSet(
            (row.lo, row.hi) for row in self.segments
        )

    def _ids(self, groups: Iterable[str]) -> Ids:
        """The ids of these groups; who has none gets the least that is free. Those of groups that
        nobody names, and that have no tokens, are free then.
        """
        wanted = [*groups]
        fresh = sorted({*wanted} - {*self.groups})
        if fresh:
            for name in self.unneeded({*wanted}):
                del self.groups[name]
        for name in fresh:
            taken = {*self.groups.values()}
            self.groups[name] = next(n for n in itertools.count() if n not in taken)
        return tuple((name, self.groups[name]) for name in wanted)

    def unneeded(self, wanted: Set[str]) -> list[str]:
        """Groups whose ids others may get."""
        named = {*wanted}.union(*(row.groups for row in self.nodes.values()))
        held = {PLAIN, *self.formed, *(group_of(row.lo) for row in self.segments)}
        return [
            name for name, number in self.groups.items() if name not in named and number not in held
        ]

    def _locks_changed(self) -> None:
        self.lock_version += 1
        self.outbox.append('locks')

    def _delete(self, name: str) -> None:
        """Delete a node row; foreign keys set what refers to it to NULL. The plan is out of date,
        even if a Join that comes late brings the same life back before the next one: its tokens
        are nobody's.
        """
        self.planned = None
        del self.nodes[name]
        for index, segment in enumerate(self.segments):
            if name in (segment.node, segment.moving_to):
                self.segments[index] = replace(
                    segment,
                    node=None if segment.node == name else segment.node,
                    moving_to=None if segment.moving_to == name else segment.moving_to,
                )
        self.changes += 1

    def write(self, segments: Iterable[Segment]) -> None:
        written = sorted(segments, key=lambda s: s.lo)
        self.check_exclusion(written)
        self.segments = written
        self.changes += 1

    def check_exclusion(self, segments: list[Segment]) -> None:
        for left, right in itertools.pairwise(segments):
            if left.hi > right.lo:
                raise Overlap(f'{left} overlaps {right}')

    def join(self, request: Join) -> Reply:
        if self.recorded is None and self.tells_history and self.is_first:
            self.recorded = self.server
        for sign in request.reap:
            if self._looks_so(sign):
                self._delete(sign.name)
        row = self.nodes.get(request.name)
        if row is not None and row.incarnation == request.incarnation:
            return JoinReply(self.version, self._ids(row.groups))
        if row is not None:
            if request.replace != (row.incarnation, row.beat):
                return Occupied(row.sign, row.process)
            self._delete(row.name)
        self.nodes[request.name] = Row(
            request.name,
            request.incarnation,
            request.process,
            self._youngest(),
            'active' if request.active else 'joining',
            request.weight,
            request.groups,
            last_heartbeat=self.clock,
            is_old=self.asker_is_old,
        )
        self.let_old_ones_follow(self.nodes[request.name])
        self.changes += 1
        if request.active:
            self.outbox.append(f'join {request.name}')
        return JoinReply(self.version, self._ids(request.groups))

    def let_old_ones_follow(self, new: Row) -> None:
        """Nodes that know of no groups become younger than one that does."""
        if self.asker_is_old or self.old_rows_locked:
            return
        for row in self.nodes.values():
            if row.is_old and row.created_on <= new.created_on:
                row.created_on = new.created_on + 1e-6

    def beat(self, request: Beat) -> Reply:
        row = self._row(request.name, request.incarnation)
        if row is None:
            return None
        same = self.continues(row, request)
        row.beat = max(row.beat, request.number + (not same))
        row.last_heartbeat = self.clock
        age = (row.created_on, row.name)
        older = sorted(
            (r.created_on, r.name)
            for r in self.nodes.values()
            if (r.created_on, r.name) < age and microseconds(r.created_on) >= request.since
        )[:ELDERS]
        rows = [self.nodes[name] for _, name in older]
        return HeartbeatReply(
            self.version,
            row.state,
            tuple(r.sign for r in rows),
            tuple(self.clock - r.last_heartbeat for r in rows),
            microseconds(min([row.created_on, *(r.created_on for r in rows)])),
            self._history,
            self._settled,
            same,
            row.held,
            row.groups,
        )

    def _youngest(self) -> float:
        """Later than every other row, even if the wall clock was set back."""
        return max([self.clock, *(other.created_on + 2e-6 for other in self.nodes.values())])

    def step_down(self, request: StepDown) -> Reply:
        row = self._row(request.name, request.incarnation)
        if row is None:
            return None
        row.created_on = self._youngest()
        self.outbox.append(f'step {row.name}')
        return True

    def refresh(self, request: Refresh) -> Reply:
        row = self._row(request.name, request.incarnation)
        if row is None:
            return None
        mine = tuple(s for s in self.segments if s.node == row.name)
        incoming = sum(
            s.hi - s.lo for s in self.segments if s.moving_to == row.name and s.node != row.name
        )
        return RefreshReply(
            self.version,
            row.state,
            mine,
            # The plan of a leader that knows of no groups is one for whom it is enough to enter.
            self.planned in (self.fingerprint(), self.fingerprint(of_groups=False)),
            incoming,
            self._history,
            self.continues(row, request),
            row.groups,
            self._ids_of(row, mine),
        )

    def _ids_of(self, row: Row, mine: Iterable[Segment]) -> Ids:
        """Of the groups that the row names, and of those that it has tokens of."""
        held = {group_of(segment.lo) for segment in mine} - {PLAIN}
        return tuple(
            (name, number)
            for name, number in self.groups.items()
            if name in row.groups or number in held
        )

    def take(self, request: Take) -> Reply:
        tasks = sorted(
            {
                task
                for task in (*self.audits, *self.claims)
                if self.is_taken(request.name, task)
                and any(lo <= token_of(task) < hi for lo, hi in request.ranges)
            },
            key=token_of,
        )
        stop = token_of(tasks[_ROWS]) if len(tasks) > _ROWS else request.ranges[-1][1]
        stop = max(stop, request.ranges[0][0] + 1)
        told = [task for task in tasks if token_of(task) < stop]
        claimed = [task for task in told if task not in self.audits]
        return TakeReply(
            tuple((lo, min(hi, stop)) for lo, hi in request.ranges if lo < stop),
            array('Q', sorted(task_key(task, self.total_tokens) for task in told)),
            None,
            tuple(sorted({self.claims[task][1] for task in claimed})),
            tuple(sorted({token_of(task) for task in claimed if task in self.promises})),
        )

    def _may_give(self, segment: Segment, request: Give) -> bool:
        return (
            segment.node == request.name
            and segment.moving
            and (segment.moving_to is not None or segment.blocked)
            and any(lo <= segment.lo and segment.hi <= hi for lo, hi in request.ranges)
            and self.version_fits(segment, request)
        )

    def _cut(self, segment: Segment, request: Give) -> list[Segment]:
        """The pieces of a row of which a part may be given."""
        if segment.node != request.name or not segment.moving:
            return [segment]
        if not self.version_fits(segment, request):
            return [segment]
        ends = {end for range_ in request.ranges for end in range_ if segment.lo < end < segment.hi}
        edges = [segment.lo, *sorted(ends), segment.hi]
        return [replace(segment, lo=lo, hi=hi) for lo, hi in pairwise(edges)]

    def version_fits(self, segment: Segment, request: Give) -> bool:
        return segment.version <= request.version

    def give(self, request: Give) -> Reply:
        if self._row(request.name, request.incarnation) is None:
            return None
        pieces = [piece for s in self.segments for piece in self._cut(s, request)]
        if len(pieces) > len(self.segments):
            self.write(pieces)
        given = [s for s in self.segments if self._may_give(s, request)]
        owned = self.owned_mask(request.name)
        for task, token in request.promised:
            if owned >> token & 1 and task not in self.audits and self.live_claim(task) is None:
                self.claims[task] = (request.name, request.incarnation)
                self.promises.add(task)
        if not given:
            return GiveReply(0)
        self.version += 1
        gone = set(given)
        self.write(
            replace(
                s,
                node=s.moving_to,
                moving=False,
                moving_to=None,
                blocked=s.moving_to is None,
                version=self.version,
            )
            if s in gone
            else s
            for s in self.segments
        )
        self.outbox.append('give ' + ','.join(sorted({s.moving_to for s in given if s.moving_to})))
        return GiveReply(sum(s.hi - s.lo for s in given))

    def activate(self, request: Activate) -> Reply:
        row = self._row(request.name, request.incarnation)
        if row is None:
            return None
        self.let_old_ones_follow(row)
        nodes = len(self.nodes) - sum(self._looks_so(sign) for sign in request.dead)
        if nodes < request.minimum_nodes and row.state != 'active':
            return ActivateReply(False, nodes)
        if row.state == 'joining':
            row.state = 'active'
            self.outbox.append(f'join {row.name}')
        return ActivateReply(True, nodes)

    def drain(self, request: Drain) -> Reply:
        row = self._row(request.name, request.incarnation)
        if row is None:
            return None
        self.outbox.append(f'drain {row.name}')
        if request.by_itself and row.held:
            return request.draining
        row.state = 'draining' if request.draining else 'active'
        row.held = request.draining and not request.by_itself
        return True

    def enroll(self, request: Enroll) -> Reply:
        row = self._row(request.name, request.incarnation)
        if row is None:
            return None
        row.groups = request.groups
        self.outbox.append(f'enroll {row.name}')
        return EnrollReply(self._ids(row.groups))

    def observe(self) -> Reply:
        expiries = [lock.expires_at for lock in self.locks.values() if lock.expires_at is not None]
        return ObserveReply(
            tuple(self.members()),
            self.version,
            self.planned != self.fingerprint() or bool(self.missing()),
            min(expiries) - self.clock if expiries else None,
        )

    def evict(self, request: Evict) -> Reply:
        row = self._row(request.name, request.incarnation)
        if row is None:
            return None
        if not self.is_eldest(row, request.dead):
            return EvictReply(False)
        names = tuple(sign.name for sign in request.targets if self.is_dead(sign))
        for name in names:
            self._delete(name)
        return EvictReply(True, names)

    def lead(self, request: Lead) -> Reply:
        row = self._row(request.name, request.incarnation)
        if row is None:
            return None
        if not self.is_eldest(row, request.dead):
            return RoundReply(False, self.version)
        expired = [
            task
            for task, lock in self.locks.items()
            if lock.expires_at is not None and lock.expires_at <= self.clock
        ]
        for task in expired:
            del self.locks[task]
        self.lock_version += bool(expired)
        draft = self.drafts.pop(request.incarnation, None)
        if draft is not None and not self.still_counts(draft):
            draft = None
        # While a plan is written the rows that it fills in are missing; any other is noticed.
        missing = TokenSet() if draft is not None and draft.begun else self.missing()
        if missing and not self.may_fill(request, missing):
            self._open_gap(request, missing)
            return RoundReply(True, self.version)
        if self.fingerprint() == self.planned and not missing:
            return RoundReply(True, self.version)
        if draft is not None or self.piece is None:
            return self._write_plan(request, draft or self.plan())
        self.drafts[request.incarnation] = self.plan()
        return RoundReply(True, self.version, more=True)

    def _write_plan(self, request: Lead, draft: Draft) -> Reply:
        """Write the next piece, or all of it."""
        rows = draft.written(self.segments, self.version + 1, self.piece)
        if rows is None:
            return RoundReply(True, self.version, more=True)
        self.version += 1
        decision = draft.decision
        for name in decision.activate:
            self.nodes[name].state = 'active'
        self.write(rows)
        if not draft.is_written:
            self.planned, draft.seen = None, self.fingerprint()
            self.drafts[request.incarnation] = draft
            return RoundReply(True, self.version, more=True)
        self.planned = self.fingerprint()
        unknown = self.formed - {PLAIN} if self.asker_is_old else frozenset()
        self.formed = frozenset(decision.formed) | unknown
        self.outbox.append(f'plan {self.version}')
        return RoundReply(True, self.version, decision.moved, decision.blocked, decision.conflicts)

    def still_counts(self, draft: Draft) -> bool:
        """Whether nodes and locks are those of the plan."""
        return draft.seen == self.fingerprint()

    def may_fill(self, request: Lead, missing: TokenSet) -> bool:
        """Whether a timeout ago all nodes were told to look at their rows, as these are missing."""
        told = self.gaps.get(request.incarnation)
        return (
            told is not None
            and told[:2] == (self.version, missing)
            and self.asker_clock - told[2] >= self.timeout
        )

    def _open_gap(self, request: Lead, missing: TokenSet) -> None:
        told = self.gaps.get(request.incarnation)
        if told is None or told[:2] != (self.version, missing):
            self.version += 1
            self.gaps[request.incarnation] = self.version, missing, self.asker_clock
            self.outbox.append(f'plan {self.version}')

    def is_eldest(self, row: Row, dead: tuple[Sign, ...]) -> bool:
        living = [r for r in self.nodes.values() if r.sign not in dead]
        return bool(living) and min(living, key=lambda r: (r.created_on, r.name)) is row

    def is_dead(self, sign: Sign) -> bool:
        """The leader's re-check: the row still looks as it was seen."""
        return self._looks_so(sign)

    def plan(self) -> Draft:
        """What a leader makes of the tables."""
        members = self.members()
        pins = [
            Pin(
                task,
                lock.token,
                lock.patterns,
                lock.created_at,
                None if lock.group is None else self.groups[lock.group],
            )
            for task, lock in sorted(self.locks.items())
            if lock.group is None or lock.group in self.groups
        ]
        hidden = self.out_of_sight(self.segments)
        before = [row for row in self.segments if row not in hidden]
        known = before
        if self.asker_is_old:
            members = [replace(member, groups=(PLAIN,)) for member in members]
            known = [row for row in before if group_of(row.lo) == PLAIN]
        version = self.version + 1
        decision = decide(members, known, pins, self.total_tokens, version)
        if self.on_plan is not None:
            self.on_plan(members, known, pins, decision)
        return Draft(self.fingerprint(), version, before, decision)

    def out_of_sight(self, rows: Iterable[Segment]) -> list[Segment]:
        """What a leader that knows of no groups is not shown, so that it does not delete it."""
        return [row for row in rows if self.asker_is_old and group_of(row.lo) != PLAIN]

    def per_token(self) -> dict[int, Segment]:
        """Each token's row."""
        return {
            token: segment for segment in self.segments for token in range(segment.lo, segment.hi)
        }
