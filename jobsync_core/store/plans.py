"""A plan's way into the assignment table: in pieces, each a short transaction of the leader's
round.

A plan of many locks is many rows. So it is computed from what was read without any lock, and
written a piece at a time, from the first token to the last. Each piece holds the cluster's row, and
checks that nodes and locks are those of the plan and that every row that it replaces is still as it
was read: whoever has given a row away meanwhile, or died, makes the leader plan again. Each piece
by itself is a step that the protocol allows, and while only some are written the plan counts as not
made.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..assignment.model import Segment
from ..assignment.round import Decision
from .cluster_transaction import ClusterTransaction
from .connection import Connection
from .tables import Tables

__all__ = ['Draft', 'Outdated', 'Piece', 'cut', 'read_assignment']


class Outdated(Exception):
    """What the plan was made from has changed."""


@dataclass(frozen=True)
class Piece:
    """Rows that go, and those that come in their place; both cover the same tokens, but for tokens
    that had no row.
    """

    gone: tuple[Segment, ...]
    fresh: tuple[Segment, ...]


def read_assignment(connection: Connection, tables: Tables) -> list[Segment]:
    """All rows, in order."""
    return [Segment(*row) for row in connection.execute(tables.sql('plan.read'))]


def cut(gone: deque[Segment], fresh: deque[Segment], most: int) -> Piece:
    """Take the next piece off both: at most so many fresh rows. Of a row that is replaced in part,
    the rest comes back as it was.
    """
    taken = [fresh.popleft() for _ in range(min(most, len(fresh)))]
    end = taken[-1].hi if fresh else None
    replaced = []
    while gone and (end is None or gone[0].lo < end):
        row = gone.popleft()
        replaced.append(row)
        if end is not None and row.hi > end:
            rest = replace(row, lo=end)
            taken.append(rest)
            gone.appendleft(rest)
            break
    return Piece(tuple(replaced), tuple(taken))


class Draft:
    """One plan that is being written.

    Args:
        seen: Fingerprint of the nodes and locks that it was made from.
        version: Stands in rows that change, until they are written.
        before: The assignment that it was made from.
        decision: The plan.
        nodes: How many nodes it knew.
    """

    def __init__(
        self, seen: str, version: int, before: Sequence[Segment], decision: Decision, nodes: int
    ) -> None:
        self.seen = seen
        self.decision = decision
        self.nodes = nodes
        self._placeholder = version
        old, new = set(before), set(decision.segments)
        self._gone = deque(row for row in before if row not in new)
        self._fresh = deque(row for row in decision.segments if row not in old)
        self._begun = False

    def write(self, steps: ClusterTransaction, version: int, most: int) -> bool:
        """Write the next piece in a transaction that holds the cluster's row; whether it was the
        last one.

        Args:
            steps: The transaction.
            version: The cluster's, of now.
            most: How many rows to write.

        Raises:
            Outdated: A row is not as it was read; nothing may be committed.
        """
        piece = cut(self._gone, self._fresh, most)
        last = not self._fresh
        since = self._replace(steps, piece, version + 1)
        self._insert(steps, piece, since, version + 1)
        self._conclude(steps, version + 1, last)
        self._begun = True
        return last

    def _replace(self, steps: ClusterTransaction, piece: Piece, version: int) -> dict[int, str]:
        """Delete what goes, change in place what keeps its tokens: that costs no index. Since when
        the deleted rows had their owners.
        """
        fresh = {(row.lo, row.hi): row for row in piece.fresh}
        pairs = [(row, fresh.get((row.lo, row.hi))) for row in piece.gone]
        rows = (
            steps.run(
                'plan.replace',
                {
                    **_columns(piece.gone, version, self._placeholder),
                    'keeps': [new is not None for _, new in pairs],
                    'version': version,
                    'new_node': [new.node if new else None for _, new in pairs],
                    'new_moving': [new.moving if new else None for _, new in pairs],
                    'new_to': [new.moving_to if new else None for _, new in pairs],
                    'new_blocked': [new.blocked if new else None for _, new in pairs],
                },
            )
            if piece.gone
            else []
        )
        if len(rows) != len(piece.gone):
            raise Outdated
        return {lo: since for lo, since in rows if lo is not None}

    def _insert(
        self, steps: ClusterTransaction, piece: Piece, since: dict[int, str], version: int
    ) -> None:
        kept = {(row.lo, row.hi) for row in piece.gone}
        fresh = [row for row in piece.fresh if (row.lo, row.hi) not in kept]
        if not fresh:
            return
        origins = _origins(piece.gone, fresh, since)
        # The index takes ranges several times faster if they do not come in order.
        order = random.Random(version).sample(range(len(fresh)), len(fresh))
        steps.run(
            'plan.insert',
            {
                **_columns([fresh[place] for place in order], version, self._placeholder),
                'since': [origins[place] for place in order],
            },
        )

    def _conclude(self, steps: ClusterTransaction, version: int, last: bool) -> None:
        """Let the first piece's nodes take part, raise the cluster's version, and after the last
        piece say that the plan is made, and which queue groups have rows.
        """
        activate = () if self._begun else self.decision.activate
        ((now, matches),) = steps.run(
            'plan.conclude',
            {
                'activate': list(activate),
                'version': version,
                'seen': self.seen,
                'last': last,
                'formed': list(self.decision.formed),
            },
        )
        # Whoever has changed its state meanwhile is planned for again.
        self.seen = now if matches else ''


def _columns(rows: Sequence[Segment], version: int, placeholder: int) -> dict[str, Any]:
    return {
        'lo': [row.lo for row in rows],
        'hi': [row.hi for row in rows],
        'node': [row.node for row in rows],
        'moving': [row.moving for row in rows],
        'to': [row.moving_to for row in rows],
        'blocked': [row.blocked for row in rows],
        'versions': [version if row.version == placeholder else row.version for row in rows],
    }


def _origins(
    gone: Sequence[Segment], fresh: Sequence[Segment], since: dict[int, str]
) -> list[str | None]:
    """For each new row, since when its node has owned the first of its tokens; None where it did
    not. Both are in order.
    """
    found: list[str | None] = []
    place = 0
    for row in fresh:
        while place < len(gone) and gone[place].hi <= row.lo:
            place += 1
        old = gone[place] if place < len(gone) else None
        same = old is not None and old.lo <= row.lo and old.node == row.node
        found.append(since.get(old.lo) if old is not None and same else None)
    return found
