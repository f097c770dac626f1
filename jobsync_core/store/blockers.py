"""Who has locked JobSync's tables, or waits in front of all others for such a lock: for messages
and the doctor alone.

What is not visible to this role (since when, in which state: that takes pg_read_all_stats) is left
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from psycopg2.extensions import connection as PgConnection

    from .tables import Tables

__all__ = ['Blocker', 'name_all', 'on_rows', 'on_tables', 'vacuuming']

#: Modes that keep others from changing rows; and the one of vacuum, which keeps them from changing
#: the table.
_WRITES = ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
_VACUUM = 'ShareUpdateExclusiveLock'
#: How many are told of.
_MOST = 5

_WHO = """coalesce(a.application_name, ''), coalesce(a.usename::text, ''),
    coalesce(a.state, a.backend_type, ''),
    extract(epoch FROM clock_timestamp() -
        coalesce(a.xact_start, a.query_start, a.backend_start))::float8"""

# A prepared transaction has no process.
_TABLES = f"""
SELECT l.pid, {_WHO}, l.mode, c.relname::text, l.granted
FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation LEFT JOIN pg_stat_activity AS a ON a.pid
    = l.pid
WHERE l.locktype = 'relation' AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname =
    current_database())
  AND l.relation IN (SELECT to_regclass(w.name) FROM unnest(%s::text[]) AS w (name))
  AND l.pid IS DISTINCT FROM pg_backend_pid() AND (%s::text[] IS NULL OR l.mode = ANY(%s::text[]))
ORDER BY l.granted DESC, a.xact_start NULLS LAST, l.pid LIMIT %s"""

# Whoever waits for a row has a lock on its table as well, and a lock that was not granted on the
# transaction that is in its way.
_ROWS = f"""
WITH mine AS (
    SELECT w.pid, min(w.relation) AS relation FROM pg_locks AS w
    WHERE w.locktype = 'relation' AND w.granted AND w.database = (SELECT d.oid FROM pg_database AS d
        WHERE d.datname = current_database())
      AND w.relation IN (SELECT to_regclass(t.name) FROM unnest(%s::text[]) AS t (name))
      AND EXISTS (SELECT FROM pg_locks AS v WHERE v.pid = w.pid AND NOT v.granted AND v.locktype IN
          ('transactionid', 'tuple'))
    GROUP BY w.pid
), ahead AS (
    SELECT b.pid, min(mine.relation) AS relation FROM mine CROSS JOIN LATERAL
        unnest(pg_blocking_pids(mine.pid)) AS b (pid)
    WHERE b.pid NOT IN (SELECT pid FROM mine) GROUP BY b.pid
)
SELECT nullif(ahead.pid, 0), {_WHO}, 'a row', c.relname::text, true
FROM ahead JOIN pg_class AS c ON c.oid = ahead.relation LEFT JOIN pg_stat_activity AS a ON a.pid =
    ahead.pid
ORDER BY a.xact_start NULLS LAST, ahead.pid LIMIT %s"""


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


def on_tables(
    connection: PgConnection, names: Sequence[str], all_modes: bool = False
) -> list[Blocker]:
    """Sessions that have locked one of these tables against changes of rows, or wait to do so;
    those that have it first, the oldest first.

    Args:
        connection: Where to ask.
        names: The tables, as SQL names them.
        all_modes: Locks of every mode, a reader's too: they are in the way of whoever changes the
            table itself.
    """
    modes = None if all_modes else list(_WRITES)
    return _ask(connection, _TABLES, (list(names), modes, modes, _MOST))


def on_rows(connection: PgConnection, names: Sequence[str]) -> list[Blocker]:
    """Sessions whose locks on rows of these tables others wait for at this moment."""
    return _ask(connection, _ROWS, (list(names), _MOST))


def vacuuming(connection: PgConnection, tables: Tables) -> bool:
    """Whether a vacuum is at one of the tables: an automatic one gives way to whoever has waited
    for a second (deadlock_timeout).
    """
    return bool(_ask(connection, _TABLES, (list(tables.all.values()), [_VACUUM], [_VACUUM], 1)))


def name_all(blockers: Sequence[Blocker]) -> str:
    """All of them in one line."""
    return '; '.join(map(str, blockers[:_MOST]))


def _ask(connection: PgConnection, sql: str, params: tuple[Any, ...]) -> list[Blocker]:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return [Blocker(*row) for row in cursor.fetchall()]
