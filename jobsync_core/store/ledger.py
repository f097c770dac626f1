"""What operators see of the ledger, and mend: rows by slices of keys, and single keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ..results import ExecutionDetails, RecordedExecution
from .base import Store
from .selection import Selection

__all__ = ['LedgerStore', 'Page', 'Slice']

#: Rows that one statement looks at, and that it changes: about 20 ms, and 100 ms.
LOOKED_AT, CHANGED = 10_000, 2_000


@dataclass(frozen=True)
class Slice:
    """What one statement did.

    Args:
        number: Rows that it counted, or deleted.
        last: The key behind which the next one goes on; None: this was the last one.
    """

    number: int
    last: str | None


@dataclass(frozen=True)
class Page:
    """What one statement found; `last` as in Slice."""

    rows: list[RecordedExecution]
    last: str | None


class LedgerStore(Store):
    """The ledger's rows, for people. Each call is a statement or two, and short, however long the
    table is.
    """

    def page(self, selection: Selection, after: str, limit: int) -> Page:
        """The next rows of a selection, in the order of their keys.

        Args:
            selection: Which rows.
            after: Only keys behind this one; '' is before all.
            limit: Rows at most; there may be fewer, even none, and more behind them.
        """
        found = self._dicts('ledger.page', {**_range(selection, after, LOOKED_AT), 'limit': limit})
        last, looked = found[0]['last'], found[0]['looked']
        for row in found:
            del row['last'], row['looked']
        rows = cast(list[RecordedExecution], [row for row in found if row['key'] is not None])
        if len(rows) == limit:
            return Page(rows, rows[-1]['key'])
        return Page(rows, last if looked == LOOKED_AT else None)

    def count(self, selection: Selection, after: str) -> Slice:
        """How many of the next rows are in a selection."""
        return self._slice('ledger.count', selection, after, LOOKED_AT)

    def purge(self, selection: Selection, after: str) -> Slice:
        """Delete those of the next rows that are in a selection, but none that a live node is at,
        and none that somebody has locked.
        """
        return self._slice('ledger.purge', selection, after, CHANGED)

    def look(self, key: str) -> ExecutionDetails | None:
        """One key's row, with its attempts that failed or were lost."""
        found = self._dicts('ledger.look', {'key': key})
        if not found:
            return None
        history = self._dicts('ledger.attempts', {'key': key})
        return cast(ExecutionDetails, {**found[0], 'history': history})

    def free(self, key: str, fence: int, error: str, retention_sec: float) -> bool:
        """Let a key begin anew that failed, was lost or is dead, as if no attempt had been lost;
        False where it is another attempt's now, is running or done, or its row is locked.

        Args:
            key: The key.
            fence: The attempt's.
            error: Why it ended, where it was lost.
            retention_sec: Seconds for which its row is kept.
        """
        parameters = {'key': key, 'fence': fence, 'error': error, 'retention': retention_sec}
        return self._run('ledger.free', parameters) == 1

    def forget(self, key: str, fence: int) -> bool:
        """Delete a key's row; False where it is another attempt's now, a live node is at it, or
        somebody has locked it.
        """
        return self._run('ledger.forget', {'key': key, 'fence': fence}) == 1

    def _slice(self, name: str, selection: Selection, after: str, rows: int) -> Slice:
        ((last, looked, number),) = self._rows(name, _range(selection, after, rows))
        return Slice(int(number), last if looked == rows else None)


def _range(selection: Selection, after: str, rows: int) -> dict[str, object]:
    return {
        'first': selection.first,
        'end': selection.end,
        'after': after,
        'rows': rows,
        'states': None if selection.states is None else list(selection.states),
        'pattern': selection.pattern,
        'node': selection.node,
        'age': selection.older_than_sec,
    }
