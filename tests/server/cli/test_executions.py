"""`jobsync executions …` against a real server: what it prints, asks, refuses and changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result

from jobsync_core.cli import executions_commands
from jobsync_core.cli.main import jobsync
from jobsync_core.config import CoordinationConfig
from tests.support.rows import Rows, rows_of

Run = Callable[..., Result]


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    """One done, one failed, one running and one lost execution."""
    with rows_of(config) as found:
        found.node('a')
        for key, state, node in (
            ('charge:1', 'done', 'a'),
            ('charge:2', 'failed', 'a'),
            ('charge:3', 'running', 'a'),
            ('mail:4', 'running', 'gone'),
        ):
            put(found, key, state, node)
        yield found


def put(rows: Rows, key: str, state: str, node: str = 'a') -> None:
    rows.run(
        f'INSERT INTO {rows.tables.execution} (key, state, node, incarnation, host, pid, fence, '
        'finished_at, error, result) '
        "VALUES (%s, %s, %s, 'life of ' || %s, 'here', 7, 5, "
        "CASE WHEN %s <> 'running' THEN now() END, "
        "CASE WHEN %s = 'failed' THEN E'ValueError: \\x1b[2Jno' END, "
        "CASE WHEN %s = 'done' THEN '[1]'::jsonb END)",
        key, state, node, node, state, state, state,
    )  # fmt: skip


@pytest.fixture
def run(config: CoordinationConfig) -> Run:
    """Runs `jobsync executions` with these words against the test's database."""
    url = (
        f'postgresql://{config.user}:{config.password or ""}@{config.host}:{config.port}'
        f'/{config.dbname}'
    )
    runner = CliRunner(env={'JOBSYNC_DATABASE_URL': url, 'COLUMNS': '200'})
    return lambda *words, command='executions', **options: runner.invoke(
        jobsync, [command, *words], **options
    )


def good(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def bad(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stderr


def keys(rows: Rows) -> list[str]:
    return [key for (key,) in rows.run(f'SELECT key FROM {rows.tables.execution} ORDER BY key')]


@pytest.mark.usefixtures('rows')
class TestList:
    def test_a_table(self, run: Run) -> None:
        lines = good(run('list')).splitlines()
        assert len([line for line in lines if ':' in line]) == 4
        (lost,) = (line for line in lines if 'mail:4' in line)
        assert 'lost' in lost and 'gone' in lost

    def test_a_text_cannot_steer_the_terminal(self, run: Run) -> None:
        shown = good(run('list', '--state', 'failed'))
        assert r'\x1b[2Jno' in shown and '\x1b' not in shown

    def test_states_may_be_repeated_and_a_function_is_the_scope(self, run: Run) -> None:
        shown = good(run('list', '--state', 'lost', '--state', 'running', '--json'))
        assert [each['key'] for each in json.loads(shown)] == ['charge:3', 'mail:4']
        shown = good(run('list', '--function', 'charge', '--key', '%1', '--node', 'a', '--json'))
        assert [each['key'] for each in json.loads(shown)] == ['charge:1']
        assert good(run('list', '--older-than', '1.5h')) == 'no executions\n'
        assert json.loads(good(run('list', '--older-than', '2d', '--json'))) == []

    def test_what_is_left_out_is_told(self, run: Run) -> None:
        shown = good(run('list', '--limit', '2'))
        assert "--after 'charge:2' goes on" in shown and 'charge:3' not in shown
        shown = good(run('list', '--limit', '2', '--after', 'charge:2'))
        assert 'mail:4' in shown and 'goes on' not in shown

    def test_all_of_them_go_table_by_table(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(executions_commands, '_TOGETHER', 3)
        shown = good(run('list', '--all'))
        assert shown.count('attempts') == 2 and 'mail:4' in shown
        assert len(json.loads(good(run('list', '--json')))) == 4
        assert len(json.loads(good(run('list', '--json', '--limit', '3')))) == 3

    @pytest.mark.parametrize(
        ('words', 'said'),
        [
            (('--state', 'over'), "'over' is not one of"),
            (('--older-than', 'long'), "'long' is no age"),
            (('--older-than', f'1{"0" * 400}'), 'is no age'),
            (('--limit', '3', '--all'), '--limit or --all'),
        ],
    )
    def test_what_cannot_be_meant(self, run: Run, words: tuple[str, ...], said: str) -> None:
        assert said in bad(run('list', *words), 2)

    def test_a_pattern_that_is_none(self, run: Run) -> None:
        assert 'last backslash' in bad(run('list', '--key', 'a\\'))


@pytest.mark.usefixtures('rows')
class TestShow:
    def test_lines(self, run: Run) -> None:
        shown = good(run('show', 'charge:1'))
        assert 'done' in shown and '7 on here' in shown and '[1]' in shown
        assert 'its node is gone' in good(run('show', 'mail:4'))
        assert 'last heartbeat' in good(run('show', 'charge:3'))

    def test_json(self, run: Run) -> None:
        found = json.loads(good(run('show', 'charge:1', '--json')))
        assert (found['state'], found['result'], found['fence']) == ('done', '[1]', 5)

    def test_a_key_that_is_not_there(self, run: Run) -> None:
        assert "no key 'charge:9'" in bad(run('show', 'charge:9'))


class TestRetry:
    def test_keys_are_freed_each_by_itself(self, rows: Rows, run: Run) -> None:
        result = run('retry', 'charge:1', 'mail:4', 'charge:9', 'charge:3', 'charge:2')
        said = bad(result)
        assert 'forget it first' in said and "no key 'charge:9'" in said and 'on a' in said
        assert 'mail:4 is free' in result.stdout and 'charge:2 is free' in result.stdout
        assert [state for (state,) in rows.run(
            f'SELECT state FROM {rows.tables.execution} ORDER BY key'
        )] == ['done', 'failed', 'running', 'failed']  # fmt: skip

    def test_what_a_filter_selects(self, rows: Rows, run: Run) -> None:
        result = run('retry', '--key', '%', input='y\n')
        assert 'Have 2 executions free' in good(result)
        assert 'mail:4 is free' in result.stdout
        done = json.loads(good(run('retry', '--key', '%', '--yes', '--json')))
        assert done == {'changed': 2, 'refused': {}}

    @pytest.mark.usefixtures('rows')
    @pytest.mark.parametrize(
        'words',
        [
            (),
            ('mail:4', '--state', 'lost'),
            ('--state', 'done', '--yes'),
            ('--state', 'lost', '--json'),
        ],
    )
    def test_what_cannot_be_meant(self, run: Run, words: tuple[str, ...]) -> None:
        bad(run('retry', *words), 2)


class TestForget:
    def test_it_asks_before(self, rows: Rows, run: Run) -> None:
        bad(run('forget', 'charge:1', input='n\n'))
        assert 'charge:1' in keys(rows)
        assert 'charge:1 is forgotten' in good(run('forget', 'charge:1', input='y\n'))
        assert 'charge:1' not in keys(rows)

    def test_what_runs_stays(self, rows: Rows, run: Run) -> None:
        result = run('forget', 'charge:3', 'charge:2', '--yes', '--json')
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert found['changed'] == 1 and list(found['refused']) == ['charge:3']
        assert keys(rows) == ['charge:1', 'charge:3', 'mail:4']


class TestPurge:
    def test_it_asks_before_and_tells_how_many(self, rows: Rows, run: Run) -> None:
        result = run('purge', '--function', 'charge', input='n\n')
        bad(result)
        assert 'Delete 2 executions' in result.stdout and len(keys(rows)) == 4
        assert '2 executions deleted' in good(run('purge', '--function', 'charge', '--yes'))
        assert keys(rows) == ['charge:3', 'mail:4']
        assert json.loads(good(run('purge', '--all', '--yes', '--json'))) == {'deleted': 1}
        assert keys(rows) == ['charge:3']

    @pytest.mark.parametrize(
        'words',
        [(), ('--yes',), ('--all', '--node', 'a'), ('--state', 'running', '--yes'),
         ('--all', '--json')],
    )  # fmt: skip
    def test_what_cannot_be_meant(self, rows: Rows, run: Run, words: tuple[str, ...]) -> None:
        bad(run('purge', *words), 2)
        assert len(keys(rows)) == 4


@pytest.mark.usefixtures('rows')
def test_who_tells_that_it_is_lost(run: Run) -> None:
    assert 'lost on gone' in good(run('mail:4', command='who'))


def test_who_only_looks_needs_three_tables_and_the_doctor_names_what_is_missing(
    rows: Rows, config: CoordinationConfig
) -> None:
    role = f'reader_{config.dbname}'
    tables = rows.tables
    rows.run(
        f"CREATE ROLE {role} LOGIN PASSWORD 'look'; GRANT USAGE ON SCHEMA public TO {role}; "
        f'GRANT SELECT ON {tables.node}, {tables.execution}, {tables.attempt} TO {role}'
    )
    try:
        url = f'postgresql://{role}:look@{config.host}:{config.port}/{config.dbname}'
        runner = CliRunner(env={'JOBSYNC_DATABASE_URL': url, 'COLUMNS': '200'})

        def ask(*words: str) -> Result:
            return runner.invoke(jobsync, list(words))

        assert 'charge:1' in good(ask('executions', 'list'))
        assert 'done' in good(ask('executions', 'show', 'charge:1'))
        for words in (
            ('forget', 'charge:1', '--yes'),
            ('purge', '--all', '--yes'),
            ('retry', 'mail:4'),
        ):
            assert 'jobsync doctor' in bad(ask('executions', *words)), words
        assert f'DELETE on "public"."{config.appname}attempt"' in ask('doctor').output
        assert len(keys(rows)) == 4
    finally:
        rows.run(f'DROP OWNED BY {role}; DROP ROLE {role}')


def test_tables_that_are_not_there(run: Run) -> None:
    for words in (('list',), ('show', 'k'), ('retry', 'k'), ('purge', '--all', '--yes')):
        assert 'jobsync init-db' in bad(run(*words))


def test_retry_says_what_becomes_of_the_message_of_a_dead_key(run: Run, rows: Rows) -> None:
    for key in ('poison:1', 'poison:2'):
        put(rows, key, 'dead')
    rows.run(
        f"UPDATE {rows.tables.execution} SET lost = 3, message = '{{}}' WHERE key = 'poison:2'"
    )
    shown = good(run('show', 'poison:2'))
    assert 'dead: 3 attempts were lost' in shown and 'kept' in shown
    said = good(run('retry', '--state', 'dead', '--yes'))
    assert 'poison:1 is free: its next message begins an attempt at once' in said
    assert 'poison:2 is free, but its message is only kept' in said
    assert 'no executions' in good(run('list', '--state', 'dead'))
