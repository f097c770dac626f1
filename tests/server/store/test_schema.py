"""The tables come into being once, whoever starts, and nobody else's are touched."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

import psycopg2
import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import JobSyncError, SchemaConflict, StatementRefused
from jobsync_core.store.layout import MIGRATIONS, SCHEMA_VERSION, Migration, render_schema
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from tests.support.cluster import query
from tests.support.rows import Rows, rows_of


def create(config: CoordinationConfig, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """As a node does when it starts."""
    sessions = Sessions(config, 'test schema')
    try:
        with sessions.session() as connection:
            create_schema(connection, config, migrations)
    finally:
        sessions.close_all()


class Next(Migration):
    """One of a version to come."""

    def __init__(self, text: str) -> None:
        super().__init__(SCHEMA_VERSION + 1, text)

    def sql(self, tables: Tables) -> str:
        return tables.migration(self.name)


def oids(config: CoordinationConfig) -> list[tuple[object, ...]]:
    """All relations of the database's public schema."""
    return query(
        config,
        "SELECT oid::int, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER "
        'BY 1',
    )


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        yield found


@pytest.fixture
def poor(config: CoordinationConfig) -> CoordinationConfig:
    """A config whose role may create nothing."""
    name = f'poor_{config.dbname}'
    query(config, f'CREATE ROLE "{name}" LOGIN PASSWORD %s', ('poor',))
    query(config, 'REVOKE CREATE ON SCHEMA public FROM PUBLIC')
    return dataclasses.replace(config, user=name, password='poor')


class TestCreate:
    def test_all_relations_are_there_and_a_second_start_changes_nothing(
        self, config: CoordinationConfig
    ) -> None:
        create(config)
        before = oids(config)
        names = {name for _, name in before}
        assert {
            quoted.rpartition('.')[2].strip('"') for quoted in Tables(config.appname).all.values()
        } <= names
        create(config)
        assert oids(config) == before
        assert query(
            config, 'SELECT total_tokens, hash_function, version, schema_version FROM "{}cluster"'
        ) == [(config.total_tokens, config.hash_function, 0, SCHEMA_VERSION)]

    def test_many_nodes_may_start_at_once(self, config: CoordinationConfig) -> None:
        barrier, errors = threading.Barrier(8), list[BaseException]()

        def start() -> None:
            barrier.wait()
            try:
                create(config)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert errors == []
        assert query(config, 'SELECT count(*) FROM "{}cluster"') == [(1,)]

    def test_the_rendered_statements_make_the_same_tables(
        self, make_config: Callable[..., CoordinationConfig]
    ) -> None:
        by_hand, by_node = make_config(appname='hand_'), make_config(appname='node_')
        query(by_hand, render_schema('hand_'))
        create(by_node)
        before = oids(by_hand)
        create(by_hand)
        assert oids(by_hand) == before

        def columns(config: CoordinationConfig) -> list[tuple[object, ...]]:
            return query(
                config,
                """
                SELECT substr(table_name, 6), column_name, data_type, is_nullable, column_default
                    FROM information_schema.columns
                WHERE starts_with(table_name, %s) AND column_name <> 'id' ORDER BY 1,
                    ordinal_position""",
                (config.appname,),
            )

        assert columns(by_hand) == columns(by_node)

    def test_the_longest_appname_fits(self, make_config: Callable[..., CoordinationConfig]) -> None:
        config = make_config(appname='x' * 40)
        create(config)
        create(config)

    def test_clusters_of_two_appnames_share_nothing(
        self, make_config: Callable[..., CoordinationConfig]
    ) -> None:
        one, two = Tables('one_'), Tables('two_')
        assert one.advisory != two.advisory and one.channel != two.channel
        for appname in ('one_', 'two_'):
            create(make_config(appname=appname))

    def test_a_table_that_was_dropped_comes_back(self, config: CoordinationConfig) -> None:
        create(config)
        query(config, 'DROP TABLE "{}queue"')
        create(config)
        assert query(config, 'SELECT * FROM "{}queue"') == []

    def test_a_function_that_was_dropped_comes_back(self, config: CoordinationConfig) -> None:
        create(config)
        query(config, 'DROP FUNCTION "{}finish_execution"')
        create(config)
        assert query(config, 'SELECT to_regproc(\'"{}finish_execution"\') IS NOT NULL') == [(True,)]


class TestRights:
    def test_no_right_to_create_is_needed_where_the_tables_are_in_place(
        self, config: CoordinationConfig, poor: CoordinationConfig
    ) -> None:
        create(config)
        query(
            config,
            f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "{poor.user}"',
        )
        create(poor)

    def test_a_role_that_may_not_create_is_told_what_it_needs(
        self, poor: CoordinationConfig
    ) -> None:
        with pytest.raises(JobSyncError, match=r'permission denied.*CREATE'):
            create(poor)

    def test_a_role_that_may_not_call_the_functions_is_told_what_it_needs(
        self, config: CoordinationConfig, poor: CoordinationConfig
    ) -> None:
        create(config)
        query(
            config,
            f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "{poor.user}"',
        )
        query(config, 'REVOKE EXECUTE ON FUNCTION "{}begin_execution" FROM PUBLIC')
        with pytest.raises(JobSyncError, match=r'permission denied.*EXECUTE'):
            create(poor)

    def test_a_role_that_may_not_read_is_told_what_it_needs(
        self, config: CoordinationConfig, poor: CoordinationConfig
    ) -> None:
        create(config)
        with pytest.raises(JobSyncError, match=r'permission denied.*SELECT'):
            create(poor)


class TestConflicts:
    @pytest.mark.parametrize(
        ('statement', 'relation'),
        [
            (
                (
                    'CREATE TABLE "{}token" (token_id int PRIMARY KEY, node text, assigned_at '
                    'timestamptz, version int)'
                ),
                'sync_token',
            ),
            ('CREATE TABLE "{}node" (name text, something int)', 'sync_node'),
            ('CREATE VIEW "{}audit" AS SELECT 1 AS one', 'sync_audit'),
            ('CREATE TABLE "{}cluster" (name text)', 'sync_cluster'),
        ],
    )
    def test_relations_of_another_program_are_refused_by_name_and_stay_as_they_are(
        self, config: CoordinationConfig, statement: str, relation: str
    ) -> None:
        query(config, statement)
        before = oids(config)
        with pytest.raises(SchemaConflict, match=f'"{relation}".*another appname'):
            create(config)
        assert oids(config) == before

    def test_a_table_that_lost_a_column_is_refused_by_name(
        self, config: CoordinationConfig
    ) -> None:
        create(config)
        query(config, 'ALTER TABLE "{}execution" DROP COLUMN fence')
        with pytest.raises(SchemaConflict, match='"sync_execution"'):
            create(config)

    def test_columns_that_somebody_added_do_no_harm(self, config: CoordinationConfig) -> None:
        create(config)
        query(config, 'ALTER TABLE "{}audit" ADD COLUMN note text')
        create(config)

    def test_a_newer_schema_is_refused(self, config: CoordinationConfig) -> None:
        create(config)
        query(config, 'UPDATE "{}cluster" SET schema_version = %s', (SCHEMA_VERSION + 1,))
        query(config, 'ALTER TABLE "{}audit" RENAME COLUMN node TO done_by')
        with pytest.raises(SchemaConflict, match=f'schema version {SCHEMA_VERSION + 1}.*upgrade'):
            create(config)


class TestMigrations:
    def test_an_older_schema_is_brought_forward_once_and_keeps_its_rows(
        self, config: CoordinationConfig
    ) -> None:
        create(config)
        query(
            config, """INSERT INTO "{}lock" (task_id, node_patterns) VALUES ('t', '["%%"]')""", ()
        )
        text = (
            'ALTER TABLE {queue} ADD COLUMN size int;\nALTER TABLE {lock} ADD COLUMN colour text;'
        )
        for _ in range(2):
            create(config, [*MIGRATIONS, Next(text)])
        assert query(config, 'SELECT schema_version FROM "{}cluster"') == [(SCHEMA_VERSION + 1,)]
        assert query(config, 'SELECT task_id, colour FROM "{}lock"') == [('t', None)]

    def test_a_migration_that_fails_leaves_the_old_schema(self, config: CoordinationConfig) -> None:
        create(config)
        text = 'ALTER TABLE {queue} ADD COLUMN size int;\nSELECT no_such_function();'
        with pytest.raises(StatementRefused, match='no_such_function'):
            create(config, [*MIGRATIONS, Next(text)])
        create(config)
        assert (
            query(
                config,
                "SELECT 1 FROM information_schema.columns WHERE table_name = 'sync_queue' AND "
                "column_name = 'size'",
            )
            == []
        )


class TestTables:
    def test_the_database_refuses_two_owners_of_one_token(self, rows: Rows) -> None:
        rows.node('a')
        rows.node('b')
        rows.own(0, 10, 'a')
        with pytest.raises(psycopg2.errors.ExclusionViolation):
            rows.own(9, 20, 'b')
        rows.own(10, 20, 'b')

    @pytest.mark.parametrize('tokens', ['[3,3)', '[5,)', '[-2,4)'])
    def test_a_row_that_is_no_range_of_tokens_is_refused(self, rows: Rows, tokens: str) -> None:
        with pytest.raises(psycopg2.errors.CheckViolation):
            rows.run(
                f'INSERT INTO {rows.tables.assignment} (tokens, version) VALUES (%s, 1)', tokens
            )

    def test_the_tokens_of_a_deleted_node_belong_to_nobody(self, rows: Rows) -> None:
        rows.node('a')
        rows.node('b')
        rows.own(0, 10, 'a')
        rows.own(10, 20, 'b', moving_to='a')
        rows.run(f'DELETE FROM {rows.tables.node} WHERE name = %s', 'a')
        left = rows.run(
            f'SELECT lower(tokens), node, moving_to FROM {rows.tables.assignment} ORDER BY tokens'
        )
        assert left == [(0, None, None), (10, 'b', None)]

    def test_the_guides_queries_work_as_printed(self, rows: Rows) -> None:
        rows.node('a')
        rows.node('dead', age=60)
        rows.own(0, 4, 'a')
        rows.own(4, 6, 'dead')
        rows.own(6, 9, None)
        assert rows.run(
            "SELECT COUNT(*) FROM sync_node WHERE last_heartbeat > NOW() - INTERVAL '15 seconds'"
        ) == [(1,)]
        assert sorted(
            rows.run('SELECT node, COUNT(*) as tokens FROM sync_token GROUP BY node')
        ) == [('a', 4), ('dead', 2)]
        assert rows.run(
            "SELECT name FROM sync_node WHERE last_heartbeat > NOW() - INTERVAL '15 seconds' "
            'ORDER BY created_on LIMIT 1'
        ) == [('a',)]
        assert [
            row[0] for row in rows.run('SELECT token_id FROM sync_token ORDER BY token_id')
        ] == list(range(6))

    def test_heartbeats_leave_the_index_alone(self, rows: Rows) -> None:
        for number in range(20):
            rows.node(f'n{number}')
        with (
            contextlib.closing(
                psycopg2.connect(
                    host=rows.config.host,
                    port=rows.config.port,
                    dbname=rows.config.dbname,
                    user=rows.config.user,
                    password=rows.config.password,
                )
            ) as connection,
            connection,
            connection.cursor() as cursor,
        ):
            for _ in range(10):
                cursor.execute(
                    f'UPDATE {rows.tables.node} SET beat = beat + 1, last_heartbeat = '
                    'clock_timestamp()'
                )
            cursor.execute(
                'SELECT pg_stat_get_xact_tuples_hot_updated(oid), '
                'pg_stat_get_xact_tuples_updated(oid) '
                "FROM pg_class WHERE relname = 'sync_node'"
            )
            hot, updated = cursor.fetchone() or (0, 0)
        # In one transaction no old version can be cleared away, so a page's reserve lasts for a few
        # rounds only.
        assert updated == 200
        assert hot > 0.5 * updated
