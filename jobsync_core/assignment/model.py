"""What the tables of nodes and of the assignment hold: plain values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ['Member', 'Range', 'Segment']

#: Tokens from the first number up to, not including, the second.
Range: TypeAlias = 'tuple[int, int]'


@dataclass(frozen=True)
class Member:
    """One row of the node table. `created_on` orders nodes by age; it is compared with others of
    its kind only.

    groups: ids of the queue groups that it belongs to, in order; 0 is always one of them.
    """

    name: str
    incarnation: str
    beat: int
    created_on: float
    state: str  # joining | active | draining
    weight: float
    groups: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Segment:
    """One row of the assignment table: tokens `lo … hi-1`.

    moving: the owner is asked to give the tokens away, to `moving_to`, or to nobody where
    `blocked`. blocked: no live node is eligible. version: the cluster version at which the row was
    written.
    """

    lo: int
    hi: int
    node: str | None
    moving: bool = False
    moving_to: str | None = None
    blocked: bool = False
    version: int = 0
