"""Redis with a key prefix, in cluster mode, with TLS and with Sentinel: what a killed worker held
comes back, and nothing lies where nobody looks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.brokers import BrokerUnavailable, RedisServer
from tests.support.redis_variants import ClusterRedis, SentinelRedis, TlsRedis
from tests.support.waiting import eventually

from .harness import Cluster
from .setups import Setup, setups

MakeCluster = Callable[..., Cluster]
_ON_REDIS = pytest.mark.parametrize(
    'setup',
    [
        *setups('processes', framework='celery', brokers=('redis',)),
        *setups('processes', framework='dramatiq', brokers=('redis',)),
    ],
    ids=str,
)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as found:
        yield found


def _started(stack: contextlib.ExitStack, kind: type[RedisServer]) -> Any:
    try:
        return stack.enter_context(kind())
    except BrokerUnavailable as error:
        pytest.skip(str(error))


def _prefixed(setup: Setup, prefix: str) -> dict[str, Any]:
    """The framework's settings for a prefix of all keys."""
    if setup.framework == 'dramatiq':
        return {'namespace': prefix}
    return {'broker_transport_options': {'global_keyprefix': f'{prefix}:'}}


def _kill_one_of_two(cluster: Cluster) -> None:
    """Two workers take more than they can run; one is killed with all of it."""
    cluster.start('alpha', 'beta', concurrency=2)
    for n in range(40):
        cluster.send('keyed' if n % 2 else 'body', n, 0.2, routed=n % 3 == 0)
    cluster.wait_progress(5)
    cluster['beta'].crash()


def _check(cluster: Cluster, *secrets: str) -> None:
    """Nothing was refused or shown."""
    for worker in cluster.workers.values():
        log = worker.log()
        assert 'a message can be lost' not in log and 'CROSSSLOT' not in log
        assert not [secret for secret in secrets if secret in log]


def _hears(cluster: Cluster, client: Any) -> None:
    """Redis tells each worker of Celery's of changes to its empty queues."""
    if cluster.adapter.framework == 'celery':
        running = sum(worker.is_running() for worker in cluster.workers.values())

        def tracked() -> bool:
            found = client.client_list()
            known = {one['id'] for one in found}
            return sum('t' in one['flags'] and one['redir'] in known for one in found) == running

        eventually(tracked, 20)


@_ON_REDIS
def test_with_a_key_prefix(setup: Setup, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(setup, conf=_prefixed(setup, 'shop'))
    _kill_one_of_two(cluster)
    cluster.finish(40)
    _check(cluster)
    server: Any = cluster.place.server
    with contextlib.closing(server.client(cluster.place.space)) as client:
        assert [key for key in client.scan_iter() if not key.startswith('shop:')] == []


@_ON_REDIS
def test_in_cluster_mode(
    setup: Setup, make_cluster: MakeCluster, stack: contextlib.ExitStack
) -> None:
    """A cluster takes only keys of one slot in one command, and the part of a name in braces says
    which.
    """
    server = _started(stack, ClusterRedis)
    cluster = make_cluster(setup, server=server, conf=_prefixed(setup, '{jobs}'))
    _kill_one_of_two(cluster)
    cluster.finish(40)
    _check(cluster)
    with contextlib.closing(server.client()) as client:
        assert [key for key in client.scan_iter() if not key.startswith('{jobs}:')] == []
        _hears(cluster, client)


@pytest.mark.parametrize(
    'setup', setups('processes', framework='dramatiq', brokers=('redis',)), ids=str
)
def test_with_a_client_that_knows_of_clusters(
    setup: Setup, make_cluster: MakeCluster, stack: contextlib.ExitStack
) -> None:
    server = _started(stack, ClusterRedis)
    conf = {**_prefixed(setup, '{jobs}'), 'cluster': True}
    cluster = make_cluster(setup, server=server, conf=conf)
    _kill_one_of_two(cluster)
    cluster.finish(40)
    _check(cluster)


@_ON_REDIS
def test_with_tls(setup: Setup, make_cluster: MakeCluster, stack: contextlib.ExitStack) -> None:
    server = _started(stack, TlsRedis)
    cluster = make_cluster(setup, server=server)
    _kill_one_of_two(cluster)
    cluster.finish(40)
    _check(cluster, server.secret)
    with contextlib.closing(server.client()) as client:
        _hears(cluster, client)


@_ON_REDIS
@pytest.mark.parametrize('lose', [SentinelRedis.fail_over, SentinelRedis.kill_master])
def test_with_sentinel(
    setup: Setup,
    make_cluster: MakeCluster,
    stack: contextlib.ExitStack,
    lose: Callable[[SentinelRedis], None],
) -> None:
    """A worker is killed, and then the master goes."""
    server = _started(stack, SentinelRedis)
    own = {'password': server.sentinels_secret}
    conf: dict[str, Any] = {'master_name': server.master_name, 'sentinel': {'sentinel_kwargs': own}}
    if setup.framework == 'celery':
        options = {'master_name': server.master_name, 'sentinel_kwargs': own}
        conf = {'broker_transport_options': options}
    cluster = make_cluster(setup, server=server, conf=conf)
    _kill_one_of_two(cluster)
    lose(server)
    cluster.launch('gamma').wait_ready()
    cluster.wait_ended({item.key for item in cluster.sent}, 60)
    cluster.finish(40)
    _check(cluster, server.secret, server.sentinels_secret)
    with contextlib.closing(server.client()) as client:
        _hears(cluster, client)
