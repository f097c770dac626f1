"""One completion, one effect: in transactions of the user's, whatever becomes of a commit's answer
and whatever the user sets in them.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import psycopg
import psycopg2
import psycopg2.extras
import pytest
import sqlalchemy
import sqlalchemy.orm

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import (
    CompletedAlready,
    ConfigurationError,
    DatabaseUnavailable,
    DuplicateExecution,
    JobSyncError,
    NotCommitted,
)
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.execution import Execution, current_execution
from jobsync_core.ledger.once import exactly_once, once
from jobsync_core.store.executions import ExecutionStore
from jobsync_core.store.statements import catalog
from jobsync_core.store.transactions import _ENDING, TransactionConnection
from tests.support import attempts as by_hand
from tests.support.ledger_process import connect
from tests.support.ledgers import effects, insert, state_of
from tests.support.rows import Rows


@pytest.fixture(params=[True, False], ids=['sessions', 'behind a pooler'])
def config(
    make_config: Callable[..., CoordinationConfig], request: pytest.FixtureRequest
) -> CoordinationConfig:
    return make_config(listen=request.param)


def address(config: CoordinationConfig) -> str:
    """The database as a URL without a driver."""
    return f'://{config.user}:{config.password}@{config.host}:{config.port}/{config.dbname}'


class LosesReplies:
    """Commits of transaction() go through, and their answers are lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        commit = TransactionConnection.commit
        left = [None] * count

        def lose(connection: TransactionConnection) -> None:
            commit(connection)
            if left:
                left.pop()
                connection.close()
                raise psycopg2.OperationalError('server closed the connection unexpectedly')

        monkeypatch.setattr(TransactionConnection, 'commit', lose)


def write_again(execution: Execution) -> None:
    """What a careful user writes: once more, where the database was away."""
    for _ in range(3):
        try:
            with execution.transaction() as connection:
                insert(connection)
            return
        except DatabaseUnavailable:
            continue


class TestALostAnswer:
    def test_a_transaction_that_is_tried_again_after_its_commit_went_through_has_no_second_effect(
        self, ledger: ClusterLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        LosesReplies(monkeypatch, 1)

        def attempt() -> None:
            with once(ledger, 'k') as execution:
                execution.result = 'first'
                write_again(execution)

        with pytest.raises(CompletedAlready, match='went through') as caught:
            attempt()
        assert (vars(caught.value)['key'], vars(caught.value)['result']) == ('k', 'first')
        assert (effects(rows), state_of(rows, 'k')) == (1, 'done')
        with pytest.raises(DuplicateExecution):
            by_hand.begin(ledger, 'k', 60)

    def test_the_attempt_of_a_function_counts_as_done_and_has_the_result_of_the_first_transaction(
        self, ledger: ClusterLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        LosesReplies(monkeypatch, 1)

        @exactly_once(key='{number}', scope='', on_duplicate='result')
        def pay(number: int) -> str:
            execution = current_execution()
            execution.result = execution.result or 'paid'
            write_again(execution)
            return 'not reached'

        @exactly_once(key='{number}', scope='', on_duplicate='result')
        async def pay_later(number: int) -> str:
            return pay.__wrapped__(number)  # type: ignore[attr-defined,no-any-return]

        assert (pay(1), pay(1)) == ('paid', 'paid')
        LosesReplies(monkeypatch, 1)
        assert (asyncio.run(pay_later(2)), asyncio.run(pay_later(2))) == ('paid', 'paid')
        assert effects(rows) == 2
        assert rows.run(f'SELECT state, attempts FROM {rows.tables.execution}') == [
            ('done', 1),
            ('done', 1),
        ]

    def test_a_commit_that_did_not_go_through_is_made_again(
        self, ledger: ClusterLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit, left = TransactionConnection.commit, [None]

        def break_off(connection: TransactionConnection) -> None:
            if left:
                left.pop()
                connection.close()
                raise psycopg2.OperationalError('server closed the connection unexpectedly')
            commit(connection)

        monkeypatch.setattr(TransactionConnection, 'commit', break_off)
        with once(ledger, 'k') as execution:
            write_again(execution)
        assert (effects(rows), state_of(rows, 'k')) == (1, 'done')

    def test_the_same_with_complete(self, ledger: ClusterLedger, rows: Rows, own: Any) -> None:
        @exactly_once(key='{number}', scope='', on_duplicate='result')
        def pay(number: int) -> str:
            for _ in range(2):  # the first commit went through, and the user was told otherwise
                insert(own)
                with own.cursor() as cursor:
                    current_execution().complete(cursor, result='paid')
                own.commit()
            return 'not reached'

        assert (pay(1), pay(1)) == ('paid', 'paid')
        own.rollback()
        assert (effects(rows), state_of(rows, '1')) == (1, 'done')

    def test_within_one_transaction_completing_twice_is_completing_once(
        self, ledger: ClusterLedger, rows: Rows, own: Any
    ) -> None:
        with once(ledger, 'k') as execution:
            insert(own)
            execution.complete(own, result=1)
            execution.complete(own, result=2)
            own.commit()
        assert rows.run(f'SELECT state, result FROM {rows.tables.execution}') == [('done', 2)]

    def test_without_the_fence_there_would_be_two_effects(
        self, ledger: ClusterLedger, rows: Rows, own: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fence = "state OPERATOR(pg_catalog.=) 'running'"
        pieces = catalog().pieces
        completing = pieces['completing']
        assert fence in completing.text
        open_to_all = completing.text.replace(fence, f'{fence} OR true')
        monkeypatch.setitem(pieces, 'completing', dataclasses.replace(completing, text=open_to_all))
        with once(ledger, 'k') as execution:
            for _ in range(2):
                insert(own)
                execution.complete(own)
                own.commit()
        assert effects(rows) == 2

    def test_recording_again_outside_of_a_transaction_stays_harmless(
        self, ledger: ClusterLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish, left = ExecutionStore.finish, [None]

        def lose(*args: Any) -> bool:
            found = finish(*args)
            if left:
                left.pop()
                raise DatabaseUnavailable
            return found

        monkeypatch.setattr(ExecutionStore, 'finish', lose)
        with once(ledger, 'k'):
            pass
        assert (state_of(rows, 'k'), left) == ('done', [])


class TestTheEndOfTheBlockIsTheEndOfTheTransaction:
    @pytest.mark.parametrize(
        'end',
        [
            lambda connection: connection.commit(),
            lambda connection: connection.rollback(),
            lambda connection: connection.close(),
            lambda connection: connection.reset(),
            lambda connection: connection.__enter__(),
            lambda connection: connection.set_session(readonly=True),
            lambda connection: connection.set_isolation_level(0),
            lambda connection: connection.set_client_encoding('LATIN1'),
            lambda connection: setattr(connection, 'autocommit', True),
            lambda connection: setattr(connection, 'isolation_level', 'SERIALIZABLE'),
            lambda connection: setattr(connection, 'readonly', True),
            lambda connection: connection.cursor().execute('COMMIT'),
            lambda connection: connection.cursor().execute('  commit work'),
            lambda connection: connection.cursor().execute('/* done */ -- really\n END'),
            lambda connection: connection.cursor().execute(b'ROLLBACK'),
            lambda connection: connection.cursor().execute('ROLLBACK AND CHAIN'),
            lambda connection: connection.cursor().execute("PREPARE TRANSACTION 'x'"),
        ],
    )
    def test_what_would_end_it_or_change_it_is_refused_beforehand(
        self, ledger: ClusterLedger, rows: Rows, end: Callable[[Any], object]
    ) -> None:
        def attempt() -> None:
            with once(ledger, 'k') as execution, execution.transaction() as connection:
                insert(connection)
                end(connection)

        for _ in range(2):
            with pytest.raises(
                ConfigurationError, match=r'inside of execution.transaction\(\).*savepoints'
            ):
                attempt()
            assert (effects(rows), state_of(rows, 'k')) == (0, 'failed')

    def test_psycopg2_s_own_with_commits_nothing_however_often_it_is_tried(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        def attempt() -> None:
            with (
                once(ledger, 'k') as execution,
                execution.transaction() as connection,
                connection,
                connection.cursor() as cursor,
            ):
                cursor.execute("INSERT INTO effect VALUES ('k')")

        for _ in range(3):
            with pytest.raises(ConfigurationError, match='with connection'):
                attempt()
        assert effects(rows) == 0

    @pytest.mark.parametrize(
        'end', ['COMMIT', 'ROLLBACK', 'COMMIT; BEGIN', 'ROLLBACK; BEGIN', 'COMMIT AND CHAIN']
    )
    def test_what_can_only_be_noticed_afterwards_is_told(
        self, ledger: ClusterLedger, rows: Rows, end: str
    ) -> None:
        with (
            pytest.raises(JobSyncError, match='committed or rolled back by itself'),
            once(ledger, 'k') as execution,
            execution.transaction() as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(f'SELECT 1; {end}')
        assert state_of(rows, 'k') == 'failed'

    def test_a_reset_of_all_settings_is_no_end_of_the_transaction(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        with once(ledger, 'k') as execution, execution.transaction() as connection:
            insert(connection)
            connection.cursor().execute('RESET ALL')
        assert (effects(rows), state_of(rows, 'k')) == (1, 'done')

    def test_savepoints_and_words_that_look_like_an_end_are_allowed(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        with (
            once(ledger, 'k') as execution,
            execution.transaction() as connection,
            connection.cursor() as cursor,
        ):
            for statement in (
                'SAVEPOINT here',
                "INSERT INTO effect VALUES ('lost')",
                'ROLLBACK TO here',
                'ROLLBACK WORK TO SAVEPOINT here',
                'RELEASE here',
                "INSERT INTO effect VALUES ('; COMMIT')",
            ):
                cursor.execute(statement)
        assert rows.run('SELECT key FROM effect') == [('; COMMIT',)]

    def test_a_statement_that_failed_and_was_passed_over_is_told(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        def attempt() -> None:
            with once(ledger, 'k') as execution, execution.transaction() as connection:
                insert(connection)
                with pytest.raises(psycopg2.errors.DivisionByZero):
                    connection.cursor().execute('SELECT 1/0')

        with pytest.raises(NotCommitted, match='savepoint'):
            attempt()
        assert (effects(rows), state_of(rows, 'k')) == (0, 'failed')

    def test_what_the_block_leaves_lying_about_does_not_reach_the_next_one(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        with once(ledger, 'k') as execution, execution.transaction() as connection:
            kept = connection.cursor()
            kept.execute('SELECT 1')
        assert kept.fetchall() == [(1,)]
        with once(ledger, 'other') as execution, execution.transaction() as again:
            assert again is connection  # it was made fresh, not opened anew
            with pytest.raises(ConfigurationError, match='over'):
                kept.execute("INSERT INTO effect VALUES ('late')")
        assert effects(rows) == 0

    def test_a_deferred_constraint_is_the_user_s_own_error(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        rows.run('CREATE TABLE parent (id int PRIMARY KEY)')
        rows.run('CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)')
        with (
            pytest.raises(psycopg2.errors.ForeignKeyViolation),
            once(ledger, 'k') as execution,
            execution.transaction() as connection,
        ):
            connection.cursor().execute('INSERT INTO child VALUES (1)')
        assert state_of(rows, 'k') == 'failed'


class TestWhatIsSetInATransaction:
    SETTINGS = (
        "SET synchronous_commit = 'off'",
        "SET statement_timeout = '20ms'",
        "SET lock_timeout = '1ms'",
        'SET search_path = pg_temp',
        "SET default_transaction_isolation = 'serializable'",
        'SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY',
        'SET ROLE nobody_much',
        'SET SESSION AUTHORIZATION nobody_much',
        "SET idle_in_transaction_session_timeout = '9s'",
        "SET jobsync.execution = 'x'",
        "SET client_encoding = 'LATIN1'",
        'SET enable_indexscan = off',
        "SET LOCAL search_path = ''",
    )

    @pytest.fixture(autouse=True)
    def a_role_without_rights(self, rows: Rows) -> None:
        rows.run(
            'DO $$ BEGIN CREATE ROLE nobody_much; EXCEPTION WHEN duplicate_object THEN NULL; END $$'
        )

    @pytest.mark.parametrize('setting', SETTINGS)
    def test_it_neither_disturbs_the_completion_nor_reaches_what_comes_after(
        self, ledger: ClusterLedger, rows: Rows, setting: str
    ) -> None:
        for key in ('first', 'second'):
            with once(ledger, key) as execution, execution.transaction() as connection:
                insert(connection, key)
                with connection.cursor() as cursor:
                    assert settings(cursor) == {
                        'synchronous_commit': 'on',
                        'search_path': '"$user", public',
                        'role': 'none',
                        'transaction_read_only': 'off',
                        'transaction_isolation': 'read committed',
                        'client_encoding': 'UTF8',
                        'enable_indexscan': 'on',
                    }, key
                    cursor.execute(setting)
            assert state_of(rows, key) == 'done'
        with once(ledger, 'without a transaction'):
            pass
        assert effects(rows) == 2

    def test_it_is_gone_after_an_exception_as_well(self, ledger: ClusterLedger, rows: Rows) -> None:
        def attempt(setting: str) -> None:
            with once(ledger, 'k') as execution, execution.transaction() as connection:
                insert(connection)
                connection.cursor().execute(setting)
                raise ValueError('x')

        for setting in self.SETTINGS:
            with pytest.raises(ValueError, match='x'):
                attempt(setting)
        with once(ledger, 'k') as execution, execution.transaction() as connection:
            insert(connection)
        assert (effects(rows), state_of(rows, 'k')) == (1, 'done')

    def test_the_commit_waits_for_the_disk_whatever_the_block_has_set(
        self, ledger: ClusterLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = TransactionConnection.commit
        seen = []

        def look(connection: TransactionConnection) -> None:
            with connection.cursor() as cursor:
                seen.append(settings(cursor)['synchronous_commit'])
            commit(connection)

        monkeypatch.setattr(TransactionConnection, 'commit', look)
        with once(ledger, 'k') as execution, execution.transaction() as connection:
            connection.cursor().execute(
                "SET synchronous_commit = 'off'; SET LOCAL synchronous_commit = 'off'"
            )
        assert seen == ['on']

    def test_a_transaction_that_was_made_read_only_is_told_so_and_the_next_one_is_not(
        self, ledger: ClusterLedger, rows: Rows
    ) -> None:
        with (
            pytest.raises(ConfigurationError, match='made its transaction read only'),
            once(ledger, 'k') as execution,
            execution.transaction() as connection,
        ):
            connection.cursor().execute('SET TRANSACTION READ ONLY')
        assert state_of(rows, 'k') == 'failed'
        with once(ledger, 'k') as execution, execution.transaction() as connection:
            insert(connection)
        assert effects(rows) == 1

    def test_temporary_tables_locks_and_listening_end_with_it(
        self, ledger: ClusterLedger, rows: Rows, config: CoordinationConfig
    ) -> None:
        if not config.listen:
            pytest.skip(
                'behind a pooler a session is not ours to clean: what a block leaves in it '
                'belongs to the pooler'
            )
        with once(ledger, 'k') as execution, execution.transaction() as connection:
            connection.cursor().execute(
                'CREATE TEMP TABLE mine (id int); SELECT pg_advisory_lock(7); LISTEN here'
            )
        with (
            once(ledger, 'next') as execution,
            execution.transaction() as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(
                "SELECT to_regclass('mine'), (SELECT count(*) FROM pg_locks WHERE locktype = "
                "'advisory' AND objid = 7),"
                ' (SELECT count(*) FROM pg_listening_channels())'
            )
            assert cursor.fetchall() == [(None, 0, 0)]


def settings(cursor: Any) -> dict[str, str]:
    names = (
        'synchronous_commit',
        'search_path',
        'role',
        'transaction_read_only',
        'transaction_isolation',
        'client_encoding',
        'enable_indexscan',
    )
    cursor.execute('SELECT ' + ', '.join(f"pg_catalog.current_setting('{name}')" for name in names))
    return dict(zip(names, cursor.fetchall()[0], strict=True))


class TestCompleteOnConnectionsOfTheUsers:
    @pytest.fixture
    def execution(self, ledger: ClusterLedger) -> Execution:
        return by_hand.begin(ledger, 'k', 60)

    def test_psycopg2_in_autocommit_mode_is_refused(
        self, execution: Execution, rows: Rows, own: Any
    ) -> None:
        own.autocommit = True
        with pytest.raises(ConfigurationError, match=r'autocommit mode.*transaction\.atomic'):
            execution.complete(own)
        assert state_of(rows, 'k') == 'running'
        own.cursor().execute('BEGIN')  # a transaction by hand is one
        execution.complete(own)
        own.cursor().execute('COMMIT')
        assert state_of(rows, 'k') == 'done'

    @pytest.mark.parametrize(
        'factory',
        [
            psycopg2.extras.RealDictCursor,
            psycopg2.extras.DictCursor,
            psycopg2.extras.NamedTupleCursor,
        ],
    )
    def test_psycopg2_s_other_cursors_will_do(
        self, execution: Execution, rows: Rows, own: Any, factory: Any
    ) -> None:
        with own.cursor(cursor_factory=factory) as cursor:
            execution.complete(cursor)
        own.commit()
        assert state_of(rows, 'k') == 'done'

    @pytest.mark.parametrize('pipeline', [False, True])
    def test_psycopg(
        self, execution: Execution, rows: Rows, config: CoordinationConfig, pipeline: bool
    ) -> None:
        with psycopg.connect(
            'postgresql' + address(config), autocommit=True, row_factory=psycopg.rows.dict_row
        ) as connection:
            with pytest.raises(ConfigurationError, match='autocommit mode'):
                execution.complete(connection)
            with connection.transaction():
                connection.execute("SET search_path = ''")
                if pipeline:
                    with connection.pipeline():
                        execution.complete(connection.cursor())
                else:
                    execution.complete(connection.cursor())
                assert state_of(rows, 'k') == 'running'
        assert state_of(rows, 'k') == 'done'

    def test_psycopg_asynchronously(
        self, execution: Execution, rows: Rows, config: CoordinationConfig
    ) -> None:
        async def main() -> None:
            async with await psycopg.AsyncConnection.connect(
                'postgresql' + address(config), autocommit=True
            ) as connection:
                with pytest.raises(ConfigurationError, match='autocommit mode'):
                    await execution.acomplete(connection)
                async with connection.transaction():
                    await execution.acomplete(connection)

        asyncio.run(main())
        assert state_of(rows, 'k') == 'done'

    @pytest.mark.parametrize('driver', ['psycopg2', 'psycopg'])
    def test_sqlalchemy(
        self, execution: Execution, rows: Rows, config: CoordinationConfig, driver: str
    ) -> None:
        engine = sqlalchemy.create_engine(f'postgresql+{driver}' + address(config))
        try:
            with engine.connect().execution_options(isolation_level='AUTOCOMMIT') as connection:
                with pytest.raises(ConfigurationError, match='autocommit mode'):
                    execution.complete(connection)
            with engine.begin() as connection:
                execution.complete(connection)
                execution.complete(connection, result=5)
                assert state_of(rows, 'k') == 'running'
            assert rows.run(f'SELECT state, result FROM {rows.tables.execution}') == [('done', 5)]
            with pytest.raises(CompletedAlready), engine.begin() as connection:
                execution.complete(connection)
        finally:
            engine.dispose()

    def test_sqlalchemy_asynchronously(
        self, execution: Execution, rows: Rows, config: CoordinationConfig
    ) -> None:
        pytest.importorskip('greenlet', reason='sqlalchemy[asyncio] is not installed')
        from sqlalchemy.ext.asyncio import create_async_engine

        async def main() -> None:
            engine = create_async_engine('postgresql+psycopg' + address(config))
            try:
                async with engine.begin() as connection:
                    await execution.acomplete(connection)
                with pytest.raises(CompletedAlready):
                    async with engine.begin() as connection:
                        await execution.acomplete(connection)
            finally:
                await engine.dispose()

        asyncio.run(main())
        assert state_of(rows, 'k') == 'done'

    def test_another_database_is_named_and_so_is_the_right_one(
        self, execution: Execution, rows: Rows, config: CoordinationConfig
    ) -> None:
        other = dataclasses.replace(config, dbname='postgres')
        said = (
            rf"'k'.*{config.dbname!r} at {config.host}:{config.port}; this one is to database "
            rf"'postgres', which lacks them"
        )
        engines = [
            sqlalchemy.create_engine(f'postgresql+{driver}' + address(other))
            for driver in ('psycopg2', 'psycopg')
        ]
        first, second = connect(other), psycopg.connect('postgresql' + address(other))
        first.autocommit = False
        try:
            with first.cursor() as cursor, second.pipeline():
                for target in (first, cursor, second, second.cursor()):
                    first.rollback()
                    second.rollback()
                    with pytest.raises(ConfigurationError, match=said) as caught:
                        execution.complete(target)
                    assert str(config.password) not in str(caught.value).replace(
                        config.dbname, ''
                    ).replace("'postgres'", '')
            for engine in engines:
                with pytest.raises(ConfigurationError, match=said), engine.begin() as connection:
                    execution.complete(connection)
                with (
                    pytest.raises(ConfigurationError, match=said),
                    sqlalchemy.orm.Session(engine) as session,
                ):
                    execution.complete(session)
        finally:
            first.close()
            second.close()
            for engine in engines:
                engine.dispose()

        async def main() -> None:
            async with await psycopg.AsyncConnection.connect(
                'postgresql' + address(other)
            ) as connection:
                with pytest.raises(ConfigurationError, match=said):
                    await execution.acomplete(connection)
                await connection.rollback()

        asyncio.run(main())
        assert state_of(rows, 'k') == 'running'

    def test_what_else_goes_wrong_is_the_drivers_error(
        self, execution: Execution, own: Any
    ) -> None:
        with pytest.raises(psycopg2.errors.UndefinedFunction):
            own.cursor().execute('SELECT no_such_function()')
        with pytest.raises(psycopg2.errors.InFailedSqlTransaction):
            execution.complete(own)

    def test_django(self, ledger: ClusterLedger, rows: Rows, config: CoordinationConfig) -> None:
        django_db = django_database(config)
        from django.db import transaction

        @exactly_once(key='{number}', scope='')
        def pay(number: int) -> None:
            with django_db.cursor() as cursor:
                cursor.execute('INSERT INTO effect VALUES (%s)', [str(number)])
                current_execution().complete(cursor)

        try:
            with pytest.raises(ConfigurationError, match=r'transaction\.atomic'):
                pay(1)  # Django's default, outside of `atomic`
            assert state_of(rows, '1') == 'failed'
            with (
                pytest.raises(NotCommitted, match='still open'),
                transaction.atomic(using='jobsync_test'),
            ):
                pay(
                    2
                    # a transaction around the function, which may be rolled back after the message
                    # is acknowledged
                )
            assert state_of(rows, '2') in ('failed', 'running') and effects(rows) == 1

            @exactly_once(key='{number}', scope='')
            def pay_within(number: int) -> None:
                with transaction.atomic(using='jobsync_test'):
                    pay.__wrapped__(number)  # type: ignore[attr-defined]

            pay_within(3)
            assert (state_of(rows, '3'), effects(rows)) == ('done', 2)
        finally:
            django_db.close()

    def test_a_transaction_older_than_the_attempt_is_told(
        self, ledger: ClusterLedger, rows: Rows, own: Any
    ) -> None:
        own.set_session(isolation_level='REPEATABLE READ')
        own.cursor().execute('SELECT 1 FROM effect')
        execution = by_hand.begin(ledger, 'young', 60)
        with pytest.raises(JobSyncError, match='older than this attempt'):
            execution.complete(own)


def django_database(config: CoordinationConfig) -> Any:
    """Django's connection to the database, under the alias `jobsync_test`."""
    from django.conf import settings as django_settings

    if not django_settings.configured:
        django_settings.configure()
    import django
    from django.db import connections

    django.setup()
    database = {
        'ENGINE': 'django.db.backends.postgresql',
        'NAME': config.dbname,
        'USER': config.user,
        'PASSWORD': str(config.password),
        'HOST': config.host,
        'PORT': str(config.port),
    }
    if 'jobsync_test' in connections.settings:
        del connections['jobsync_test']
    connections.settings['jobsync_test'] = connections.configure_settings(
        {'default': {}, 'jobsync_test': database}
    )['jobsync_test']
    return connections['jobsync_test']


def test_what_ends_a_transaction_is_found_in_linear_time() -> None:
    many = '/* a * b */ -- c\n ;' * 200
    assert (
        _ENDING.match(f'{many} SELECT 1') is None
        and _ENDING.match(f'{many} ROLLBACK TO here') is None
    )
    assert _ENDING.match(f'{many} COMMIT') and _ENDING.match('/***/ end')
    assert _ENDING.match('/* COMMIT') is None
