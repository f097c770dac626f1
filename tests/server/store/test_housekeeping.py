"""Housekeeping against a real PostgreSQL: what it deletes, at what cost, and that nothing waits for
it.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import threading
from collections.abc import Callable, Iterator

import psycopg2
import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.agent.housekeeper import Housekeeper
from jobsync_core.process import Process
from jobsync_core.store.completions import Completion
from jobsync_core.store.connection import Connection
from jobsync_core.store.executions import ExecutionStore, Holder
from jobsync_core.store.housekeeping import (
    AGES,
    CHORES,
    LOST_DAYS,
    SETTINGS,
    Chore,
    HousekeepingStore,
)
from tests.support.cluster import query
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

TODAY = datetime.date(2024, 5, 6)
EXPIRED, ATTEMPTS, LOST, CLAIMS, PROMISES, REBALANCES = CHORES


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as rows:
        yield rows


@pytest.fixture
def connection(config: CoordinationConfig, rows: Rows) -> Iterator[Connection]:
    connection = Connection.open(config, 'housekeeping')
    yield connection
    connection.close()


@contextlib.contextmanager
def outsider(config: CoordinationConfig) -> Iterator[psycopg2.extensions.connection]:
    """Somebody else's session."""
    connection = psycopg2.connect(
        host=config.host,
        port=config.port,
        dbname=config.dbname,
        user=config.user,
        password=config.password,
    )
    try:
        yield connection
    finally:
        connection.close()


def executions_of(
    rows: Rows,
    count: int,
    *,
    node: str = 'a',
    state: str = 'done',
    expires: str | None = '-1 second',
) -> None:
    """Rows of the ledger; they expired a second ago, each at a moment of its own."""
    rows.run(
        f'INSERT INTO {rows.tables.execution} (key, state, fence, node, incarnation, pid, '
        'expires_at) '
        "SELECT %s || '-' || n, %s, 1, %s, 'life of ' || %s, 7, now() + %s::interval - "
        'make_interval(secs => n * 1e-6) '
        'FROM generate_series(1, %s) AS n',
        f'{state}-{node}',
        state,
        node,
        node,
        expires,
        count,
    )


def claims_of(
    rows: Rows, count: int, node: str, *, age: str = '2 minutes', promised: bool = False
) -> None:
    rows.run(
        f'INSERT INTO {rows.tables.claim} (node, task_id, created_on, date, token, incarnation, '
        'promised) '
        "SELECT %s, %s || n, now() - %s::interval, %s, n %% 10000, 'life of ' || %s, %s FROM "
        'generate_series(1, %s) AS n',
        node,
        f'{node} {promised} {age}',
        age,
        TODAY,
        node,
        promised,
        count,
    )


def tidy(connection: Connection, rows: Rows, *chores: Chore, size: int = 1000) -> None:
    """Run chores until each finds nothing more."""
    for chore in chores or CHORES:
        position = None
        while True:
            found = HousekeepingStore(connection, rows.tables).run(chore, size, position)
            if found.rows < size:
                break
            position = found.position


class TestWhatGoes:
    def test_completed_and_failed_executions_past_their_time(
        self, rows: Rows, connection: Connection
    ) -> None:
        rows.node('a')
        executions_of(rows, 25)
        executions_of(rows, 5, state='failed')
        executions_of(rows, 3, node='fresh', expires='1 hour')
        executions_of(rows, 2, node='endless', expires=None)
        tidy(connection, rows, size=10)
        assert rows.run(
            f'SELECT node, count(*) FROM {rows.tables.execution} GROUP BY 1 ORDER BY 1'
        ) == [('endless', 2), ('fresh', 3)]

    def test_attempts_past_their_time(self, rows: Rows, connection: Connection) -> None:
        rows.run(
            f'INSERT INTO {rows.tables.attempt} (key, slot, number, fence, outcome, ended_at, '
            "expires_at) SELECT 'k' || n % 5, n, n, n, 'failed', now(), "
            "now() + CASE WHEN n % 5 = 0 THEN interval '1 hour' ELSE '-1 second' END "
            'FROM generate_series(1, 50) AS n'.replace('%', '%%')
        )
        tidy(connection, rows, ATTEMPTS, size=7)
        assert rows.run(f'SELECT key, count(*) FROM {rows.tables.attempt} GROUP BY 1') == [
            ('k0', 10)
        ]

    def test_claims_of_nodes_that_are_gone(self, rows: Rows, connection: Connection) -> None:
        rows.node('a')
        rows.node('c')
        for name in ('a', 'b', 'c', 'd'):
            claims_of(rows, 15, name)
        claims_of(rows, 1, 'd', age='0')
        rows.run(
            f"UPDATE {rows.tables.claim} SET incarnation = 'a former life' WHERE node = 'c' AND "
            'token <= 5'
        )
        tidy(connection, rows, size=10)
        assert rows.run(
            f'SELECT node, count(*) FROM {rows.tables.claim} GROUP BY 1 ORDER BY 1'
        ) == [('a', 15), ('c', 10), ('d', 1)]

    def test_promises_that_nobody_came_back_to(self, rows: Rows, connection: Connection) -> None:
        rows.node('a')
        claims_of(rows, 15, 'a', promised=True)
        claims_of(rows, 1, 'a', promised=True, age='0')
        claims_of(rows, 1, 'a')
        tidy(connection, rows, size=10)
        assert sorted(
            rows.run(f'SELECT promised, count(*) FROM {rows.tables.claim} GROUP BY 1')
        ) == [(False, 1), (True, 1)]

    def test_all_but_the_last_thousand_rebalances_and_those_of_three_months_ago(
        self, rows: Rows, connection: Connection
    ) -> None:
        rows.run(
            f'INSERT INTO {rows.tables.rebalance} (triggered_at, trigger_reason, nodes_before, '
            'nodes_after, tokens_moved, duration_ms) '
            "SELECT now() - CASE WHEN n = 1500 THEN interval '91 days' ELSE '1 day' END, n::text, "
            '1, 1, 1, 1 '
            'FROM generate_series(1, 1500) AS n'
        )
        tidy(connection, rows, size=100)
        reasons = [
            int(row[0])
            for row in rows.run(f'SELECT trigger_reason FROM {rows.tables.rebalance} ORDER BY id')
        ]
        assert reasons == list(range(501, 1500))

    def test_running_executions_of_nodes_that_are_gone_when_they_have_been_found_so_for_a_week(
        self, rows: Rows, connection: Connection
    ) -> None:
        rows.node('a')
        executions_of(rows, 15, state='running', expires=None)
        executions_of(rows, 15, node='b', state='running', expires=None)
        # However long ago it was begun, it may have run until now.
        rows.run(f"UPDATE {rows.tables.execution} SET started_at = now() - interval '1 year'")
        tidy(connection, rows, size=10)
        ends = dict(
            rows.run(
                'SELECT node, extract(epoch FROM min(expires_at) - now())::float8 FROM '
                f"{rows.tables.execution} WHERE state = 'running' "
                'GROUP BY node'
            )
        )
        assert ends['a'] is None
        assert ends['b'] == pytest.approx(LOST_DAYS * 86400, abs=60)
        rows.run(f"UPDATE {rows.tables.execution} SET expires_at = expires_at - interval '8 days'")
        tidy(connection, rows, size=10)
        assert rows.run(f'SELECT DISTINCT node FROM {rows.tables.execution}') == [('a',)]

    def test_a_running_execution_that_somebody_took_over_stays_whatever_was_written_meanwhile(
        self, rows: Rows, connection: Connection
    ) -> None:
        rows.node('a')
        executions_of(rows, 1, state='running', expires='-1 second')
        tidy(connection, rows)
        assert rows.value(f'SELECT count(*) FROM {rows.tables.execution}') == 1

    def test_fences_of_a_key_rise_across_the_deletion_of_its_lost_row(
        self, rows: Rows, connection: Connection
    ) -> None:
        def holder(node: str) -> Holder:
            return Holder(node, f'life of {node}', Process('here', 'boot', 'ns', 7, '1'))

        for name in ('a', 'b'):
            rows.node(name)
        with rows.sessions.session() as session:
            first = ExecutionStore(session, rows.tables).begin('key', holder('a'))
        rows.run(f"DELETE FROM {rows.tables.node} WHERE name = 'a'")
        tidy(connection, rows)
        rows.run(f"UPDATE {rows.tables.execution} SET expires_at = now() - interval '1 second'")
        tidy(connection, rows)
        assert rows.value(f'SELECT count(*) FROM {rows.tables.execution}') == 0
        with rows.sessions.session() as session:
            second = ExecutionStore(session, rows.tables).begin('key', holder('b'))
        assert second.began
        assert second.fence > first.fence
        with rows.sessions.session() as session:
            assert not ExecutionStore(session, rows.tables).finish(
                Completion('key', first.fence, None, 60.0)
            )

    def test_a_row_that_somebody_holds_is_left_and_not_waited_for(
        self, rows: Rows, connection: Connection
    ) -> None:
        executions_of(rows, 100)
        with rows.sessions.session() as session, session.cursor() as cursor:
            cursor.execute(f"SELECT FROM {rows.tables.execution} WHERE key = 'done-a-7' FOR UPDATE")
            tidy(connection, rows, EXPIRED, size=10)
            assert query(rows.config, 'SELECT key FROM "{}execution"') == [('done-a-7',)]
        tidy(connection, rows, EXPIRED)
        assert query(rows.config, 'SELECT key FROM "{}execution"') == []


class TestCost:
    def read(self, rows: Rows) -> dict[str, tuple[int, int]]:
        """Rows that were read by scans of whole tables, and by indexes."""
        # A session tells of its reads at the end of a transaction, at most once a second unless it
        # is asked to.
        rows.run('SELECT pg_stat_clear_snapshot()')
        return {
            name: (sequential, fetched)
            for name, sequential, fetched in rows.run(
                'SELECT relname, seq_tup_read, coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables'
            )
        }

    @pytest.mark.parametrize('chore', CHORES, ids=lambda chore: chore.name)
    def test_each_statement_finds_its_rows_by_an_index(
        self, rows: Rows, connection: Connection, chore: Chore
    ) -> None:
        rows.node('a')
        executions_of(rows, 20_000, expires='1 hour')
        executions_of(rows, 500, state='running', expires=None)
        claims_of(rows, 20_000, 'a')
        for _ in range(2):
            parameters = {'rows': 1000, 'position': None, **AGES}
            plan = '\n'.join(
                row[0]
                for row in connection.execute(
                    f'{SETTINGS}; EXPLAIN {rows.tables.sql(chore.statement)}', parameters
                )
            )
            for table in ('execution', 'attempt', 'claim', 'rebalance'):
                assert f'Seq Scan on {rows.tables.appname}{table}' not in plan, plan
            connection.execute('ANALYZE')  # and with statistics, too

    def test_what_is_to_stay_is_not_read(self, rows: Rows, connection: Connection) -> None:
        """The more live rows there are, the same few are read: neither live claims nor live
        executions are looked at one by one.
        """
        for number in range(20):
            rows.node(f'n{number}')
            claims_of(rows, 2500, f'n{number}')
            executions_of(rows, 2500, node=f'n{number}', expires='1 hour')
            executions_of(rows, 50, node=f'n{number}', state='running', expires=None)
        claims_of(rows, 30, 'gone')
        executions_of(rows, 30, node='gone', state='running', expires=None)
        executions_of(rows, 30, node='old')
        connection.execute('SELECT pg_stat_reset()')
        tidy(connection, rows)
        connection.close()  # its last reads are told of now
        names = [f'{rows.tables.appname}{table}' for table in ('claim', 'execution')]
        eventually(lambda: all(self.read(rows)[name][1] > 0 for name in names))
        for name in names:
            sequential, fetched = self.read(rows)[name]
            assert sequential == 0
            assert fetched < 1500, name
        assert rows.value(f"SELECT count(*) FROM {rows.tables.claim} WHERE node = 'gone'") == 0
        assert rows.value(f"SELECT count(*) FROM {rows.tables.execution} WHERE node = 'old'") == 0

    def test_a_slice_does_not_read_again_what_the_one_before_it_deleted(
        self, rows: Rows, connection: Connection
    ) -> None:
        """While an old snapshot is open, what was deleted stays in the index."""
        executions_of(rows, 5000)
        with outsider(rows.config) as reader:
            reader.set_isolation_level(psycopg2.extensions.ISOLATION_LEVEL_REPEATABLE_READ)
            with reader.cursor() as cursor:
                cursor.execute(f'SELECT count(*) FROM {rows.tables.execution}')
            connection.execute('SELECT pg_stat_reset()')
            tidy(connection, rows, EXPIRED, size=100)
        connection.close()
        assert rows.value(f'SELECT count(*) FROM {rows.tables.execution}') == 0
        index = f'{rows.tables.appname}execution_expiry'
        read = int(
            rows.value(
                'SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = %s', index
            )
        )
        assert read < 3 * 5000


def leader_duty(
    config: CoordinationConfig, rows: Rows, leads: Callable[[], bool] = lambda: True
) -> Housekeeper:
    return Housekeeper(config, rows.tables, 'test', leads)


class TestDuty:
    def test_a_slice_that_takes_too_long_is_tried_with_fewer_rows(
        self, rows: Rows, config: CoordinationConfig
    ) -> None:
        """As with results of many megabytes: here each deletion takes 5 ms."""
        executions_of(rows, 1200)
        rows.run(
            "CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM "
            "pg_sleep(0.005); RETURN old; END'"
        )
        rows.run(
            f'CREATE TRIGGER linger BEFORE DELETE ON {rows.tables.execution} FOR EACH ROW EXECUTE '
            'FUNCTION linger()'
        )
        duty = leader_duty(config, rows)
        duty.look()
        eventually(
            lambda: rows.value(f'SELECT count(*) FROM {rows.tables.execution}') == 0, timeout=60
        )
        assert duty.stop(5.0)

    def test_it_stops_amid_its_work_when_the_node_no_longer_leads(
        self, rows: Rows, config: CoordinationConfig
    ) -> None:
        executions_of(rows, 100_000)
        leads = threading.Event()
        leads.set()
        duty = leader_duty(config, rows, leads.is_set)
        duty.look()
        eventually(
            lambda: rows.value(f'SELECT count(*) FROM {rows.tables.execution}') < 100_000,
            every=0.001,
        )
        leads.clear()
        eventually(lambda: not duty.running)
        left = rows.value(f'SELECT count(*) FROM {rows.tables.execution}')
        assert left > 0
        duty.look()
        assert not duty.running
        assert (
            rows.value(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'jobsync "
                "housekeeping%%' "
                'AND datname = current_database()'
            )
            == 0
        )

    def test_the_leader_alone_keeps_house_and_its_successor_takes_over(
        self, config: CoordinationConfig, rows: Rows
    ) -> None:
        def keepers() -> list[str]:
            return [
                thread.name
                for thread in threading.enumerate()
                if thread.name.startswith('jobsync-housekeeping-')
            ]

        with Job('first', config, wait_on_enter=0) as first:
            second = Job('second', config, wait_on_enter=0)
            with second:
                eventually(lambda: keepers() == ['jobsync-housekeeping-first'])
                first.__exit__(None, None, None)
                eventually(lambda: keepers() == ['jobsync-housekeeping-second'])
                executions_of(rows, 100)
                eventually(lambda: rows.value(f'SELECT count(*) FROM {rows.tables.execution}') == 0)
        assert keepers() == []

    def test_whatever_holds_the_ledger_the_leader_plans_evicts_and_beats(
        self, config: CoordinationConfig, rows: Rows, caplog: pytest.LogCaptureFixture
    ) -> None:
        """CREATE INDEX holds such a lock. The fence: housekeeping shares neither thread nor
        connection with the node.
        """
        executions_of(rows, 10)
        claims_of(rows, 10, 'gone')
        with outsider(config) as session, session.cursor() as cursor:
            cursor.execute(f'LOCK TABLE {rows.tables.execution} IN SHARE MODE')
            with Job('a', config, wait_on_enter=0) as a, Job('b', config, wait_on_enter=0) as b:
                eventually(lambda: len(a.my_tokens) == len(b.my_tokens) == config.total_tokens // 2)
                # Housekeeping has met the lock by now, and has done what the lock does not keep it
                # from.
                eventually(lambda: 'lock timeout' in caplog.text)
                eventually(lambda: not query(config, 'SELECT 1 FROM "{}claim"'))
                query(
                    config,
                    'INSERT INTO "{}node" (name, incarnation, state, lease_sec) VALUES (\'dead\', '
                    "'x', 'active', 1)",
                )
                query(config, 'SELECT pg_notify(%s, %s)', (rows.tables.channel, 'join dead'))
                eventually(
                    lambda: query(
                        config,
                        'SELECT sum(upper(tokens) - lower(tokens)) FROM "{}assignment" '
                        "WHERE node = 'dead' OR moving_to = 'dead'",
                    )[0][0]
                )
                eventually(
                    lambda: not query(config, 'SELECT 1 FROM "{}node" WHERE name = \'dead\'')
                )
                eventually(lambda: len(a.my_tokens) == len(b.my_tokens) == config.total_tokens // 2)
                assert (
                    a.get_coordination_status()['evictions']
                    == b.get_coordination_status()['evictions']
                    == 0
                )
                assert len(query(config, 'SELECT 1 FROM "{}execution"')) == 10
        said = [
            record
            for record in caplog.records
            if "'expired executions' failed" in record.getMessage()
        ]
        assert len(said) == 1
        assert said[0].levelno == logging.WARNING
