"""Who has locked JobSync's tables, or waits in front of all others for such a lock: for messages
and the doctor alone.

What is not visible to this role (since when, in which state: that takes pg_read_all_stats) is left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import Store

__all__ = ['Blocker', 'BlockerStore', 'name_all']

#: Modes that keep others from changing rows; and the one of vacuum, which keeps them from changing
#: the table.
_WRITES = ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
_VACUUM = 'ShareUpdateExclusiveLock'
#: How many are told of.
_MOST = 5


@dataclass(frozen=True)
class Blocker:
    """One session and what it has locked.

    Args:
        pid: Of the server's process; None: a prepared transaction.
        application: Its application_name.
        user: Its role.
        state: As in pg_stat_activity, or the kind of process; '' where this role may not see it.
        seconds: Since its transaction began; None where this role may not see it.
        mode: Of the lock, as in pg_locks; 'a row' for locks of rows.
        table: The table's name.
        granted: Whether it has the lock; False: it waits for it, and whoever comes later waits
            behind it.
    """

    pid: int | None
    application: str
    user: str
    state: str
    seconds: float | None
    mode: str
    table: str
    granted: bool

    def __str__(self) -> str:
        if self.pid is None:
            who = 'a prepared transaction (see pg_prepared_xacts)'
        else:
            details = [
                f'pid {self.pid}',
                *([f'user {self.user!r}'] if self.user else []),
                *([self.state] if self.state else []),
            ]
            if self.seconds is not None:
                details.append(f'its transaction began {self.seconds:.0f} s ago')
            who = f'application {self.application!r} ({", ".join(details)})'
        if self.mode == 'a row':
            return f'{who} has locked rows of {self.table}'
        return (
            f'{who} {"has locked" if self.granted else "waits to lock"} {self.table} ({self.mode})'
        )


class BlockerStore(Store):
    """Who is in the way."""

    def on_tables(self, names: Sequence[str], all_modes: bool = False) -> list[Blocker]:
        """Sessions that have locked one of these tables against changes of rows, or wait to do so;
        those that have it first, the oldest first.

        Args:
            names: The tables, as SQL names them.
            all_modes: Locks of every mode, a reader's too: they are in the way of whoever changes
                the table itself.
        """
        return self._on_tables(names, None if all_modes else _WRITES, _MOST)

    def on_rows(self, names: Sequence[str]) -> list[Blocker]:
        """Sessions whose locks on rows of these tables others wait for at this moment."""
        rows = self._rows('blocker.on_rows', {'tables': list(names), 'most': _MOST})
        return [Blocker(*row) for row in rows]

    def vacuuming(self) -> bool:
        """Whether a vacuum is at one of the cluster's tables: an automatic one gives way to whoever
        has waited for a second (deadlock_timeout).
        """
        return bool(self._on_tables(list(self._tables.all.values()), (_VACUUM,), 1))

    def _on_tables(
        self, names: Sequence[str], modes: Sequence[str] | None, most: int
    ) -> list[Blocker]:
        rows = self._rows(
            'blocker.on_tables',
            {'tables': list(names), 'modes': None if modes is None else list(modes), 'most': most},
        )
        return [Blocker(*row) for row in rows]


def name_all(blockers: Sequence[Blocker]) -> str:
    """All of them in one line."""
    return '; '.join(map(str, blockers[:_MOST]))
