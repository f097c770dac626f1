"""Operating the plugin, as processes: `celery jobsync …`, `celery inspect jobsync`, and a worker's
health and metrics.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from celery import Celery
from kombu.utils.json import dumps, loads
from prometheus_client.parser import text_string_to_metric_families

from jobsync_celery import JobSync, control
from jobsync_core import CoordinationConfig, Job
from jobsync_core.assignment.hashing import task_to_token
from jobsync_core.worker.node_of_tests import set_node_of_tests
from tests.support.brokers import BrokerServer, die_with_parent, free_port
from tests.support.cluster import query
from tests.support.proxy import Mode, Proxy
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
FIELDS = (
    'host',
    'port',
    'dbname',
    'user',
    'password',
    'appname',
    'total_tokens',
    'heartbeat_interval_sec',
    'heartbeat_timeout_sec',
    'rebalance_check_interval_sec',
)
#: It must not be seen anywhere.
PASSWORD = 's3cret@word'


@dataclass
class Result:
    code: int
    out: str
    errors: str


class Stage:
    """A database, a broker, and `celery` as a process."""

    def __init__(self, config: CoordinationConfig, broker: str, directory: Path) -> None:
        self.config = config
        self.broker = broker
        self.directory = directory
        self.settings: dict[str, Any] = {name: getattr(config, name) for name in FIELDS}

    @property
    def url(self) -> str:
        """The database's, with the password."""
        config = self.config
        login = f'{config.user}:{quote(PASSWORD, safe="")}'
        return f'postgresql://{login}@{config.host}:{config.port}/{config.dbname}'

    def environment(self, settings: dict[str, Any] | None, **more: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(('JOBSYNC_', 'CELERY_', 'PYTEST_'))
        }
        return {
            **kept,
            'TEST_BROKER': self.broker,
            'TEST_SETTINGS': json.dumps(settings) if settings else '',
            'COLUMNS': '200',
            **more,
        }

    def celery(
        self,
        *words: str,
        app: str | None = 'tests.celery.commands_app',
        plugin: bool = True,
        **environ: str,
    ) -> Result:
        """Run `celery -A app …` to its end."""
        command = [sys.executable, '-m', 'celery', *(('-A', app) if app else ()), *words]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment(self.settings if plugin else None, **environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert PASSWORD not in done.stdout + done.stderr
        assert 'Traceback' not in done.stdout + done.stderr, done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    def good(self, *words: str, **options: Any) -> str:
        found = self.celery(*words, **options)
        assert found.code == 0, found
        return found.out

    @contextlib.contextmanager
    def worker(
        self, name: str, plugin: bool = True, **settings: Any
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A worker that consumes."""
        log = self.directory / f'{name}.log'
        command = [
            sys.executable,
            '-m',
            'celery',
            '-A',
            'tests.celery.commands_app',
            'worker',
            '-n',
            f'{name}@test',
            '-P',
            'solo',
            '-l',
            'INFO',
        ]
        with log.open('wb') as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment({**self.settings, **settings} if plugin else None),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent(),
            )
        try:
            eventually(
                lambda: f'{name}@test ready.' in log.read_text() or process.poll() is not None, 40
            )
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            finally:
                process.kill()
                process.wait()
            assert PASSWORD not in log.read_text()


@pytest.fixture
def stage(
    config: CoordinationConfig, redis_server: BrokerServer, tmp_path: Path
) -> Iterator[Stage]:
    space = redis_server.new_space()
    role = f'operator_{uuid.uuid4().hex[:12]}'
    query(config, f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{PASSWORD}'")
    yield Stage(replace(config, user=role, password=PASSWORD), redis_server.url(space), tmp_path)
    query(config, f'REASSIGN OWNED BY {role} TO CURRENT_USER')
    query(config, f'DROP ROLE {role}')
    redis_server.drop_space(space)


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    """A cluster of two nodes that share the tokens."""
    with rows_of(config) as found:
        found.node('alpha')
        found.node('beta')
        found.own(0, 6_000, 'alpha')
        found.own(6_000, 10_000, 'beta')
        yield found


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urlopen(f'http://127.0.0.1:{port}{path}', timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def counted(port: int) -> dict[str, float]:
    """The counters of messages by event, from the metrics."""
    return {
        sample.labels['event']: sample.value
        for family in text_string_to_metric_families(fetch(port, '/metrics')[1])
        if family.name == 'jobsync_messages'
        for sample in family.samples
    }


class TestCommands:
    def test_they_look_at_the_apps_cluster_and_steer_it(self, stage: Stage, rows: Rows) -> None:
        found = json.loads(stage.good('jobsync', 'status', '--json'))
        assert [(node['name'], node['tokens']) for node in found['nodes']] == [
            ('alpha', 6_000),
            ('beta', 4_000),
        ]
        shown = stage.good('jobsync', 'who', 'order:7')
        token = task_to_token('order:7', 10_000, 'double_sha256')
        assert f'{token} of 10,000' in shown
        assert f'owner      {"alpha" if token < 6_000 else "beta"}' in shown
        assert 'gives its tokens away' in stage.good('jobsync', 'drain', 'beta')
        assert rows.value(f"SELECT state FROM {rows.tables.node} WHERE name = 'beta'") == 'draining'
        assert 'takes part again' in stage.good('jobsync', 'undrain', 'beta')
        assert 'locked order:7 to alpha' in stage.good(
            'jobsync', 'locks', 'add', 'order:7', 'alpha'
        )
        assert 'order:7' in stage.good('jobsync', 'locks', 'list')
        assert stage.good('jobsync', 'locks', 'clear', '--all', '--yes') == '1 lock deleted\n'
        rows.rebalance('nodes died', 'alpha', 1234)
        assert '1,234' in stage.good('jobsync', 'rebalances')
        assert 'ok   notifications' in stage.good('jobsync', 'doctor')

    def test_the_environment_and_the_options_can_name_another_cluster(
        self, stage: Stage, rows: Rows
    ) -> None:
        assert 'alpha' in stage.good(
            'jobsync', 'status', plugin=False, JOBSYNC_DATABASE_URL=stage.url
        )
        stage.settings['port'] = free_port()
        assert 'alpha' in stage.good('jobsync', 'status', '--url', stage.url)
        stage.settings['port'] = stage.config.port
        stage.good('jobsync', 'init-db', '--appname', 'other_')
        assert 'no node is registered' in stage.good('jobsync', 'status', '--appname', 'other_')

    def test_an_app_that_names_no_database_says_what_to_set(self, stage: Stage) -> None:
        for app in ('tests.celery.commands_app', None):
            found = stage.celery('jobsync', 'status', app=app, plugin=False)
            assert found.code == 1
            assert 'JOBSYNC_DATABASE_URL' in found.errors

    def test_a_database_that_is_away_is_one_line(self, stage: Stage) -> None:
        stage.settings.update(host='127.0.0.1', port=free_port())
        for words in (
            ('status',),
            ('who', 'a'),
            ('drain', 'a'),
            ('undrain', 'a'),
            ('locks', 'list'),
            ('rebalances',),
        ):
            found = stage.celery('jobsync', *words)
            assert (found.code, found.out) == (1, '')
            assert len(found.errors.strip().splitlines()) == 1
        assert stage.celery('jobsync', 'doctor').code == 1

    def test_wrong_words_are_refused_with_help(self, stage: Stage) -> None:
        for words, said in (
            (('who',), "Missing argument 'TASK_ID'"),
            (('nonsense',), 'No such command'),
            (('status', '--nonsense'), '--nonsense'),
            (('status', '-A', 'proj'), 'celery -A proj jobsync'),
            (('locks', 'list', '--app', 'proj'), 'celery --app proj jobsync'),
        ):
            found = stage.celery('jobsync', *words)
            assert found.code == 2
            assert said in found.errors

    def test_help_needs_no_app_and_no_database(self, stage: Stage) -> None:
        shown = stage.good('jobsync', '--help', app=None, plugin=False)
        assert all(
            name in shown
            for name in ('status', 'who', 'drain', 'undrain', 'locks', 'rebalances', 'doctor')
        )
        assert 'dry-run' in stage.good('jobsync', 'drain', '--help', app=None, plugin=False)

    def test_without_rich_the_extra_is_named_and_celery_is_unharmed(
        self, stage: Stage, tmp_path: Path
    ) -> None:
        (tmp_path / 'rich.py').write_text(
            "raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')\n"
        )
        for words in (
            ('jobsync', 'status', '--json'),
            ('jobsync', 'locks', 'add', 'a', 'b'),
            ('jobsync',),
        ):
            found = stage.celery(*words, PYTHONPATH=str(tmp_path))
            assert found.code == 1
            assert 'jobsync-workers[cli]' in found.errors
        assert stage.good('--version', PYTHONPATH=str(tmp_path))


class TestInspect:
    def test_each_worker_tells_of_its_node(self, stage: Stage) -> None:
        with stage.worker('one'), stage.worker('two'), stage.worker('plain', plugin=False):

            def told() -> dict[str, Any]:
                found: dict[str, Any] = json.loads(
                    stage.good('inspect', 'jobsync', '--json', '-t', '3')
                )
                return (
                    found
                    if [found.get(node, {}).get('my_tokens') for node in ('one@test', 'two@test')]
                    == [5_000, 5_000]
                    else {}
                )

            found = eventually(told, 40)
            # To a worker without JobSync the command is not known: this is Celery's answer.
            assert found.pop('plain@test') == {'error': "KeyError('jobsync')"}
            assert set(found) == {'one@test', 'two@test'}
            one = found['one@test']
            assert (one['node_name'], one['healthy'], one['consuming']) == ('one@test', True, True)
            assert [each['is_leader'] for each in found.values()].count(True) == 1
            assert isinstance(one['messages'], dict)
            assert 'one@test' in stage.good('inspect', 'jobsync', '-d', 'one@test', '-t', '5')

    def test_the_answer_is_json(self, config: CoordinationConfig) -> None:
        class State:
            app = Celery('inspected', broker='memory://')

        assert 'JobSync(app)' in control.jobsync(State)['error']
        JobSync(State.app, config=config)
        assert control.jobsync(State) == {'coordination_enabled': False}
        with Job('n1', config, wait_on_enter=0) as job:
            set_node_of_tests(job)
            try:
                found = control.jobsync(State)
            finally:
                set_node_of_tests(None)
            assert found['node_name'] == 'n1'
            assert loads(dumps(found)) == json.loads(json.dumps(found)) == found


class TestHttp:
    def test_a_worker_serves_health_and_metrics(self, stage: Stage) -> None:
        port = free_port()
        with stage.worker('one', http=f'127.0.0.1:{port}') as worker:
            assert fetch(port, '/health/live') == (200, '{"status": "live"}')
            eventually(lambda: fetch(port, '/health/ready')[0] == 200)
            found = json.loads(fetch(port, '/health/ready')[1])
            assert list(found.pop('groups')) == ['celery']
            assert found == {
                'status': 'ready',
                'lease': True,
                'consuming': True,
                'coordinated': True,
                'node': 'one@test',
            }
            app = Celery('sender', broker=stage.broker, backend=stage.broker)
            try:
                for number in range(3):
                    app.send_task('tests.celery.commands_app.charge', (number,))
                eventually(lambda: counted(port).get('run') == 3)
            finally:
                app.close()
            assert counted(port)['received'] >= 3
            worker.terminate()
            assert worker.wait(30) == 0
            with pytest.raises(OSError):
                fetch(port, '/health/live')

    def test_a_worker_that_loses_its_database_is_alive_and_not_ready_until_it_is_back(
        self, stage: Stage
    ) -> None:
        port = free_port()
        with (
            Proxy(stage.config.host, int(stage.config.port)) as proxy,
            stage.worker('one', http=f'127.0.0.1:{port}', host=proxy.host, port=proxy.port),
        ):
            eventually(lambda: fetch(port, '/health/ready')[0] == 200)
            proxy.switch(Mode.HOLD)
            eventually(lambda: fetch(port, '/health/ready')[0] == 503)
            eventually(lambda: json.loads(fetch(port, '/health/ready')[1])['consuming'] is False)
            assert fetch(port, '/health/live')[0] == 200
            assert 'jobsync_healthy{node="one@test"} 0.0' in fetch(port, '/metrics')[1]
            proxy.heal()
            eventually(lambda: fetch(port, '/health/ready')[0] == 200)

    def test_a_port_in_use_ends_the_worker_with_its_name(self, stage: Stage) -> None:
        port = free_port()
        with stage.worker('one', http=f'127.0.0.1:{port}'):
            done = subprocess.run(
                [
                    sys.executable,
                    '-m',
                    'celery',
                    '-A',
                    'tests.celery.commands_app',
                    'worker',
                    '-n',
                    'two@test',
                    '-P',
                    'solo',
                    '-l',
                    'INFO',
                ],
                cwd=ROOT,
                env=stage.environment({**stage.settings, 'http': f'127.0.0.1:{port}'}),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode != 0
            assert f"http='127.0.0.1:{port}'" in done.stderr
