"""What a user may get wrong is told at the earliest moment, by value and remedy; nothing hangs, and
no password is shown.
"""

from __future__ import annotations

import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobsync_core import (
    ConfigMismatch,
    ConfigurationError,
    CoordinationConfig,
    DatabaseUnavailable,
    DuplicateNodeName,
    InvalidTaskId,
    Job,
    JobSyncError,
    SchemaConflict,
    Task,
)
from tests.support.cluster import query
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

MakeConfig = Callable[..., CoordinationConfig]


def node(config: CoordinationConfig, name: str = 'n1', **arguments: Any) -> Job:
    """A Job without a grace period."""
    return Job(name, config, **{'wait_on_enter': 0, **arguments})


class TestSettings:
    @pytest.mark.parametrize(
        ('setting', 'value'),
        [
            (name, value)
            for name in (
                'total_tokens',
                'minimum_nodes',
                'heartbeat_interval_sec',
                'heartbeat_timeout_sec',
                'rebalance_check_interval_sec',
                'connect_timeout_sec',
            )
            for value in (0, -1, 'many', None, True, float('nan'))
        ]
        + [
            ('total_tokens', 1_000_001),
            ('total_tokens', 2.5),
            ('release_timeout_sec', -1),
            ('hash_function', 'sha1'),
            ('hash_function', None),
            ('hash_function', ''),
            ('port', 0),
            ('port', 65_536),
            ('port', 'x'),
            ('port', None),
            ('port', '1,2'),
            ('host', ''),
            ('host', None),
            ('dbname', ''),
            ('user', ''),
            ('host', 'a\0b'),
        ],
    )
    def test_a_wrong_value_is_named(self, setting: str, value: object) -> None:
        with pytest.raises(ConfigurationError) as caught:
            CoordinationConfig(**{setting: value})  # type: ignore[arg-type]
        assert setting in str(caught.value)
        assert repr(value) in str(caught.value)
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize('interval', [15, 16, 14])
    def test_a_timeout_that_leaves_no_room_for_the_interval(self, interval: float) -> None:
        with pytest.raises(
            ConfigurationError, match=f'heartbeat_timeout_sec=15.*heartbeat_interval_sec={interval}'
        ):
            CoordinationConfig(heartbeat_interval_sec=interval, heartbeat_timeout_sec=15)

    @pytest.mark.parametrize(
        'appname',
        [
            'my-app_',
            'a"b',
            "a'b",
            'x' * 70,
            'x" CASCADE; DROP TABLE users; --',
            '1st_',
            '',
            'sp ace',
            'ünï_',
            'a\0',
            'a.b',
            'a\n',
        ],
    )
    def test_an_appname_that_is_no_identifier(self, appname: str) -> None:
        with pytest.raises(ConfigurationError, match='appname'):
            CoordinationConfig(appname=appname)

    def test_an_appname_is_folded_as_postgresql_folds_names(self, make_config: MakeConfig) -> None:
        config = make_config(appname='MyApp_')
        with node(config):
            assert query(config, "SELECT to_regclass('MyApp_node') IS NOT NULL") == [(True,)]

    @pytest.mark.parametrize('appname', ['x' * 40, 'user', '_', 'select'])
    def test_any_identifier_works(self, make_config: MakeConfig, appname: str) -> None:
        config = make_config(appname=appname)
        with node(config) as job:
            job.add_task(1)
            job.register_lock(2, '%')
            job.write_audit()
            assert len(job.get_audit()) == 1

    @pytest.mark.parametrize(
        ('argument', 'value'),
        [
            ('node_name', ''),
            ('node_name', None),
            ('node_name', 'a,b'),
            ('node_name', ' a'),
            ('node_name', 'a\0'),
            ('node_name', 'a\nb'),
            ('node_name', 'x' * 201),
            ('node_name', 7),
            ('coordination_config', 'postgresql://localhost/x'),
            ('date', 'today'),
            ('date', 5),
            ('wait_on_enter', -1),
            ('wait_on_enter', 'long'),
            ('wait_on_enter', float('inf')),
            ('wait_on_exit', -1),
            ('wait_on_exit', None),
            ('lock_provider', 'locks'),
            ('on_rebalance', 1),
            ('on_release', []),
            ('weight', 0),
            ('weight', -1),
            ('weight', 'heavy'),
        ],
    )
    def test_a_wrong_argument_of_job_is_named(self, argument: str, value: object) -> None:
        with pytest.raises(ConfigurationError, match=argument):
            Job(**{'node_name': 'n1', 'coordination_config': CoordinationConfig(), argument: value})  # type: ignore[arg-type]


class TestLocks:
    @pytest.mark.parametrize(
        'lock',
        [
            (),
            (1,),
            (1, '%'),
            (1, '%', 'why', 1, 2),
            'text',
            5,
            None,
            {'task_id': 1},
            (1, '', 'why'),
            (1, [], 'why'),
            (1, [''], 'why'),
            (1, 5, 'why'),
            (1, ['%', 5], 'why'),
            (1, None, 'why'),
            (1, b'%', 'why'),
            (1, 'a\0', 'why'),
            (1, 'a\\', 'why'),
            (None, '%', 'why'),
            ([], '%', 'why'),
            ('a\0b', '%', 'why'),
            (1, '%', 5),
            (1, '%', 'a\0'),
            (1, '%', 'why', 0),
            (1, '%', 'why', -1),
            (1, '%', 'why', 'soon'),
            (1, '%', 'why', float('nan')),
            (1, '%', 'why', float('inf')),
        ],
        ids=repr,
    )
    def test_a_malformed_lock_registers_nothing(
        self, config: CoordinationConfig, lock: object
    ) -> None:
        with node(config) as job:
            with pytest.raises((ConfigurationError, InvalidTaskId)):
                job.register_locks_bulk([('good', '%', 'why'), lock])  # type: ignore[list-item]
            assert job.list_locks() == []

    @pytest.mark.parametrize('locks', ['text', 5, None])
    def test_locks_that_are_no_list(self, config: CoordinationConfig, locks: Any) -> None:
        with node(config) as job, pytest.raises(ConfigurationError):
            job.register_locks_bulk(locks)

    def test_an_error_in_a_lock_provider_comes_out_of_enter(
        self, config: CoordinationConfig
    ) -> None:
        def provider(job: Job) -> None:
            job.register_locks_bulk([(1, 2, 3)])

        with pytest.raises(ConfigurationError), node(config, lock_provider=provider):
            pytest.fail('entered')


class TestTaskIds:
    @pytest.mark.parametrize(
        'task_id',
        [None, [], {}, set(), 'a\0b', 'x' * 2001, '\ud800', Task(None), Task('\0')],
        ids=repr,
    )
    def test_an_id_that_cannot_be_stored(self, config: CoordinationConfig, task_id: Any) -> None:
        with node(config) as job:
            for use in (
                job.can_claim_task,
                job.add_task,
                job.set_claim,
                job.owner_of,
                job.task_to_token,
            ):
                if use == job.set_claim and isinstance(task_id, (list, dict, set)):
                    continue  # several tasks: none
                with pytest.raises(InvalidTaskId):
                    use(task_id)
            assert job.get_audit() == []
            job.write_audit()

    @pytest.mark.parametrize(
        'task_id',
        [
            '',
            "'; DROP TABLE x; --",
            '%s %(a)s',
            '日本',
            '\U0001f600',
            0,
            -1,
            1.5,
            True,
            ('a', 1),
            b'bytes',
            '\\',
            '{}',
        ],
        ids=repr,
    )
    def test_any_other_id_works(self, config: CoordinationConfig, task_id: Any) -> None:
        with node(config) as job:
            assert job.can_claim_task(task_id)
            job.add_task(task_id)
            job.write_audit()
            assert [row['task_id'] for row in job.get_audit()] == [str(task_id)]


class TestCluster:
    @pytest.mark.parametrize(
        'setting',
        [{'total_tokens': 500}, {'hash_function': 'md5'}],
        ids=lambda setting: next(iter(setting)),
    )
    def test_settings_that_differ_from_the_live_clusters(
        self, config: CoordinationConfig, setting: dict[str, Any]
    ) -> None:
        with node(config) as first:
            other = dataclasses.replace(config, **setting)
            with pytest.raises(ConfigMismatch) as caught, node(other, 'n2'):
                pytest.fail('entered')
            for value in (*setting.values(), getattr(config, next(iter(setting)))):
                assert str(value) in str(caught.value)
            assert len(first.my_tokens) == config.total_tokens
        # The first node of an empty cluster forms it anew.
        with node(other, 'n2') as second:
            assert len(second.my_tokens) == other.total_tokens

    def test_the_name_of_a_live_node(self, config: CoordinationConfig) -> None:
        with node(config) as first:
            with pytest.raises(DuplicateNodeName, match="'n1'"), node(config):
                pytest.fail('entered')
            assert len(first.my_tokens) == config.total_tokens
            assert first.am_i_healthy()

    def test_tables_of_another_program(self, config: CoordinationConfig) -> None:
        query(config, 'CREATE TABLE "{}node" (name varchar PRIMARY KEY, something int)')
        with pytest.raises(SchemaConflict, match='appname'), node(config):
            pytest.fail('entered')
        assert query(config, 'SELECT * FROM "{}node"') == []


def enter_fails(config: CoordinationConfig, limit: float, **arguments: Any) -> DatabaseUnavailable:
    """Entering fails within `limit` seconds; the error."""
    caught: list[BaseException] = []

    def enter() -> None:
        try:
            with node(config, **arguments):
                pass
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    thread.join(limit)
    assert not thread.is_alive(), f'still entering after {limit} s'
    (error,) = caught
    assert isinstance(error, DatabaseUnavailable), error
    return error


class TestDatabase:
    def test_a_refused_connection_fails_at_once(self, config: CoordinationConfig) -> None:
        with socket.socket() as placeholder:
            placeholder.bind(('127.0.0.1', 0))
            port = placeholder.getsockname()[1]
            error = enter_fails(dataclasses.replace(config, host='127.0.0.1', port=port), 10)
        assert str(port) in str(error)

    @pytest.mark.parametrize(
        'mode',
        [Mode.HOLD, Mode.SWALLOW, Mode.HOLD_TO_SERVER, Mode.HOLD_TO_CLIENT],
        ids=lambda mode: str(mode.name).lower(),
    )
    def test_a_black_hole_fails_within_connect_timeout(
        self, config: CoordinationConfig, mode: Mode
    ) -> None:
        with Proxy(config.host, int(config.port)) as proxy:
            proxy.switch(mode)
            through = dataclasses.replace(
                config, host=proxy.host, port=proxy.port, connect_timeout_sec=2
            )
            began = time.monotonic()
            enter_fails(through, 30)
            assert time.monotonic() - began < 10, 'far more than connect_timeout_sec'

    @pytest.mark.parametrize('heals', [True, False], ids=['heals', 'stays broken'])
    def test_a_network_that_fails_during_the_grace_period(
        self, make_config: MakeConfig, heals: bool
    ) -> None:
        """A short failure is got over; after the longer of heartbeat timeout and wait_on_enter
        entering gives up.
        """
        config = make_config(heartbeat_timeout_sec=3)
        failures: list[Exception] = []
        with Proxy(config.host, int(config.port)) as proxy:
            job = node(
                dataclasses.replace(
                    config, host=proxy.host, port=proxy.port, connect_timeout_sec=1
                ),
                wait_on_enter=1.0,
            )

            def enter() -> None:
                try:
                    job.__enter__()
                except DatabaseUnavailable as error:
                    failures.append(error)

            entering = threading.Thread(target=enter, daemon=True)
            entering.start()
            eventually(
                lambda: (
                    query(config, """SELECT to_regclass('"{}cluster"') IS NOT NULL""") == [(True,)]
                )
            )
            eventually(lambda: query(config, 'SELECT count(*) FROM "{}node"') == [(1,)])
            proxy.switch(Mode.HOLD)
            if heals:
                held = time.monotonic()
                eventually(lambda: time.monotonic() > held + 1.2)
                assert entering.is_alive()
                proxy.heal()
            entering.join(30)
            assert not entering.is_alive()
            if heals:
                assert not failures
                assert job.can_claim_task(1)
                job.__exit__(None, None, None)
            else:
                assert len(failures) == 1

    def test_api_calls_fail_in_time_while_the_network_is_a_black_hole(
        self, config: CoordinationConfig
    ) -> None:
        with Proxy(config.host, int(config.port)) as proxy:
            through = dataclasses.replace(
                config, host=proxy.host, port=proxy.port, connect_timeout_sec=1
            )
            with node(through) as job:
                job.add_task('before')
                proxy.switch(Mode.HOLD)
                for use in (
                    lambda: job.add_task('x'),
                    job.list_locks,
                    job.get_active_nodes,
                    lambda: job.owner_of('x'),
                    job.get_audit,
                ):
                    began = time.monotonic()
                    with pytest.raises(DatabaseUnavailable):
                        use()
                    assert time.monotonic() - began < 10
                assert not job.am_i_healthy()
                assert not job.can_claim_task(1)
                assert job.get_coordination_status()['healthy'] is False
                proxy.heal()
                eventually(lambda: job.can_claim_task(1), timeout=20)
                job.add_task('after')

    def test_leaving_in_a_black_hole_is_bounded(self, config: CoordinationConfig) -> None:
        with Proxy(config.host, int(config.port)) as proxy:
            through = dataclasses.replace(
                config,
                host=proxy.host,
                port=proxy.port,
                connect_timeout_sec=1,
                release_timeout_sec=1,
            )
            job = node(through)
            job.__enter__()
            proxy.switch(Mode.HOLD)
            began = time.monotonic()
            job.__exit__(None, None, None)
            assert time.monotonic() - began < 15

    def test_a_database_that_does_not_exist(self, config: CoordinationConfig) -> None:
        error = enter_fails(dataclasses.replace(config, dbname='no_such_database'), 10)
        assert 'no_such_database' in str(error)

    def test_a_role_without_rights_is_told_which_right(self, config: CoordinationConfig) -> None:
        query(
            config,
            "DO $$ BEGIN CREATE ROLE poor LOGIN PASSWORD 'poor'; EXCEPTION WHEN duplicate_object "
            'THEN NULL; END $$',
        )
        query(config, 'REVOKE CREATE ON SCHEMA public FROM PUBLIC')
        with (
            pytest.raises(JobSyncError, match='permission denied'),
            node(dataclasses.replace(config, user='poor', password='poor')),
        ):
            pytest.fail('entered')


class TestPasswords:
    PASSWORD = 'p@ss:w/o%r#d?&=\' "\\ü{}'

    @pytest.fixture
    def secret(self, config: CoordinationConfig) -> CoordinationConfig:
        """A config whose role has a password full of trouble, which the server checks."""
        name = f'secretive_{config.dbname[:40]}'
        query(config, f'DROP ROLE IF EXISTS "{name}"')
        query(config, f'CREATE ROLE "{name}" LOGIN SUPERUSER PASSWORD %s', (self.PASSWORD,))
        return dataclasses.replace(config, user=name, password=self.PASSWORD)

    def test_every_character_works(self, secret: CoordinationConfig) -> None:
        with node(secret) as job:
            job.add_task(1)
            assert job.list_locks() == []

    def test_is_never_shown(
        self,
        secret: CoordinationConfig,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        caplog.set_level(logging.DEBUG)
        shown = [repr(secret), str(secret)]
        for broken in (
            dataclasses.replace(secret, dbname='no_such_database'),
            dataclasses.replace(secret, port=1),
            dataclasses.replace(secret, host='no-such-host.invalid', connect_timeout_sec=2),
            dataclasses.replace(secret, user='no_such_role'),
            dataclasses.replace(secret, connection_options={'sslmode': 'nonsense'}),
        ):
            with pytest.raises(JobSyncError) as caught, node(broken):
                pytest.fail('entered')
            error: BaseException | None = caught.value
            while error is not None:
                if not type(error).__module__.startswith(
                    'tests.'
                ):  # another test's error may hang on to the end of the chain
                    shown += [str(error), repr(error)]
                error = error.__cause__ or error.__context__
        with node(secret) as job:
            shown += [repr(job), str(job.get_coordination_status()), str(job.get_active_nodes())]
        output = capfd.readouterr()
        shown += [caplog.text, output.out, output.err]
        for text in shown:
            assert self.PASSWORD not in text
            assert 'p@ss' not in text

    def test_a_url_with_quoted_characters(self, secret: CoordinationConfig) -> None:
        from urllib.parse import quote

        login = f'{quote(secret.user)}:{quote(self.PASSWORD, safe="")}'
        url = f'postgresql://{login}@{secret.host}:{secret.port}/{quote(secret.dbname)}'
        read = CoordinationConfig.from_url(url)
        assert (read.user, read.password, read.dbname) == (
            secret.user,
            self.PASSWORD,
            secret.dbname,
        )
        with node(read) as job:
            assert job.can_claim_task(1)
