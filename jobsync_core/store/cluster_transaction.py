"""Transactions of the agent that take more than one statement, and what changes of ownership have
in common.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from ..assignment.groups import PLAIN
from ..assignment.model import Member
from ..errors import StoreTimeout
from ..protocol.messages.signs import Sign
from .connection import Connection
from .tables import Tables

__all__ = ['ClusterTransaction', 'lock_key', 'read_members']

#: How much later than the server's own limit the client gives up, in seconds.
_ANSWER = 0.5


def read_members(text: str | None) -> tuple[Member, ...]:
    """What the piece `members` gave."""
    return tuple(
        # A weight that somebody wrote by hand and that is no number, NaN, is a text in JSON.
        Member(
            name,
            incarnation,
            beat,
            created / 1e6,
            state,
            1.0 if isinstance(weight, str) else weight,
            (PLAIN, *groups),
        )
        for name, incarnation, beat, created, state, weight, groups in json.loads(text or '[]')
    )


def lock_key(tables: Tables) -> dict[str, int]:
    """The parameters of the cluster's lock."""
    first, second = tables.advisory
    return {'lock_first': first, 'lock_second': second}


class ClusterTransaction:
    """One transaction that holds the cluster's row, as a context manager: commits at the end, rolls
    back on an error.

    The first statement that is sent begins the transaction and takes the advisory lock, all in one
    round trip; the last one is the commit. Where the roll-back fails too, the connection is closed:
    no lock is left behind.

    Args:
        connection: The agent's.
        tables: Names of the tables.
        exclusive: Whether the advisory lock keeps everybody else out (the leader), or leaders only.
        seconds: For the whole of it, whatever the statements take each: a heartbeat waits behind
            it.
    """

    def __init__(
        self, connection: Connection, tables: Tables, exclusive: bool, seconds: float = math.inf
    ) -> None:
        self._connection = connection
        self._tables = tables
        self._lock = 'cluster.lock_out_all' if exclusive else 'cluster.lock_out_leaders'
        self._begun = False
        self._deadline = time.monotonic() + seconds

    def __enter__(self) -> ClusterTransaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._begun:
            return
        if error is None:
            self._connection.execute('COMMIT')
            return
        try:
            self._connection.execute('ROLLBACK')
        except Exception:
            self._connection.close()

    def run(
        self, name: str, params: Mapping[str, object] | None = None, **pieces: str
    ) -> list[tuple[Any, ...]]:
        """Run a statement in the transaction; the rows of its last part.

        Raises:
            StoreTimeout: The time for the whole is over.
        """
        connection = self._connection
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise StoreTimeout('the transaction took too long: nothing was changed')
        limit = None if left == math.inf else left
        sql = self._tables.sql(name, **pieces)
        if limit is not None:
            sql = f'{connection.limit_statements(limit)}; {sql}'
        given: Mapping[str, object] = params or {}
        if not self._begun:
            self._begun = True
            sql = f'BEGIN; {connection.local_limits}; {self._tables.sql(self._lock)}; {sql}'
            given = {**given, **lock_key(self._tables)}
        return connection.execute(sql, given, None if limit is None else limit + _ANSWER)

    def delete_unchanged(self, signs: Iterable[Sign]) -> tuple[str, ...]:
        """Delete the nodes that still look as they were seen; their names, sorted. Their tokens
        become unowned.
        """
        seen = list(signs)
        return self._delete('cluster.delete_unchanged', seen) if seen else ()

    def delete_unlocked(self, signs: Iterable[Sign]) -> tuple[str, ...]:
        """The same, but a node whose row somebody else has locked is left for another time, and
        holds up no other.
        """
        return self._delete('cluster.delete_unlocked', list(signs))

    def _delete(self, name: str, seen: list[Sign]) -> tuple[str, ...]:
        rows = self.run(
            name,
            {
                'names': [sign.name for sign in seen],
                'lives': [sign.incarnation for sign in seen],
                'beats': [sign.beat for sign in seen],
            },
        )
        return tuple(sorted(row[0] for row in rows))
