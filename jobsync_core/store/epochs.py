"""When a cluster ends and another begins: audits count within one epoch, that is while there is
always a node that lives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..protocol.messages.signs import Sign
from .cluster_transaction import ClusterTransaction

__all__ = ['Epochs']


class Epochs:
    """Begins a new epoch where this node finds that no other one lived when it joined.

    That is so where it found no other row, or where all that it found are dead and have not sent a
    heartbeat since: nobody compares clocks. In both cases this node has owned nothing before.

    Args:
        resume: The node goes on with the epoch of a cluster that has ended.
    """

    def __init__(self, resume: bool) -> None:
        self._resume = resume
        self._found: frozenset[tuple[str, int]] = frozenset()
        self._version = -1
        self.begun = False

    @property
    def resumes(self) -> bool:
        """Whether the node goes on where a cluster has ended."""
        return self._resume

    def joined(self, others: Iterable[Sign], again: bool, version: int) -> None:
        """The node has joined, for the first time or `again` after an eviction, and found these
        others, at this version of the plan.
        """
        self._version = version
        self._found = (
            frozenset()
            if again or self._resume
            else frozenset((sign.incarnation, sign.beat) for sign in others)
        )

    def evicting(
        self, steps: ClusterTransaction, dead: Iterable[Sign], names: Iterable[str]
    ) -> None:
        """In the leader's transaction: those of `dead` that have these names are evicted, and
        nothing is planned yet.
        """
        gone = set(names)
        if self._found and self._found <= {
            (sign.incarnation, sign.beat) for sign in dead if sign.name in gone
        }:
            # A plan or a hand-over since this node joined may have given it tokens, and it may have
            # audited: then nothing has ended.
            begun = steps.run('cluster.begin_epoch', {'version': self._version})
            self.begun = self.begun or bool(begun)

    def evicted(self, names: Collection[str]) -> None:
        """That was committed: from now on this node may own tokens, and its own audits must go on
        to count.
        """
        if names:
            self._found = frozenset()
