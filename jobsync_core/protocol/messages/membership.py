"""A node's row: it is inserted, counts heartbeats, takes part, drains and goes."""

from __future__ import annotations

from dataclasses import dataclass

from ...process import Process
from .groups import Ids
from .signs import Sign

__all__ = [
    'ELDERS',
    'Join',
    'JoinReply',
    'Occupied',
    'Mismatch',
    'Beat',
    'HeartbeatReply',
    'Activate',
    'ActivateReply',
    'Drain',
    'Leave',
]

#: How many of the older nodes a heartbeat's answer names: so many of the oldest may die at once and
#: are found in time.
ELDERS = 4


@dataclass(frozen=True)
class Join:
    """Insert the node row; replies JoinReply, Occupied or Mismatch.

    active: skip the grace period (a node that comes back after an eviction). replace: (incarnation,
    beat) of a row of this name that is known dead; it is deleted if it still looks so. reap: nodes
    seen dead; deleted if they still look so, before the settings are compared. groups: names of its
    queue groups; one that has no id gets one. A Join whose incarnation is in the table already
    succeeded earlier: JoinReply.
    """

    name: str
    incarnation: str
    process: Process
    weight: float
    active: bool
    replace: tuple[str, int] | None = None
    reap: tuple[Sign, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class JoinReply:
    """ids: of the queue groups that the row names."""

    version: int
    ids: Ids = ()


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
    not, it is another one, whatever its name. held: the node was drained by somebody else than
    itself, or by its program: it does not take part again by itself. groups: names of the queue
    groups that the row names; None: not told.
    """

    version: int
    state: str
    older: tuple[Sign, ...]
    ages: tuple[float, ...] = ()
    since: int = 0
    history: str = ''
    settled: bool = True
    same: bool = True
    held: bool = False
    groups: tuple[str, ...] | None = None


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
    """Set or clear this node's draining state; replies whether the row says so now, or None when
    evicted.

    Attributes:
        by_itself: The node drains, or takes part again, by what it finds itself: somebody else's
            drain stays.
    """

    name: str
    incarnation: str
    draining: bool
    by_itself: bool = False


@dataclass(frozen=True)
class Leave:
    """Delete the node row, its ranges become unowned; replies True."""

    name: str
    incarnation: str
