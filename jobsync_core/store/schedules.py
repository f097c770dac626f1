"""Rows of the schedule table: the last slot of each periodic task that was sent; and which of many
schedulers is the active one.

Safety is in the row: whoever sends a slot holds the row's lock from before it looks at the last
slot until the new one is committed. That one of them is the active one only
keeps the others idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import blake2b

from ..config import CoordinationConfig
from ..errors import DatabaseRefused, DatabaseUnavailable
from .base import Store
from .connection import Connection
from .tables import Tables

__all__ = ['ActiveScheduler', 'ScheduleStore', 'State']


@dataclass(frozen=True)
class State:
    """What is known of an entry.

    Args:
        slot: The due time that was sent last, or the moment from which the entry counts.
        runs: How often it was sent.
    """

    slot: datetime
    runs: int


class ScheduleStore(Store):
    """The entries of a schedule."""

    def learn(self, entries: Sequence[tuple[str, datetime, str]]) -> dict[str, State]:
        """The states of entries; those that are new begin.

        Args:
            entries: Name, the moment from which it counts if it is new, and its description for who
                looks at the table.
        """
        names, slots, texts = ([entry[place] for entry in entries] for place in range(3))
        self._run('schedule.begin', {'names': names, 'slots': slots, 'entries': texts})
        # Not of the INSERT's snapshot: a row that another scheduler has just made is seen.
        return {
            name: State(slot.astimezone(timezone.utc), runs)
            for name, slot, runs in self._rows('schedule.states', {'names': names})
        }

    def lock(self, name: str, hold_sec: float) -> State | None:
        """Lock an entry's row until the end of the transaction, and read it.

        Args:
            name: The entry.
            hold_sec: The server ends the session of a holder that is silent for longer, so that a
                stopped one keeps nothing.

        Returns:
            None where another scheduler holds the row, or there is none.
        """
        row = self._row('schedule.lock', {'silent': _milliseconds(hold_sec), 'name': name})
        return State(row[0].astimezone(timezone.utc), row[1]) if row else None

    def advance(self, name: str, slot: datetime, text: str, sent: bool) -> None:
        """Record that an entry's slot was sent, or passed over."""
        self._run(
            'schedule.advance', {'slot': slot, 'sent': int(sent), 'entry': text, 'name': name}
        )

    def prune(self, names: Sequence[str], unused_sec: float) -> int:
        """Say that `names` are in use, and forget the others that nobody has said this of for
        `unused_sec` seconds.
        """
        self._run('schedule.keep', {'names': list(names)})
        return self._run('schedule.prune', {'names': list(names), 'unused': unused_sec})


class ActiveScheduler:
    """Which of the schedulers of a cluster is the active one: whose session holds an advisory lock.

    The server ends a session that is silent for one heartbeat timeout, so that a stopped or
    unreachable one is replaced. Behind a transaction pooler (`listen=False`) sessions hold
    nothing: all are active then, and the rows alone decide.

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
        """Become the active one if there is none, or prove to still be it.

        Raises:
            DatabaseUnavailable: The database cannot be reached; nothing is held any more.
        """
        if not self._config.listen:
            return True
        try:
            self._held = self._ask()
        except DatabaseRefused:  # another session would hear the same
            raise
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
                self._tables.sql('schedule.end_when_silent'), {'silent': silent}
            )
        if self._held:
            self._connection.execute(self._tables.sql('schedule.prove'))
            return True
        digest = blake2b(f'jobsync beat {self._tables.label}'.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, 'big', signed=True)
        ((held,),) = self._connection.execute(
            self._tables.sql('schedule.try_to_lead'), {'key': key}
        )
        return bool(held)

    def resign(self) -> None:
        """Let another scheduler be the active one, at once."""
        self._held = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _milliseconds(seconds: float) -> str:
    return f'{max(1, round(seconds * 1000))}ms'
