"""Probes while a worker's broker is away and while it shuts down, and an end in time whatever the
database does.
"""

from __future__ import annotations

import http.client
import json
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.brokers import free_port
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

from .harness import Cluster, Worker
from .history import moment
from .setups import Setup, setups

MakeCluster = Callable[..., Cluster]
on_all = pytest.mark.parametrize('setup', setups(), ids=str)
on_threads = pytest.mark.parametrize('setup', setups('threads'), ids=str)
#: Seconds within which probes are told; what an end takes beyond the running task; and what a busy
#: machine adds to either.
TOLD_SEC, END_SEC, BUSY_SEC = 15.0, 5.0, 3.0
#: The times that users have who set none.
DEFAULTS = {
    'heartbeat_interval_sec': 5,
    'heartbeat_timeout_sec': 15,
    'rebalance_check_interval_sec': 30,
}


def probe(port: int, path: str) -> tuple[int, dict[str, Any]]:
    """Status and answer; 0 where nobody listens, or ends amid an answer."""
    try:
        try:
            with urllib.request.urlopen(f'http://127.0.0.1:{port}{path}', timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
    except (OSError, http.client.HTTPException):
        return 0, {}


def is_ready(port: int) -> bool:
    return probe(port, '/health/ready')[0] == 200


def launch(cluster: Cluster, port: int, **options: Any) -> Worker:
    worker = cluster.launch('alpha', concurrency=1, http=f'127.0.0.1:{port}', **options)
    worker.wait_ready()
    eventually(lambda: is_ready(port), 20)
    return worker


@pytest.mark.parametrize('mode', [Mode.REFUSE, Mode.SWALLOW], ids=['refused', 'silent'])
@on_threads
def test_a_worker_whose_broker_is_away_is_alive_and_not_ready_until_it_is_back(
    setup: Setup, make_cluster: MakeCluster, mode: Mode
) -> None:
    cluster, port = make_cluster(setup), free_port()
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        launch(cluster, port, broker=server.url(cluster.place.space, proxy.port), **DEFAULTS)
        proxy.switch(mode)
        if mode is Mode.REFUSE:
            proxy.reset()
        eventually(lambda: probe(port, '/health/ready')[0] == 503, TOLD_SEC + BUSY_SEC)
        assert probe(port, '/health/live')[0] == 200
        assert not probe(port, '/health/ready')[1]['consuming']
        proxy.heal()
        eventually(lambda: is_ready(port), 60)
        cluster.send('keyed', 1)
        cluster.finish()


@on_all
def test_a_worker_that_shuts_down_is_alive_and_not_ready_until_it_ends(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster, port = make_cluster(setup), free_port()
    worker = launch(cluster, port)
    cluster.send('plain', 1, 4.0)
    eventually(lambda: cluster.notes.of('start'), 20)
    worker.send_signal(signal.SIGTERM)
    eventually(lambda: not is_ready(port), 3)
    assert not cluster.ended() and worker.is_running()
    seen: list[tuple[int, int]] = []
    while worker.is_running():
        seen.append((probe(port, '/health/live')[0], probe(port, '/health/ready')[0]))
    assert worker.wait() == 0 and len(seen) > 10
    # The last words of a process that has nothing left to do may go unheard.
    while 0 in seen[-1]:
        seen.pop()
    assert set(seen) == {(200, 503)}, seen


@pytest.mark.parametrize('task', ['', 'keyed'])
@on_all
def test_a_worker_ends_in_time_whose_database_is_silent(
    setup: Setup, make_cluster: MakeCluster, task: str
) -> None:
    cluster, port = make_cluster(setup), free_port()
    config = cluster.place.config
    with Proxy(config.host, int(config.port)) as proxy:
        url = (
            f'postgresql://{config.user}:{config.password}'
            f'@{proxy.host}:{proxy.port}/{config.dbname}'
        )
        worker = launch(cluster, port, database=url, **DEFAULTS)
        took = 3.0 if task else 0.0
        if task:
            cluster.send(task, 1, took)
            eventually(lambda: cluster.notes.of('start'), 20)
        began = moment()
        proxy.switch(Mode.SWALLOW)
        worker.send_signal(signal.SIGTERM)
        worker.wait()
        needed = moment() - began
        print(f'{setup} {task or "idle"}: ended in {needed:.1f} s')
        assert needed < took + END_SEC + BUSY_SEC, worker.log(6000)
