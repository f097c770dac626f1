"""What a node says to the store and what it hears: plain values, no behaviour.

The protocol (node.py) produces requests and consumes replies; the PostgreSQL store
(store/cluster.py) and the simulated store (tests/sim) both answer them. Each request is atomic: it
happens wholly or not at all, at one instant, and its reply may be lost after it happened. Every
request carries the incarnation that it speaks for, so that a statement which arrives late can do no
harm.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from ..assignment.model import Member, Range, Segment
from ..process import Process

__all__ = [
    'DEATHS',
    'ELDERS',
    'Activate',
    'ActivateReply',
    'Beat',
    'HeartbeatReply',
    'Connect',
    'ConnectReply',
    'Drain',
    'Evict',
    'EvictReply',
    'Give',
    'GiveReply',
    'RefreshReply',
    'Join',
    'JoinReply',
    'Lead',
    'Leave',
    'RoundReply',
    'Lives',
    'LivesReply',
    'Mismatch',
    'Observe',
    'ObserveReply',
    'Occupied',
    'RecordHistory',
    'Refresh',
    'Reply',
    'Request',
    'Sign',
    'StepDown',
    'Take',
    'TakeReply',
]

#: How many of the older nodes a heartbeat's answer names: so many of the oldest may die at once and
#: are found in time.
ELDERS = 4
#: Why a leader plans after an eviction.
DEATHS = 'nodes died'


class Life(NamedTuple):
    """One life of a node. Each request carries that for which it speaks."""

    name: str
    incarnation: str


@dataclass(frozen=True)
class Sign:
    """A node's sign of life as one look at the node table showed it. `beat` counts heartbeats;
    compare it for equality only.
    """

    name: str
    incarnation: str
    beat: int


@dataclass(frozen=True)
class Connect:
    """Open the control connection (and LISTEN)."""


@dataclass(frozen=True)
class ConnectReply:
    """`server` names the server, where the answers cannot name the database's history; else it is
    ''.
    """

    server: str


@dataclass(frozen=True)
class Join:
    """Insert the node row; replies JoinReply, Occupied or Mismatch.

    active: skip the grace period (a node that comes back after an eviction). replace: (incarnation,
    beat) of a row of this name that is known dead; it is deleted if it still looks so. reap: nodes
    seen dead; deleted if they still look so, before the settings are compared. A Join whose
    incarnation is in the table already succeeded earlier: JoinReply.
    """

    name: str
    incarnation: str
    process: Process
    weight: float
    active: bool
    replace: tuple[str, int] | None = None
    reap: tuple[Sign, ...] = ()


@dataclass(frozen=True)
class JoinReply:
    version: int


@dataclass(frozen=True)
class Occupied:
    """Another incarnation has the name."""

    sign: Sign
    process: Process


@dataclass(frozen=True)
class Mismatch:
    """The cluster has nodes and other settings."""

    total_tokens: int
    hash_function: str
    nodes: tuple[Sign, ...]


@dataclass(frozen=True)
class Beat:
    """Heartbeat; replies HeartbeatReply, or None when the incarnation has been evicted.

    since: no node is older than this (HeartbeatReply.since of an earlier answer), so that nothing
    need be read before it. number: what the row's `beat` becomes: even, and larger than that of any
    heartbeat which was sent before. seen: what the row's `beat` was at the last answer; 0 before
    the first one.

    Where the row holds neither `seen` nor a later number that this node has sent, the database has
    forgotten the last answered heartbeat: it is in another history. Then `beat` becomes `number +
    1`. An odd number stays a break until the node has heard of it.
    """

    name: str
    incarnation: str
    since: int = 0
    number: int = 2
    seen: int = 0


@dataclass(frozen=True)
class HeartbeatReply:
    """The row's heartbeat counts; this is what the tables say meanwhile.

    older: the oldest of the nodes that are older than this one, at most ELDERS, oldest first. ages:
    seconds since the last heartbeat of each, by the server's clock; a hint for timing, never a
    proof of life or death. since: when the oldest node that was seen was created, in microseconds
    of the server's clock. history: names the database's history (system identifier and timeline);
    '' where this role may not ask for it. settled: the cluster's row names this history: since it
    began, somebody has waited until no lease of another one can be valid. So it is where the row
    names none and the server was never promoted. same: this is the history of the last answer. If
    not, it is another one, whatever its name.
    """

    version: int
    state: str
    older: tuple[Sign, ...]
    ages: tuple[float, ...] = ()
    since: int = 0
    history: str = ''
    settled: bool = True
    same: bool = True


@dataclass(frozen=True)
class Refresh:
    """Read the rows that name this incarnation as owner; replies RefreshReply, or None when
    evicted.

    seen: as in Beat.
    """

    name: str
    incarnation: str
    seen: int = 0


@dataclass(frozen=True)
class RefreshReply:
    """The rows of this node, and what is on its way here.

    planned: the latest plan took the present nodes and locks into account. incoming: tokens on
    their way to this node. history, same: as in HeartbeatReply.
    """

    version: int
    state: str
    segments: tuple[Segment, ...]
    planned: bool
    incoming: int
    history: str = ''
    same: bool = True


@dataclass(frozen=True)
class Take:
    """Ask which tasks of tokens are audited for this node's date, or claimed by another live node;
    replies TakeReply.

    ranges: sorted and disjoint; the answer may be about the first of these tokens alone.
    limit: how many rows it should be made of.
    after: where the answer before was about a part of the first token: the last task of that part.
    """

    name: str
    ranges: tuple[Range, ...]
    limit: int = 10_000
    after: str | None = None


@dataclass(frozen=True)
class TakeReply:
    """What is known now, and of which tokens.

    ranges: the tokens whose tasks are all known with this answer. keys: the tasks, as sorted keys
    of exclusions.Exclusions. after: not None: only a part of the first token is known, up to this
    task; `ranges` is empty. holders: the lives of nodes that hold claims on some of these tasks.
    promised: tokens with tasks that were promised and not taken: they may become free again at any
    time.
    """

    ranges: tuple[Range, ...] = ()
    keys: array[int] = field(default_factory=lambda: array('Q'))
    after: str | None = None
    holders: tuple[str, ...] = ()
    promised: tuple[int, ...] = ()


@dataclass(frozen=True)
class Lives:
    """Ask which of these lives of nodes are over; replies LivesReply."""

    incarnations: tuple[str, ...]


@dataclass(frozen=True)
class LivesReply:
    incarnations: tuple[str, ...]


@dataclass(frozen=True)
class Give:
    """Give away the rows of mine that are moving, lie within `ranges` and are not newer than
    `version`; replies GiveReply.

    promised: (task_id, token) pairs that this node has just said it may claim; recorded as its
    claims in the same transaction.
    """

    name: str
    incarnation: str
    ranges: tuple[Range, ...]
    version: int
    promised: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class GiveReply:
    tokens: int


@dataclass(frozen=True)
class Activate:
    """The grace period is over: become active if enough nodes are there (not counting `dead`);
    replies ActivateReply, or None when evicted.
    """

    name: str
    incarnation: str
    minimum_nodes: int
    dead: tuple[Sign, ...] = ()


@dataclass(frozen=True)
class ActivateReply:
    ok: bool
    nodes: int


@dataclass(frozen=True)
class Drain:
    """Set or clear this node's draining state; replies True, or None when evicted."""

    name: str
    incarnation: str
    draining: bool


@dataclass(frozen=True)
class Leave:
    """Delete the node row, its ranges become unowned; replies True."""

    name: str
    incarnation: str


@dataclass(frozen=True)
class Observe:
    """Look at the whole node table; replies ObserveReply."""


@dataclass(frozen=True)
class ObserveReply:
    """stale: nodes or locks differ from those of the latest plan. next_expiry: seconds until the
    next lock expires.
    """

    members: tuple[Member, ...]
    version: int
    stale: bool
    next_expiry: float | None


@dataclass(frozen=True)
class Evict:
    """Delete the nodes in `dead` that still look so; replies EvictReply. A transaction of its own:
    it stands, whatever the plan does.

    only: delete this one of them alone; the others still do not count as older than this node.
    """

    name: str
    incarnation: str
    dead: tuple[Sign, ...]
    only: Sign | None = None

    @property
    def targets(self) -> tuple[Sign, ...]:
        """Who is to be deleted."""
        return self.dead if self.only is None else (self.only,)


@dataclass(frozen=True)
class EvictReply:
    """led: this node was the oldest of those not seen dead. names: who was deleted."""

    led: bool
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lead:
    """One leader's round: plan if anything changed; replies RoundReply.

    dead: nodes seen dead that could not be evicted yet.
    """

    name: str
    incarnation: str
    dead: tuple[Sign, ...]
    reason: str


@dataclass(frozen=True)
class RoundReply:
    """led: this node was the oldest of those not seen dead. moved: tokens that the plan moves.

    more: the round is not over, since plans of many rows are written in pieces: ask again at once.
    """

    led: bool
    version: int
    moved: int = 0
    blocked: int = 0
    conflicts: tuple[str, ...] = ()
    more: bool = False


@dataclass(frozen=True)
class StepDown:
    """Become the youngest node: this one cannot lead, the next oldest may try; replies True, or
    None when evicted.
    """

    name: str
    incarnation: str


@dataclass(frozen=True)
class RecordHistory:
    """All leases of earlier histories are over: let `history` be the cluster's; replies True.

    Nothing is done where the server's history has another name, or does not hold this node's last
    answered heartbeat (`seen`).
    """

    name: str
    incarnation: str
    seen: int
    history: str


Request: TypeAlias = (
    'Connect | Join | Beat | Refresh | Take | Lives | Give | Activate | Drain | Leave | Observe | '
    'Evict | Lead | StepDown | RecordHistory'
)
Reply: TypeAlias = (
    'ConnectReply | JoinReply | Occupied | Mismatch | HeartbeatReply | RefreshReply | TakeReply | '
    'LivesReply | GiveReply | ActivateReply | ObserveReply | EvictReply | RoundReply | bool | None'
)
