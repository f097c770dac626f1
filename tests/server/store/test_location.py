"""Where a cluster's tables are: in the schema that a setting names, or where they always were."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import jobsync_core
from jobsync_core import CoordinationConfig, Job
from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.store.connection import Connection
from jobsync_core.store.layout import MIGRATIONS, SCHEMA_VERSION
from jobsync_core.store.location import location_of
from jobsync_core.store.options import Keepalive
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from tests.support.cluster import query
from tests.support.waiting import eventually

MakeConfig = Callable[..., CoordinationConfig]


def names_of(config: CoordinationConfig) -> tuple[str, str, tuple[int, int]]:
    """What a process that begins now finds: a table's name, the channel and the key of the lock."""
    fresh = dataclasses.replace(config, connection_options={'connect_timeout': str(len(seen) + 10)})
    seen.append(fresh)
    sessions = Sessions(fresh, 'test')
    with sessions.session():
        tables = Tables.of(fresh)
        found = tables.node, tables.channel, tables.advisory
    sessions.close_all()
    return found


seen: list[CoordinationConfig] = []


def test_an_installation_from_before_goes_on_where_it_is_with_its_channel_and_its_lock(
    make_config: MakeConfig,
) -> None:
    config = make_config()
    query(config, 'CREATE SCHEMA app')
    query(config, f'ALTER DATABASE "{config.dbname}" SET search_path = app, public')
    old = [
        migration.sql(Tables('sync_', 'app')).replace('"app".', '')
        for migration in MIGRATIONS
        if migration.number < 6
    ]
    query(config, 'SET search_path TO app, public;' + ''.join(old) + 'RESET search_path')
    plain = Tables('sync_')
    before = '"app"."sync_node"', plain.channel, plain.advisory
    assert names_of(config) == before
    for number, named in enumerate((config, dataclasses.replace(config, schema='app'), config)):
        create_schema(named)
        assert names_of(named) == before
        with Job('n1', named, wait_on_enter=0) as job, job.once(f'key {number}'):
            assert len(job.my_tokens) == config.total_tokens
    assert query(config, 'SELECT schema_version, scope FROM app.sync_cluster') == [
        (SCHEMA_VERSION, '')
    ]
    assert query(config, "SELECT to_regclass('public.sync_cluster') IS NULL") == [(True,)]


def test_a_new_cluster_has_the_same_names_however_its_schema_is_found(
    make_config: MakeConfig,
) -> None:
    config = make_config()
    query(config, f'ALTER DATABASE "{config.dbname}" SET search_path = app, public')
    named = dataclasses.replace(config, schema='APP')
    create_schema(named)
    assert names_of(config) == names_of(named)
    assert names_of(named)[1] != Tables('sync_').channel
    with Job('n1', config, wait_on_enter=0) as one, Job('n2', named, wait_on_enter=0) as two:
        eventually(lambda: len(one.my_tokens) == len(two.my_tokens) == config.total_tokens // 2)


def test_two_schemas_of_one_database_are_two_clusters(make_config: MakeConfig) -> None:
    configs = [dataclasses.replace(make_config(), schema=name) for name in ('public', 'one', 'two')]
    with (
        Job('n', configs[0], wait_on_enter=0) as a,
        Job('n', configs[1], wait_on_enter=0) as b,
        Job('n', configs[2], wait_on_enter=0) as c,
    ):
        assert [len(job.my_tokens) for job in (a, b, c)] == [configs[0].total_tokens] * 3
        a.register_lock('task', 'n', 'here alone')
        assert (len(a.list_locks()), len(b.list_locks()), len(c.list_locks())) == (1, 0, 0)
        with a.once('key'), b.once('key'), c.once('key'):
            pass
    tables = [names_of(config) for config in configs]
    assert (
        len({name for name, _, _ in tables})
        == len({channel for _, channel, _ in tables})
        == len({key for _, _, key in tables})
        == 3
    )
    assert tables[0][1:] == (Tables('sync_').channel, Tables('sync_').advisory)


def test_a_channel_of_the_longest_names_fits() -> None:
    tables = Tables('x' * 40, 'y' * 63, 'y' * 63)
    assert len(tables.channel) < 64
    assert tables.channel != Tables('x' * 40, 'z' * 63, 'z' * 63).channel


def test_a_path_without_a_schema_is_told_with_the_remedy(make_config: MakeConfig) -> None:
    config = make_config()
    query(config, f'ALTER DATABASE "{config.dbname}" SET search_path = nowhere')
    with pytest.raises(JobSyncError, match=r'nowhere.*init-db'):
        create_schema(config)


@pytest.mark.parametrize(
    'name', ['', 'a b', 'a"b', 'pg_catalog', 'information_schema', 'ä', 'x' * 64, '1a', 7]
)
def test_what_cannot_be_a_schema_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match='schema='):
        CoordinationConfig(schema=name)


def test_the_schema_comes_from_the_environment_too() -> None:
    assert CoordinationConfig.from_env({'JOBSYNC_SCHEMA': 'Workers'}).schema == 'workers'
    assert location_of(CoordinationConfig(schema='workers')).schema == 'workers'


def test_a_server_that_cannot_look_for_closed_connections_is_not_asked_to(
    config: CoordinationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Keepalive.settings

    def settings(self: Keepalive) -> dict[str, str]:
        return {
            **original(self),
            **({'client_connection_check_interval': '-5'} if self.checks else {}),
        }

    monkeypatch.setattr(Keepalive, 'settings', settings)
    Connection.open(config, 'test').close()
    with Job('n1', config, wait_on_enter=0) as job:
        with (
            job.once('key') as execution,
            execution.transaction() as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute('SHOW tcp_keepalives_count')
            assert cursor.fetchone() == ('3',)


def test_no_part_of_the_package_forgets_the_schema() -> None:
    root = Path(jobsync_core.__file__).parents[1]
    sources = [
        path
        for package in ('jobsync_core', 'jobsync_celery', 'jobsync_dramatiq')
        for path in (root / package).rglob('*.py')
    ]
    made = {
        f'{path.relative_to(root)}: {found}'
        for path in sources
        for found in re.findall(
            r'\bTables\((?!self|appname)[^)]*\)', path.read_text(encoding='utf-8')
        )
    }
    assert made == {
        "jobsync_core/cli/main.py: Tables(config.appname, config.schema or 'public')"
    }  # printing needs no database
