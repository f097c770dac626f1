"""Transactions of the agent that take more than one statement."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from ..assignment.model import Member
from ..errors import StoreTimeout
from ..protocol.messages import Sign
from .connection import Connection
from .tables import Tables

#: How much later than the server's own limit the client gives up, in seconds.
_ANSWER = 0.5

__all__ = ['Round', 'fingerprint', 'members_json', 'read_members', 'take_turn']


def fingerprint(tables: Tables, state: str = 'f.state') -> str:
    """SQL for what a plan depends on, as text; `c` is the cluster's row, `f` a node's, `state` what
    counts as its state.
    """
    # The bytes of a float8: how it becomes text depends on settings of the session.
    return f"""(
        SELECT encode(sha256(convert_to(concat(json_agg(json_build_array(f.name, f.incarnation,
            {state}, float8send(f.weight))
                                                        ORDER BY f.name)::text, c.lock_version),
                                                            'UTF8')), 'hex')
        FROM {tables.node} AS f)"""


def members_json(tables: Tables) -> str:
    """SQL for the node table, the eldest first, as JSON text for `read_members`."""
    # Microseconds, not seconds, for the same reason.
    return f"""(
        SELECT json_agg(json_build_array(m.name, m.incarnation, m.beat, (extract(epoch FROM
            m.created_on) * 1000000)::bigint,
                                         m.state, m.weight) ORDER BY m.created_on, m.name)::text
        FROM {tables.node} AS m)"""


def read_members(text: str | None) -> tuple[Member, ...]:
    """What `members_json` gave."""
    return tuple(
        Member(name, incarnation, beat, created / 1e6, state, weight)
        for name, incarnation, beat, created, state, weight in json.loads(text or '[]')
    )


def take_turn(connection: Connection, tables: Tables) -> str:
    """SQL that goes before what changes ownership, in one string with it: no leader plans
    meanwhile, and nobody else changes any.
    """
    first, second = tables.advisory
    lock = f'SELECT pg_advisory_xact_lock_shared({first}, {second})'
    return f'{connection.local_limits}; {lock}; SELECT FROM {tables.cluster} FOR UPDATE'


class Round:
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
        self._lock = 'pg_advisory_xact_lock' if exclusive else 'pg_advisory_xact_lock_shared'
        self._begun = False
        self._deadline = time.monotonic() + seconds

    def __enter__(self) -> Round:
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
        self, sql: str, params: Sequence[object] | Mapping[str, object] = ()
    ) -> list[tuple[Any, ...]]:
        """Run statements in the transaction; the rows of the last one.

        Raises:
            StoreTimeout: The time for the whole is over.
        """
        connection = self._connection
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise StoreTimeout('the transaction took too long: nothing was changed')
        limit = None if left == math.inf else left
        if limit is not None:
            sql = f'{connection.limit_statements(limit)}; {sql}'
        if not self._begun:
            self._begun = True
            first, second = self._tables.advisory
            sql = f'BEGIN; {connection.local_limits}; SELECT {self._lock}({first}, {second}); {sql}'
        return connection.execute(sql, params, None if limit is None else limit + _ANSWER)

    def delete_unchanged(self, signs: Iterable[Sign]) -> tuple[str, ...]:
        """Delete the nodes that still look as they were seen; their names, sorted. Their tokens
        become unowned.
        """
        seen = list(signs)
        if not seen:
            return ()
        rows = self.run(
            f"""
            DELETE FROM {self._tables.node} AS n USING unnest(%s::text[], %s::text[], %s::bigint[])
                AS s (name, incarnation, beat)
            WHERE n.name = s.name AND n.incarnation = s.incarnation AND n.beat = s.beat RETURNING
                n.name
            """,
            (
                [sign.name for sign in seen],
                [sign.incarnation for sign in seen],
                [sign.beat for sign in seen],
            ),
        )
        return tuple(sorted(row[0] for row in rows))

    def delete_unlocked(self, signs: Iterable[Sign]) -> tuple[str, ...]:
        """The same, but a node whose row somebody else has locked is left for another time, and
        holds up no other.
        """
        seen = list(signs)
        rows = self.run(
            f"""
            DELETE FROM {self._tables.node} AS n USING (
                SELECT m.name FROM {self._tables.node} AS m
                JOIN unnest(%s::text[], %s::text[], %s::bigint[]) AS s (name, incarnation, beat)
                    ON m.name = s.name AND m.incarnation = s.incarnation AND m.beat = s.beat
                FOR UPDATE OF m SKIP LOCKED) AS d
            WHERE n.name = d.name RETURNING n.name
            """,
            (
                [sign.name for sign in seen],
                [sign.incarnation for sign in seen],
                [sign.beat for sign in seen],
            ),
        )
        return tuple(sorted(row[0] for row in rows))
