"""Fences, each taken away in turn: what it forbids then happens, and the suite sees it.

The simulator's tests do the same for all fences of the protocol. Here are those that the database
holds, and two of the protocol that show that the history checker of the real servers' tests has
teeth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from jobsync_core import CoordinationConfig, Job
from tests.support.cluster import Cluster, query
from tests.support.proxy import Mode
from tests.support.waiting import eventually

SECOND_OWNER = """INSERT INTO "{}assignment" (tokens, node, moving, blocked, version, assigned_at)
                  VALUES (int4range(5, 7), 'n2', false, false, 1, now())"""


def _constraint(config: CoordinationConfig, kind: str, table: str) -> str:
    ((name,),) = query(
        config,
        'SELECT conname FROM pg_constraint WHERE contype = %s AND conrelid = %s::regclass',
        (kind, f'"{config.appname}{table}"'),
    )
    return str(name)


def test_the_database_refuses_a_second_owner_of_a_token(config: CoordinationConfig) -> None:
    with Job('n1', config, wait_on_enter=0), Job('n2', config, wait_on_enter=0):
        with pytest.raises(psycopg2.errors.ExclusionViolation):
            query(config, SECOND_OWNER)


def test_without_the_exclusion_constraint_it_does_not(config: CoordinationConfig) -> None:
    with Job('n1', config, wait_on_enter=0) as first, Job('n2', config, wait_on_enter=0) as second:
        eventually(lambda: len(first.my_tokens) + len(second.my_tokens) == config.total_tokens)
        query(
            config,
            'ALTER TABLE "{}assignment" DROP CONSTRAINT '
            f'"{_constraint(config, "x", "assignment")}"',
        )
        query(config, SECOND_OWNER)
        ((owners,),) = query(config, 'SELECT count(*) FROM "{}assignment" WHERE tokens @> 5')
        assert owners == 2


def test_tokens_of_a_deleted_node_become_unowned_in_the_same_statement(
    config: CoordinationConfig,
) -> None:
    with Job('n1', config, wait_on_enter=0):
        ((owned,),) = query(
            config,
            """
            WITH gone AS (DELETE FROM "{}node" WHERE name = 'n1' RETURNING name) SELECT count(*)
                FROM gone""",
        )
        assert owned == 1
        # Nothing names a node that is not in the table, at any moment.
        assert (
            query(
                config,
                """
            SELECT node FROM "{}assignment" AS a
            WHERE node IS NOT NULL AND NOT EXISTS (SELECT FROM "{}node" AS n WHERE n.name =
                a.node)""",
            )
            == []
        )


def test_a_token_outside_the_node_table_is_refused(config: CoordinationConfig) -> None:
    with Job('n1', config, wait_on_enter=0):
        with pytest.raises(psycopg2.errors.ForeignKeyViolation):
            query(config, """UPDATE "{}assignment" SET node = 'nobody'""")


def test_a_heartbeat_of_an_earlier_life_changes_nothing(config: CoordinationConfig) -> None:
    """The incarnation in every statement: a row that was replaced is not kept alive by its former
    holder.
    """
    with Job('n1', config, wait_on_enter=0) as job:
        life = job.incarnation
        query(
            config,
            """UPDATE "{}node" SET incarnation = 'somebody-else', beat = 0 WHERE name = 'n1'""",
        )
        eventually(lambda: job.incarnation != life)
        assert query(
            config, """SELECT beat FROM "{}node" WHERE incarnation = 'somebody-else'"""
        ) in ([(0,)], [])
        eventually(lambda: job.can_claim_task(1), timeout=20)


@pytest.fixture
def unsafe(make_config: Callable[..., CoordinationConfig], tmp_path: Path) -> Iterator[Cluster]:
    """Nodes that may claim what is another's."""
    config = make_config(
        heartbeat_interval_sec=0.4, heartbeat_timeout_sec=2.0, connect_timeout_sec=2
    )
    with Cluster(config, tmp_path, checked=False) as cluster:
        yield cluster


def test_without_the_lease_a_partitioned_node_claims_on(unsafe: Cluster) -> None:
    unsafe.start('n1', 'n2', 'n3', without='lease')
    unsafe['n2'].proxy.switch(Mode.HOLD)
    eventually(lambda: unsafe.history().overlaps(), timeout=30)


def test_without_the_shrink_before_the_hand_over_two_nodes_claim(unsafe: Cluster) -> None:
    unsafe.start('n1', 'n2', without='shrink')
    unsafe.start('n3', without='shrink', settle=False)
    eventually(lambda: unsafe.history().overlaps(), timeout=30)
