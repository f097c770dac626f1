"""The role of `jobsync init-db --role` can do all that a node does, and nothing else; of each right
that it lacks the doctor tells.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from urllib.parse import quote

import psycopg2
import pytest
from click.testing import CliRunner, Result

from jobsync_core import CoordinationConfig
from jobsync_core.cli.main import jobsync
from jobsync_core.errors import ConfigurationError, JobSyncError, MissingPrivilege
from jobsync_core.store import rights
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from tests.support.cluster import query
from tests.support.whole import admin_of, use_everything

MakeConfig = Callable[..., CoordinationConfig]


def run(config: CoordinationConfig, *words: str) -> Result:
    login = f'{quote(config.user)}:{quote(config.password or "")}'
    url = f'postgresql://{login}@{config.host}:{config.port}/{config.dbname}'
    schema = {'JOBSYNC_SCHEMA': config.schema} if config.schema else {}
    environment = {'JOBSYNC_DATABASE_URL': url, 'JOBSYNC_APPNAME': config.appname, **schema}
    return CliRunner(env=environment).invoke(jobsync, list(words))


@pytest.fixture
def make_role(
    make_config: MakeConfig,
) -> Iterator[Callable[..., tuple[CoordinationConfig, CoordinationConfig]]]:
    """A database and its administrator, and the role that init-db has made there. Everybody else
    may do nothing in it.
    """
    made: list[CoordinationConfig] = []

    def make(**settings: object) -> tuple[CoordinationConfig, CoordinationConfig]:
        admin = make_config(**settings)
        role = f'node_{admin.dbname}'
        made.append(admin)
        query(admin, f'REVOKE ALL ON DATABASE "{admin.dbname}" FROM PUBLIC')
        query(admin, 'REVOKE ALL ON SCHEMA public FROM PUBLIC')
        query(admin, 'ALTER DEFAULT PRIVILEGES REVOKE ALL ON FUNCTIONS FROM PUBLIC')
        for _ in range(2):
            result = run(admin, 'init-db', '--role', role)
            assert result.exit_code == 0, result.output
        query(admin, f'ALTER ROLE "{role}" PASSWORD %s', ('x',))
        return admin, dataclasses.replace(admin, user=role, password='x')

    yield make
    for admin in made:
        query(admin, f'DROP OWNED BY "node_{admin.dbname}" CASCADE')
        query(admin, f'DROP ROLE "node_{admin.dbname}"')


def start(role: CoordinationConfig) -> None:
    """Look at the tables as the first Job of a process does: those that follow at once do not look
    again.
    """
    sessions = Sessions(role, 'test')
    try:
        with sessions.session() as connection:
            create_schema(connection, role)
    finally:
        sessions.close_all()


@pytest.mark.parametrize('settings', [{}, {'schema': 'workers', 'listen': False}])
def test_that_role_is_enough_for_nodes_plugins_and_commands_and_may_do_nothing_else(
    make_role: Callable[..., tuple[CoordinationConfig, CoordinationConfig]],
    settings: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    admin, role = make_role(**settings)
    schema = admin.schema or 'public'
    with admin_of(admin) as run_as_admin:
        if schema != 'public':  # for the table of effects alone
            run_as_admin(f'GRANT USAGE ON SCHEMA public TO "{role.user}"')
        use_everything(role, run_as_admin)
    assert 'lacks' not in caplog.text
    for statement in (
        f'CREATE TABLE "{schema}".mine (i int)',
        f'DROP TABLE "{schema}".sync_node',
        f'TRUNCATE "{schema}".sync_audit',
        'CREATE SCHEMA mine',
        'CREATE TEMP TABLE mine (i int)',
        f'ALTER TABLE "{schema}".sync_node ADD COLUMN i int',
        'CREATE ROLE another',
        "SELECT pg_read_file('/etc/passwd')",
    ):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            query(role, statement)
    assert query(
        admin,
        'SELECT rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls FROM pg_roles '
        'WHERE rolname = %s',
        (role.user,),
    ) == [(False,) * 5]
    result = run(role, 'doctor')
    assert 'rights: all that a node needs\n' in result.output, result.output


def test_of_each_single_right_that_is_taken_away_the_doctor_tells(
    make_role: Callable[..., tuple[CoordinationConfig, CoordinationConfig]],
) -> None:
    admin, role = make_role()
    wanted = rights.needed(Tables(role.appname), role.dbname)
    assert {right.kind for right in wanted} == {'DATABASE', 'SCHEMA', 'TABLE', 'FUNCTION'}
    assert {right.name for right in wanted} > {
        'sync_schedule',
        'sync_queue',
        'sync_token',
        'sync_begin_execution',
        'public',
    }
    for right in wanted:
        query(admin, f'REVOKE {right.privilege} ON {right.kind} {right.thing} FROM "{role.user}"')
        result = run(role, 'doctor')
        assert result.exit_code == 1, right
        if right.kind == 'DATABASE':
            assert 'connection' in result.output and 'CONNECT' in result.output
        else:
            kind = '' if right.kind == 'TABLE' else f'{right.kind.lower()} '
            (line,) = (line for line in result.output.splitlines() if 'lacking' in line)
            assert line.endswith(f'rights: lacking: {right.privilege} on {kind}{right.thing}'), line
        query(admin, f'GRANT {right.privilege} ON {right.kind} {right.thing} TO "{role.user}"')
    assert run(role, 'doctor').exit_code == 0


def test_a_node_whose_role_lacks_something_says_what_at_its_start(
    make_role: Callable[..., tuple[CoordinationConfig, CoordinationConfig]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    admin, role = make_role()
    query(admin, f'REVOKE DELETE ON public.sync_audit FROM "{role.user}"')
    with caplog.at_level(logging.WARNING):
        start(role)
    assert (
        'lacks DELETE on "public"."sync_audit"' in caplog.text and 'init-db --role' in caplog.text
    )
    query(admin, f'REVOKE SELECT ON public.sync_cluster FROM "{role.user}"')
    with pytest.raises(
        JobSyncError,
        match=r'permission denied.*lacks SELECT on "public"."sync_cluster"; DELETE on '
        r'"public"."sync_audit"',
    ):
        start(role)


def test_row_level_security_that_hides_rows_is_an_error_and_the_doctor_names_it(
    make_role: Callable[..., tuple[CoordinationConfig, CoordinationConfig]],
) -> None:
    admin, role = make_role()
    query(admin, 'ALTER TABLE public.sync_node ENABLE ROW LEVEL SECURITY')
    result = run(role, 'doctor')
    assert (
        result.exit_code == 1
        and 'row-level security hides rows of "public"."sync_node"' in result.output
    )
    sessions = Sessions(role, 'test')
    with (
        pytest.raises(MissingPrivilege),
        sessions.session() as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute('SELECT * FROM public.sync_node')
    sessions.close_all()


def test_the_printed_statements_make_the_same_role_and_need_no_database(
    make_config: MakeConfig,
) -> None:
    config = make_config(schema='workers')
    nowhere = dataclasses.replace(config, host='192.0.2.1')
    role = f'node_{config.dbname}'
    printed = run(nowhere, 'init-db', '--role', role, '--sql')
    assert printed.exit_code == 0, printed.output
    for _ in range(2):
        query(config, printed.output.replace('%', '%%'))
    query(config, f'ALTER ROLE "{role}" PASSWORD %s', ('x',))
    theirs = dataclasses.replace(config, user=role, password='x')
    create_schema(theirs)
    assert run(theirs, 'doctor').exit_code == 0
    assert query(config, 'SELECT scope FROM workers.sync_cluster') == [('workers',)]
    query(config, f'DROP OWNED BY "{role}" CASCADE')
    query(config, f'DROP ROLE "{role}"')


def test_whoever_may_not_grant_is_told_so_and_an_odd_role_is_refused(
    make_role: Callable[..., tuple[CoordinationConfig, CoordinationConfig]],
) -> None:
    admin, role = make_role()
    other = f'other_{admin.dbname}'
    assert run(role, 'init-db', '--role', other).exit_code == 1  # nor make one
    query(admin, f'CREATE ROLE "{other}"')
    result = run(role, 'init-db', '--role', other)
    query(admin, f'DROP ROLE "{other}"')
    assert result.exit_code == 1 and 'may not grant CONNECT on database' in result.output
    for name in ('', 'pg_nodes', 'public', 'a\\b', 'a\nb', 'x' * 64):
        with pytest.raises(ConfigurationError):
            rights.check_role(name)
        assert run(admin, 'init-db', '--role', name, '--sql').exit_code == 1


def test_a_superuser_and_a_schema_that_is_open_to_all_are_remarked(
    config: CoordinationConfig,
) -> None:
    create_schema(config)
    query(config, 'GRANT CREATE ON SCHEMA public TO PUBLIC')
    result = run(config, 'doctor')
    assert result.exit_code == 0
    assert (
        'is a superuser' in result.output
        and 'REVOKE CREATE ON SCHEMA public FROM PUBLIC' in result.output
    )


def test_a_role_that_may_not_ask_for_the_history_is_warned_of_failovers(
    make_role: Callable[..., tuple[CoordinationConfig, CoordinationConfig]],
) -> None:
    admin, role = make_role()
    assert 'ok   history' in run(role, 'doctor').output
    query(admin, 'REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC')
    result = run(role, 'doctor')
    assert result.exit_code == 0
    assert (
        f'GRANT EXECUTE ON FUNCTION pg_catalog.pg_control_system() TO {role.user}' in result.output
    )
