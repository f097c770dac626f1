"""A Celery worker that starts owns nothing before it can take messages."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.support.cluster import query
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

from .harness import STEADY, Cluster, Worker
from .setups import Setup, setups

MakeCluster = Callable[..., Cluster]
_ALL = pytest.mark.parametrize('setup', setups(framework='celery'), ids=str)
_ON_PROCESSES = pytest.mark.parametrize('setup', setups('processes', framework='celery'), ids=str)
#: What Celery says when it begins to mingle, which takes a second where others are; and what
#: JobSync says when the node has entered.
_MINGLES, _ENTERED = 'mingle: searching for neighbors', 'JobSync: node'


def _states(cluster: Cluster) -> dict[str, str]:
    return dict(query(cluster.place.config, 'SELECT name, state FROM {}node'))


@contextlib.contextmanager
def _mingling(cluster: Cluster, worker: Worker) -> Iterator[None]:
    """While it mingles; it is stopped for so long, as that takes a second."""
    eventually(lambda: _MINGLES in worker.log() or not worker.is_running(), 40)
    worker.send_signal(signal.SIGSTOP)
    try:
        assert _states(cluster)['beta@test'] == 'joining', worker.log(3000)
        assert cluster.owning() == {'alpha'} and _ENTERED not in worker.log()
        yield
    finally:
        worker.send_signal(signal.SIGCONT)


@_ALL
def test_a_worker_that_mingles_owns_nothing_yet(setup: Setup, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(setup, STEADY)
    cluster.start('alpha')
    worker = cluster.launch('beta')
    with _mingling(cluster, worker):
        pass
    eventually(lambda: 'beta' in cluster.owning(), 30)
    assert 'mingle: sync' in worker.log()
    worker.wait_ready()
    cluster.settle()
    for n in range(20):
        cluster.send('keyed', n, routed=True)
    cluster.finish()


@_ON_PROCESSES
def test_one_that_mingles_with_nobody_owns_its_keys_when_it_is_ready(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('alpha', 'beta', options=['--without-mingle', '--without-gossip'])
    for n in range(20):
        cluster.send('keyed', n, routed=True)
    cluster.finish()


@_ON_PROCESSES
def test_a_worker_that_loses_its_broker_while_it_starts_owns_nothing_until_it_is_back(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, STEADY)
    server = cluster.place.server
    cluster.start('alpha')
    with Proxy('127.0.0.1', server.port) as proxy:
        worker = cluster.launch('beta', broker=server.url(cluster.place.space, proxy.port))
        with _mingling(cluster, worker):
            proxy.switch(Mode.REFUSE)
            proxy.reset()
        eventually(lambda: 'rying' in worker.log() or not worker.is_running(), 40)
        for n in range(20):
            cluster.send('keyed', n, routed=True)
        cluster.wait_ended([f'k:{n}' for n in range(20)], 40)
        assert worker.is_running(), worker.log(3000)
        assert _states(cluster) == {'alpha@test': 'active', 'beta@test': 'joining'}
        assert cluster.owning() == {'alpha'} and _ENTERED not in worker.log()
        proxy.heal()
        worker.wait_ready()
        cluster.settle()
        for n in range(20, 40):
            cluster.send('keyed', n, routed=True)
        cluster.finish()


@_ON_PROCESSES
def test_a_worker_that_is_ended_while_it_mingles_leaves_no_row(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, STEADY)
    cluster.start('alpha')
    worker = cluster.launch('beta')
    with _mingling(cluster, worker):
        worker.send_signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.log(3000)
    assert _states(cluster) == {'alpha@test': 'active'}
    assert 'Traceback' not in worker.log() and 'use it inside' not in worker.log()
