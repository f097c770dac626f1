"""Behind PgBouncer in transaction mode, where a session is nobody's."""
from __future__ import annotations

import contextlib
from collections.abc import Callable

import psycopg2

from jobsync_core.config import CoordinationConfig
from tests.pgbouncer import PgBouncer
from tests.server.cluster import query
from tests.waiting import eventually


class TestTheFixture:
    def test_clients_share_server_connections_and_stay_connected_when_it_points_elsewhere(
            self, make_config: Callable[..., CoordinationConfig], make_pgbouncer: Callable[..., PgBouncer]) -> None:
        config = make_config()
        pooler = make_pgbouncer(config, settings={'default_pool_size': '1'})

        def connect() -> contextlib.closing[psycopg2.extensions.connection]:
            return contextlib.closing(psycopg2.connect(
                host=pooler.host, port=pooler.port, dbname=config.dbname, user=config.user, password=config.password))

        def backend(connection: psycopg2.extensions.connection) -> int:
            with connection, connection.cursor() as cursor:
                cursor.execute('SELECT pg_backend_pid()')
                return int((cursor.fetchone() or (0,))[0])

        with connect() as one, connect() as two:
            first = backend(one)
            assert backend(two) == first
            pooler.point_at(config.host, int(config.port))
            assert backend(one) != first
            eventually(lambda: query(config, 'SELECT 1 FROM pg_stat_activity WHERE pid = %s', (first,)) == [])
