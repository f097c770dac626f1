"""Clusters written by hand, row by row, for tests of what reads and writes single tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobsync_core.config import CoordinationConfig
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables

__all__ = ['Rows', 'rows_of']


class Rows:
    """A cluster of rows under the config's appname."""

    def __init__(self, config: CoordinationConfig, sessions: Sessions) -> None:
        self.config = config
        self.sessions = sessions
        self.tables = Tables(config.appname)
        with sessions.session() as connection:
            create_schema(connection, config)
        self.run(
            f'UPDATE {self.tables.cluster} SET total_tokens = %s, hash_function = %s, version = 1',
            config.total_tokens,
            config.hash_function,
        )

    def run(self, sql: str, *params: object) -> list[tuple[Any, ...]]:
        """Run one statement in a transaction of its own."""
        with self.sessions.session(users=True) as connection, connection.cursor() as cursor:
            cursor.execute(sql, params)
            return cursor.fetchall() if cursor.description else []

    def node(
        self,
        name: str,
        *,
        state: str = 'active',
        age: float = 0.0,
        weight: float = 1.0,
        incarnation: str | None = None,
    ) -> None:
        """A node without queue groups; `age` is seconds since its heartbeat. Nodes are as old as
        the order of these calls.
        """
        self.run(
            f"""INSERT INTO {self.tables.node} (name, created_on, last_heartbeat, incarnation, beat,
                state, weight, lease_sec,
                                                host, boot_id, pid_namespace, pid, started, groups)
                VALUES (%s, clock_timestamp(), clock_timestamp() - make_interval(secs => %s), %s, 1,
                    %s, %s, %s,
                        'here', 'boot', 'ns', 7, '1', '{{}}')""",
            name,
            age,
            incarnation or f'life of {name}',
            state,
            weight,
            self.config.lease_sec,
        )

    def own(
        self,
        lo: int,
        hi: int,
        node: str | None,
        *,
        moving_to: str | None = None,
        moving: bool = False,
        blocked: bool = False,
    ) -> None:
        """One row of the assignment."""
        self.run(
            f'INSERT INTO {self.tables.assignment} (tokens, node, moving, moving_to, blocked, '
            'version) '
            'VALUES (int4range(%s, %s), %s, %s, %s, %s, 1)',
            lo,
            hi,
            node,
            moving or moving_to is not None,
            moving_to,
            blocked,
        )

    def rebalance(self, reason: str, leader: str, moved: int) -> None:
        """One row of the history of plans: three nodes became two."""
        self.run(
            f'INSERT INTO {self.tables.rebalance} '
            '(triggered_at, trigger_reason, leader_node, nodes_before, nodes_after, tokens_moved, '
            'duration_ms) '
            'VALUES (now(), %s, %s, 3, 2, %s, 5)',
            reason,
            leader,
            moved,
        )

    def waiting(self) -> int:
        """How many sessions of this database wait for a lock."""
        return int(
            self.value(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname "
                '= current_database()'
            )
        )

    def value(self, sql: str, *params: object) -> Any:
        """The first column of the first row."""
        return self.run(sql, *params)[0][0]

    @property
    def lock_version(self) -> int:
        """What the leader compares to see that locks changed."""
        return int(self.value(f'SELECT lock_version FROM {self.tables.cluster}'))


@contextmanager
def rows_of(config: CoordinationConfig) -> Iterator[Rows]:
    """An empty cluster in the database of `config`."""
    sessions = Sessions(config, 'test rows')
    try:
        yield Rows(config, sessions)
    finally:
        sessions.close_all()
