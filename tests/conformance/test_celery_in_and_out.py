"""Taking the plugin in and out of a fleet: what workers of one kind held is found by those of the
other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.brokers import RedisServer
from tests.support.waiting import eventually

from .harness import Cluster
from .setups import Setup, setups

MakeCluster = Callable[..., Cluster]
_COUNT = 20
#: Nothing is lost by an early acknowledgement.
_LATE: dict[str, Any] = {'task_acks_late': True, 'task_reject_on_worker_lost': True}
#: kombu's own record is looked at soon.
_CONF: dict[str, Any] = {
    **_LATE,
    'broker_transport_options': {
        'visibility_timeout': 2,
        'unacked_restore_interval': 1,
        'unacked_restore_throttle': 1,
    },
}
_DEAD = 'postgresql://postgres:secret@127.0.0.1:9/nothing'
_SETUPS = setups('processes', framework='celery')
_ON_REDIS = pytest.mark.parametrize(
    'setup', setups('processes', framework='celery', brokers=('redis',)), ids=str
)


def _with_plugin(cluster: Cluster, plugin: bool) -> None:
    cluster.adapter.order = replace(cluster.adapter.order, jobsync=plugin)


def _send(cluster: Cluster, task: str = 'plain') -> list[str]:
    return [cluster.send(task, n, routed=True) for n in range(_COUNT)]


def _unacked(cluster: Cluster) -> int:
    server = cluster.place.server
    assert isinstance(server, RedisServer)
    return sum(
        count for name, count in server.depths(cluster.place.space).items() if 'unacked' in name
    )


def _evacuate(cluster: Cluster) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'celery',
            '-A',
            'tests.conformance.celery_worker',
            'jobsync',
            'evacuate',
            '--json',
        ],
        env={**os.environ, **cluster.adapter.order.environment()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, 2), done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found['complete'] is (done.returncode == 0)
    return found


@_ON_REDIS
@pytest.mark.parametrize('task', ['plain', 'routed'])
def test_what_plain_workers_held_when_they_were_killed_is_run_by_those_with_the_plugin(
    setup: Setup, make_cluster: MakeCluster, task: str
) -> None:
    cluster = make_cluster(setup)
    _with_plugin(cluster, False)
    worker = cluster.launch('plain', conf=_CONF, pause=60).wait_ready()
    _with_plugin(cluster, True)
    for n in range(_COUNT):
        cluster.send(task, n)
    eventually(lambda: _unacked(cluster) >= 4)
    worker.crash()
    cluster.launch('alpha', conf=_CONF).wait_ready()
    cluster.wait_ended([f'{task[0]}:{n}' for n in range(_COUNT)])
    eventually(lambda: not cluster.place.server.depths(cluster.place.space))


@_ON_REDIS
def test_what_an_uncoordinated_worker_held_is_where_plain_workers_look(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    worker = cluster.launch(
        'lone', conf=_CONF, pause=60, database=_DEAD, required=False
    ).wait_ready()
    _send(cluster)
    eventually(lambda: _unacked(cluster) >= 4)
    assert not [
        name for name in cluster.place.server.depths(cluster.place.space) if 'jobsync.' in name
    ]
    worker.crash()
    _with_plugin(cluster, False)
    cluster.launch('plain', conf=_CONF).wait_ready()
    cluster.wait_ended([f'p:{n}' for n in range(_COUNT)])
    eventually(lambda: not cluster.place.server.depths(cluster.place.space))


@pytest.mark.parametrize('setup', _SETUPS, ids=str)
def test_after_an_evacuation_plain_workers_run_everything(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, pins=['homeless'])
    cluster.launch('alpha', conf=_LATE, pause=60)
    cluster.launch('beta', conf=_LATE, pause=60)
    for name in ('alpha', 'beta'):
        cluster[name].wait_ready()
    for n in range(4):
        cluster.send('homeless', n)
    eventually(
        lambda: (
            cluster.place.server.depths(cluster.place.space) == {'celery.jobsync.sync_.parked': 4}
        ),
        20,
    )
    _send(cluster, 'routed')
    eventually(
        lambda: sum(cluster.place.server.depths(cluster.place.space).values()) >= _COUNT + 4, 20
    )
    # Those that live are left alone, and lose nothing.
    found = _evacuate(cluster)
    assert sorted(found['busy']) == ['alpha@test', 'beta@test'] and not found['failed']
    # They pass on and park again what came home. While a message is on its way there are two of it,
    # and a crash would leave both.
    looks: list[dict[str, int]] = []

    def rests() -> bool:
        looks.append(cluster.place.server.depths(cluster.place.space))
        return sum(looks[-1].values()) == _COUNT + 4 and looks[-10:] == [looks[-1]] * 10

    eventually(rests, 30, every=0.1)
    for name in ('alpha', 'beta'):
        cluster[name].crash()
    found = _evacuate(cluster)  # nobody is left who could have noticed that all nodes are dead
    assert found['complete'], found
    left = cluster.place.server.depths(cluster.place.space)
    assert {name: count for name, count in left.items() if 'jobsync.' in name} == {}, left
    assert sum(left.values()) == _COUNT + 4, left
    assert _evacuate(cluster)['moved'] == {}
    _with_plugin(cluster, False)
    cluster.launch('plain', conf=_LATE).wait_ready()
    cluster.wait_ended([*(f'r:{n}' for n in range(_COUNT)), *(f'g:{n}' for n in range(4))])
    eventually(lambda: not cluster.place.server.depths(cluster.place.space))
