"""The command line against a real server: what it prints, what it refuses, and how it fails."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import click
import psycopg2
import pytest
from click.testing import CliRunner, Result

from jobsync_core import Job
from jobsync_core.assignment.hashing import task_to_token
from jobsync_core.cli import doctor
from jobsync_core.cli.main import jobsync
from jobsync_core.config import CoordinationConfig
from jobsync_core.embedded.postgres import EmbeddedPostgres
from jobsync_core.store.layout import render_schema
from jobsync_core.store.locks import LockStore
from jobsync_core.store.tables import Tables
from tests.support.cluster import query
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[3]


def url_of(config: CoordinationConfig, **replace: object) -> str:
    user, password = replace.get('user', config.user), replace.get('password', config.password)
    login = quote(str(user), safe='') + (f':{quote(str(password), safe="")}' if password else '')
    place = f'{quote(config.host, safe="")}:{replace.get("port", config.port)}'
    return f'postgresql://{login}@{place}/{replace.get("dbname", config.dbname)}'


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        yield found


@pytest.fixture
def run(config: CoordinationConfig) -> Callable[..., Result]:
    """Runs a command against the test's database."""
    runner = CliRunner(env={'JOBSYNC_DATABASE_URL': url_of(config), 'COLUMNS': '200'})
    return lambda *words, **options: runner.invoke(jobsync, list(words), **options)


def good(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def bad(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    assert 'Traceback' not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stderr


def two_nodes(rows: Rows) -> None:
    rows.node('alpha')
    rows.node('beta')
    rows.own(0, 6_000, 'alpha')
    rows.own(6_000, 9_990, 'beta')
    rows.own(9_990, 10_000, None, blocked=True)


class TestStatus:
    def test_it_shows_nodes_leader_tokens_shares_leases_and_what_is_blocked(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        two_nodes(rows)
        rows.rebalance('nodes died', 'alpha', 1234)
        shown = good(run('status'))
        alpha = next(line for line in shown.splitlines() if line.strip().startswith('alpha'))
        assert 'leader, active' in alpha
        assert '6,000' in alpha
        assert '60.0%' in alpha
        assert 's ago' in alpha
        assert '10 tokens blocked' in shown
        assert 'nodes died' in shown
        assert '1,234' in shown

    def test_a_silent_node_is_shown_as_such(self, rows: Rows, run: Callable[..., Result]) -> None:
        rows.node('gone', age=60)
        assert 'silent' in good(run('status'))

    def test_a_date_that_python_has_not_is_told(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        rows.node('odd')
        rows.run(f"UPDATE {rows.tables.node} SET last_heartbeat = '11111-11-11'")
        assert 'a row of the tables cannot be read' in bad(run('status'))

    def test_json_holds_the_same(self, rows: Rows, run: Callable[..., Result]) -> None:
        two_nodes(rows)
        found = json.loads(good(run('status', '--json')))
        assert found['leader'] == 'alpha'
        assert [(node['name'], node['tokens']) for node in found['nodes']] == [
            ('alpha', 6_000),
            ('beta', 3_990),
        ]
        assert (found['blocked_tokens'], found['unowned_tokens'], found['moving_tokens']) == (
            10,
            10,
            0,
        )
        assert found['cluster']['total_tokens'] == 10_000

    def test_the_doctor_tells_who_is_in_the_way_what_cannot_be_written_and_which_locks_are_none(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        rows.node('a')
        shown = run('doctor').output
        assert (
            'nobody keeps nodes out' in shown
            and 'a row was written' in shown
            and 'all can be read' in shown
        )
        assert rows.run(f'SELECT key FROM {rows.tables.execution}') == []
        for task, patterns in (
            ('good', '["a"]'),
            ('bad', '{"a": 1}'),
            ('huge', f'["{"%" * 300_000}"]'),
        ):
            rows.run(
                f'INSERT INTO {rows.tables.lock} (task_id, node_patterns) VALUES (%s, %s::jsonb)',
                task,
                patterns,
            )
        rows.run("""CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$""")
        rows.run(
            f'CREATE TRIGGER full_disk BEFORE INSERT ON {rows.tables.execution} FOR EACH ROW '
            'EXECUTE FUNCTION full_disk()'
        )
        config = rows.config
        with (
            contextlib.closing(
                psycopg2.connect(
                    host=config.host,
                    port=config.port,
                    dbname=config.dbname,
                    user=config.user,
                    password=config.password,
                    application_name='nightly index',
                )
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(f'LOCK TABLE {rows.tables.node} IN SHARE MODE')
            result = run('doctor')
        assert result.exit_code == 1
        assert (
            "application 'nightly index'" in result.output
            and 'has locked sync_node (ShareLock)' in result.output
        )
        assert (
            'could not extend file (SQLSTATE 53100)' in result.output
            and 'free disk space' in result.output
        )
        assert 'ignored, as their patterns are none: bad, huge' in result.output

    def test_many_locks_and_long_patterns_are_listed_in_bounds(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        rows.run(f"""INSERT INTO {rows.tables.lock} (task_id, node_patterns, reason, created_at)
                     SELECT 'task ' || n, '["a"]', repeat('r', 900), now() + n * interval '1 ms'
                         FROM generate_series(1, 20000) AS n""")
        rows.run(f"""INSERT INTO {rows.tables.lock} (task_id, node_patterns, created_at)
                     VALUES ('long', jsonb_build_array(repeat('x', 1000000)), now() - interval
                         '1 day')""")
        began = time.monotonic()
        shown = good(run('locks', 'list'))
        assert time.monotonic() - began < 5
        lines = shown.splitlines()
        assert len(lines) == 102 and max(map(len, lines)) < 320
        assert lines[1].startswith('long') and '1,000,004 bytes' in lines[1]
        assert lines[-1] == 'and 19,901 more of 20,001: --all lists them, --json with nothing cut'
        assert len(good(run('locks', 'list', '--limit', '3')).splitlines()) == 5
        began = time.monotonic()
        everything = good(run('locks', 'list', '--all')).splitlines()
        assert time.monotonic() - began < 15
        assert len(everything) == 20_002 and max(map(len, everything)) < 320
        found = json.loads(good(run('locks', 'list', '--json')))
        assert len(found) == 20_001 and len(found[0]['node_patterns'][0]) == 1_000_000

    def test_tokens_whose_rows_somebody_has_deleted_have_no_owner(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        two_nodes(rows)
        rows.run(f'DELETE FROM {rows.tables.assignment} WHERE node = %s', 'beta')
        assert json.loads(good(run('status', '--json')))['unowned_tokens'] == 4_000
        assert '4,000 tokens without an owner' in good(run('status'))
        rows.run(f'DELETE FROM {rows.tables.assignment}')
        assert '10,000 tokens without an owner' in good(run('status'))

    def test_an_empty_cluster_is_no_error(self, rows: Rows, run: Callable[..., Result]) -> None:
        assert 'leader none' in good(run('status'))

    def test_control_characters_in_the_database_do_not_reach_the_terminal(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        rows.node('a')
        with rows.sessions.session() as connection:
            LockStore(connection, rows.tables).register(
                [('\x1b[2Jtask', ('[red]a[/red]',), '\x1b]0;evil\x07', None, None)], 'x'
            )
        shown = good(run('locks', 'list'))
        assert '\x1b' not in shown
        assert '[red]a[/red]' in shown

    def test_watch_repeats_until_interrupted(self, rows: Rows, config: CoordinationConfig) -> None:
        two_nodes(rows)
        # Nobody heartbeats here, and a process takes its time to start.
        rows.run(f"UPDATE {rows.tables.node} SET last_heartbeat = now() + interval '1 hour'")
        with subprocess.Popen(
            [sys.executable, '-m', 'jobsync_core.cli', 'status', '--json', '--watch', '0.1'],
            cwd=ROOT,
            env={**os.environ, 'JOBSYNC_DATABASE_URL': url_of(config)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                lines = [process.stdout.readline() for _ in range(3)]
                for _ in range(4):
                    # Python drops an interrupt that strikes while it cleans up after an object;
                    # whoever sits there presses again.
                    process.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        _, errors = process.communicate(timeout=5)
                        break
            finally:
                process.kill()
        assert [json.loads(line)['leader'] for line in lines] == ['alpha'] * 3
        assert process.returncode == 0
        assert errors == ''


def test_tokens_that_nobody_may_have_are_not_blamed_on_locks_where_there_are_none(
    rows: Rows, run: Callable[..., Result]
) -> None:
    rows.node('a', state='draining')
    rows.own(0, 10_000, None, blocked=True)
    shown = good(run('status'))
    assert 'every live node is draining' in shown and 'locks' not in shown


@pytest.mark.parametrize(
    ('states', 'reason'),
    [(['draining', 'draining'], 'every live node is draining'), ([], 'no node is alive')],
)
def test_a_lock_is_not_blamed_for_tokens_that_no_node_could_take(
    states: list[str], reason: str, rows: Rows, run: Callable[..., Result]
) -> None:
    for number, state in enumerate(states):
        rows.node(f'a{number}', state=state)
    rows.own(0, 10_000, None, blocked=True)
    good(run('locks', 'add', 'render', 'gpu-%'))
    shown = good(run('status'))
    assert reason in shown and 'their locks' not in shown and 'wants gpu-%' not in shown


def test_a_node_that_matches_a_lock_and_is_draining_is_named(
    rows: Rows, run: Callable[..., Result]
) -> None:
    rows.node('gpu-1', state='draining')
    rows.node('cpu-1')
    token = task_to_token('render', 10_000, 'double_sha256')
    rows.own(token, token + 1, None, blocked=True)
    good(run('locks', 'add', 'render', 'gpu-%'))
    assert 'the nodes that match their locks are draining: gpu-1' in good(run('status'))


class TestWho:
    def test_it_tells_owner_token_lock_pattern_and_successor(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        rows.node('gpu-1')
        rows.node('gpu-2')
        rows.own(0, 10_000, 'gpu-1')
        good(run('locks', 'add', 'job-7', 'gold-%', 'gpu-%', '--reason', 'needs one'))
        shown = good(run('who', 'job-7'))
        for name, value in (
            ('task', 'job-7'),
            ('token', f'{task_to_token("job-7", 10_000, "double_sha256")} of 10,000'),
            ('owner', 'gpu-1'),
            ('lock', 'gold-%, gpu-%'),
            ('matched', 'gpu-%'),
            ('reason', 'needs one'),
            ('next', 'gpu-2'),
        ):
            assert f'{name:<11}{value}\n' in shown

    def test_it_says_whether_an_audited_task_runs_again(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        rows.node('a')
        rows.own(0, 10_000, 'a')
        rows.run(
            f"INSERT INTO {rows.tables.audit} (node, task_id, date, token) VALUES ('b', 't', "
            "'2026-01-02', 1)"
        )
        assert 'audited    by b for 2026-01-02' in (shown := good(run('who', 't')))
        assert 'does not run again for that date' in shown
        rows.run(f'DELETE FROM {rows.tables.node}')
        assert 'the last node has left: it runs again, unless' in good(run('who', 't'))
        rows.run(f'UPDATE {rows.tables.cluster} SET epoch = epoch + 1')
        assert 'that cluster has ended: it runs again' in good(run('who', 't'))

    def test_the_clusters_settings_count_and_not_those_of_this_shell(
        self, make_config: Callable[..., CoordinationConfig]
    ) -> None:
        config = make_config(total_tokens=77, hash_function='md5')
        with rows_of(config):
            result = CliRunner(
                env={'JOBSYNC_DATABASE_URL': url_of(config), 'JOBSYNC_TOTAL_TOKENS': '500'}
            ).invoke(jobsync, ['who', '42'])
        assert f'{task_to_token(42, 77, "md5")} of 77' in good(result)

    def test_a_blocked_task_says_so(self, rows: Rows, run: Callable[..., Result]) -> None:
        rows.node('a')
        token = task_to_token('t', 10_000, 'double_sha256')
        rows.own(token, token + 1, None, blocked=True)
        assert 'nobody: blocked' in good(run('who', 't'))

    def test_an_owner_that_is_silent_is_said_to_be(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        rows.node('a', age=60)
        rows.own(0, 10_000, 'a')
        assert 'owner      a (no heartbeat for 6' in good(run('who', 't'))

    def test_a_key_of_the_ledger_is_known(self, rows: Rows, run: Callable[..., Result]) -> None:
        rows.run(f"""INSERT INTO {rows.tables.execution} (key, state, node, fence, attempts,
            finished_at, error)
                     VALUES ('shop.ship:order 17', 'failed', 'b', 1, 3, now(), 'no stock')""")
        shown = good(run('who', 'shop.ship:order 17'))
        assert 'ledger     failed on b at ' in shown and ', 3 attempts: no stock' in shown
        assert "`jobsync who 'order 17'`" in shown

    @pytest.mark.parametrize('patterns', ['5', '{}', '[]', '[1]', 'null'])
    def test_a_lock_that_the_leader_ignores_hides_nothing_else(
        self, rows: Rows, run: Callable[..., Result], patterns: str
    ) -> None:
        rows.node('a')
        rows.own(0, 10_000, 'a')
        rows.run(
            f"INSERT INTO {rows.tables.lock} (task_id, node_patterns) VALUES ('bad', "
            f"'{patterns}'), ('good', '[\"a\"]')"
        )
        assert 'owner      a' in good(run('who', 't'))
        assert 'matched    a' in good(run('who', 'good'))
        assert 'matched    no live node' in good(run('who', 'bad'))
        assert 'good' in good(run('locks', 'list')) and 'a' in good(run('drain', 'a', '--dry-run'))

    def test_an_impossible_id_is_one_line(self, rows: Rows, run: Callable[..., Result]) -> None:
        assert '2000' in bad(run('who', 'x' * 3_000))


class TestLocks:
    def test_pins_of_workers_stay_unless_they_are_asked_for(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        rows.run(f"""INSERT INTO {rows.tables.lock} (task_id, node_patterns, reason, pin)
                     VALUES ('a', '["x"]', 'pin', false), ('render#1', '["x"]', 'pin', true),
                         ('render#2', '["x"]', 'pin', true)""")
        assert good(run('locks', 'clear', '--all', '--yes')) == '1 lock deleted\n'
        assert 'render#1' in good(run('locks', 'list'))
        asked = run('locks', 'clear', '--pins', input='n\n')
        assert 'the pins of tasks: their messages go to any node' in asked.output
        assert good(run('locks', 'clear', '--pins', '--yes')) == '2 locks deleted\n'
        bad_call = run('locks', 'clear', '--pins', '--task', 'a')
        assert bad_call.exit_code == 2 and '--pins' in bad_call.output

    def test_add_list_and_clear(self, rows: Rows, run: Callable[..., Result]) -> None:
        rows.node('gpu-1')
        assert 'matching now: gpu-1' in good(
            run('locks', 'add', 'a', '%-1', '--expires-in-days', '1.5')
        )
        added = run('locks', 'add', 'b', 'nowhere')
        assert good(added)
        assert 'no live node matches' in added.stderr
        shown = good(run('locks', 'list'))
        assert '%-1' in shown
        assert 'nowhere' in shown
        assert good(run('locks', 'clear', '--task', 'a', '--yes')) == '1 lock deleted\n'
        assert good(run('locks', 'clear', '--all', '--yes')) == '1 lock deleted\n'
        assert good(run('locks', 'list')) == 'no locks\n'

    def test_a_lock_on_one_queue_is_added_shown_and_cleared_as_such(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        for name, groups in (('gpu-1', '{gpu,mail}'), ('gpu-2', '{mail}')):
            rows.node(name)
            rows.run(f'UPDATE {rows.tables.node} SET groups = %s WHERE name = %s', groups, name)
        added = good(run('locks', 'add', 'a', 'gpu-%', '--queue', 'gpu'))
        assert added == 'locked a to gpu-% in the queue gpu\nmatching now: gpu-1\n'
        good(run('locks', 'add', 'b', 'gpu-%'))
        header, first, second = good(run('locks', 'list')).splitlines()
        assert header.split()[:3] == ['task', 'patterns', 'queue']
        assert first.split()[:3] == ['a', 'gpu-%', 'gpu']
        assert second.split()[:3] == ['b', 'gpu-%', '(all)']
        assert json.loads(good(run('locks', 'list', '--json')))[0]['queue'] == 'gpu'
        nowhere = run('locks', 'add', 'c', 'gpu-%', '--queue', 'none')
        assert good(nowhere) and 'no live node consumes the queue none' in nowhere.stderr
        asked = run('locks', 'clear', '--queue', 'gpu', input='n\n')
        assert 'the locks that count in the queue gpu alone' in asked.output
        assert good(run('locks', 'clear', '--queue', 'gpu', '--yes')) == '1 lock deleted\n'
        assert good(run('locks', 'add', 'b', 'gpu-%', '--queue', 'mail')), 'it replaces the other'
        assert [lock['queue'] for lock in json.loads(good(run('locks', 'list', '--json')))] == [
            'mail',
            'none',
        ]

    @pytest.mark.parametrize('queue', ['', 'x' * 300, '\udcff'])
    def test_a_lock_on_what_is_no_queue_is_refused(
        self, rows: Rows, run: Callable[..., Result], queue: str
    ) -> None:
        assert 'queue' in bad(run('locks', 'add', 'a', 'x', '--queue', queue))
        assert 'queue' in bad(run('locks', 'clear', '--queue', queue, '--yes'))

    def test_clear_by_creator(self, rows: Rows, run: Callable[..., Result]) -> None:
        with rows.sessions.session() as connection:
            LockStore(connection, rows.tables).register([('t', ('a',), None, None, None)], 'node-1')
        assert good(run('locks', 'clear', '--creator', 'node-2', '--yes')) == '0 locks deleted\n'
        assert good(run('locks', 'clear', '--creator', 'node-1', '--yes')) == '1 lock deleted\n'
        assert 'UTF-8' in bad(run('locks', 'clear', '--creator', '\udcff', '--yes'), 2)

    def test_a_module_that_is_relative_is_none(self, run: Callable[..., Result]) -> None:
        assert 'MODULE:NAME' in bad(run('evacuate', '--app', '..:x'), 2)

    @pytest.mark.parametrize('words', [('backlog',), ('purge', 'q', '--yes'), ('evacuate',)])
    def test_a_command_that_needs_the_broker_says_how_to_name_it(
        self, run: Callable[..., Result], words: tuple[str, ...]
    ) -> None:
        assert 'celery -A proj' in bad(run(*words)) and 'JOBSYNC_APP' in bad(run(*words))

    @pytest.mark.parametrize(
        'words',
        [('backlog',), ('purge', 'q', '--yes'), ('evacuate',), ('executions', 'retry', 'k')],
    )
    @pytest.mark.parametrize('option', ['--url', '--appname', '--schema'])
    def test_a_command_that_asks_the_application_is_for_no_other_cluster(
        self,
        run: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
        words: tuple[str, ...],
        option: str,
    ) -> None:
        plugin = SimpleNamespace(evacuable=None)  # any use of it would raise
        monkeypatch.setitem(sys.modules, 'proj_here', SimpleNamespace(jobsync=plugin))
        asked = ('--app', 'proj_here:jobsync', option, 'other_')
        assert f'{option}: this command asks' in bad(run(*words, *asked), 2)

    def test_a_purge_that_prints_json_asks_nothing(self, run: Callable[..., Result]) -> None:
        assert '--yes' in bad(run('purge', 'q', '--json'), 2)

    def test_clear_asks_first_and_no_means_no(self, rows: Rows, run: Callable[..., Result]) -> None:
        good(run('locks', 'add', 'a', 'x'))
        bad(run('locks', 'clear', '--all', input='n\n'))
        assert 'x' in good(run('locks', 'list'))
        assert '1 lock deleted' in good(run('locks', 'clear', '--all', input='y\n'))

    @pytest.mark.parametrize(
        'words',
        [(), ('--all', '--task', 'a'), ('--creator', 'a', '--all'), ('--queue', 'a', '--pins')],
    )
    def test_clear_wants_one_selection(
        self, rows: Rows, run: Callable[..., Result], words: tuple[str, ...]
    ) -> None:
        assert 'give one of' in bad(run('locks', 'clear', '--yes', *words), code=2)

    @pytest.mark.parametrize(
        'words',
        [
            ('t', ''),
            ('t', 'a\\'),
            ('t', 'a', '--expires-in-days', '0'),
            ('t', 'a', '--expires-in-days', '-1'),
            ('t',),
        ],
    )
    def test_what_makes_no_lock_is_refused(
        self, rows: Rows, run: Callable[..., Result], words: tuple[str, ...]
    ) -> None:
        result = run('locks', 'add', *words)
        assert result.exit_code in (1, 2)
        assert result.stderr
        assert good(run('locks', 'list')) == 'no locks\n'


class TestDrain:
    def test_a_dry_run_shows_what_would_move_and_changes_nothing(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        two_nodes(rows)
        shown = good(run('drain', 'alpha', '--dry-run'))
        assert any(line.split() == ['alpha', 'beta', '6,000'] for line in shown.splitlines()), shown
        assert rows.run(f"SELECT state FROM {rows.tables.node} WHERE name = 'alpha'") == [
            ('active',)
        ]

    def test_drain_and_undrain_and_saying_it_twice(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        two_nodes(rows)
        shown = good(run('drain', 'alpha'))
        assert 'gives its tokens away' in shown
        assert 'no other node can take' not in shown and 'takes part again' not in shown
        again = good(run('drain', 'alpha'))
        assert 'draining already' in again
        assert 'no other node can take' in good(run('drain', 'beta'))
        assert 'takes part again' in good(run('undrain', 'beta'))
        assert 'takes part again' in good(run('undrain', 'alpha'))
        assert 'was not draining' in good(run('undrain', 'alpha'))

    def test_unknown_and_joining_nodes_are_refused(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        two_nodes(rows)
        rows.node('newcomer', state='joining')
        assert 'alpha, beta, newcomer' in bad(run('drain', 'gamma'))
        assert 'alpha, beta, newcomer' in bad(run('drain', 'gamma', '--dry-run'))
        assert 'still joining' in bad(run('drain', 'newcomer'))

    def test_a_running_node_gives_everything_away_and_takes_part_again(
        self, config: CoordinationConfig, run: Callable[..., Result]
    ) -> None:
        with (
            Job('first', coordination_config=config, wait_on_enter=0) as first,
            Job('second', coordination_config=config, wait_on_enter=0) as second,
        ):
            eventually(lambda: len(first.my_tokens) == len(second.my_tokens) == 5_000)
            good(run('drain', 'second'))
            eventually(lambda: (len(first.my_tokens), len(second.my_tokens)) == (10_000, 0))
            assert 'draining' in good(run('status'))
            good(run('undrain', 'second'))
            eventually(lambda: len(first.my_tokens) == len(second.my_tokens) == 5_000)
            assert 'second' in good(run('who', 'x')) + good(run('status'))
            assert 'first' in good(run('rebalances', '--limit', '1'))

    def test_an_operator_may_drain_a_node_that_drained_itself_before(
        self, config: CoordinationConfig, run: Callable[..., Result]
    ) -> None:
        with (
            Job('first', coordination_config=config, wait_on_enter=0) as first,
            Job('second', coordination_config=config, wait_on_enter=0) as second,
        ):
            eventually(lambda: len(second.my_tokens) == 5_000)
            assert second.drain()
            good(run('undrain', 'second'))
            eventually(lambda: len(first.my_tokens) == len(second.my_tokens) == 5_000)
            assert second.drain()
            second.undrain()
            eventually(lambda: len(second.my_tokens) == 5_000)
            good(run('drain', 'second'))
            eventually(lambda: (len(first.my_tokens), len(second.my_tokens)) == (10_000, 0))


class TestSchema:
    def test_init_db_creates_the_tables_once_and_again(
        self, config: CoordinationConfig, run: Callable[..., Result]
    ) -> None:
        assert 'sync_' in good(run('init-db'))
        good(run('init-db'))
        assert 'no node is registered' in good(run('status'))

    def test_schema_prints_what_a_dba_can_run(self, run: Callable[..., Result]) -> None:
        assert (
            good(run('schema', '--sql', '--appname', 'other_')).strip()
            == render_schema('other_').strip()
        )

    def test_another_appname_is_another_cluster(
        self, rows: Rows, run: Callable[..., Result]
    ) -> None:
        rows.node('a')
        good(run('--appname', 'other_', 'init-db'))
        assert ' a ' not in good(run('status', '--appname', 'other_'))
        assert ' a ' in good(run('--appname', 'SYNC_', 'status'))


class TestQueueGroups:
    @pytest.fixture
    def groups(self, config: CoordinationConfig) -> Iterator[None]:
        """Two nodes: one of `mail`, and one of `mail` and `gpu`."""
        with (
            Job('n1', config, wait_on_enter=0, groups=['mail']) as one,
            Job('n2', config, wait_on_enter=0, groups=['mail', 'gpu']) as two,
        ):

            def tokens(job: Job) -> dict[str, int]:
                return job.local_status()['groups']

            eventually(
                lambda: (
                    tokens(one) == {'mail': 5_000} and tokens(two) == {'gpu': 10_000, 'mail': 5_000}
                ),
                30,
            )
            yield

    def test_status_shows_who_owns_what_of_each(
        self, groups: None, run: Callable[..., Result]
    ) -> None:
        shown = good(run('status'))
        assert re.search(r'gpu +n2 +10,000 +100.0%', shown), shown
        assert re.search(r'mail +n1 +5,000 +50.0%\s+n2 +5,000 +50.0%', shown), shown
        found = json.loads(good(run('status', '--json')))
        assert [row['queue_group'] for row in found['groups']] == ['gpu', 'mail']

    def test_who_tells_the_owner_in_a_queue(self, groups: None, run: Callable[..., Result]) -> None:
        shown = good(run('who', 't', '--queue', 'gpu'))
        assert re.search(r'^queue +gpu$', shown, re.MULTILINE)
        assert re.search(r'^owner +n2$', shown, re.MULTILINE)
        shown = good(run('who', 't'))
        assert re.search(r'^in queue +gpu: n2$', shown, re.MULTILINE)
        assert re.search(r'^in queue +mail: n[12]$', shown, re.MULTILINE)
        assert 'more of one with --queue' in shown
        assert "'gpu', 'mail'" in bad(run('who', 't', '--queue', 'celery'))

    def test_a_drained_last_node_of_a_queue_is_named_as_the_reason(
        self, groups: None, run: Callable[..., Result]
    ) -> None:
        assert 'no other node can take those of gpu:' in good(run('drain', 'n2'))
        reason = 'gpu: every live node that consumes it is draining'
        eventually(lambda: 'nobody' in good(run('who', 't', '--queue', 'gpu')))
        shown = good(run('status'))
        assert reason in shown and 'their locks' not in shown, shown
        assert 'no other node can take them:' in good(run('drain', 'n1'))
        eventually(lambda: 'mail: every live node' in good(run('status')))
        assert reason in good(run('status'))


class TestSimulate:
    def test_it_needs_no_database(self) -> None:
        result = CliRunner(
            env={'JOBSYNC_DATABASE_URL': 'postgresql://nobody@192.0.2.1/none'}
        ).invoke(jobsync, ['simulate', '--nodes', '7', '--tasks', '600', '--tokens', '10000'])
        shown = good(result)
        assert len(re.findall(r'^ *node-\d +1,42[89] ', shown, re.MULTILINE)) == 7
        assert 'node-8 joins: 1,250 tokens move' in shown
        assert 'node-7 leaves: 1,428 tokens move' in shown

    def test_more_tasks_than_tokens_is_remarked(self) -> None:
        assert 'share tokens' in good(
            CliRunner().invoke(jobsync, ['simulate', '--tasks', '100', '--tokens', '10'])
        )

    def test_numbers_out_of_range_are_refused(self) -> None:
        bad(CliRunner().invoke(jobsync, ['simulate', '--nodes', '0']), code=2)

    def test_each_queue_group_spreads_over_its_own_nodes(self) -> None:
        words = ['simulate', '--nodes', '4', '--tokens', '1000', '--group', 'mail=4']
        shown = good(CliRunner().invoke(jobsync, [*words, '--group', 'a=b=2']))
        mail, other = shown.split('queue group a=b: 2 nodes')
        assert 'queue group mail: 4 nodes' in mail
        assert 'node-5 joins: 200 tokens move' in mail and 'node-3 joins: 333 tokens' in other

    @pytest.mark.parametrize('group', ['gpu', '=2', 'gpu=0', 'gpu=6', 'gpu=²', 'gpu=-1'])
    def test_a_group_that_cannot_be_is_refused(self, group: str) -> None:
        assert 'NAME=NODES' in bad(CliRunner().invoke(jobsync, ['simulate', '--group', group]), 2)

    def test_a_group_that_is_given_twice_is_refused(self) -> None:
        words = ['simulate', '--group', 'a=1', '--group', 'a=2']
        assert 'once' in bad(CliRunner().invoke(jobsync, words), 2)


class TestDoctor:
    def test_a_good_server_passes(self, rows: Rows, run: Callable[..., Result]) -> None:
        shown = good(run('doctor'))
        for name in (
            'connection',
            'server version',
            'writable',
            'clock',
            'schema',
            'rights',
            'durability',
            'pooler',
            'notifications',
        ):
            assert name in shown
        assert ' bad ' not in shown

    def test_at_a_standby_all_the_rest_is_looked_at(self, own_server: EmbeddedPostgres) -> None:
        config = own_server.config('postgres')
        runner = CliRunner(env={'JOBSYNC_DATABASE_URL': url_of(config), 'COLUMNS': '200'})
        good(runner.invoke(jobsync, ['init-db']))
        ((directory,),) = query(config, "SELECT current_setting('data_directory')")
        own_server.kill()
        signal_file = Path(directory, 'standby.signal')
        signal_file.touch()
        signal_file.chmod(0o666)
        own_server.start()
        result = runner.invoke(jobsync, ['doctor'])
        bad(result)
        for name in ('writable', 'writes', 'locks of tasks', 'rights', 'durability'):
            assert name in result.stdout, result.stdout

    def test_missing_tables_are_fine_as_long_as_a_node_may_create_them(
        self, run: Callable[..., Result]
    ) -> None:
        assert 'init-db' in good(run('doctor'))

    def test_missing_rights_are_named(self, rows: Rows) -> None:
        rows.run('DROP ROLE IF EXISTS reader')
        rows.run("CREATE ROLE reader LOGIN PASSWORD 'a word'")
        try:
            rows.run(f'GRANT SELECT ON {rows.tables.node}, {rows.tables.cluster} TO reader')
            url = url_of(rows.config, user='reader', password='a word')
            result = CliRunner(env={'JOBSYNC_DATABASE_URL': url}).invoke(jobsync, ['doctor'])
            bad(result)
            assert 'INSERT, UPDATE, DELETE on "public"."sync_node"' in result.stdout
            assert 'init-db --role reader' in result.stdout
        finally:
            rows.run('DROP OWNED BY reader')
            rows.run('DROP ROLE reader')

    def test_tables_in_part_are_bad(self, rows: Rows, run: Callable[..., Result]) -> None:
        rows.run(f'DROP TABLE {rows.tables.rebalance}')
        result = run('doctor')
        bad(result)
        assert 'not there: rebalance' in result.stdout

    def test_a_server_that_is_not_there_is_bad_and_the_password_stays_hidden(
        self, config: CoordinationConfig
    ) -> None:
        with socket.socket() as unused:
            unused.bind(('127.0.0.1', 0))
            url = url_of(config, port=unused.getsockname()[1], password='s3cret@:/')
            result = CliRunner(env={'JOBSYNC_DATABASE_URL': url}).invoke(jobsync, ['doctor'])
        bad(result)
        assert 'connection' in result.output
        assert 's3cret' not in result.output

    def test_a_transaction_pooler_is_bad_unless_nobody_listens(
        self, make_config: Callable[..., CoordinationConfig]
    ) -> None:
        config = make_config()
        assert doctor._pooler_check(config, 'transaction').verdict == 'bad'
        assert 'listen=False' in doctor._pooler_check(config, 'transaction').remedy
        assert doctor._pooler_check(make_config(listen=False), 'transaction').verdict == 'ok'
        assert (
            doctor._pooler_check(config, 'session').verdict
            == doctor._pooler_check(config, 'none').verdict
            == 'ok'
        )


class TestFailures:
    @pytest.mark.parametrize(
        'words',
        [
            ('status',),
            ('who', 'x'),
            ('locks', 'list'),
            ('locks', 'add', 'a', 'b'),
            ('locks', 'clear', '--all', '--yes'),
            ('drain', 'a'),
            ('drain', 'a', '--dry-run'),
            ('undrain', 'a'),
            ('rebalances',),
            ('init-db',),
            ('status', '--watch', '--json'),
        ],
    )
    def test_without_a_server_each_command_says_so_in_one_line(
        self, config: CoordinationConfig, words: tuple[str, ...]
    ) -> None:
        with socket.socket() as unused:
            unused.bind(('127.0.0.1', 0))
            url = url_of(config, port=unused.getsockname()[1], password='s3cret@:/')
            message = bad(CliRunner(env={'JOBSYNC_DATABASE_URL': url}).invoke(jobsync, list(words)))
        assert len(message.strip().splitlines()) == 1
        assert 's3cret' not in message

    def test_without_tables_the_remedy_is_named(self, run: Callable[..., Result]) -> None:
        assert 'init-db' in bad(run('status'))

    @pytest.mark.parametrize(
        ('words', 'named'),
        [
            (('--url', 'mysql://u:s3cret@h/d', 'status'), 'mysql'),
            (('--appname', 'no-such"name', 'status'), 'appname'),
            (('status', '--url', 'postgresql://u:s3cret@h:99999/d'), 'port'),
        ],
    )
    def test_settings_that_cannot_work_are_named(self, words: tuple[str, ...], named: str) -> None:
        message = bad(CliRunner().invoke(jobsync, list(words)))
        assert named in message
        assert 's3cret' not in message

    def test_an_option_wins_over_the_environment(self, rows: Rows) -> None:
        rows.node('alpha')
        runner = CliRunner(
            env={'JOBSYNC_DATABASE_URL': 'postgresql://nobody@127.0.0.1:1/none', 'COLUMNS': '200'}
        )
        assert 'alpha' in good(runner.invoke(jobsync, ['status', '--url', url_of(rows.config)]))
        assert 'alpha' in good(runner.invoke(jobsync, ['--url', url_of(rows.config), 'status']))

    def test_every_command_explains_itself(self) -> None:
        def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
            yield path
            for name, child in getattr(command, 'commands', {}).items():
                yield from walk(child, (*path, name))

        paths = list(walk(jobsync, ()))
        wanted = {
            'status',
            'who',
            'drain',
            'undrain',
            'rebalances',
            'simulate',
            'init-db',
            'schema',
            'doctor',
            'locks',
        }
        assert wanted <= {path[0] for path in paths if path}
        for path in paths:
            assert 'Usage:' in good(CliRunner().invoke(jobsync, [*path, '--help']))


class TestProcess:
    def test_it_runs_as_a_module_without_a_terminal(
        self, rows: Rows, config: CoordinationConfig
    ) -> None:
        two_nodes(rows)
        done = subprocess.run(
            [sys.executable, '-m', 'jobsync_core.cli', 'status'],
            cwd=ROOT,
            env={**os.environ, 'JOBSYNC_DATABASE_URL': url_of(config), 'LC_ALL': 'C'},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, '')
        assert 'alpha' in done.stdout
        assert '\x1b' not in done.stdout

    def test_without_its_packages_it_names_the_extra(self, tmp_path: Path) -> None:
        (tmp_path / 'rich.py').write_text(
            "raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')\n"
        )
        done = subprocess.run(
            [sys.executable, '-m', 'jobsync_core.cli', 'status'],
            cwd=ROOT,
            env={**os.environ, 'PYTHONPATH': str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert 'jobsync-workers[cli]' in done.stderr
        assert 'Traceback' not in done.stderr

    def test_the_schema_names_every_relation_that_the_doctor_looks_for(self) -> None:
        sql = render_schema('sync_')
        tables = Tables('sync_')
        assert all(getattr(tables, name) in sql for name in tables.all)
