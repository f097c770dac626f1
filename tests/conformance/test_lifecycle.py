"""Workers that come and go, in order: nothing is lost, nothing runs twice, and every end is an
end.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.support.waiting import eventually

from .harness import STEADY, Cluster
from .history import moment
from .setups import Setup, setups

on_processes = pytest.mark.parametrize('setup', setups('processes'), ids=str)
on_threads = pytest.mark.parametrize('setup', setups('threads'), ids=str)
on_celery_processes = pytest.mark.parametrize(
    'setup', setups('processes', framework='celery'), ids=str
)
on_all = pytest.mark.parametrize('setup', setups(), ids=str)
MakeCluster = Callable[..., Cluster]


def send_keyed(cluster: Cluster, count: int, start: int = 0, sleep: float = 0.02) -> None:
    for n in range(start, start + count):
        cluster.send('keyed', n, sleep, routed=n % 2 == 0)


@on_threads
def test_a_worker_that_joins_under_load_gets_its_share(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('alpha', 'beta')
    send_keyed(cluster, 100)
    cluster.wait_progress(10)
    cluster.start('gamma')
    send_keyed(cluster, 60, start=100)
    cluster.finish()
    assert 'gamma' in cluster.ran_on('k')


@on_all
def test_a_worker_that_leaves_under_load_finishes_its_work_and_returns_the_rest(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, STEADY)
    cluster.start('alpha', 'beta')
    send_keyed(cluster, 120, sleep=0.05)
    cluster.wait_progress(10)
    since = moment()
    assert cluster['alpha'].stop(signal.SIGTERM) == 0, cluster['alpha'].log(3000)
    print(f'left in {moment() - since:.1f} s')
    cluster.settle()
    cluster.finish()
    # A warm shutdown interrupts nothing, so nothing was begun twice.
    starts = [note.key for note in cluster.notes.of('start')]
    assert len(starts) == len(set(starts))


@on_celery_processes
def test_a_cold_shutdown_under_load_loses_nothing(setup: Setup, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(setup)
    cluster.start('alpha', 'beta')
    send_keyed(cluster, 120, sleep=0.05)
    cluster.wait_progress(10)
    cluster['alpha'].stop(signal.SIGQUIT)
    cluster.settle()
    cluster.finish()


@on_celery_processes
def test_a_cold_shutdown_amid_the_writing_of_a_task_is_one(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    """Plain Celery does not end: the process waits for the other half of the task, the worker for
    the process.
    """
    cluster = make_cluster(setup)
    cluster.launch('alpha', torn=10)
    cluster.start('beta')
    send_keyed(cluster, 120)
    cluster['alpha'].wait()
    cluster.settle()
    cluster.finish()


@pytest.mark.parametrize(
    'setup', setups('processes', 'threads', framework='celery', brokers=('rabbitmq',)), ids=str
)
def test_workers_that_start_together_meet_each_other_at_once(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    """Celery's mingle goes on for as long as something comes in each second: RabbitMQ's heartbeats,
    if they are that frequent.
    """
    cluster = make_cluster(setup)
    workers = [cluster.launch(name) for name in ('alpha', 'beta')]
    for worker in workers:
        worker.wait_ready()
        assert worker.log().count('mingle: searching') == 1, worker.log()
    cluster.finish()


@on_celery_processes
def test_a_soft_shutdown_under_load_loses_nothing(setup: Setup, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(setup)
    cluster.start(
        'alpha',
        'beta',
        conf={'worker_soft_shutdown_timeout': 1.0, 'worker_enable_soft_shutdown_on_idle': True},
    )
    send_keyed(cluster, 80, sleep=0.3)
    cluster.wait_progress(10)
    cluster['alpha'].stop(signal.SIGQUIT)
    cluster.settle()
    cluster.finish()


@on_threads
def test_all_workers_are_replaced_one_by_one_under_load(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('alpha-1', 'beta-1')
    for number, name in enumerate(('alpha', 'beta')):
        send_keyed(cluster, 80, start=80 * number, sleep=0.05)
        cluster.wait_progress(len(cluster.ended()) + 5)
        cluster.start(f'{name}-2', settle=False)
        assert cluster[f'{name}-1'].stop() == 0
    cluster.finish()
    eventually(lambda: cluster.owning() == {'alpha-2', 'beta-2'})


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGQUIT], ids=['SIGTERM', 'SIGQUIT'])
@on_celery_processes
def test_a_worker_can_be_ended_while_it_joins(
    setup: Setup, make_cluster: MakeCluster, number: signal.Signals
) -> None:
    cluster = make_cluster(setup)
    worker = cluster.launch('alpha', wait_on_enter=60)
    eventually(lambda: cluster.lives('alpha'), 30)
    since = moment()
    worker.stop(number, timeout=40)  # less than it would wait for
    print(f'ended in {moment() - since:.1f} s')
    eventually(lambda: not cluster.ledger.incarnations())
    assert not worker.children


@on_threads
def test_no_message_is_consumed_while_joining(setup: Setup, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(setup)
    cluster.send('plain', 1)
    cluster.launch('alpha', wait_on_enter=6)
    eventually(lambda: cluster.lives('alpha'), 30)
    joined = moment()  # when it was seen, which may be late
    cluster.finish()
    assert cluster.notes.of('start')[0].at - joined > 2


@pytest.mark.parametrize('setup', setups('processes', 'single', brokers=('redis',)), ids=str)
def test_without_a_database_a_worker_says_so_and_exits(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    worker = cluster.launch(
        'alpha',
        database='postgresql://postgres:secret-word@127.0.0.1:9/nothing',
        wait_for_database_sec=2,
    )
    assert worker.wait(30) not in (0, -signal.SIGKILL)
    log = worker.log()
    assert 'cannot connect to PostgreSQL at 127.0.0.1:9' in log, log
    assert 'secret-word' not in log
    assert 'Unrecoverable error' not in log
    assert not worker.children


@pytest.mark.parametrize('setup', setups('processes', 'threads', brokers=('redis',)), ids=str)
def test_a_worker_that_does_not_require_jobsync_runs_without_a_database_and_says_so(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    worker = cluster.launch(
        'alpha', database='postgresql://postgres:secret-word@127.0.0.1:9/nothing', required=False
    ).wait_ready()
    messages = [cluster.send(task, 1) for task in ('plain', 'routed', 'body', 'flaky')]
    cluster.wait_ended(['p:1', 'r:1', 'b:1', 'f:1'])
    assert cluster.result(messages[0]) == 1
    assert 'WITHOUT COORDINATION' in worker.log()
    assert worker.stop() == 0


@pytest.mark.parametrize('setup', setups('threads', framework='celery'), ids=str)
def test_a_second_worker_of_one_name_is_refused_and_the_first_goes_on(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, STEADY)
    cluster.start('alpha', 'beta')
    first = cluster['alpha']
    incarnations = cluster.ledger.incarnations()
    send_keyed(cluster, 60)
    second = cluster.launch('alpha')
    assert second.wait() != 0
    assert f'node name {cluster.adapter.node_of("alpha")!r} is used' in second.log(), second.log(
        3000
    )
    assert first.is_running()
    assert cluster.ledger.incarnations() == incarnations
    cluster.workers['alpha'] = first
    cluster.finish()


@on_threads
def test_a_worker_may_come_back_under_its_name(setup: Setup, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(setup)
    cluster.start('alpha', 'beta')
    send_keyed(cluster, 40)
    cluster['alpha'].crash()
    cluster.start('alpha')
    send_keyed(cluster, 40, start=40)
    cluster.finish()


@on_threads
def test_a_pin_follows_its_preferred_node_when_that_joins(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, pins=['preferred'])
    cluster.start('gpu-1', 'other')
    assert {cluster.worker_of(cluster.result(cluster.send('preferred', n))) for n in range(8)} == {
        'gpu-1'
    }
    cluster.start('best')
    assert {
        cluster.worker_of(cluster.result(cluster.send('preferred', n))) for n in range(100, 108)
    } == {'best'}
    cluster['best'].crash()
    # Sent to the dead node's queue, they come back.
    messages = [cluster.send('preferred', n, routed=True) for n in range(200, 208)]
    assert {cluster.worker_of(cluster.result(message)) for message in messages} == {'gpu-1'}
    cluster['gpu-1'].stop()
    cluster.settle()
    assert {
        cluster.worker_of(cluster.result(cluster.send('preferred', n))) for n in range(300, 308)
    } == {'other'}
    cluster.finish()


@on_threads
def test_messages_whose_pin_matches_no_node_wait_for_one(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, pins=['homeless'])
    cluster.start('alpha')
    for n in range(6):
        cluster.send('homeless', n, routed=n % 2 == 0)
    # Parked, not held: the worker could be killed now.
    eventually(
        lambda: sum(count for name, count in cluster.left().items() if 'parked' in name) == 6
    )
    assert not cluster.notes.of('start')
    cluster.start('missing-1')
    cluster.finish()
    assert cluster.ran_on() == {'missing-1'}
