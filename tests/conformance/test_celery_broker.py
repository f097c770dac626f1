"""Celery workers whose broker is not up yet, cannot be reached, or takes nothing: they wait, and
the others have their keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from tests.support.brokers import RabbitServer
from tests.support.cluster import query
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

from .harness import Cluster
from .setups import Setup, setups

MakeCluster = Callable[..., Cluster]
_ON_PROCESSES = pytest.mark.parametrize('setup', setups('processes', framework='celery'), ids=str)
_ON_REDIS = pytest.mark.parametrize(
    'setup', setups('processes', framework='celery', brokers=('redis',)), ids=str
)
_ON_RABBIT = pytest.mark.parametrize(
    'setup', setups('processes', framework='celery', brokers=('rabbitmq',)), ids=str
)
_NO_BROKER = 'redis://127.0.0.1:9/0'


def _state(cluster: Cluster, name: str) -> str:
    return str(
        query(cluster.place.config, f"SELECT state FROM {{}}node WHERE name = '{name}@test'")[0][0]
    )


@_ON_PROCESSES
def test_a_worker_that_is_up_before_its_broker_waits_for_it(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        proxy.switch(Mode.REFUSE)
        worker = cluster.launch('alpha', broker=server.url(cluster.place.space, proxy.port))
        eventually(
            lambda: (
                'the broker' in worker.log()
                and 'trying again' in worker.log()
                or not worker.is_running()
            ),
            30,
        )
        assert worker.is_running(), worker.log(3000)
        proxy.heal()
        worker.wait_ready()
        cluster.send('keyed', 1)
        cluster.finish()


@_ON_REDIS
@pytest.mark.parametrize(
    'conf',
    [
        {'broker_connection_retry_on_startup': False},
        {'broker_connection_retry_on_startup': None, 'broker_connection_retry': False},
        {'broker_connection_max_retries': 1},
    ],
    ids=['not on startup', 'never', 'one more try'],
)
def test_a_worker_that_is_not_to_wait_for_its_broker_ends(
    setup: Setup, make_cluster: MakeCluster, conf: dict[str, Any]
) -> None:
    worker = make_cluster(setup).launch('alpha', broker=_NO_BROKER, conf=conf)
    assert worker.wait(30) == 1
    assert 'Connection refused' in worker.log(), worker.log(3000)


@_ON_REDIS
def test_a_worker_that_is_up_before_its_database_waits_for_it(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    config = cluster.place.config
    with Proxy(config.host, int(config.port)) as proxy:
        proxy.switch(Mode.REFUSE)
        url = f'postgresql://{config.user}:{config.password}@127.0.0.1:{proxy.port}/{config.dbname}'
        worker = cluster.launch('alpha', database=url)
        eventually(lambda: 'wait_for_database_sec' in worker.log() or not worker.is_running(), 30)
        assert worker.is_running(), worker.log(3000)
        proxy.heal()
        worker.wait_ready()
        cluster.send('keyed', 1)
        cluster.finish()


@_ON_PROCESSES
@pytest.mark.parametrize('how', [Mode.REFUSE, Mode.HOLD], ids=['refused', 'held'])
def test_a_worker_cut_off_from_the_broker_alone_gives_its_keys_to_the_others(
    setup: Setup, make_cluster: MakeCluster, how: Mode
) -> None:
    cluster = make_cluster(setup)
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        cluster.launch('alpha', broker=server.url(cluster.place.space, proxy.port)).wait_ready()
        cluster.start('beta')
        proxy.switch(how)
        if how is Mode.REFUSE:
            proxy.reset()
        for n in range(20):
            cluster.send('body', n, routed=True)
        cluster.wait_ended([f'b:{n}' for n in range(20)], 40)
        assert {note.node for note in cluster.notes.of('end')} == {'beta@test'}
        assert _state(cluster, 'alpha') == 'draining'
        assert 'gives its keys away' in cluster['alpha'].log()
        proxy.heal()
        if how is Mode.HOLD:
            proxy.reset()
        eventually(lambda: _state(cluster, 'alpha') == 'active', 60)
        cluster.settle()
        assert 'alpha@test' in cluster.ledger.owned()
        for n in range(20, 40):
            cluster.send('body', n, routed=True)
        cluster.finish()


@_ON_REDIS
def test_the_last_worker_keeps_its_keys_while_the_broker_is_away(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        cluster.launch('alpha', broker=server.url(cluster.place.space, proxy.port)).wait_ready()
        cluster.settle()
        version = query(cluster.place.config, 'SELECT version FROM {}cluster')
        proxy.switch(Mode.REFUSE)
        proxy.reset()
        eventually(
            lambda: (
                'Trying again' in cluster['alpha'].log()
                or 'Cannot connect' in cluster['alpha'].log()
            ),
            20,
        )
        eventually(lambda: 'has taken no messages' in cluster['alpha'].log(), 30)
        proxy.heal()
        cluster.send('body', 1)
        cluster.finish()
        assert query(cluster.place.config, 'SELECT version FROM {}cluster') == version


@pytest.mark.parametrize('setup', setups('single', framework='celery', brokers=('redis',)), ids=str)
def test_a_solo_worker_at_work_keeps_its_keys(setup: Setup, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(setup)
    cluster.start('alpha', 'beta')
    before = query(cluster.place.config, 'SELECT version FROM {}cluster')
    for n in range(4):
        cluster.send('body', n, 6.0, routed=True)
    cluster.finish()
    assert query(cluster.place.config, 'SELECT version FROM {}cluster') == before
    assert not [
        worker for worker in cluster.workers.values() if 'has taken no messages' in worker.log()
    ]


@_ON_RABBIT
def test_queues_with_other_arguments_than_configured_are_made_anew_or_used_as_they_are(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    server, space = cast(RabbitServer, cluster.place.server), cluster.place.space
    late = {'task_acks_late': True, 'task_reject_on_worker_lost': True}
    cluster.launch('alpha', conf=late, pause=60).wait_ready()
    cluster.settle()
    for n in range(20):
        cluster.send('routed', n, routed=True)
    eventually(lambda: server.depths(space).get('celery.jobsync.sync_.alpha@test', 0) > 0)
    cluster['alpha'].crash()
    server.api(
        'DELETE', f'queues/{space}/celery'
    )  # Celery's own queue is the user's to delete, with the plugin and without
    for _ in range(2):
        worker = cluster.launch('alpha', conf={**late, 'task_queue_max_priority': 10}).wait_ready()
        cluster.wait_ended([f'r:{n}' for n in range(20)])
        arguments = {
            item['name']: item['arguments'] for item in server.api('GET', f'queues/{space}')
        }
        assert arguments['celery.jobsync.sync_.alpha@test']['x-max-priority'] == 10
        assert arguments['jobsync.sync_.parked'] == {}
        log = worker.log()
        assert 'jobsync.sync_.parked has other arguments' in log and 'evacuate' in log
        assert worker.stop() == 0
    assert cluster['alpha'].log().count('was made anew') == 0


@_ON_RABBIT
def test_an_exchange_of_another_kind_is_named_with_the_remedy(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    server, space = cast(RabbitServer, cluster.place.server), cluster.place.space
    server.api('PUT', f'exchanges/{space}/jobsync.sync_', {'type': 'topic', 'durable': True})
    worker = cluster.launch('alpha')
    assert worker.wait(40) == 1
    assert (
        "the exchange 'jobsync.sync_'" in worker.log() and 'delete the exchange' in worker.log()
    ), worker.log(3000)
