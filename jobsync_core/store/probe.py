"""Questions about the server itself, for `jobsync doctor`."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..assignment.patterns import PATTERN_BYTES, read_patterns
from .base import Store
from .sessions import Sessions
from .tables import Tables

__all__ = ['HISTORY_FUNCTIONS', 'ProbeStore', 'Replication', 'pooling']

#: What tells the history of a database: its system identifier and its timeline.
HISTORY_FUNCTIONS = (
    'pg_control_system()',
    'pg_is_in_recovery()',
    'pg_current_wal_lsn()',
    'pg_walfile_name(pg_lsn)',
)


@dataclass(frozen=True)
class Replication:
    """synchronous: synchronous_standby_names. standbys: how many are connected."""

    synchronous: str
    standbys: int
    fsync: bool


class ProbeStore(Store):
    """What the server and this role can do."""

    def server_version(self) -> tuple[int, str]:
        """The version as a number (140005) and as text."""
        ((number, text),) = self._rows('probe.server_version')
        return number, text

    def read_only(self) -> str | None:
        """Why nothing can be written, if so."""
        ((standby, setting),) = self._rows('probe.read_only')
        if standby:
            return 'this server is a standby'
        return 'transactions are read-only here' if setting == 'on' else None

    def try_write(self) -> None:
        """Write a row of a quarter of a megabyte, which takes new pages of the disk, and roll back.

        Raises:
            StatementRefused: What the server says to any node that writes now.
        """
        self._run('probe.write')
        self.connection.rollback()

    def bad_locks(self) -> list[str]:
        """Tasks whose lock has patterns that the leader ignores."""
        found = []
        for (text,) in self._rows('probe.patterns', {'size': PATTERN_BYTES}):
            try:
                read_patterns(text)
            except Exception:  # whatever is wrong with it
                found.append(text)
        rows = self._rows('probe.bad_locks', {'size': PATTERN_BYTES, 'patterns': found})
        return [task_id for (task_id,) in rows]

    def clock_offset(self) -> float:
        """Seconds by which the server's clock is ahead of this machine's; the best of five
        looks.
        """
        looks = []
        for _ in range(5):
            before = time.time()
            ((server,),) = self._rows('probe.clock')
            after = time.time()
            looks.append((after - before, server - (before + after) / 2))
        return float(min(looks)[1])

    def missing_tables(self) -> list[str]:
        """Tables and views that are not there."""
        tables = self._tables
        there = {name for (name,) in self._rows('probe.relations', {'schema': tables.schema})}
        return [name for name in tables.all if tables.appname + name not in there]

    def schema_version(self) -> int | None:
        """The version of the tables; None before the first node."""
        row = self._row('probe.schema_version')
        return int(row[0]) if row else None

    def may_create(self) -> bool:
        """Whether this user may create tables where they would go."""
        ((may,),) = self._rows('probe.may_create', {'schema': self._tables.schema})
        return bool(may)

    def everybody_creates(self) -> bool:
        """Whether every role of the server may create things in the schema of the tables."""
        ((may,),) = self._rows('probe.everybody_creates', {'schema': self._tables.schema})
        return bool(may)

    def unasked_history(self) -> list[str]:
        """Functions of HISTORY_FUNCTIONS that this user may not call."""
        rows = self._rows('probe.not_callable', {'functions': list(HISTORY_FUNCTIONS)})
        return [name for (name,) in rows]

    def is_superuser(self) -> bool:
        """Whether this user may do everything."""
        ((may,),) = self._rows('probe.superuser')
        return bool(may)

    def replication(self) -> Replication:
        """How commits reach standbys."""
        ((synchronous, standbys, fsync),) = self._rows('probe.replication')
        return Replication(synchronous, standbys, fsync)

    def notify(self, channel: str, payload: str) -> None:
        """Send a notification when the transaction commits."""
        self._run('probe.notify', {'channel': channel, 'payload': payload})

    def backend(self) -> int:
        """Process id of the server's process."""
        ((backend,),) = self._rows('probe.backend')
        return int(backend)


def pooling(sessions: Sessions, tables: Tables) -> str:
    """What stands between here and the server: 'none', 'session' or 'transaction'.

    A pooler answers the start-up with a process id of its own, so the one that the protocol told
    differs from the one that the server tells. With transaction pooling two clients at once get one
    server process in turn.
    """
    with sessions.session() as one:
        told = one.info.backend_pid
        first = ProbeStore(one, tables).backend()
        one.commit()
        with sessions.session() as two:
            second = ProbeStore(two, tables).backend()
            again = ProbeStore(one, tables).backend()
    if told == first:
        return 'none'
    return 'transaction' if second == first or again != first else 'session'
