"""A node's queue groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ['Enroll', 'EnrollReply', 'Ids']

#: Queue groups by name, each with its id: where its tokens are on the number line.
Ids: TypeAlias = 'tuple[tuple[str, int], ...]'


@dataclass(frozen=True)
class Enroll:
    """Let the node's row name these queue groups, and no others; replies EnrollReply, or None when
    evicted.

    A group that has no id gets one. What the node has in a group that is left stays its own: a plan
    asks for it, and the node gives it.
    """

    name: str
    incarnation: str
    groups: tuple[str, ...]


@dataclass(frozen=True)
class EnrollReply:
    """ids: of the groups that the row names."""

    ids: Ids
