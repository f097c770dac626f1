"""`celery -A proj jobsync …`, `inspect jobsync` and the worker's own HTTP server, with a real
worker.
"""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig
from tests.support.brokers import BrokerServer, free_port
from tests.support.waiting import eventually

from .programs import Programs

_PROJECT = Path(__file__).parents[2] / 'examples' / 'celery_plain'
CELERY = 'celery -A shop.app'


@pytest.fixture(scope='module')
def port() -> int:
    return free_port()


@pytest.fixture
def programs(
    config: CoordinationConfig, redis_server: BrokerServer, tmp_path: Path, port: int
) -> Iterator[Programs]:
    """A project whose worker `red` runs."""
    made = Programs(config, redis_server, _PROJECT, tmp_path)
    try:
        made.start(
            f'JOBSYNC_HTTP=127.0.0.1:{port} {CELERY} worker -l INFO -c 1 -P threads -n red@%h '
            '--jobsync-node red',
            'ready.',
        )
        yield made
    finally:
        made.close()


def ask(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f'http://127.0.0.1:{port}{path}', timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_cluster_can_be_looked_at_and_steered(programs: Programs) -> None:
    assert 'red' in programs.run(f'{CELERY} jobsync status')
    assert 'red' in programs.run(f'{CELERY} jobsync who order-7')
    assert '%' in programs.run(f'{CELERY} jobsync locks list')
    programs.run(f'{CELERY} jobsync drain red')
    eventually(lambda: 'drain' in programs.run(f'{CELERY} jobsync status'), 30)
    programs.run(f'{CELERY} jobsync undrain red')
    eventually(lambda: 'drain' not in programs.run(f'{CELERY} jobsync status'), 30)


def test_a_worker_tells_of_itself(programs: Programs, port: int) -> None:
    text = programs.run(f'{CELERY} inspect jobsync --json')
    (status,) = json.loads(text[text.index('\n{') if '\n{' in text else text.index('{') :]).values()
    assert status['node_name'] == 'red' and status['consuming'] is True
    assert ask(port, '/health/live')[0] == 200
    eventually(lambda: ask(port, '/health/ready')[0] == 200)
    assert json.loads(ask(port, '/health/ready')[1]) == {
        'status': 'ready',
        'lease': True,
        'consuming': True,
        'coordinated': True,
        'node': 'red',
    }
    code, metrics = ask(port, '/metrics')
    assert code == 200 and 'jobsync_healthy{' in metrics and 'node="red"' in metrics
    programs.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(('127.0.0.1', port), 5)


def test_a_command_that_does_not_exist_is_refused_with_the_others_named(programs: Programs) -> None:
    text = programs.run(f'! {CELERY} jobsync nonsense')
    assert 'nonsense' in text and 'Traceback' not in text
