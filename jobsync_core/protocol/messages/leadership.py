"""The duties of the oldest nodes: to look, to evict, to plan, and to step down."""

from __future__ import annotations

from dataclasses import dataclass

from ...assignment.model import Member
from .signs import Sign

__all__ = [
    'DEATHS',
    'Observe',
    'ObserveReply',
    'Evict',
    'EvictReply',
    'Lead',
    'RoundReply',
    'StepDown',
]

#: Why a leader plans after an eviction.
DEATHS = 'nodes died'


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
    for_nobody: no token of any queue group may have an owner now.
    """

    led: bool
    version: int
    moved: int = 0
    blocked: int = 0
    conflicts: tuple[str, ...] = ()
    more: bool = False
    for_nobody: bool = False


@dataclass(frozen=True)
class StepDown:
    """Become the youngest node: this one cannot lead, the next oldest may try; replies True, or
    None when evicted.
    """

    name: str
    incarnation: str
