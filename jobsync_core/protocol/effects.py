"""What the protocol asks its driver to do, besides sending requests: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from ..assignment.tokens import TokenSet

__all__ = ['Effect', 'Effects', 'Entered', 'Failed', 'Left', 'Note', 'RebalanceEvent', 'Release']


@dataclass(frozen=True)
class RebalanceEvent:
    """A change of the tokens that this node may claim.

    Attributes:
        is_initial: True for the first one after entering.
        token_version: Version of the cluster's assignment.
        tokens_added: Number of tokens gained.
        tokens_removed: Number of tokens lost.
    """

    is_initial: bool
    token_version: int
    tokens_added: int
    tokens_removed: int


@dataclass(frozen=True)
class Release:
    """Run `on_release(tokens)`, then call `Protocol.released(number)`; before, if it tells which
    tokens are still in use, `Protocol.release_went_on(number, used)`.
    """

    number: int
    tokens: TokenSet


@dataclass(frozen=True)
class Entered:
    """`__enter__` may return."""


@dataclass(frozen=True)
class Left:
    """The row is gone; the node has nothing more to do."""


@dataclass(frozen=True)
class Failed:
    """The node cannot go on."""

    error: Exception


@dataclass(frozen=True)
class Note:
    """One line for the log."""

    level: str
    event: str
    fields: dict[str, object] = field(default_factory=dict)


Effect: TypeAlias = 'RebalanceEvent | Release | Entered | Left | Failed | Note'


class Effects:
    """What there is to do, in order; each is handed out once.

    Args:
        node: The node's name, for its notes.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._waiting: list[Effect] = []

    def add(self, effect: Effect) -> None:
        """One thing more."""
        self._waiting.append(effect)

    def note(self, level: str, event: str, **fields: object) -> None:
        """One line more for the log."""
        self.add(Note(level, event, {'node': self._node, **fields}))

    def take(self) -> list[Effect]:
        """All that waits."""
        effects, self._waiting = self._waiting, []
        return effects
