"""Tasks without affinity: whoever is free runs their messages, each key completes once, and nodes
with affinity and without get along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.proxy import Proxy
from tests.support.waiting import eventually

from .harness import QUICK, Cluster, within
from .history import moment
from .setups import Setup, setups

MakeCluster = Callable[..., Cluster]
#: Workers that run one task at a time.
_SETUPS = [*setups('threads'), *setups('processes', framework='celery')]
on_all = pytest.mark.parametrize('setup', _SETUPS, ids=str)
on_threads = pytest.mark.parametrize('setup', setups('threads'), ids=str)
on_rabbitmq = pytest.mark.parametrize('setup', setups('threads', brokers=('rabbitmq',)), ids=str)
_WORKERS = ('alpha', 'beta', 'gamma')
#: Seconds that the long task takes, and each of the short ones; two workers have twelve of these.
_LONG_SEC, _SHORT_SEC, _SHORT_ONES = 12.0, 0.5, 12
#: What a machine that runs other tests at the same time may add.
_SLOW_SEC = 10.0
#: Tasks of the suite that contradict the setting affinity=False.
_PLACED = ('routed', 'reveal')


def _behind_a_long_task(cluster: Cluster, task: str) -> float:
    """Seconds until twelve short tasks have ended that were sent while a long one ran."""
    cluster.start(*_WORKERS, concurrency=1, **cluster.adapter.one_at_a_time)
    cluster.send(task, 0, _LONG_SEC)
    letter = task[0]
    eventually(lambda: cluster.notes.of('start'), 20)
    since = moment()
    for n in range(1, _SHORT_ONES + 1):
        cluster.send(task, n, _SHORT_SEC, routed=n % 2 == 0)
    within(40, lambda: len({note.key for note in cluster.ended()} - {f'{letter}:0'}) == _SHORT_ONES)
    return moment() - since


@on_all
def test_no_message_waits_behind_a_long_task_while_others_are_idle(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, {'heartbeat_timeout_sec': 5, 'heartbeat_interval_sec': 0.5})
    took = _behind_a_long_task(cluster, 'loose')
    assert not cluster.ended('l:0'), 'they waited for the long task'
    busy = cluster.notes.of('start', ['l:0'])[0].node
    assert busy not in {note.node for note in cluster.ended()}
    cluster.finish()
    plain = make_cluster(setup)
    plain.adapter.order = replace(plain.adapter.order, jobsync=False)
    plain.adapter.jobsync = False
    bare = _behind_a_long_task(plain, 'plain')
    print(f'{setup}: twelve short ones behind a long one in {took:.1f} s, plainly in {bare:.1f} s')
    assert took < min(bare * 1.25 + 4.0, _LONG_SEC)


@on_all
def test_what_a_killed_worker_was_running_completes_once(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start(*_WORKERS, concurrency=1, **cluster.adapter.one_at_a_time)
    cluster.send('loose', 0, 3)
    eventually(lambda: cluster.notes.of('start'), 20)
    for n in range(1, _SHORT_ONES + 1):
        cluster.send('loose', n, 0.1, routed=n % 2 == 0)
    since = moment()
    victim = cluster.worker_of(cluster.notes.of('start', ['l:0'])[0].node)
    assert victim is not None
    cluster[victim].crash()
    within(30, lambda: len(cluster.notes.of('start', ['l:0'])) > 1)
    took = moment() - since
    print(f'{setup}: begun again {took:.2f} s after SIGKILL of its worker')
    assert took < QUICK['heartbeat_timeout_sec'] + 2 + _SLOW_SEC
    cluster.finish()


@on_all
def test_a_mixed_load_under_kills_and_joins_completes_once(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('worker-1', 'worker-2', 'worker-3', concurrency=2)
    for number in range(3):
        before = len(cluster.ended())
        for n in range(number * 40, number * 40 + 40):
            cluster.send(('loose', 'keyed', 'body')[n % 3], n, 0.05, routed=n % 2 == 0)
            if n % 5 == 0:
                cluster.send(('loose', 'keyed', 'body')[n % 3], n, 0.05, routed=n % 2 == 1)
        cluster.wait_progress(before + 10)
        cluster[f'worker-{number + 1}'].crash()
        cluster.start(f'worker-{number + 4}', concurrency=2, settle=False)
    cluster.finish(60)


@on_threads
def test_duplicates_get_the_result_of_the_one_that_runs(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start(*_WORKERS, concurrency=2)
    first = cluster.send('loose', 1, 2.0)
    eventually(lambda: cluster.notes.of('start'), 20)
    others = [cluster.send('loose', 1, routed=n % 2 == 0) for n in range(5)]
    hasty = cluster.send('hasty', 1, 2.0)
    eventually(lambda: cluster.notes.of('start', ['h:1']), 20)
    skipped = [cluster.send('hasty', 1) for _ in range(3)]
    assert [cluster.result(message, 10) for message in skipped] == [None] * 3
    assert cluster.result(first) == {'n': 1, 'message': first}
    assert [cluster.result(message) for message in others] == [cluster.result(first)] * 5
    assert cluster.result(hasty) == {'n': 1, 'message': hasty}
    assert len(cluster.notes.of('start')) == 2
    cluster.finish()


@on_rabbitmq
def test_a_message_that_is_delivered_again_is_not_skipped_for_its_own_attempt(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    """Its worker loses the broker first, while it is alive for all, and its life then."""
    cluster = make_cluster(setup, {'heartbeat_timeout_sec': 10, 'heartbeat_interval_sec': 1})
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        broker = server.url(cluster.place.space, proxy.port)
        # It is at it when the broker delivers the message again, however long that takes.
        cluster.launch('victim', broker=broker, concurrency=1, pause=120).wait_ready()
        cluster.send('hasty', 1)
        eventually(lambda: cluster.notes.of('start'), 20)
        cluster.start('alpha', concurrency=2)
        proxy.reset()
        # Whoever gets it first finds the key running.
        said = 'comes back in'
        within(40, lambda: said in cluster['alpha'].log() or said in cluster['victim'].log())
        cluster['victim'].crash()
        cluster.finish(60)


def _by_setting(**more: Any) -> dict[str, Any]:
    """A worker of the new settings: its `exactly_once` tasks have no affinity."""
    return {'affinity': False, 'without': _PLACED, 'concurrency': 2, **more}


@on_threads
def test_workers_with_affinity_and_without_complete_what_either_is_sent(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.launch('new', **_by_setting())
    cluster.start('old', concurrency=2)
    for n in range(80):
        # Producers with affinity stamp keys and send to nodes' queues, those of both workers.
        cluster.send(('body', 'keyed', 'by_id', 'loose')[n % 4], n, routed=n % 2 == 0)
    cluster.finish()
    assert {'old', 'new'} <= cluster.ran_on()


@on_threads
def test_what_waits_in_a_node_s_queue_comes_home_when_that_is_gone(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.launch('old', pause=60, concurrency=1)
    cluster.start('other', concurrency=1, pause=60)
    for n in range(30):
        cluster.send('keyed', n, routed=True)
    eventually(lambda: len(cluster.notes.of('start')) >= 2, 20)
    for name in ('old', 'other'):
        cluster[name].crash()
    cluster.start('new', **_by_setting())
    cluster.finish()
    assert {cluster.worker_of(node) for _, _, node in cluster.ledger.effects()} == {'new'}


@on_threads
def test_what_an_older_worker_parked_waits_for_no_owner(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, pins=['homeless'])
    cluster.start('old')
    for n in range(6):
        cluster.send('homeless', n, routed=n % 2 == 0)
    eventually(
        lambda: sum(count for name, count in cluster.left().items() if 'parked' in name) == 6, 20
    )
    cluster.start('new', loose=['homeless'])
    cluster['old'].stop()  # it would park again what it takes from their queue before the new one
    cluster.finish(60)
    assert {note.key for note in cluster.ended()} == {f'g:{n}' for n in range(6)}


@pytest.mark.parametrize('setup', setups('threads', brokers=('redis',)), ids=str)
def test_a_worker_that_is_no_node_runs_it_too(setup: Setup, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(setup)
    worker = cluster.launch(
        'lone',
        database='postgresql://postgres:secret@127.0.0.1:9/nothing',
        required=False,
        **_by_setting(),
    ).wait_ready()
    message = cluster.send('body', 1)
    assert cluster.result(message) == {'n': 1, 'message': message}
    assert 'WITHOUT COORDINATION' in worker.log()
    assert worker.stop() == 0


@on_threads
def test_a_contradiction_keeps_a_worker_from_starting(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    worker = cluster.launch('alpha', affinity=False)
    assert worker.wait(40) != 0
    log = worker.log()
    assert "routed: jobsync_key='r:{n}'" in log or "reveal: jobsync_key='v:{n}'" in log, log[-3000:]
    assert 'the setting affinity=False' in log
