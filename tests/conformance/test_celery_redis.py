"""Redis as fleets have it, and what is reported of Celery's workers on it: a server that refuses
writes for a while, connections that break in mingle or are never answered again, lost bindings, key
prefixes, few rights, priorities.

Nothing is lost or doubled, and workers go on.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from tests.support.brokers import RedisServer
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

from .harness import Cluster
from .history import moment
from .setups import Setup, setups

MakeCluster = Callable[..., Cluster]
_SOAK = pytest.mark.soak
_ON_PROCESSES = pytest.mark.parametrize(
    'setup', setups('processes', framework='celery', brokers=('redis',)), ids=str
)
_ON_THREADS = pytest.mark.parametrize(
    'setup', setups('threads', framework='celery', brokers=('redis',)), ids=str
)


def _server(cluster: Cluster) -> RedisServer:
    return cast(RedisServer, cluster.place.server)


@contextlib.contextmanager
def _client(cluster: Cluster) -> Iterator[Any]:
    with contextlib.closing(_server(cluster).client(cluster.place.space)) as client:
        yield client


def _send(cluster: Cluster, count: int, start: int = 0, sleep: float = 0.1, **options: Any) -> None:
    for n in range(start, start + count):
        cluster.send('keyed' if n % 2 else 'body', n, sleep, routed=n % 3 == 0, **options)


def _pass(seconds: float) -> None:
    since = moment()
    eventually(lambda: moment() - since > seconds, seconds + 5)


def _check_atomic(cluster: Cluster) -> None:
    """They have not fallen back to kombu's way of receiving."""
    for worker in cluster.workers.values():
        assert worker.is_running(), worker.log(3000)
        assert 'a message can be lost' not in worker.log()


@_ON_PROCESSES
@pytest.mark.parametrize(
    ('refuse', 'accept', 'seconds'),
    [
        pytest.param(
            ('CONFIG', 'SET', 'maxmemory', '1'),
            ('CONFIG', 'SET', 'maxmemory', '0'),
            3,
            id='memory',
            marks=_SOAK,
        ),
        # As long as it takes kombu to look for what was taken long ago.
        pytest.param(
            ('CONFIG', 'SET', 'min-replicas-to-write', '1'),
            ('CONFIG', 'SET', 'min-replicas-to-write', '0'),
            12,
            id='replicas',
        ),
        pytest.param(
            ('REPLICAOF', '127.0.0.1', '1'), ('REPLICAOF', 'NO', 'ONE'), 3, id='a replica itself'
        ),
    ],
)
def test_a_server_that_takes_no_writes_for_a_while_costs_nothing(
    setup: Setup,
    make_cluster: MakeCluster,
    refuse: tuple[str, ...],
    accept: tuple[str, ...],
    seconds: int,
) -> None:
    cluster = make_cluster(setup, own=True)
    cluster.start('alpha', 'beta', concurrency=2)
    _send(cluster, 40)
    cluster.wait_progress(5)
    with _client(cluster) as client:
        client.execute_command(*refuse)
        _pass(seconds)
        client.execute_command(*accept)
    _send(cluster, 20, start=40)
    cluster.finish(60)
    _check_atomic(cluster)


@_ON_PROCESSES
def test_connections_that_break_again_and_again_while_a_worker_connects_do_not_stop_it(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    """Mingle, and the first looks at the queues, included."""
    cluster = make_cluster(setup)
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        cluster.launch('alpha', broker=server.url(cluster.place.space, proxy.port)).wait_ready()
        cluster.launch('beta', broker=server.url(cluster.place.space, proxy.port)).wait_ready()
        for turn in range(12):
            _send(cluster, 4, start=10 * turn)
            _pass(0.1 + 0.07 * turn)
            proxy.reset()
        cluster.finish(60)
    assert all(worker.is_running() for worker in cluster.workers.values())


@_ON_PROCESSES
def test_a_worker_whose_connections_are_never_answered_again_makes_others(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    """A router has forgotten them; the server can be reached. Plain Celery waits for ever."""
    cluster = make_cluster(setup)
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        cluster.launch('alpha', broker=server.url(cluster.place.space, proxy.port)).wait_ready()
        cluster.settle()
        _send(cluster, 4)
        cluster.finish()
        proxy.strand()
        _send(cluster, 10, start=10)
        cluster.finish(60)
    _check_atomic(cluster)


@_SOAK
@_ON_THREADS
def test_delayed_messages_run_once_over_a_restart_of_the_server(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, own=True)
    cluster.start('alpha', concurrency=2)
    # Longer than the visibility timeout that the user has set, for which Celery would deliver them
    # again.
    cluster.launch(
        'beta',
        conf={
            'broker_transport_options': {
                'visibility_timeout': 1,
                'unacked_restore_interval': 1,
                'unacked_restore_throttle': 1,
            }
        },
    ).wait_ready()
    cluster.settle()
    _send(cluster, 20, sleep=0.0, delay=8)
    eventually(
        lambda: sum(worker.log().count(' received') for worker in cluster.workers.values()) >= 20,
        20,
    )
    _server(cluster).restart(signal.SIGKILL)
    cluster.finish(60)
    assert len(cluster.ended()) == 20


@_ON_PROCESSES
def test_bindings_that_the_server_has_evicted_are_not_missed(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('alpha', 'beta', concurrency=2)
    _send(cluster, 30)
    cluster.wait_progress(5)
    with _client(cluster) as client:
        client.delete(*client.keys('_kombu.binding.*'))
        cluster['beta'].crash()
        for n in range(30, 50):
            cluster.send('body', n, routed=True)
        cluster.finish(60)


@_ON_PROCESSES
@pytest.mark.parametrize(
    'options',
    [
        pytest.param(
            {'priority_steps': [*range(10)], 'sep': ':', 'queue_order_strategy': 'priority'},
            id='priorities',
        ),
        pytest.param({'global_keyprefix': '{shop}:'}, id='prefix'),
        pytest.param(
            {'fanout_prefix': False, 'fanout_patterns': False, 'queue_order_strategy': 'sorted'},
            id='fanout',
            marks=_SOAK,
        ),
    ],
)
def test_transport_options_of_the_users_hold(
    setup: Setup, make_cluster: MakeCluster, options: dict[str, Any]
) -> None:
    cluster = make_cluster(setup)
    adapter: Any = cluster.adapter
    for app in (adapter.app, adapter.routing):
        app.conf.broker_transport_options = options
    conf = {'broker_transport_options': options}
    cluster.launch('alpha', conf=conf).wait_ready()
    cluster.launch('beta', conf=conf).wait_ready()
    assert 'mingle: sync complete' in cluster['beta'].log()
    cluster.settle()
    for n in range(40):
        cluster.send('keyed' if n % 2 else 'body', n, 0.1, routed=n % 3 == 0, priority=n % 10)
    cluster.wait_progress(8)
    cluster['beta'].crash()
    cluster.finish(60)
    if 'global_keyprefix' in options:
        with _client(cluster) as client:
            assert {
                key for key in client.scan_iter() if not key.startswith(options['global_keyprefix'])
            } == set()


@_ON_PROCESSES
def test_rights_to_the_users_own_prefix_are_enough(setup: Setup, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(setup)
    server, options = _server(cluster), {'global_keyprefix': 'shop:'}
    with _client(cluster) as client:
        client.execute_command(
            'ACL',
            'SETUSER',
            'shop',
            'reset',
            'on',
            '>secret',
            '~shop:*',
            '&*',
            '+@all',
            '-@admin',
            '-@dangerous',
        )
    url = server.url(cluster.place.space).replace('redis://', 'redis://shop:secret@')
    adapter: Any = cluster.adapter
    for app in (adapter.app, adapter.routing):
        app.conf.update(broker_transport_options=options, broker_url=url)
    for name in ('alpha', 'beta'):
        cluster.launch(name, conf={'broker_transport_options': options}, broker=url)
    for worker in cluster.workers.values():
        worker.wait_ready()
    cluster.settle()
    _send(cluster, 30)
    cluster.wait_progress(5)
    cluster['beta'].crash()
    cluster.finish(60)
    assert 'No permissions' not in cluster['alpha'].log() and 'NOPERM' not in cluster['alpha'].log()
    assert 'secret' not in cluster['alpha'].log()
    _check_atomic_of(cluster, 'alpha')


def _check_atomic_of(cluster: Cluster, name: str) -> None:
    assert cluster[name].is_running() and 'a message can be lost' not in cluster[name].log()


@_SOAK
@_ON_PROCESSES
def test_a_server_that_ends_idle_connections_costs_nothing(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    """And pool processes that end after one task, each of which closes what it has inherited."""
    cluster = make_cluster(setup, own=True)
    with _client(cluster) as client:
        client.config_set('timeout', 3)
    cluster.start('alpha', 'beta', concurrency=2, options=('--max-tasks-per-child', '1'))
    for turn in range(2):
        _send(cluster, 8, start=10 * turn)
        cluster.wait_progress(8 * turn + 8)
        _pass(5)
    cluster.finish()
    assert all(
        'Connection to broker lost' not in worker.log() for worker in cluster.workers.values()
    )
    _check_atomic(cluster)
