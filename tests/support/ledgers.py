"""Ledgers of nodes that are rows only, and what tests look at in the database."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.store.sessions import Sessions
from tests.support.rows import Rows

__all__ = ['MakeLedger', 'effects', 'insert', 'ledgers_of', 'state_of']

MakeLedger = Callable[..., ClusterLedger]


@contextlib.contextmanager
def ledgers_of(rows: Rows) -> Iterator[MakeLedger]:
    """Makes ledgers, each of a node of its own with a row in the node table."""
    made: list[tuple[ClusterLedger, Sessions]] = []

    def make(node: str = 'a') -> ClusterLedger:
        rows.node(node)
        sessions = Sessions(rows.config, node)
        ledger = ClusterLedger(sessions, rows.tables, node, lambda: f'life of {node}')
        made.append((ledger, sessions))
        return ledger

    yield make
    for ledger, sessions in made:
        ledger.close()
        sessions.close_all()


def state_of(rows: Rows, key: str) -> str | None:
    """What the ledger says of a key."""
    found = rows.run(f'SELECT state FROM {rows.tables.execution} WHERE key = %s', key)
    return found[0][0] if found else None


def effects(rows: Rows) -> int:
    """How many rows `insert` has made."""
    return int(rows.value('SELECT count(*) FROM effect'))


def insert(connection: Any, key: str = 'k') -> None:
    """An effect."""
    with connection.cursor() as cursor:
        cursor.execute('INSERT INTO effect VALUES (%s)', (key,))
