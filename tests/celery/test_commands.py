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
from typing import Any

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
    assert 'red' in programs.run(f'{CELERY} jobsync who order-7 --queue celery')
    assert '%' in programs.run(f'{CELERY} jobsync locks list')
    assert 'no executions' in programs.run(f'{CELERY} jobsync executions list')
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
    groups = {'celery': status['total_tokens']}
    eventually(lambda: json.loads(ask(port, '/health/ready')[1]).get('groups') == groups)
    assert json.loads(ask(port, '/health/ready')[1]) == {
        'status': 'ready',
        'lease': True,
        'consuming': True,
        'coordinated': True,
        'node': 'red',
        'groups': groups,
    }
    code, metrics = ask(port, '/metrics')
    assert 'jobsync_group_tokens{node="red",queue_group="celery"}' in metrics
    assert code == 200 and 'jobsync_healthy{' in metrics and 'node="red"' in metrics
    programs.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(('127.0.0.1', port), 5)


def test_what_waits_can_be_seen_and_deleted(programs: Programs, port: int) -> None:
    for number in range(3):
        programs.run(f"{CELERY} call shop.tasks.charge --args '[{number}, 1]' --queue later")

    def run(words: str) -> dict[str, Any]:
        text = programs.run(f'{CELERY} jobsync {words}')
        found: dict[str, Any] = json.loads(text[text.index('\n{') :])
        return found

    later = run('backlog --queue later --json')
    assert (later['known'], later['backlog'], later['parked']) == (True, 3, 0)
    assert 'celery' in [each['queue'] for each in run('backlog --json')['queues']]
    code, text = ask(port, '/backlog?queue=later')
    assert (code, json.loads(text)['backlog']) == (200, 3)
    eventually(lambda: 'jobsync_backlog_ready{queue="celery"} ' in ask(port, '/metrics')[1], 30)
    assert run('purge later --yes --json')['home'] == 3
    eventually(lambda: json.loads(ask(port, '/backlog?queue=later')[1])['backlog'] == 0, 30)
    assert 'redis://' not in programs.run(f'{CELERY} jobsync backlog')


def test_a_server_of_its_own_counts_while_no_worker_is_there(programs: Programs, port: int) -> None:
    programs.end()
    counting = programs.start(
        f'{CELERY} jobsync backlog --http 127.0.0.1:{port}', 'serving /backlog'
    )
    assert json.loads(ask(port, '/backlog?queue=celery')[1])['backlog'] == 0
    eventually(lambda: 'jobsync_backlog_ready{queue="celery"} 0.0' in ask(port, '/metrics')[1], 30)
    programs.broker.stop()
    try:
        eventually(lambda: ask(port, '/backlog')[0] == 503, 30)
        assert ask(port, '/health/ready')[0] == 200 == ask(port, '/metrics')[0]
    finally:
        programs.broker.start()
    eventually(lambda: ask(port, '/backlog')[0] == 200, 30)
    assert 'Traceback' not in counting.log


def test_a_command_that_does_not_exist_is_refused_with_the_others_named(programs: Programs) -> None:
    text = programs.run(f'! {CELERY} jobsync nonsense')
    assert 'nonsense' in text and 'Traceback' not in text
