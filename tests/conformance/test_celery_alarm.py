"""RabbitMQ is short of memory: it takes no messages, and delivers what it has. Celery workers wait
for it without standing still.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast
from urllib.request import urlopen

import pytest
from celery import Celery

from tests.support.brokers import RabbitServer, free_port
from tests.support.cluster import query
from tests.support.waiting import eventually

from .harness import STEADY, Cluster
from .setups import Setup, setups

_COUNT = 200
_BUSY, _AGAIN, _STUCK = (
    'did not take a message in time',
    'takes messages again',
    'has taken no messages',
)
_ON_RABBIT = pytest.mark.parametrize(
    'setup', setups('processes', framework='celery', brokers=('rabbitmq',)), ids=str
)


def _ping(url: str) -> list[str]:
    """Who answers."""
    app = Celery('pinging', broker=url, set_as_current=False)
    try:
        return sorted(name for answer in app.control.ping(timeout=2) or () for name in answer)
    finally:
        app.close()


def _ready(port: int) -> Any:
    with urlopen(f'http://127.0.0.1:{port}/health/ready', timeout=10) as answer:
        return json.loads(answer.read())


@_ON_RABBIT
def test_in_a_memory_alarm_workers_hold_what_is_not_theirs_and_go_on(
    setup: Setup, make_cluster: Callable[..., Cluster]
) -> None:
    cluster = make_cluster(setup, STEADY)
    server = cast(RabbitServer, cluster.place.server)
    ports = {name: free_port() for name in ('alpha', 'beta')}
    for name, port in ports.items():
        # Celery's default: with confirm_publish its own events and replies wait for RabbitMQ
        # without a limit, in the event loop.
        cluster.launch(name, conf={'broker_transport_options': {}}, http=f'127.0.0.1:{port}')
    workers = [worker.wait_ready() for worker in cluster.workers.values()]
    cluster.settle()
    before = cluster.ledger.incarnations()
    for n in range(_COUNT):
        cluster.send('body', n, 0.3)  # not routed: half of them come to the wrong worker
    with server.memory_alarm():
        eventually(lambda: all(_BUSY in worker.log() for worker in workers), 30)
        ended = len(cluster.notes.of('end'))
        assert ended < _COUNT
        # For longer than a worker whose event loop stands still keeps its keys.
        began = query(cluster.place.config, 'SELECT now()')[0][0]
        eventually(
            lambda: query(
                cluster.place.config, f"SELECT now() > '{began}'::timestamptz + interval '8 s'"
            )[0][0],
            30,
        )
        assert all(_ready(port)['consuming'] for port in ports.values())
        assert not [
            worker.name for worker in workers if _STUCK in worker.log() or _AGAIN in worker.log()
        ]
        assert cluster.ledger.incarnations() == before
        assert {row[0] for row in query(cluster.place.config, 'SELECT state FROM {}node')} == {
            'active'
        }
        print(
            f'{ended} of {_COUNT} had ended when both found the broker busy, '
            f'{len(cluster.notes.of("end"))} at the end of the alarm'
        )
    eventually(lambda: all(_AGAIN in worker.log() for worker in workers), 30)
    cluster.finish(60)
    assert len(cluster.notes.of('end')) == _COUNT
    eventually(lambda: _ping(server.url(cluster.place.space)) == ['alpha@test', 'beta@test'], 30)
    assert all(worker.log().count(_BUSY) <= 2 for worker in workers), (
        'it is said once, whatever waits'
    )


@_ON_RABBIT
def test_where_celery_itself_waits_for_confirms_nothing_is_lost_either(
    setup: Setup, make_cluster: Callable[..., Cluster]
) -> None:
    cluster = make_cluster(setup, STEADY)
    server = cast(RabbitServer, cluster.place.server)
    cluster.start('alpha', 'beta')
    for n in range(_COUNT):
        cluster.send('body', n, 0.3)
    with server.memory_alarm():
        eventually(lambda: any(_STUCK in worker.log() for worker in cluster.workers.values()), 40)
    cluster.finish(60)
