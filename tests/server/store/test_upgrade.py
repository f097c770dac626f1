"""The tables are brought forward while nodes of the released version 3 run: whatever is in the way,
nobody waits for long behind it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import StatementRefused, StoreTimeout
from jobsync_core.store import schema
from jobsync_core.store.layout import MIGRATIONS, SCHEMA_VERSION, Migration, render_schema
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from tests.support.cluster import query
from tests.support.waiting import eventually

RELEASED = 3
#: What version 3 sends with each heartbeat.
BEAT = """
UPDATE "{}node" AS n SET beat = beat + 1, last_heartbeat = clock_timestamp()
WHERE n.name = 'n1' AND n.incarnation = 'life of n1'
RETURNING (SELECT c.version FROM "{}cluster" AS c), n.state,
    (SELECT json_agg(json_build_array(o.name, o.incarnation, o.beat) ORDER BY o.created_on,
        o.name)::text
     FROM "{}node" AS o WHERE (o.created_on, o.name) < (n.created_on, n.name))"""
#: A heartbeat waits behind two locks that are tried for a tenth of a second each; the rest is the
#: load of the machine.
LONGEST_SEC = 1.0


@pytest.fixture
def old(config: CoordinationConfig) -> CoordinationConfig:
    """A cluster of version 3 with a node, a lock, an audited task and a completed key."""
    tables = Tables(config.appname)
    query(config, ''.join(each.sql(tables) for each in MIGRATIONS if each.number <= RELEASED))
    query(
        config,
        """
        INSERT INTO "{}node" (name, incarnation, state, lease_sec) VALUES ('n1', 'life of n1',
            'active', 9);
        INSERT INTO "{}lock" (task_id, node_patterns) VALUES ('t', '["n1"]');
        INSERT INTO "{}audit" (node, task_id, date) VALUES ('n1', 'done', '2026-01-01');
        INSERT INTO "{}execution" (key, state, fence) VALUES ('key', 'done', 7)""",
    )
    assert version(config) == RELEASED
    return config


def version(config: CoordinationConfig) -> int:
    return int(query(config, 'SELECT schema_version FROM "{}cluster"')[0][0])


def rows(config: CoordinationConfig) -> list[tuple[object, ...]]:
    return query(
        config,
        """
        SELECT n.name, l.task_id, a.task_id, e.fence FROM "{}node" AS n, "{}lock" AS l, "{}audit" AS
            a, "{}execution" AS e""",
    )


@contextlib.contextmanager
def transaction(config: CoordinationConfig, sql: str) -> Iterator[psycopg2.extensions.connection]:
    """Somebody's transaction that stays open."""
    with contextlib.closing(
        psycopg2.connect(
            host=config.host,
            port=config.port,
            dbname=config.dbname,
            user=config.user,
            password=config.password,
            application_name='nightly report',
        )
    ) as connection:
        with connection.cursor() as cursor:
            cursor.execute(sql.replace('{}', config.appname))
        yield connection


class Upgrade(threading.Thread):
    """A node of this version that starts."""

    def __init__(
        self, config: CoordinationConfig, migrations: Sequence[Migration] = MIGRATIONS
    ) -> None:
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self._config = config
        self._migrations = migrations
        self.start()

    def run(self) -> None:
        sessions = Sessions(self._config, 'test upgrade')
        try:
            with sessions.session() as connection:
                create_schema(connection, self._config, self._migrations)
        except BaseException as error:
            self.error = error
        finally:
            sessions.close_all()

    def end(self) -> None:
        """Wait until it has come through."""
        self.join(90)
        assert not self.is_alive() and self.error is None, self.error


def longest_beat(config: CoordinationConfig, number: int = 40) -> float:
    """Seconds that the slowest of so many heartbeats of version 3 took."""
    longest = 0.0
    for _ in range(number):
        began = time.monotonic()
        assert query(config, BEAT)[0][0] == 0
        longest = max(longest, time.monotonic() - began)
        threading.Event().wait(0.05)
    return longest


@pytest.mark.parametrize(
    ('in_the_way', 'reached'),
    [
        ('SELECT FROM "{}node", "{}cluster"', 3),
        ('LOCK TABLE "{}execution" IN SHARE UPDATE EXCLUSIVE MODE', 4),  # as vacuum does
        ('SELECT FROM "{}execution"; SELECT FROM "{}audit"', 6),
        ('SELECT FROM "{}queue"', 7),
    ],
)
def test_heartbeats_hardly_wait_for_an_upgrade_that_waits_for_somebody(
    old: CoordinationConfig, in_the_way: str, reached: int
) -> None:
    with transaction(old, in_the_way) as reader:
        upgrade = Upgrade(old)
        eventually(lambda: version(old) == reached, timeout=30)
        assert longest_beat(old) < LONGEST_SEC
        assert upgrade.is_alive() and version(old) == reached
        reader.commit()
        upgrade.end()
    assert version(old) == SCHEMA_VERSION
    assert rows(old) == [('n1', 't', 'done', 7)]


def test_no_migration_holds_the_cluster_while_it_waits_for_a_table(old: CoordinationConfig) -> None:
    """Not even for a moment: the cluster's lock keeps joins and hand-overs out, and the tables'
    locks everybody.
    """
    with transaction(old, 'SELECT FROM "{}audit"') as reader:
        upgrade = Upgrade(old)
        eventually(lambda: version(old) == 6, timeout=30)
        held = 0
        for _ in range(60):
            held += query(
                old,
                """
                SELECT count(*) FROM pg_locks AS l WHERE l.granted AND l.mode =
                    'AccessExclusiveLock'
                    AND l.relation IN ('"{}cluster"'::regclass, '"{}node"'::regclass)""",
            )[0][0]
            threading.Event().wait(0.02)
        assert held == 0
        reader.commit()
        upgrade.end()


def test_nodes_that_upgrade_at_once_do_it_once(old: CoordinationConfig) -> None:
    with transaction(old, 'SELECT FROM "{}audit"') as reader:
        upgrades = [Upgrade(old) for _ in range(3)]
        eventually(lambda: version(old) == 6, timeout=30)
        assert longest_beat(old, 10) < LONGEST_SEC
        reader.commit()
        for upgrade in upgrades:
            upgrade.end()
    assert version(old) == SCHEMA_VERSION and rows(old) == [('n1', 't', 'done', 7)]


def test_an_upgrade_that_is_killed_between_two_versions_is_carried_on_by_the_next_start(
    old: CoordinationConfig,
) -> None:
    program = """
import json, sys
from jobsync_core.config import CoordinationConfig
from jobsync_core.store.schema import create_schema
create_schema(CoordinationConfig(**json.load(sys.stdin)))
"""
    settings = {
        name: getattr(old, name)
        for name in (
            'host',
            'port',
            'dbname',
            'user',
            'password',
            'heartbeat_interval_sec',
            'heartbeat_timeout_sec',
        )
    }
    with transaction(old, 'SELECT FROM "{}audit"') as reader:
        process = subprocess.Popen(
            [sys.executable, '-c', program], stdin=subprocess.PIPE, text=True
        )
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(settings))
            process.stdin.close()
            eventually(lambda: version(old) == 6, timeout=30)
        finally:
            process.kill()
            process.wait()
        assert longest_beat(old, 5) < LONGEST_SEC
        reader.commit()
    assert version(old) == 6 and rows(old) == [('n1', 't', 'done', 7)]
    Upgrade(old).end()
    assert version(old) == SCHEMA_VERSION and rows(old) == [('n1', 't', 'done', 7)]


class Failing(Migration):
    """One that fails at its end."""

    def sql(self, tables: Tables) -> str:
        return super().sql(tables) + 'SELECT no_such_function();'


@pytest.mark.parametrize('number', [each.number for each in MIGRATIONS if each.number > RELEASED])
def test_a_migration_that_fails_leaves_the_version_before_it(
    old: CoordinationConfig, number: int
) -> None:
    upgrade = Upgrade(
        old,
        [Failing(each.number, each.name) if each.number == number else each for each in MIGRATIONS],
    )
    upgrade.join(60)
    assert isinstance(upgrade.error, StatementRefused)
    assert upgrade.error.sqlstate == '42883'  # undefined function
    before = max(each.number for each in MIGRATIONS if each.number < number)
    assert version(old) == before and longest_beat(old, 1) < LONGEST_SEC
    Upgrade(old).end()
    assert version(old) == SCHEMA_VERSION and rows(old) == [('n1', 't', 'done', 7)]


def test_a_table_that_was_dropped_from_an_old_version_comes_back(old: CoordinationConfig) -> None:
    query(old, 'DROP TABLE "{}queue"')
    Upgrade(old).end()
    assert version(old) == SCHEMA_VERSION and query(old, 'SELECT place FROM "{}queue"') == []


def test_who_is_in_the_way_for_a_minute_is_named(
    old: CoordinationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, '_PATIENCE_SEC', 1.5)
    with transaction(old, 'SELECT FROM "{}audit"') as reader:
        upgrade = Upgrade(old)
        upgrade.join(60)
        assert isinstance(upgrade.error, StoreTimeout)
        told = str(upgrade.error)
        assert (
            "application 'nightly report'" in told
            and f'pid {reader.info.backend_pid}' in told
            and 'sync_audit' in told
        ), told
    assert version(old) == 6


def test_an_automatic_vacuum_gets_the_second_that_it_takes_to_give_way(
    old: CoordinationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds looks like this; it ends itself when somebody has waited for
    deadlock_timeout.
    """
    waits: list[float] = []
    migrate = schema._migrate

    def noted(*args: Any, **options: Any) -> int | None:
        waits.append(args[4])
        return migrate(*args, **options)

    monkeypatch.setattr(schema, '_migrate', noted)
    with transaction(old, 'LOCK TABLE "{}execution" IN SHARE UPDATE EXCLUSIVE MODE') as vacuum:
        upgrade = Upgrade(old)
        eventually(lambda: any(sec > 1.0 for sec in waits), timeout=30)
        vacuum.commit()
        upgrade.end()
    assert sum(sec > 1.0 for sec in waits) <= len(waits) / 3 + 1, 'now and then only'


def test_the_printed_statements_bring_an_old_version_forward_step_by_step(
    old: CoordinationConfig,
) -> None:
    printed = render_schema('sync_')
    with transaction(old, 'SELECT FROM "{}audit"') as reader:
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            query(old, printed)
        query(old, 'ROLLBACK')
        assert version(old) == 6
        reader.commit()
    query(old, printed)
    assert version(old) == SCHEMA_VERSION and rows(old) == [('n1', 't', 'done', 7)]
