"""Statements of the leader's housekeeping: each deletes at most so many rows, finds them by an
index, and waits for no lock of a row.

A statement goes on where the one before it ended (`position`), so that it does not read again what
was deleted there and is still in the index, as everything is while an old transaction stays open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .connection import Connection
from .tables import Tables

__all__ = [
    'AGES',
    'CHORES',
    'LOST_DAYS',
    'SETTINGS',
    'STATEMENT_SEC',
    'Chore',
    'HousekeepingStore',
    'Slice',
]

#: What one statement may take, in seconds; and how long it waits for a lock of a whole table,
#: behind which others would queue.
STATEMENT_SEC, LOCK_SEC = 2.0, 0.2
#: Rows of the history of plans that are kept, and for how many days.
_REBALANCE_ROWS, _REBALANCE_DAYS = 1000, 90
#: Seconds after which a claim may be one that nobody stands behind: younger ones may belong to a
#: hand-over that is under way.
_CLAIM_SEC = 60
#: Days for which a running row is kept after its node was found gone: as long as a completed key by
#: default.
LOST_DAYS = 7

# A kept row is found by an index, whatever the statistics of a table that has just grown say. A
# deletion that a crash undoes is made again: nobody has to wait for the disk.
_SETTINGS: Mapping[str, str] = {
    'statement_timeout': f'{STATEMENT_SEC:g}s',
    'lock_timeout': f'{int(LOCK_SEC * 1000)}ms',
    'idle_in_transaction_session_timeout': '5s',
    'synchronous_commit': 'off',
    'default_transaction_isolation': 'read committed',
    'enable_seqscan': 'off',
    'enable_bitmapscan': 'off',
    'enable_sort': 'off',
    'jit': 'off',
}
#: What goes before each statement, in one string with it.
SETTINGS = 'SELECT ' + ', '.join(
    f"set_config('{name}', '{value}', true)" for name, value in _SETTINGS.items()
)


@dataclass(frozen=True)
class Slice:
    """What one statement did: rows that it changed, and where the next one goes on."""

    rows: int
    position: str | None


@dataclass(frozen=True)
class Chore:
    """One kind of rows to be tidied.

    Args:
        name: For logs.
        every: Seconds from when nothing was left until the next look.
        statement: Its name; the parameters are those of HousekeepingStore.run.
    """

    name: str
    every: float
    statement: str


CHORES: tuple[Chore, ...] = (
    Chore('expired executions', 5.0, 'housekeeping.expired_executions'),
    Chore('expired attempts', 60.0, 'housekeeping.expired_attempts'),
    Chore('executions of nodes that are gone', 60.0, 'housekeeping.lost_executions'),
    Chore('claims of nodes that are gone', 30.0, 'housekeeping.lost_claims'),
    Chore('promises that nobody came back to', 30.0, 'housekeeping.old_promises'),
    Chore('old rebalances', 600.0, 'housekeeping.old_rebalances'),
)


#: What says how old things are that go.
AGES: Mapping[str, int] = {
    'lost_days': LOST_DAYS,
    'claim_sec': _CLAIM_SEC,
    'rebalance_days': _REBALANCE_DAYS,
    'rebalance_rows': _REBALANCE_ROWS,
}


class HousekeepingStore:
    """Carries out chores.

    Args:
        connection: Any; its settings do not matter.
        tables: Names of the tables.
    """

    def __init__(self, connection: Connection, tables: Tables) -> None:
        self._connection = connection
        self._tables = tables

    def run(self, chore: Chore, rows: int, position: str | None) -> Slice:
        """One statement of a chore, a transaction of its own.

        Args:
            chore: Which.
            rows: How many rows it changes at most.
            position: Where the slice before it ended; None for the first one.

        Raises:
            DatabaseUnavailable: The connection is lost or did not answer in time.
            StatementRefused: The server refused: a lock, the time limit, a right.
        """
        connection = self._connection
        ((count, end),) = connection.execute(
            f'{connection.local_limits}; {SETTINGS}; {self._tables.sql(chore.statement)}',
            {'rows': rows, 'position': position, **AGES},
            timeout=STATEMENT_SEC + 1.0,
        )
        return Slice(int(count), end)
