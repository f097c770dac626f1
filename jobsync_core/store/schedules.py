"""Rows of the schedule table: the last slot of each periodic task that was sent; and which of many
schedulers is the active one.

Safety is in the row: whoever sends a slot holds the row's lock from before it looks at the last
slot until the new one is committed. Leadership only keeps the others idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import blake2b
from typing import TYPE_CHECKING

from ..config import CoordinationConfig
from ..errors import DatabaseUnavailable
from .connection import Connection

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .tables import Tables

__all__ = ['Leadership', 'State', 'advance', 'learn', 'lock', 'prune']


@dataclass(frozen=True)
class State:
    """What is known of an entry.

    Args:
        slot: The due time that was sent last, or the moment from which the entry counts.
        runs: How often it was sent.
    """

    slot: datetime
    runs: int


def learn(
    connection: PgConnection, tables: Tables, entries: Sequence[tuple[str, datetime, str]]
) -> dict[str, State]:
    """The states of entries; those that are new begin.

    Args:
        entries: Name, the moment from which it counts if it is new, and its description for who
            looks at the table.
    """
    names, slots, texts = ([entry[place] for entry in entries] for place in range(3))
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            INSERT INTO {tables.schedule} (name, slot, entry, updated_at)
            SELECT name, slot, entry, now()
            FROM unnest(%s::text[], %s::timestamptz[], %s::text[]) AS wanted (name, slot, entry)
                ORDER BY name
            ON CONFLICT (name) DO NOTHING
            """,
            (names, slots, texts),
        )
        # Not of the INSERT's snapshot: a row that another scheduler has just made is seen.
        cursor.execute(
            f'SELECT name, slot, total_run_count FROM {tables.schedule} WHERE name = ANY (%s)',
            (names,),
        )
        return {
            name: State(slot.astimezone(timezone.utc), runs)
            for name, slot, runs in cursor.fetchall()
        }


def lock(connection: PgConnection, tables: Tables, name: str, hold_sec: float) -> State | None:
    """Lock an entry's row until the end of the transaction, and read it.

    Args:
        hold_sec: The server ends the session of a holder that is silent for longer, so that a
            stopped one keeps nothing.

    Returns:
        None where another scheduler holds the row, or there is none.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT set_config('idle_in_transaction_session_timeout', %s, true);
            SELECT slot, total_run_count FROM {tables.schedule} WHERE name = %s FOR UPDATE SKIP
                LOCKED
            """,
            (_milliseconds(hold_sec), name),
        )
        rows = cursor.fetchall()
    return State(rows[0][0].astimezone(timezone.utc), rows[0][1]) if rows else None


def advance(
    connection: PgConnection, tables: Tables, name: str, slot: datetime, text: str, sent: bool
) -> None:
    """Record that an entry's slot was sent, or passed over."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            UPDATE {tables.schedule}
            SET slot = %s, total_run_count = total_run_count + %s, entry = %s, updated_at = now()
                WHERE name = %s
            """,
            (slot, int(sent), text, name),
        )


def prune(connection: PgConnection, tables: Tables, names: Sequence[str], unused_sec: float) -> int:
    """Say that `names` are in use, and forget the others that nobody has said this of for
    `unused_sec` seconds.
    """
    with connection.cursor() as cursor:
        # Rows that are being sent right now are in use anyway.
        cursor.execute(
            f"""
            UPDATE {tables.schedule} SET updated_at = now()
            WHERE name IN (SELECT name FROM {tables.schedule} WHERE name = ANY (%s) FOR UPDATE SKIP
                LOCKED)
            """,
            (list(names),),
        )
        cursor.execute(
            f'DELETE FROM {tables.schedule} WHERE NOT name = ANY (%s) AND updated_at < now() - '
            'make_interval(secs => %s)',
            (list(names), unused_sec),
        )
        return int(cursor.rowcount)


class Leadership:
    """Which of the schedulers of a cluster is the active one: whose session holds an advisory lock.

    The server ends a session that is silent for one heartbeat timeout, so that a stopped or
    unreachable leader is replaced. Behind a transaction pooler (`listen=False`) sessions hold
    nothing: all lead then, and the rows alone decide.

    Args:
        config: Where the database is.
        tables: Names of the tables.
    """

    def __init__(self, config: CoordinationConfig, tables: Tables) -> None:
        self._config = config
        self._tables = tables
        self._connection: Connection | None = None
        self._held = False

    def hold(self) -> bool:
        """Become the leader if there is none, or prove to still be it.

        Raises:
            DatabaseUnavailable: The database cannot be reached; nothing is held any more.
        """
        if not self._config.listen:
            return True
        try:
            self._held = self._ask()
        except DatabaseUnavailable:  # perhaps only this session was ended
            self.resign()
            self._held = self._ask()
        return self._held

    def _ask(self) -> bool:
        if self._connection is None or self._connection.closed:
            self._held = False
            self._connection = Connection.open(self._config, 'beat')
            silent = _milliseconds(self._config.heartbeat_timeout_sec)
            self._connection.execute(
                "SELECT set_config('idle_session_timeout', %s, false)", (silent,)
            )
        if self._held:
            self._connection.execute('SELECT 1')
            return True
        digest = blake2b(f'jobsync beat {self._tables.label}'.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, 'big', signed=True)
        return bool(self._connection.execute('SELECT pg_try_advisory_lock(%s)', (key,))[0][0])

    def resign(self) -> None:
        """Let another scheduler lead, at once."""
        self._held = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _milliseconds(seconds: float) -> str:
    return f'{max(1, round(seconds * 1000))}ms'
