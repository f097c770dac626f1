"""Whatever the server answers: at begin nothing is begun and nothing is held; what has run is
recorded as soon as that is possible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import psycopg2
import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import (
    DatabaseRefused,
    DatabaseUnavailable,
    ExecutionRunning,
    Fenced,
    StoreTimeout,
)
from jobsync_core.ledger import unsettled
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.current import set_current_ledger
from jobsync_core.ledger.execution import Execution
from jobsync_core.ledger.once import exactly_once, once
from jobsync_core.store.sessions import Sessions
from tests.support import attempts as by_hand
from tests.support.ledgers import effects, insert, state_of
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

#: Codes that pause consuming, as they will meet the next statement too: out of resources, I/O,
#: rights, objects that are missing.
LASTING = (
    '53000',
    '53100',
    '53200',
    '53400',
    '58030',
    '58P01',
    'XX001',
    'XX002',
    '42501',
    '42P01',
    '42883',
    '3F000',
    '28000',
)
#: Others, of all kinds.
OTHERS = (
    '40001',
    '40P01',
    '22P05',
    '22021',
    '23514',
    'XX000',
    '54000',
    '54001',
    '55000',
    'P0001',
    '42601',
)
#: Answers after which the server is asked again elsewhere, or which are its time limits.
UNAVAILABLE = ('57014', '55P03', '25006', '0A000', '53300', '57P01', '57P03')
# Triggers raise what a test wants, wherever a row of the ledger is written.
TROUBLE = """
CREATE TABLE trouble (code text);
CREATE TABLE effect (key text);
CREATE FUNCTION raise_trouble() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS $$
DECLARE wanted text;
BEGIN
    SELECT code INTO wanted FROM trouble;
    IF wanted IS NOT NULL AND NEW.key LIKE 'k%%' THEN RAISE EXCEPTION 'trouble' USING ERRCODE =
        wanted; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER raise_trouble BEFORE INSERT OR UPDATE ON {execution} FOR EACH ROW EXECUTE FUNCTION
    raise_trouble();
"""


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        found.run(TROUBLE.format(execution=found.tables.execution))
        yield found


def make_trouble(rows: Rows, code: str) -> None:
    rows.run('INSERT INTO trouble VALUES (%s)', code)


def end_trouble(rows: Rows) -> None:
    rows.run('DELETE FROM trouble')


def begin(ledger: ClusterLedger, key: str) -> Execution | None:
    try:
        return by_hand.begin(ledger, key, 60)
    except ExecutionRunning:
        return None


@pytest.mark.parametrize('code', LASTING + OTHERS + UNAVAILABLE)
class TestEveryAnswer:
    def test_at_begin_nothing_is_begun_and_the_key_is_free_at_once(
        self, ledger: ClusterLedger, rows: Rows, code: str
    ) -> None:
        make_trouble(rows, code)
        with pytest.raises(DatabaseUnavailable) as caught:
            by_hand.begin(ledger, 'k', 60)
        error = caught.value
        if code == '55P03':  # somebody holds the row of a key that nobody executes
            assert isinstance(error, DatabaseRefused)
            assert (error.pause, ledger.unsettled) == (False, 0)
        elif code in UNAVAILABLE:
            assert not isinstance(error, DatabaseRefused)
            assert isinstance(error, StoreTimeout) == (code == '57014')
        else:
            assert isinstance(error, DatabaseRefused)
            assert (error.sqlstate, error.pause) == (code, code in LASTING)
            assert code in str(error)
            assert ledger.unsettled == 0  # nothing has to be looked for
        assert state_of(rows, 'k') is None
        end_trouble(rows)
        # Where nobody knows what became of it, the background may be looking after it at this
        # moment.
        assert eventually(lambda: begin(ledger, 'k'), timeout=1 if code in UNAVAILABLE else 0)

    @pytest.mark.parametrize('fails', [False, True], ids=['completion', 'failure'])
    def test_at_the_end_it_is_recorded_when_that_is_possible(
        self, ledger: ClusterLedger, rows: Rows, code: str, fails: bool
    ) -> None:
        def attempt() -> None:
            with once(ledger, 'k') as execution:
                execution.result = 'kept'
                make_trouble(rows, code)
                if fails:
                    raise ValueError('x')

        with pytest.raises(ValueError if fails else DatabaseUnavailable):
            attempt()
        assert (state_of(rows, 'k'), ledger.unsettled) == ('running', 1)
        end_trouble(rows)
        eventually(lambda: state_of(rows, 'k') == ('failed' if fails else 'done'))
        result = rows.value(f'SELECT result FROM {rows.tables.execution}')
        # Data that the database refuses is recorded without its result: the trouble may end between
        # these two tries.
        assert result == (None if fails else 'kept') or (result is None and code == '22P05')
        eventually(lambda: ledger.unsettled == 0)

    def test_in_a_transaction_of_the_user_s_it_is_rolled_back_and_the_key_is_settled(
        self, ledger: ClusterLedger, rows: Rows, code: str
    ) -> None:
        def attempt() -> None:
            with once(ledger, 'k') as execution, execution.transaction() as connection:
                insert(connection)
                make_trouble(rows, code)

        expected = psycopg2.Error if code.startswith(('23', 'P0')) else Exception
        with pytest.raises(expected) as caught:
            attempt()
        assert isinstance(caught.value, psycopg2.Error) == code.startswith(('23', 'P0'))
        end_trouble(rows)
        eventually(lambda: state_of(rows, 'k') == 'failed')
        assert effects(rows) == 0


@pytest.mark.parametrize('ends', ['failure', 'result'])
def test_a_trouble_that_meets_all_keys_is_told_once_and_then_once_a_minute_with_its_count(
    ledger: ClusterLedger,
    rows: Rows,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    ends: str,
) -> None:
    now = [1000.0]
    monkeypatch.setattr('jobsync_core.ledger.cluster.clock.now', lambda: now[0])
    executions = [by_hand.begin(ledger, f'k{number}', 60) for number in range(5)]
    for execution in executions:
        if ends == 'result':
            with execution.transaction():
                pass
            execution.result = 'x'
    make_trouble(rows, '53100')
    caplog.clear()
    for number, execution in enumerate(executions):
        now[0] += 61.0 if number == 4 else 0.1
        by_hand.finish(execution) if ends == 'result' else by_hand.fail(execution, ValueError('x'))
    end_trouble(rows)
    said = (
        'failed, which could not be recorded yet'
        if ends == 'failure'
        else 'completed, and its result is not recorded yet'
    )
    lines = [record.getMessage() for record in caplog.records if said in record.getMessage()]
    assert len(lines) == 2, lines
    assert 'key=k0' in lines[0] and 'key=k4' in lines[1] and lines[1].endswith('(3 more like it)')


def test_an_answer_that_passes_is_asked_for_again(ledger: ClusterLedger, rows: Rows) -> None:
    rows.run('CREATE SEQUENCE times')
    rows.run("""
        CREATE OR REPLACE FUNCTION raise_trouble() RETURNS trigger LANGUAGE plpgsql SET search_path
            = public AS $$
        BEGIN
            IF nextval('times') < 4 THEN RAISE EXCEPTION 'trouble' USING ERRCODE = '40001'; END IF;
            RETURN NEW;
        END $$""")
    assert by_hand.begin(ledger, 'k', 60).attempts == 1


def test_one_that_cannot_be_recorded_does_not_hold_up_the_others(
    ledger: ClusterLedger, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    make_trouble(rows, 'XX000')  # of keys that begin with k only
    attempts = {}
    end_trouble(rows)
    for key in ('k1', 'x1', 'k2', 'x2'):
        attempts[key] = by_hand.begin(ledger, key, 60)
    make_trouble(rows, 'XX000')
    for execution in attempts.values():
        by_hand.abandon(execution)
    eventually(
        lambda: (
            [state_of(rows, key) for key in attempts] == ['running', 'failed', 'running', 'failed']
        )
    )
    assert (
        len([record for record in caplog.records if 'not recorded yet' in record.message]) == 1
    )  # and not once for each try
    end_trouble(rows)
    eventually(lambda: {state_of(rows, key) for key in attempts} == {'failed'})


def test_a_role_that_lacks_a_right_is_told_without_an_error_of_psycopg2_s(
    rows: Rows, config: CoordinationConfig
) -> None:
    role = f'poor_{config.dbname}'
    rows.run(f"CREATE ROLE {role} LOGIN PASSWORD 'poor'")
    try:
        rows.run(f'GRANT USAGE ON SCHEMA public TO {role}')
        rows.node('poor')
        sessions = Sessions(dataclasses.replace(config, user=role, password='poor'), 'poor')
        poor = ClusterLedger(sessions, rows.tables, 'poor', lambda: 'life of poor')
        set_current_ledger(poor)

        @exactly_once(key='{number}', scope='')
        def function(number: int) -> None:
            raise AssertionError('run without a right to')

        with pytest.raises(DatabaseRefused, match='permission denied') as caught:
            function(1)
        assert (caught.value.sqlstate, caught.value.pause) == ('42501', True)
        poor.close()
        sessions.close_all()
    finally:
        set_current_ledger(None)
        rows.run(f'DROP OWNED BY {role}')
        rows.run(f'DROP ROLE {role}')


def test_memory_is_bounded_by_beginning_nothing_more(
    ledger: ClusterLedger, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsettled, 'MOST_UNSETTLED', 3)
    attempts = [by_hand.begin(ledger, f'k{number}', 60) for number in range(3)]
    make_trouble(rows, '53100')
    for execution in attempts:
        with pytest.raises(DatabaseRefused, match='was executed'):
            by_hand.finish(execution)
    with pytest.raises(DatabaseUnavailable, match='3 attempts of this process wait'):
        by_hand.begin(ledger, 'x', 60)
    end_trouble(rows)
    eventually(lambda: ledger.unsettled == 0)
    assert by_hand.begin(ledger, 'x', 60).attempts == 1


def test_a_completion_that_waits_is_fenced_where_another_has_taken_its_key(
    ledger: ClusterLedger, rows: Rows
) -> None:
    attempt = by_hand.begin(ledger, 'k', 60)
    make_trouble(rows, '53100')
    with pytest.raises(DatabaseRefused):
        by_hand.finish(attempt)
    # At once: between the two the thread that settles would find the key its own.
    rows.run(f'DELETE FROM trouble; UPDATE {rows.tables.execution} SET fence = fence + 1')
    eventually(lambda: ledger.unsettled == 0)
    assert state_of(rows, 'k') == 'running'
    with pytest.raises(Fenced):
        by_hand.finish(attempt)
