"""Behind PgBouncer in transaction mode, where a session is nobody's."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.embedded.postgres import EmbeddedPostgres
from jobsync_core.errors import DatabaseUnavailable
from jobsync_core.store.connection import Connection
from jobsync_core.store.probe import pooling
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from tests.conftest import SETTINGS
from tests.support.cluster import Cluster, query
from tests.support.history import moment
from tests.support.pgbouncer import PgBouncer
from tests.support.proxy import Mode
from tests.support.waiting import eventually
from tests.support.whole import admin_of, use_everything

MakePgBouncer = Callable[..., PgBouncer]

_SETTINGS = (
    'search_path',
    'statement_timeout',
    'lock_timeout',
    'idle_in_transaction_session_timeout',
    'synchronous_commit',
    'row_security',
    'extra_float_digits',
    'default_transaction_isolation',
    'default_transaction_read_only',
    'jobsync.execution',
    'role',
)


def through(pooler: PgBouncer, config: CoordinationConfig, **settings: Any) -> CoordinationConfig:
    """The config of a node behind the pooler."""
    return dataclasses.replace(config, host=pooler.host, port=pooler.port, listen=False, **settings)


@contextlib.contextmanager
def stranger(config: CoordinationConfig) -> Iterator[psycopg2.extensions.cursor]:
    """Another client of the same pooler and role, in autocommit mode."""
    with contextlib.closing(
        psycopg2.connect(
            host=config.host,
            port=config.port,
            dbname=config.dbname,
            user=config.user,
            password=config.password,
        )
    ) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield cursor


class TestTheFixture:
    def test_clients_share_server_connections_and_stay_connected_when_it_points_elsewhere(
        self,
        make_config: Callable[..., CoordinationConfig],
        make_pgbouncer: Callable[..., PgBouncer],
    ) -> None:
        config = make_config()
        pooler = make_pgbouncer(config, settings={'default_pool_size': '1'})

        def connect() -> contextlib.closing[psycopg2.extensions.connection]:
            return contextlib.closing(
                psycopg2.connect(
                    host=pooler.host,
                    port=pooler.port,
                    dbname=config.dbname,
                    user=config.user,
                    password=config.password,
                )
            )

        def backend(connection: psycopg2.extensions.connection) -> int:
            with connection, connection.cursor() as cursor:
                cursor.execute('SELECT pg_backend_pid()')
                return int((cursor.fetchone() or (0,))[0])

        with connect() as one, connect() as two:
            first = backend(one)
            assert backend(two) == first
            pooler.point_at(config.host, int(config.port))
            assert backend(one) != first
            eventually(
                lambda: (
                    query(config, 'SELECT 1 FROM pg_stat_activity WHERE pid = %s', (first,)) == []
                )
            )


class TestACluster:
    def test_does_all_that_it_does_and_leaves_nothing_on_the_servers_connections(
        self, config: CoordinationConfig, make_pgbouncer: MakePgBouncer
    ) -> None:
        pooler = make_pgbouncer(config, settings={'default_pool_size': '4'})
        pooled = through(pooler, config)

        def shown(cursor: psycopg2.extensions.cursor) -> tuple[Any, ...]:
            cursor.execute(
                'SELECT pg_backend_pid(), (SELECT count(*) FROM pg_prepared_statements), (SELECT '
                'count(*) FROM pg_listening_channels()), '
                "(SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = "
                'pg_backend_pid()), '
                + ', '.join(f"coalesce(current_setting('{name}', true), '')" for name in _SETTINGS)
            )
            return cursor.fetchall()[0]

        with stranger(pooled) as cursor:
            ordinary = shown(cursor)[1:]
            assert ordinary[:3] == (0, 0, 0)
            with admin_of(config) as admin:
                use_everything(pooled, admin)
            seen = {backend: rest for backend, *rest in (shown(cursor) for _ in range(50))}
        assert len(seen) > 1
        assert [rest for rest in seen.values() if tuple(rest) != ordinary] == []

    def test_takes_no_harm_from_what_other_clients_leave_there(
        self, config: CoordinationConfig, make_pgbouncer: MakePgBouncer
    ) -> None:
        pooler = make_pgbouncer(config, settings={'default_pool_size': '3'})
        pooled = through(pooler, config)
        with contextlib.ExitStack() as stack:
            cursors = [stack.enter_context(stranger(pooled)) for _ in range(3)]
            for cursor in cursors:  # at once, so that each has a server's connection of its own
                cursor.execute('BEGIN')
            for cursor in cursors:
                cursor.execute(
                    "SET lock_timeout = '1ms'; SET search_path = nowhere; SET row_security = off;"
                    'SET default_transaction_isolation = serializable; SET '
                    'default_transaction_read_only = on;'
                    'SET extra_float_digits = -15; SET synchronous_commit = off; SET TimeZone = '
                    "'Asia/Kathmandu'; PREPARE p AS SELECT 1;"
                    "SET statement_timeout = '50ms'"
                )
            for cursor in cursors:
                cursor.execute('COMMIT')
        with admin_of(config) as admin:
            use_everything(dataclasses.replace(pooled, schema='public'), admin)

    def test_goes_on_without_a_node_that_is_killed_and_with_one_that_joins(
        self, config: CoordinationConfig, make_pgbouncer: MakePgBouncer, tmp_path: Path
    ) -> None:
        pooler = make_pgbouncer(config)
        with Cluster(through(pooler, config), tmp_path) as cluster:
            cluster.start('n1', 'n2', 'n3')
            since = cluster['n1'].kill()
            cluster.wait_balanced(['n2', 'n3'])
            assert cluster.wait_claimed(since) < 5
            cluster.start('n4')
            cluster['n2'].leave()
            cluster.wait_balanced(['n3', 'n4'])

    def test_keeps_its_tokens_when_the_pooler_is_killed_and_comes_back(
        self, config: CoordinationConfig, make_pgbouncer: MakePgBouncer, tmp_path: Path
    ) -> None:
        pooler = make_pgbouncer(config)
        with Cluster(through(pooler, config), tmp_path) as cluster:
            cluster.start('n1', 'n2')
            before = cluster.assignment(), cluster.evictions()
            pooler.kill()
            eventually(
                lambda: (
                    not any(
                        query(
                            config,
                            "SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'jobsync "
                            "n%%'",
                            (),
                        )
                    )
                )
            )
            pooler.start()
            cluster.wait_claimed()
            assert (cluster.assignment(), cluster.evictions()) == before


@contextlib.contextmanager
def promoted_copy(server: EmbeddedPostgres) -> Iterator[EmbeddedPostgres]:
    """Another server with another history: it has all that the first has at this moment, and was
    promoted since.
    """
    home = Path(tempfile.mkdtemp(prefix='jobsync-copy-'))
    server.pause()  # so that the copy is of one moment
    try:
        subprocess.run(['cp', '-a', f'{server.log.parent}/.', str(home)], check=True)
    finally:
        server.resume()
    (home / 'data' / 'postmaster.pid').unlink(missing_ok=True)
    standby = home / 'data' / 'standby.signal'
    standby.touch()
    standby.chmod(0o666)
    try:
        with EmbeddedPostgres(data_dir=home, bin_dir=server.bin_dir, settings=SETTINGS) as copy:
            assert query(copy.config(), 'SELECT pg_promote()') == [(True,)]
            yield copy
    finally:
        shutil.rmtree(home, ignore_errors=True)


def test_no_task_is_claimable_twice_when_the_pooler_goes_over_to_a_server_that_lost_the_last_plans(
    own_server: EmbeddedPostgres, make_pgbouncer: MakePgBouncer, tmp_path: Path
) -> None:
    own_server.create_database('shop')
    # A lease is longer than it takes to see what the other server has: only who knows the histories
    # apart waits for its end.
    config = own_server.config(
        'shop', heartbeat_interval_sec=0.5, heartbeat_timeout_sec=5, rebalance_check_interval_sec=1
    )
    pooler = make_pgbouncer(config)
    with Cluster(through(pooler, config), tmp_path) as cluster:
        cluster.start('n1')
        with promoted_copy(own_server) as other:
            cluster.start('n2')  # of which the other server knows nothing
            assert query(other.config('shop'), 'SELECT name FROM sync_node') == [('n1',)]
            since = moment()
            cluster['n2'].proxy.switch(
                Mode.HOLD
            )  # it hears nothing of all this, and claims until its lease is over
            pooler.point_at(other.host, other.port)
            cluster.launch('n3')  # a fresh node has no history to compare with
            cluster['n3'].wait_event('entered')
            cluster['n2'].proxy.heal()
            cluster.wait_balanced(['n1', 'n2', 'n3'])
            cluster.wait_claimed(since)
            assert query(other.config('shop'), 'SELECT name FROM sync_node ORDER BY name') == [
                ('n1',),
                ('n2',),
                ('n3',),
            ]
            for name in ('n1', 'n2', 'n3'):
                cluster[name].kill()


def test_no_task_is_claimable_twice_when_a_standby_that_never_followed_the_first_takes_over(
    own_server: EmbeddedPostgres, make_pgbouncer: MakePgBouncer, tmp_path: Path
) -> None:
    own_server.create_database('shop')
    config = own_server.config(
        'shop', heartbeat_interval_sec=0.5, heartbeat_timeout_sec=5, rebalance_check_interval_sec=1
    )
    pooler = make_pgbouncer(config)
    with Cluster(through(pooler, config), tmp_path) as cluster:
        cluster.start('n1', 'n2')
        with promoted_copy(own_server) as first, promoted_copy(own_server) as second:
            timelines = {
                query(each.config('shop'), 'SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)')[
                    0
                ]
                for each in (first, second)
            }
            assert timelines == {('00000002',)}, 'their histories have one name'
            pooler.point_at(first.host, first.port)
            eventually(
                lambda: query(
                    first.config('shop'),
                    "SELECT 1 FROM sync_cluster WHERE history LIKE '%% 00000002'",
                    (),
                ),
                timeout=20,
            )
            cluster.start('n3')  # of which the second one knows nothing
            cluster.wait_claimed()
            since = moment()
            cluster['n3'].proxy.switch(
                Mode.HOLD
            )  # it hears nothing of all this, and claims until its lease is over
            pooler.point_at(second.host, second.port)
            cluster.launch('n4')
            cluster['n4'].wait_event('entered')
            cluster['n3'].proxy.heal()
            cluster.wait_balanced(['n1', 'n2', 'n3', 'n4'])
            cluster.wait_claimed(since)
            for name in ('n1', 'n2', 'n3', 'n4'):
                cluster[name].kill()


class TestWhatIsPooled:
    def test_the_doctor_tells_the_mode(
        self, config: CoordinationConfig, make_pgbouncer: MakePgBouncer
    ) -> None:
        found = []
        for mode in ('transaction', 'session'):
            sessions = Sessions(through(make_pgbouncer(config, mode=mode), config), 'test')
            found.append(pooling(sessions, Tables.of(config)))
            sessions.close_all()
        assert found == ['transaction', 'session']

    def test_settings_of_a_session_are_not_refused_in_session_mode(
        self, config: CoordinationConfig, make_pgbouncer: MakePgBouncer
    ) -> None:
        pooled = dataclasses.replace(
            through(make_pgbouncer(config, mode='session'), config), listen=True
        )
        with Job('n1', pooled, wait_on_enter=0) as job:
            eventually(lambda: len(job.my_tokens) == config.total_tokens)

    def test_two_statements_of_a_transaction_of_the_users_are_on_one_connection_of_the_server(
        self, config: CoordinationConfig, make_pgbouncer: MakePgBouncer
    ) -> None:
        pooled = through(make_pgbouncer(config, settings={'default_pool_size': '3'}), config)
        query(config, 'CREATE TABLE effect (key text)')
        with Job('n1', pooled, wait_on_enter=0) as job:
            for number in range(10):
                with (
                    job.once(f'key {number}') as execution,
                    execution.transaction() as connection,
                    connection.cursor() as cursor,
                ):
                    cursor.execute('INSERT INTO effect VALUES (%s)', (execution.key,))
                with (
                    pytest.raises(ZeroDivisionError),
                    job.once(f'broken {number}') as execution,
                    execution.transaction() as connection,
                ):
                    _insert_and_fail(connection)
        assert query(config, 'SELECT count(*), count(DISTINCT key) FROM effect') == [(10, 10)]
        assert query(config, 'SELECT state, count(*) FROM "{}execution" GROUP BY 1 ORDER BY 1') == [
            ('done', 10),
            ('failed', 10),
        ]

    def test_a_standby_behind_it_is_no_place_for_a_node(
        self, config: CoordinationConfig, make_pgbouncer: MakePgBouncer
    ) -> None:
        create_schema(config)
        connection = Connection.open(through(make_pgbouncer(config), config), 'n1')
        connection.execute('SELECT 1')
        with pytest.raises(
            DatabaseUnavailable
        ):  # as a standby answers to READ WRITE, which this server cannot be made to
            connection.execute("DO $$ BEGIN RAISE SQLSTATE '0A000'; END $$")
        assert connection.closed


def _insert_and_fail(connection: psycopg2.extensions.connection) -> None:
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO effect VALUES ('broken')")
    raise ZeroDivisionError
