"""How nodes are told apart, and what shows that one lives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ['Life', 'Sign']


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
