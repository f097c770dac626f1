"""The database is used by others too: what they create there never takes the place of what
JobSync's statements mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

import jobsync_core.store
from jobsync_core import CoordinationConfig, Job
from jobsync_core.errors import MissingTable, StatementRefused
from jobsync_core.store import deadline, options
from jobsync_core.store.connection import Connection
from jobsync_core.store.location import PINNED_PATH
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import FUNCTIONS, Tables
from tests.support.cluster import query
from tests.support.pgbouncer import PgBouncer
from tests.support.waiting import eventually
from tests.support.whole import Admin, admin_of, use_everything

MakeConfig = Callable[..., CoordinationConfig]

_OPERATORS = ('=', '<>', '<', '>', '<=', '>=', '+', '-', '*', '/', '||', '@>', '<@', '&&', '~', '^')
#: A copy of each function and operator of PostgreSQL that JobSync's statements could mean, which
#: raises; ahead of PostgreSQL's own on the path of everybody who does not pin his.
_TRAPS = """
CREATE SCHEMA trap;
GRANT USAGE ON SCHEMA trap TO PUBLIC;
DO $do$
DECLARE one record;
BEGIN
    FOR one IN SELECT DISTINCT p.proname AS name, oidvectortypes(p.proargtypes) AS arguments FROM
        pg_proc AS p
               WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.proname = ANY(%s) LOOP
        BEGIN
            EXECUTE format('CREATE FUNCTION trap.%%I(%%s) RETURNS text LANGUAGE plpgsql'
                ' AS $$ BEGIN RAISE ''trapped''; END $$',
                           one.name, one.arguments);
        EXCEPTION WHEN OTHERS THEN NULL; END;
    END LOOP;
    FOR one IN SELECT o.oprname AS name, format_type(o.oprleft, NULL) AS l, format_type(o.oprright,
        NULL) AS r FROM pg_operator AS o
               WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND o.oprname = ANY(%s) AND
                   o.oprleft <> 0 LOOP
        BEGIN
            EXECUTE format('CREATE OR REPLACE FUNCTION trap.operator_trap(%%s, %%s) RETURNS boolean'
                ' LANGUAGE plpgsql'
                           ' AS $$ BEGIN RAISE ''trapped''; END $$', one.l, one.r);
            EXECUTE format('CREATE OPERATOR trap.%%s (LEFTARG = %%s, RIGHTARG = %%s,'
                ' FUNCTION = trap.operator_trap)',
                           one.name, one.l, one.r);
        EXCEPTION WHEN OTHERS THEN NULL; END;
    END LOOP;
END $do$;
CREATE FUNCTION trap.concat(text, bigint) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped';
    END $$;
CREATE FUNCTION trap.make_interval(secs numeric) RETURNS interval LANGUAGE plpgsql AS $$ BEGIN RAISE
    'trapped'; END $$;
CREATE FUNCTION trap.lower(int4range) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped'; END
    $$;
CREATE FUNCTION trap.unnest(text[]) RETURNS SETOF text LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped';
    END $$;
"""


@pytest.fixture
def trapped(make_config: MakeConfig) -> Iterator[Callable[..., tuple[CoordinationConfig, Admin]]]:
    """A database in which every statement whose path is not pinned fails."""
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> tuple[CoordinationConfig, Admin]:
            config = make_config(**settings)
            sources = Path(jobsync_core.store.__file__).parent.rglob('*')
            text = ''.join(path.read_text() for path in sources if path.suffix in ('.py', '.sql'))
            names = sorted(set(re.findall(r'\b([a-z_0-9]+)\(', text)))
            admin = stack.enter_context(admin_of(config))
            admin(_TRAPS, names, list(_OPERATORS))
            admin(f'ALTER DATABASE "{config.dbname}" SET search_path = trap, pg_catalog, public')
            return config, admin

        yield make


@pytest.mark.parametrize('listen', [True, False])
def test_nothing_on_the_path_of_the_role_is_ever_called(
    trapped: Callable[..., tuple[CoordinationConfig, Admin]], listen: bool
) -> None:
    config, admin = trapped(listen=listen, appname='shop_', schema='public')
    for statement in (
        "SELECT concat('a'::text, 1::bigint)",
        'SELECT 1 = 1',
        "SELECT set_config('a.b', 'c', true)",
        'SELECT now()',
    ):
        with pytest.raises(psycopg2.Error, match='trapped'):
            query(config, statement)
    use_everything(config, admin)
    assert admin("SELECT count(*) > 0 FROM pg_proc WHERE pronamespace = 'trap'::regnamespace") == [
        (True,)
    ]


@pytest.mark.parametrize('listen', [True, False])
@pytest.mark.parametrize('schema', [None, 'shop'])
def test_every_statement_names_its_tables_with_their_schema_and_every_transaction_pins_its_path(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, listen: bool, schema: str | None
) -> None:
    config = make_config(listen=listen, appname='shop_', schema=schema)
    sent: list[str] = []
    original_send = Connection._send

    def record(query: str, begun: bool) -> None:
        sent.append(f'in a transaction: {query}' if begun else query)

    def send(self: Connection, sql: str, *args: Any) -> Any:
        record(sql, self._raw.get_transaction_status() != TRANSACTION_STATUS_IDLE)
        return original_send(self, sql, *args)

    class Recording(deadline.GuardedCursor):
        def execute(self, query: Any, vars: Any = None) -> None:
            if not self._prologue():
                record(query, self.connection.get_transaction_status() != TRANSACTION_STATUS_IDLE)
            super().execute(query, vars)

        def execute_first(self, query: str, vars: Any = None) -> None:
            record(query, False)
            super().execute_first(query, vars)

    monkeypatch.setattr(Connection, '_send', send)
    monkeypatch.setattr(deadline, 'GuardedCursor', Recording)
    with admin_of(config) as admin:
        use_everything(config, admin)
        place = schema or 'public'
        named = [
            re.findall(
                r'[^\s(]*\bshop_[a-z_]+"?', re.sub(r'INDEX IF NOT EXISTS "\w+"', '', statement)
            )
            for statement in sent
        ]
        loose = {
            name for names in named for name in names if not name.startswith(f'"{place}"."shop_')
        }
        assert {
            name for name in loose if not name.startswith('"shop_events')
        } == set()  # a channel has no schema
        assert sum(map(len, named)) > 300
        pinned = f"pg_catalog.set_config('search_path', '{PINNED_PATH}'"
        if not listen:
            firsts = [
                statement for statement in sent if not statement.startswith('in a transaction: ')
            ]
            users = (
                'SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE; SELECT '
                'pg_catalog.set_config'
            )
            bad = [
                one
                for one in firsts
                if pinned not in one
                and not one.startswith((users, 'BEGIN', 'INSERT INTO public.effect'))
            ]
            assert bad == []
        functions = admin(
            'SELECT proname::text, proconfig, prosrc FROM pg_proc WHERE pronamespace = '
            '%s::regnamespace AND starts_with(proname, %s)',
            place,
            'shop_',
        )
        assert {name for name, _, _ in functions} == {f'shop_{name}' for name in FUNCTIONS}
        for name, settings, source in functions:
            assert f'search_path={PINNED_PATH}' in settings, name
            assert set(re.findall(r'[^\s(]*\bshop_[a-z_]+', source)) <= {
                f'"{place}"."shop_{name}' for name in (*Tables('shop_').all, *FUNCTIONS)
            }


def test_the_fixture_would_notice_a_path_that_is_not_pinned(
    trapped: Callable[..., tuple[CoordinationConfig, Admin]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = trapped()
    monkeypatch.setattr(options.Limits, 'begin_session', lambda *args: 'SELECT')
    with pytest.raises(StatementRefused, match=r'trapped|operator does not exist'):
        create_schema(config)


class TestARoleThatMayCreateInPublic:
    @pytest.mark.parametrize('listen', [True, False])
    def test_does_not_become_superuser_by_a_function_of_a_name_that_statements_use(
        self, make_config: MakeConfig, listen: bool
    ) -> None:
        config = make_config(listen=listen)
        hostile = f'hostile_{config.dbname}'
        query(config, f'CREATE ROLE "{hostile}" LOGIN PASSWORD %s', ('x',))
        query(config, 'GRANT CREATE ON SCHEMA public TO PUBLIC')
        theirs = dataclasses.replace(config, user=hostile, password='x')
        for name, types, kind in (
            ('concat', 'text, bigint', 'text'),
            ('lower', 'int4range', 'int'),
            ('unnest', 'text[]', 'SETOF text'),
            ('make_interval', 'secs numeric', 'interval'),
            ('json_build_array', 'text, text, text', 'json'),
        ):
            query(
                theirs,
                f'''
                CREATE FUNCTION public.{name}({types}) RETURNS {kind} LANGUAGE plpgsql AS $$
                BEGIN
                    IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
                        ALTER ROLE "{hostile}" SUPERUSER;
                    END IF;
                    RETURN{' QUERY SELECT NULL::text' if kind.startswith('SETOF') else ' NULL'};
                END $$''',
            )
        query(
            theirs,
            'CREATE FUNCTION public.sync_finish_execution(text, int, text, text) RETURNS bool '
            'LANGUAGE sql AS $$ SELECT true $$',
        )
        with admin_of(config) as admin:
            use_everything(config, admin)
            assert admin('SELECT rolsuper FROM pg_roles WHERE rolname = %s', hostile) == [(False,)]
        query(
            config, "SELECT concat('a'::text, 1::bigint)"
        )  # who has not pinned his path does what they want
        assert query(config, 'SELECT rolsuper FROM pg_roles WHERE rolname = %s', (hostile,)) == [
            (True,)
        ]

    def test_does_not_put_tables_of_the_same_names_in_the_place_of_those_that_are_there(
        self, make_config: MakeConfig
    ) -> None:
        config = make_config()
        hostile = f'hostile_{config.dbname}'
        query(config, f'CREATE ROLE "{hostile}" LOGIN PASSWORD %s', ('x',))
        query(config, f'CREATE SCHEMA early AUTHORIZATION "{hostile}"')
        query(config, f'ALTER DATABASE "{config.dbname}" SET search_path = early, public')
        create_schema(dataclasses.replace(config, schema='public'))
        theirs = dataclasses.replace(config, user=hostile, password='x', schema='early')
        create_schema(theirs)
        with Job('n1', config, wait_on_enter=0) as job:
            assert len(job.my_tokens) == config.total_tokens
            assert query(config, 'SELECT name FROM public.sync_node') == [('n1',)]
            assert query(config, 'SELECT name FROM early.sync_node') == []


def test_temporary_tables_that_a_client_of_the_pooler_left_are_not_taken_for_ours(
    config: CoordinationConfig, make_pgbouncer: Callable[..., PgBouncer]
) -> None:
    pooler = make_pgbouncer(config, settings={'default_pool_size': '3'})
    pooled = dataclasses.replace(config, host=pooler.host, port=pooler.port, listen=False)
    create_schema(config)
    others = [
        psycopg2.connect(
            host=pooler.host,
            port=pooler.port,
            dbname=config.dbname,
            user=config.user,
            password=config.password,
        )
        for _ in range(3)
    ]
    with contextlib.ExitStack() as stack:
        for other in others:
            stack.enter_context(contextlib.closing(other))
            with other.cursor() as cursor:
                for name in ('node', 'cluster', 'assignment', 'execution', 'lock'):
                    cursor.execute(f'CREATE TEMP TABLE sync_{name} (LIKE public.sync_{name})')
                cursor.execute(
                    "SET statement_timeout = '7s'; SET default_transaction_isolation = serializable"
                )
        for other in others:
            other.commit()
    with Job('n1', pooled, wait_on_enter=0) as job:
        eventually(lambda: len(job.my_tokens) == config.total_tokens)
        with (
            job.once('key') as execution,
            execution.transaction() as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute('SHOW transaction_isolation')
            assert cursor.fetchone() == ('read committed',)
        assert query(config, 'SELECT name FROM public.sync_node') == [('n1',)]
        assert query(config, 'SELECT key, state FROM public.sync_execution') == [('key', 'done')]


def test_a_session_of_the_users_finds_his_tables_by_his_path_and_a_pinned_one_does_not(
    make_config: MakeConfig,
) -> None:
    for listen in (True, False):
        config = make_config(listen=listen)
        query(config, 'CREATE TABLE IF NOT EXISTS mine (i int)')
        sessions = Sessions(config, 'test')
        for users, limited in ((True, True), (True, False), (False, True)):
            with contextlib.ExitStack() as stack:
                if not users:
                    stack.enter_context(pytest.raises(MissingTable))
                with sessions.session(limited, users) as connection, connection.cursor() as cursor:
                    cursor.execute('SELECT * FROM mine')
        sessions.close_all()
