"""What this node may claim, right now: a token bitmap and a lease deadline in memory that forked
children share.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from ..assignment.groups import PLAIN, window
from ..assignment.model import Range
from ..assignment.tokens import TokenSet
from . import pausing
from .exclusions import Exclusions

__all__ = ['Ownership']

forked = False


def _note_fork() -> None:
    global forked
    forked = True


os.register_at_fork(after_in_child=_note_fork)

_LEASE = 8  # one double: the deadline
_LIFE = 64  # the incarnation, as text that ends with NULs
# first byte not 0: the node is leaving; second byte not 0: forked children took tasks for the audit
_CLOSED = 8
_PAUSE = _LEASE + _LIFE + _CLOSED  # see Pausing
_HEADER = _PAUSE + pausing.SIZE


class Ownership:
    """The local token set and the lease, written by the agent and read by everybody.

    A claim reads one bit and one double, both of which change atomically, so that no lock is
    needed: not between threads, and not between the process that entered a Job and the children
    that it forks (the map is anonymous and shared). Times are seconds of the clock that the owner
    passes in; forked children use the same one.

    Args:
        total_tokens: Tokens of the cluster.
        owner_lives: Whether the process that makes this object is known to live; asked by the
            children of its children.
        lock: Keeps the threads apart that exclude tasks.
    """

    def __init__(
        self,
        total_tokens: int,
        owner_lives: Callable[[], bool] = lambda: False,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self.total_tokens = total_tokens
        self._pid = os.getpid()
        self._owner_lives = owner_lives
        self._map = mmap.mmap(-1, _HEADER + (total_tokens + 7) // 8)
        view = memoryview(self._map)
        self.lease = view[:_LEASE].cast('d')
        self._life = view[_LEASE : _LEASE + _LIFE]
        self._closed = view[_LEASE + _LIFE : _PAUSE]
        #: Whether workers pause, as the database refuses to begin anything.
        self.pausing = pausing.Pausing(view[_PAUSE:_HEADER])
        self.bits = view[_HEADER:]
        self._tokens = TokenSet()
        self._plain = TokenSet([window(PLAIN, total_tokens)])
        self.exclusions = Exclusions(total_tokens, lock)

    @property
    def deadline(self) -> float:
        """When the lease ends; 0 where there is none."""
        return self.lease[0]

    @property
    def incarnation(self) -> str:
        """The node's present life: forked children speak for the one that is alive now, not at the
        fork.
        """
        return bytes(self._life).rstrip(b'\0').decode()

    @incarnation.setter
    def incarnation(self, incarnation: str) -> None:
        self._life[:] = incarnation.encode().ljust(_LIFE, b'\0')

    @property
    def tokens(self) -> TokenSet:
        """The tokens in the set, whether the lease is valid or not; in forked children without
        those of queue groups.
        """
        if os.getpid() == self._pid:
            return self._tokens
        bits = self.bits
        return TokenSet.of(
            token for token in range(self.total_tokens) if bits[token >> 3] >> (token & 7) & 1
        )

    @property
    def plain(self) -> TokenSet:
        """Those of the plain Job alone."""
        return self.tokens & self._plain

    def may_claim(self, token: int, now: float) -> bool:
        """Whether the set holds the token and the lease has not run out. Tokens of queue groups are
        known to the node's own process alone: its children answer False.
        """
        if token >= self.total_tokens:
            return now < self.lease[0] and token in self._tokens and os.getpid() == self._pid
        return (
            now < self.lease[0]
            and bool(self.bits[token >> 3] >> (token & 7) & 1)
            and not (forked and self.is_orphaned())
        )

    def is_orphaned(self) -> bool:
        """Whether this is a forked process whose node's main process is gone, or leaves: others may
        take its tokens at once then.
        """
        if os.getpid() == self._pid:
            return False
        if self._closed[0]:
            return True
        if os.getppid() == self._pid:
            return False
        return not self._owner_lives()  # a child of a child

    def exclude(self, ranges: Sequence[Range], keys: array[int]) -> None:
        """Let `keys` be the tasks of these tokens that others have taken, or that are done; before
        the tokens can be claimed.
        """
        self.exclusions.replace(ranges, keys)

    def exclude_more(self, keys: array[int]) -> None:
        """Exclude further tasks."""
        self.exclusions.add(keys)

    def replace(self, tokens: TokenSet) -> None:
        """Put another set in place of this one. When this returns, no later answer comes from the
        old set.
        """
        plain = tokens & self._plain
        lost = (self._tokens & self._plain) - plain
        self._tokens = tokens
        plain.write_bitmap(self.bits, self.total_tokens)
        if lost and not plain:
            self.exclusions.clear()
        elif lost and len(self.exclusions):
            self.exclusions.replace(lost.ranges, array('Q'))

    def close(self) -> None:
        """The node leaves: its forked children take nothing any more."""
        self._closed[0] = 1

    @property
    def closed(self) -> bool:
        """Whether the node is leaving."""
        return self._closed[0] != 0

    def note_children(self) -> None:
        """A forked child takes tasks for the audit, which the node's exit has to write."""
        self._closed[1] = 1

    @property
    def children_took(self) -> bool:
        """Whether a forked child ever took a task for the audit."""
        return self._closed[1] != 0

    def extend(self, deadline: float) -> None:
        """Let the lease end at `deadline`."""
        self.lease[0] = deadline

    def suspend(self) -> None:
        """End the lease now."""
        self.lease[0] = 0.0
