"""Connections cannot hang, tell what is wrong without telling the password, and survive a fork."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.embedded.postgres import EmbeddedPostgres
from jobsync_core.errors import (
    BadData,
    DatabaseUnavailable,
    LockNotAvailable,
    MissingTable,
    StatementCanceled,
    StatementRefused,
    StoreTimeout,
)
from jobsync_core.store import sessions as sessions_module
from jobsync_core.store.connection import Connection
from jobsync_core.store.options import Limits
from jobsync_core.store.sessions import Sessions
from tests.support.cluster import query
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually


@pytest.fixture
def connection(config: CoordinationConfig) -> Iterator[Connection]:
    found = Connection.open(config, 'n1')
    yield found
    found.close()


@pytest.fixture
def sessions(config: CoordinationConfig) -> Iterator[Sessions]:
    found = Sessions(config, 'jobsync test')
    yield found
    found.close_all()


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(('127.0.0.1', 0)) as listener:
        yield listener.getsockname()[1]


class TestOpen:
    def test_several_statements_in_one_string_are_one_transaction_and_give_the_last_rows(
        self, connection: Connection
    ) -> None:
        assert connection.execute('SELECT 1; SELECT %s, %s', ('ü"\'', 2)) == [('ü"\'', 2)]
        assert (
            connection.execute('CREATE TABLE public.t (i int); INSERT INTO public.t VALUES (1)')
            == []
        )
        with pytest.raises(BadData):
            connection.execute('INSERT INTO public.t VALUES (2); SELECT 1 / 0')
        assert connection.execute('SELECT i FROM public.t') == [(1,)]

    def test_the_server_limits_what_a_stopped_process_may_hold_up(
        self, connection: Connection
    ) -> None:
        names = (
            'statement_timeout',
            'lock_timeout',
            'idle_in_transaction_session_timeout',
            'synchronous_commit',
        )
        values = connection.execute(
            'SELECT ' + ', '.join(f"current_setting('{name}')" for name in names)
        )[0]
        assert values == ('500ms', '400ms', '1s', 'on')
        assert connection.execute(
            'SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()'
        ) == [('jobsync n1',)]

    def test_settings_are_not_left_to_other_clients_of_a_pooler(
        self, config: CoordinationConfig
    ) -> None:
        connection = Connection.open(dataclasses.replace(config, listen=False), 'n1')
        names = 'statement_timeout', 'search_path'
        settings = 'SELECT ' + ', '.join(f"current_setting('{name}')" for name in names)
        assert connection.execute(settings) == [('500ms', 'pg_catalog, pg_temp')]
        connection.execute('BEGIN')
        assert connection.execute(settings) == [('0', '"$user", public')]
        assert connection.execute(f'COMMIT; BEGIN; {connection.local_limits}; {settings}') == [
            ('500ms', 'pg_catalog, pg_temp')
        ]
        connection.execute('COMMIT')
        connection.close()

    def test_an_address_that_was_given_is_used_by_every_kind_of_connection(
        self, config: CoordinationConfig
    ) -> None:
        named = dataclasses.replace(
            config, host='database.invalid', connection_options={'hostaddr': '127.0.0.1'}
        )
        connection = Connection.open(named, 'n1')
        assert connection.execute('SELECT 1') == [(1,)]
        connection.close()
        calls = Sessions(named, 'jobsync test')
        with calls.session() as session:
            assert session.info.host == 'database.invalid'
        calls.close_all()

    def test_a_long_name_is_shortened_and_any_name_works(self, config: CoordinationConfig) -> None:
        for name in ('ü' * 200, 'a\'b"c\\ %s', 'x' * 200):
            connection = Connection.open(config, name)
            assert connection.execute('SELECT 1') == [(1,)]
            connection.close()

    def test_the_second_host_is_used_where_the_first_refuses(
        self, config: CoordinationConfig
    ) -> None:
        with socket.create_server(('127.0.0.1', 0)) as listener:
            closed = listener.getsockname()[1]
        both = dataclasses.replace(
            config, host=f'127.0.0.1,{config.host}', port=f'{closed},{config.port}'
        )
        connection = Connection.open(both, 'n1')
        assert connection.execute('SELECT 1') == [(1,)]
        connection.close()

    def test_the_second_host_is_used_after_the_time_of_a_silent_first(
        self, config: CoordinationConfig, black_hole: int
    ) -> None:
        both = dataclasses.replace(
            config,
            host=f'127.0.0.1,{config.host}',
            port=f'{black_hole},{config.port}',
            connect_timeout_sec=0.3,
        )
        began = time.monotonic()
        connection = Connection.open(both, 'n1')
        assert 0.25 < time.monotonic() - began < 5
        connection.close()

    def test_of_several_hosts_one_that_is_read_only_is_passed_over(
        self, config: CoordinationConfig
    ) -> None:
        query(config, f'ALTER DATABASE "{config.dbname}" SET default_transaction_read_only = on')
        both = dataclasses.replace(config, host=f'{config.host},{config.host}')
        with pytest.raises(DatabaseUnavailable, match='read-only'):
            Connection.open(both, 'n1')

    def test_a_statement_that_a_read_only_server_refuses_ends_the_connection(
        self, connection: Connection
    ) -> None:
        connection.execute('CREATE TABLE public.t (i int)')
        connection.execute('SET default_transaction_read_only = on')
        with pytest.raises(DatabaseUnavailable, match='read-only'):
            connection.execute('INSERT INTO public.t VALUES (1)')
        assert connection.closed

    def test_a_restarted_server_has_the_same_name_and_a_crashed_one_too(
        self, own_server: EmbeddedPostgres
    ) -> None:
        config = own_server.config('postgres')
        names = []
        for happens in ('nothing', 'restart', 'crash'):
            if happens == 'restart':
                own_server.restart()
            if happens == 'crash':
                own_server.kill()
                own_server.start()
            connection = Connection.open(config, 'n1')
            names.append(connection.server)
            connection.close()
        assert len(set(names)) == 1
        assert names[0].split()[1] == '00000001'

    def test_a_promoted_server_has_another_name(self, own_server: EmbeddedPostgres) -> None:
        config = own_server.config('postgres')

        def name() -> str:
            connection = Connection.open(config, 'n1')
            connection.close()
            return connection.server

        before = name()
        ((directory,),) = query(config, "SELECT current_setting('data_directory')")
        own_server.kill()
        signal_file = Path(directory, 'standby.signal')
        signal_file.touch()
        signal_file.chmod(0o666)
        own_server.start()
        assert name() == before.split()[0] + ' standby'
        assert query(config, 'SELECT pg_promote()') == [(True,)]
        promoted = name()
        assert promoted == before.split()[0] + ' 00000002'
        # Later checkpoints, after which pg_control_checkpoint() shows the new timeline too, are no
        # other server.
        query(config, 'CHECKPOINT')
        assert name() == promoted

    def test_a_role_that_may_not_ask_for_the_servers_name_connects_too(
        self, config: CoordinationConfig
    ) -> None:
        role = f'asks_nothing_{config.dbname}'
        query(config, f'CREATE ROLE "{role}" LOGIN PASSWORD %s', ('x',))
        query(config, 'REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC')
        connections = [
            Connection.open(dataclasses.replace(config, user=role, password='x'), 'n1')
            for _ in range(2)
        ]
        assert len({connection.server for connection in connections}) == 1
        assert connections[0].server
        for connection in connections:
            connection.close()


class TestFailures:
    def test_a_black_hole_fails_within_connect_timeout(
        self, config: CoordinationConfig, black_hole: int
    ) -> None:
        silent = dataclasses.replace(
            config, host='127.0.0.1', port=black_hole, connect_timeout_sec=0.5
        )
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match=str(black_hole)):
            Connection.open(silent, 'n1')
        assert 0.4 < time.monotonic() - began < 5

    def test_a_name_that_is_not_resolved_in_time_fails_within_connect_timeout(
        self, config: CoordinationConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answered = threading.Event()
        monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: answered.wait(30) and [])
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match='not resolved in time'):
            Connection.open(
                dataclasses.replace(config, host='slow.example', connect_timeout_sec=0.3), 'n1'
            )
        assert time.monotonic() - began < 5
        answered.set()

    def test_the_message_names_host_port_and_database_but_never_the_password(
        self, config: CoordinationConfig
    ) -> None:
        secret = dataclasses.replace(config, password='s3cr3t w0rd')
        with socket.create_server(('127.0.0.1', 0)) as listener:
            closed = listener.getsockname()[1]
        for broken, words in (
            (
                dataclasses.replace(secret, host='127.0.0.1', port=closed),
                ('127.0.0.1', str(closed), config.dbname),
            ),
            (
                dataclasses.replace(secret, host='no-such-host.invalid'),
                ('no-such-host.invalid', config.dbname),
            ),
            (
                dataclasses.replace(secret, dbname='no such database', password=config.password),
                ("'no such database'", 'createdb'),
            ),
            (dataclasses.replace(secret, user='no_such_role'), ('no_such_role',)),
            (dataclasses.replace(secret, connection_options={'sslmode': 'nonsense'}), ('sslmode',)),
        ):
            for attempt in (
                lambda broken=broken: Connection.open(broken, 'n1'),
                lambda broken=broken: _use(broken),
            ):
                with pytest.raises(DatabaseUnavailable) as caught:
                    attempt()
                assert all(word in str(caught.value) for word in words), str(caught.value)
                assert 's3cr3t' not in f'{caught.value!r} {caught.value} {caught.value.__cause__}'

    def test_a_statement_that_gets_no_answer_ends_in_time_and_the_connection_with_it(
        self, config: CoordinationConfig
    ) -> None:
        with Proxy(config.host, int(config.port)) as proxy:
            connection = Connection.open(
                dataclasses.replace(config, host=proxy.host, port=proxy.port), 'n1'
            )
            proxy.switch(Mode.HOLD)
            began = time.monotonic()
            with pytest.raises(StoreTimeout):
                connection.execute('SELECT 1', timeout=0.3)
            assert 0.25 < time.monotonic() - began < 5
            assert connection.closed
            with pytest.raises(DatabaseUnavailable):
                connection.execute('SELECT 1')
            with pytest.raises(DatabaseUnavailable):
                connection.notifies()

    def test_a_server_that_restarts_is_a_lost_connection(
        self, own_server: EmbeddedPostgres
    ) -> None:
        connection = Connection.open(own_server.config('postgres'), 'n1')
        own_server.restart()
        with pytest.raises(DatabaseUnavailable):
            connection.execute('SELECT 1')
        assert connection.closed

    def test_a_connection_that_is_killed_is_seen_while_idle(
        self, config: CoordinationConfig, connection: Connection
    ) -> None:
        pid = connection.execute('SELECT pg_backend_pid()')[0][0]
        query(config, 'SELECT pg_terminate_backend(%s)', (pid,))

        def listen() -> None:
            for _ in range(5):  # the server's last words may come before the end itself
                assert select.select([connection.fileno()], [], [], 10)[0]
                assert connection.notifies() == []

        with pytest.raises(DatabaseUnavailable):
            listen()
        assert connection.closed

    def test_descriptors_beyond_a_thousand_work(self, config: CoordinationConfig) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        try:
            connection = Connection.open(config, 'n1')
            assert connection.fileno() > 1024
            assert connection.execute('SELECT 1') == [(1,)]
            connection.close()
            assert _use(config) == 1
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class TestNotifications:
    def test_they_arrive_by_channel_in_order(
        self, config: CoordinationConfig, connection: Connection
    ) -> None:
        connection.listen('odd "channel"')
        query(
            config,
            "SELECT pg_notify('odd \"channel\"', 'one'), pg_notify('other', 'x'), pg_notify('odd "
            "\"channel\"', 'two')",
        )
        heard: list[str] = []

        def listen() -> bool:
            heard.extend(connection.notifies())
            return len(heard) >= 2

        eventually(listen)
        assert heard == ['one', 'two']
        assert connection.notifies() == []

    def test_those_that_come_with_an_answer_are_not_lost(self, connection: Connection) -> None:
        connection.listen('c')
        connection.execute("SELECT pg_notify('c', 'mine')")
        eventually(lambda: connection.notifies() == ['mine'])


class TestFork:
    def test_a_child_does_not_use_or_end_the_parents_connections(
        self, config: CoordinationConfig
    ) -> None:
        connection, sessions = Connection.open(config, 'n1'), Sessions(config, 'jobsync test')
        with sessions.session() as raw:
            parents = raw.info.backend_pid
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with sessions.session() as raw:
                    other = raw.info.backend_pid != parents
                refused = False
                try:
                    connection.execute('SELECT 1')
                except DatabaseUnavailable:
                    refused = True
                connection.close()
                sessions.close_all()
                del connection, sessions
                gc.collect()
                code = 0 if other and refused else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert connection.execute('SELECT 1') == [(1,)]
        with sessions.session() as raw:
            assert raw.info.backend_pid == parents
        connection.close()
        sessions.close_all()


class TestSessions:
    def test_it_commits_at_the_end_and_rolls_back_on_an_error(
        self, config: CoordinationConfig, sessions: Sessions
    ) -> None:
        with sessions.session() as connection, connection.cursor() as cursor:
            cursor.execute('CREATE TABLE public.t (i int); INSERT INTO public.t VALUES (1)')
        with (
            pytest.raises(ZeroDivisionError),
            sessions.session() as connection,
            connection.cursor() as cursor,
        ):
            _insert_and_fail(cursor)
        with (
            pytest.raises(MissingTable),
            sessions.session() as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute('INSERT INTO public.t VALUES (3); SELECT * FROM nothing')
        assert query(config, 'SELECT i FROM t') == [(1,)]

    def test_the_connection_is_used_again_the_last_one_first(self, sessions: Sessions) -> None:
        with sessions.session() as one, sessions.session() as two:
            assert one is not two
        with sessions.session() as again:
            assert again is one

    def test_as_many_as_are_in_use_at_once_are_kept_and_fewer_later(
        self, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def borrow(count: int) -> set[psycopg2.extensions.connection]:
            with contextlib.ExitStack() as stack:
                return {stack.enter_context(sessions.session()) for _ in range(count)}

        many = borrow(8)
        assert borrow(8) == many
        monkeypatch.setattr(sessions_module, '_IDLE_SEC', 0.0)
        borrow(1)
        assert sum(not each.closed for each in many) == 4

    def test_close_all_closes_the_idle_at_once_and_the_others_afterwards(
        self, sessions: Sessions
    ) -> None:
        with sessions.session() as idle, sessions.session() as used:
            pass
        with sessions.session() as used:
            sessions.close_all()
            assert not used.closed
        assert used.closed and (idle.closed or idle is used)
        with sessions.session() as fresh:
            assert not fresh.closed
        with sessions.session() as again:
            assert again is fresh

    def test_what_a_burst_has_opened_is_closed_after_a_while_and_one_is_kept(
        self, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with contextlib.ExitStack() as burst:
            opened = [burst.enter_context(sessions.session()) for _ in range(6)]
        sessions.trim()
        assert [item for item in opened if item.closed] == []  # they may be needed again
        monkeypatch.setattr(sessions_module, '_REST_SEC', 0.0)
        with sessions.session() as used:
            sessions.trim()
            assert not used.closed
        sessions.trim()
        assert len([item for item in opened if not item.closed]) == 1

    def test_an_idle_connection_that_the_server_ended_is_replaced_unnoticed(
        self, config: CoordinationConfig, sessions: Sessions
    ) -> None:
        with sessions.session() as connection:
            pid = connection.info.backend_pid
        query(config, 'SELECT pg_terminate_backend(%s)', (pid,))
        eventually(
            lambda: query(config, 'SELECT 1 FROM pg_stat_activity WHERE pid = %s', (pid,)) == []
        )
        with sessions.session() as connection, connection.cursor() as cursor:
            cursor.execute('SELECT 1')

    def test_a_connection_that_is_lost_in_the_block_is_database_unavailable(
        self, sessions: Sessions
    ) -> None:
        with (
            pytest.raises(DatabaseUnavailable),
            sessions.session() as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(
                'SELECT pg_terminate_backend(%s); SELECT pg_sleep(5)',
                (connection.info.backend_pid,),
            )

    def test_what_our_statements_raise_is_ours_and_what_the_users_raise_is_the_drivers(
        self, config: CoordinationConfig, sessions: Sessions
    ) -> None:
        query(config, 'CREATE TABLE public.u (i int UNIQUE DEFERRABLE INITIALLY DEFERRED)')
        for statement, kind, code in (
            ('SELECT * FROM public.nothing', MissingTable, '42P01'),
            ('SELECT nothing FROM public.u', MissingTable, '42703'),
            ("SELECT 'a'::int", BadData, '22P02'),
            # At the commit.
            ('INSERT INTO public.u VALUES (1), (1)', StatementRefused, '23505'),
        ):
            for users in (False, True):
                with (
                    pytest.raises(Exception) as caught,
                    sessions.session(users=users) as connection,
                    connection.cursor() as cursor,
                ):
                    cursor.execute(statement)
                error = caught.value
                assert isinstance(error, psycopg2.Error if users else kind)
                if isinstance(error, StatementRefused):
                    assert isinstance(error.__cause__, psycopg2.Error)
                    assert error.sqlstate == error.__cause__.pgcode == code
                    assert str(error) == str(error.__cause__)
                    assert not error.sent

    def test_within_the_block_a_lock_that_is_not_to_be_had_is_told_from_other_refusals(
        self, config: CoordinationConfig, sessions: Sessions
    ) -> None:
        query(config, 'CREATE TABLE public.v (i int)')
        with sessions.session() as holder, holder.cursor() as held:
            held.execute('LOCK TABLE public.v')
            with sessions.session() as connection, connection.cursor() as cursor:
                with pytest.raises(LockNotAvailable):
                    cursor.execute('LOCK TABLE public.v NOWAIT')
                connection.rollback()
            with (
                pytest.raises(StoreTimeout),
                sessions.session() as connection,
                connection.cursor() as cursor,
            ):
                cursor.execute('LOCK TABLE public.v NOWAIT')

    def test_an_error_of_another_connection_passes_through(self, sessions: Sessions) -> None:
        with pytest.raises(psycopg2.OperationalError) as caught, sessions.session():
            psycopg2.connect(host='127.0.0.1', port=1, connect_timeout=2)
        assert not isinstance(caught.value, DatabaseUnavailable)

    def test_a_black_hole_ends_a_call_in_time(self, config: CoordinationConfig) -> None:
        with Proxy(config.host, int(config.port)) as proxy:
            sessions = Sessions(
                dataclasses.replace(config, host=proxy.host, port=proxy.port),
                'jobsync test',
                Limits(0.5, 0.5, 1.0),
            )
            with sessions.session() as connection, connection.cursor() as cursor:
                cursor.execute('SELECT 1')
            proxy.switch(Mode.HOLD)
            began = time.monotonic()
            with (
                pytest.raises(StoreTimeout),
                sessions.session() as connection,
                connection.cursor() as cursor,
            ):
                cursor.execute('SELECT 1')
            assert 1.0 < time.monotonic() - began < 5
            proxy.heal()
            with sessions.session() as connection, connection.cursor() as cursor:
                cursor.execute('SELECT 1')
            sessions.close_all()
        eventually(
            lambda: (
                not [
                    thread for thread in threading.enumerate() if thread.name == 'jobsync-deadlines'
                ]
            )
        )

    def test_a_statement_that_takes_too_long_is_a_store_timeout_unless_it_is_the_users_own(
        self, config: CoordinationConfig
    ) -> None:
        sessions = Sessions(config, 'jobsync test', Limits(0.2, 0.2, 1.0))
        with (
            pytest.raises(StoreTimeout),
            sessions.session() as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute('SELECT pg_sleep(5)')
        with sessions.session(limited=False) as connection, connection.cursor() as cursor:
            cursor.execute('SET LOCAL statement_timeout = 0; SELECT pg_sleep(1.5)')
        with (
            pytest.raises(StatementCanceled),
            sessions.session(limited=False) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute('SELECT pg_sleep(5)')
        sessions.close_all()

    def test_many_threads_may_call_at_once(self, sessions: Sessions) -> None:
        answers: list[int] = []

        def call() -> None:
            for number in range(20):
                with sessions.session() as connection, connection.cursor() as cursor:
                    cursor.execute('SELECT %s', (number,))
                    answers.append((cursor.fetchone() or (-1,))[0])

        threads = [threading.Thread(target=call) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(answers) == sorted(list(range(20)) * 6)


def _insert_and_fail(cursor: psycopg2.extensions.cursor) -> None:
    cursor.execute('INSERT INTO public.t VALUES (2)')
    raise ZeroDivisionError


def _use(config: CoordinationConfig) -> int:
    sessions = Sessions(config, 'jobsync test')
    try:
        with sessions.session() as connection, connection.cursor() as cursor:
            cursor.execute('SELECT 1')
            return int((cursor.fetchone() or (0,))[0])
    finally:
        sessions.close_all()
