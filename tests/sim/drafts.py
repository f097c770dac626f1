"""A plan on its way into the assignment of the simulated store: in pieces, as store/plans.py writes
it, or at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, field, replace

from jobsync_core.assignment.model import Segment
from jobsync_core.assignment.round import Decision
from jobsync_core.store.plans import cut

__all__ = ['Draft']


@dataclass
class Draft:
    """One plan, in the memory of the leader's process.

    seen: what it was made from. version: stands in rows that change, until they are written.
    before: the rows that it was made from.
    """

    seen: Hashable
    version: int
    before: Sequence[Segment]
    decision: Decision
    begun: bool = False
    _gone: deque[Segment] = field(init=False)
    _fresh: deque[Segment] = field(init=False)

    def __post_init__(self) -> None:
        old, new = set(self.before), set(self.decision.segments)
        self._gone = deque(row for row in self.before if row not in new)
        self._fresh = deque(row for row in self.decision.segments if row not in old)

    @property
    def is_written(self) -> bool:
        """Whether its last piece is written."""
        return not self._gone and not self._fresh

    @staticmethod
    def are_as_read(gone: Set[Segment], rows: Sequence[Segment]) -> bool:
        """Whether the rows that a piece replaces are still there, unchanged."""
        return gone <= set(rows)

    def written(
        self, rows: Sequence[Segment], version: int, most: int | None
    ) -> list[Segment] | None:
        """The rows with the next piece written, in this version; None where one of them is not as
        it was read.
        """
        piece = cut(self._gone, self._fresh, most or len(self._fresh))
        gone = set(piece.gone)
        if not self.are_as_read(gone, rows):
            return None
        self.begun = True
        return [
            *(row for row in rows if row not in gone),
            *(
                replace(row, version=version) if row.version == self.version else row
                for row in piece.fresh
            ),
        ]
