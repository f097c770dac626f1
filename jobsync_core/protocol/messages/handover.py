"""A node's tokens: which are its own, what others have taken of them, and those that it gives
away.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from ...assignment.model import Range, Segment
from .groups import Ids

__all__ = [
    'Refresh',
    'RefreshReply',
    'Take',
    'TakeReply',
    'Lives',
    'LivesReply',
    'Give',
    'GiveReply',
]


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
    their way to this node. history, same: as in HeartbeatReply. groups: names of the queue groups
    that the node's row names. ids: of these, and of those in which rows name this node.
    """

    version: int
    state: str
    segments: tuple[Segment, ...]
    planned: bool
    incoming: int
    history: str = ''
    same: bool = True
    groups: tuple[str, ...] = ()
    ids: Ids = ()


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
