"""Statements of the leader's housekeeping: each deletes at most so many rows, finds them by an
index, and waits for no lock of a row.

A statement goes on where the one before it ended (`position`), so that it does not read again what
was deleted there and is still in the index, as everything is while an old transaction stays open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .connection import Connection
from .tables import Tables

__all__ = ['CHORES', 'LOST_DAYS', 'SETTINGS', 'STATEMENT_SEC', 'Chore', 'Slice', 'run']

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

# Rows are deleted by their place on disk (ctid), which a concurrent change moves: so only versions
# that the statement itself has looked at and locked are deleted, never what somebody made of them
# meanwhile. A deleted key's fences go on to rise, since a new row begins with the id of its
# transaction.
_EXPIRED = """
WITH gone AS (
    DELETE FROM {execution} WHERE ctid = ANY(ARRAY(
        SELECT e.ctid FROM {execution} AS e
        WHERE e.expires_at <= now() AND e.expires_at >= coalesce(%(position)s::timestamptz,
            '-infinity')
          AND (e.state IN ('done', 'failed')
               OR NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = e.node AND n.incarnation =
                   e.incarnation))
        ORDER BY e.expires_at LIMIT %(rows)s FOR UPDATE OF e SKIP LOCKED))
    RETURNING expires_at
)
SELECT count(*), max(expires_at)::text FROM gone"""

# The lives (a node's name and incarnation) that have rows, each found by one step down the index;
# and which of them are gone.
_GONE_LIVES = """
RECURSIVE lives AS (
    (SELECT node, incarnation FROM {table} WHERE {condition} ORDER BY node, incarnation LIMIT 1)
    UNION ALL
    SELECT next.node, next.incarnation FROM lives CROSS JOIN LATERAL (
        SELECT t.node, t.incarnation FROM {table} AS t
        WHERE {condition} AND (t.node, t.incarnation) > (lives.node, lives.incarnation) ORDER BY
            t.node, t.incarnation LIMIT 1) AS next
), gone AS (
    SELECT lives.node, lives.incarnation FROM lives
    WHERE NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = lives.node AND n.incarnation =
        lives.incarnation)
)"""

# A running row of a node that is gone may be taken over for as long as it is there. From now on it
# has an end.
_LOST = """
WITH {gone_executions}, marked AS (
    UPDATE {execution} SET expires_at = now() + make_interval(days => {lost_days}) WHERE ctid =
        ANY(ARRAY(
        SELECT e.ctid FROM gone JOIN {execution} AS e ON e.node = gone.node AND e.incarnation =
            gone.incarnation
        WHERE e.state = 'running' AND e.expires_at IS NULL LIMIT %(rows)s FOR UPDATE OF e SKIP
            LOCKED))
    RETURNING 1
)
SELECT count(*), NULL FROM marked"""

_CLAIMS = """
WITH {gone_claims}, deleted AS (
    DELETE FROM {claim} WHERE ctid = ANY(ARRAY(
        SELECT c.ctid FROM gone JOIN {claim} AS c ON c.node = gone.node AND c.incarnation =
            gone.incarnation
        WHERE c.created_on < now() - make_interval(secs => {claim_sec}) LIMIT %(rows)s FOR UPDATE OF
            c SKIP LOCKED))
    RETURNING 1
)
SELECT count(*), NULL FROM deleted"""

_PROMISES = """
WITH deleted AS (
    DELETE FROM {claim} WHERE ctid = ANY(ARRAY(
        SELECT c.ctid FROM {claim} AS c WHERE c.promised AND c.created_on < now() -
            make_interval(secs => {claim_sec})
        ORDER BY c.created_on LIMIT %(rows)s FOR UPDATE SKIP LOCKED))
    RETURNING 1
)
SELECT count(*), NULL FROM deleted"""

# Ids rise with time, so that the oldest rows are the first of the primary key.
_REBALANCES = """
WITH deleted AS (
    DELETE FROM {rebalance} WHERE ctid = ANY(ARRAY(
        SELECT r.ctid FROM {rebalance} AS r
        WHERE r.triggered_at < now() - make_interval(days => {rebalance_days})
           OR r.id <= (SELECT k.id FROM {rebalance} AS k ORDER BY k.id DESC OFFSET {rebalance_rows}
               LIMIT 1)
        ORDER BY r.id LIMIT %(rows)s FOR UPDATE SKIP LOCKED))
    RETURNING 1
)
SELECT count(*), NULL FROM deleted"""


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
        sql: The statement for a cluster's tables; its parameters are `rows` and `position`.
    """

    name: str
    every: float
    sql: Callable[[Tables], str]


def _sql(text: str) -> Callable[[Tables], str]:
    def render(tables: Tables) -> str:
        names = tables.all
        return text.format(
            **names,
            lost_days=LOST_DAYS,
            claim_sec=_CLAIM_SEC,
            rebalance_days=_REBALANCE_DAYS,
            rebalance_rows=_REBALANCE_ROWS,
            gone_executions=_GONE_LIVES.format(
                table=tables.execution, node=tables.node, condition="state = 'running'"
            ),
            gone_claims=_GONE_LIVES.format(table=tables.claim, node=tables.node, condition='true'),
        )

    return render


CHORES: tuple[Chore, ...] = (
    Chore('expired executions', 5.0, _sql(_EXPIRED)),
    Chore('executions of nodes that are gone', 60.0, _sql(_LOST)),
    Chore('claims of nodes that are gone', 30.0, _sql(_CLAIMS)),
    Chore('promises that nobody came back to', 30.0, _sql(_PROMISES)),
    Chore('old rebalances', 600.0, _sql(_REBALANCES)),
)


def run(
    connection: Connection, tables: Tables, chore: Chore, rows: int, position: str | None
) -> Slice:
    """One statement of a chore, a transaction of its own.

    Args:
        connection: Any; its settings do not matter.
        tables: Names of the tables.
        chore: Which.
        rows: How many rows it changes at most.
        position: Where the slice before it ended; None for the first one.

    Raises:
        DatabaseUnavailable: The connection is lost or did not answer in time.
        psycopg2.Error: The server refused: a lock, the time limit, a right.
    """
    parameters: dict[str, Any] = {'rows': rows, 'position': position}
    ((count, end),) = connection.execute(
        f'{connection.local_limits}; {SETTINGS}; {chore.sql(tables)}',
        parameters,
        timeout=STATEMENT_SEC + 1.0,
    )
    return Slice(int(count), end)
