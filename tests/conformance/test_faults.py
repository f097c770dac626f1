"""Processes die or stop at random moments: what they held comes back in seconds, and is completed
once.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Callable

import pytest

from jobsync_core.embedded.supervisor import running
from tests.support.brokers import RabbitServer
from tests.support.waiting import eventually

from .harness import QUICK, Cluster, within
from .history import moment
from .setups import SOAK, Setup, setups

on_processes = pytest.mark.parametrize('setup', setups('processes'), ids=str)
on_threads = pytest.mark.parametrize('setup', setups('threads'), ids=str)
MakeCluster = Callable[..., Cluster]
#: What a machine that runs other tests at the same time may add.
_SLOW_SEC = 10.0
#: Kills of a test; there are two tests of them on two brokers.
_KILLS = 5 * SOAK
#: Environment variable with a seed that makes the random moments those of another run.
_SEED = os.environ.get('CONFORMANCE_SEED')


def _chance() -> random.Random:
    seed = int(_SEED) if _SEED else random.SystemRandom().randrange(1_000_000)
    print(f'CONFORMANCE_SEED={seed}')
    return random.Random(seed)


@on_processes
def test_workers_killed_at_random_moments_lose_nothing(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    chance = _chance()
    cluster = make_cluster(setup)
    names = ['worker-1', 'worker-2', 'worker-3']
    cluster.start(*names, concurrency=3)
    for number in range(_KILLS):
        before = len(cluster.ended())
        for n in range(number * 40, number * 40 + 40):
            cluster.send(
                chance.choice(['keyed', 'body']),
                n,
                chance.uniform(0, 0.2),
                routed=chance.random() < 0.5,
            )
        cluster.wait_progress(before + chance.randrange(1, 25))
        victim = cluster[names.pop(chance.randrange(len(names)))]
        pool = victim.children
        victim.kill()
        names.append(f'worker-{number + 4}')
        cluster.start(names[-1], concurrency=3, settle=False)
        eventually(lambda pool=pool: not any(running(pid) for pid in pool))  # type: ignore[misc]  # a default binds it
    cluster.finish(60 * SOAK)


@on_processes
def test_pool_processes_killed_at_random_moments_lose_nothing(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    chance = _chance()
    cluster = make_cluster(setup)
    names = ['worker-1', 'worker-2']
    cluster.start(*names, concurrency=2)
    for number in range(_KILLS):
        before = len(cluster.ended())
        for n in range(number * 40, number * 40 + 40):
            cluster.send(
                chance.choice(['keyed', 'body']),
                n,
                chance.uniform(0, 0.1),
                routed=chance.random() < 0.5,
            )
        cluster.wait_progress(before + chance.randrange(1, 25))
        victim = cluster[chance.choice(names)]
        pool = victim.children
        if pool:
            os.kill(chance.choice(pool), signal.SIGKILL)
        if pool and not cluster.adapter.replaces_processes:
            # The others of the pool are stopped, and the worker ends with an error.
            assert victim.wait() != 0
            names.remove(victim.name)
            names.append(f'worker-{number + 3}')
            cluster.start(names[-1], concurrency=2, settle=False)
    cluster.finish(60 * SOAK)


@on_processes
def test_a_task_whose_process_is_killed_runs_again_at_once(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    # One worker is enough where the process is replaced.
    cluster.start('alpha', *([] if cluster.adapter.replaces_processes else ['beta']))
    cluster.send('keyed', 1, 3)
    eventually(lambda: cluster.notes.of('start'))
    since = moment()
    os.kill(cluster.notes.of('start')[0].pid, signal.SIGKILL)
    within(20, lambda: len(cluster.notes.of('start')) > 1)
    print(f'{setup}: begun again {moment() - since:.2f} s after SIGKILL of its pool process')
    cluster.finish()


@pytest.mark.parametrize('setup', setups(), ids=str)
def test_what_a_killed_worker_held_runs_again_within_seconds(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.launch('victim', pause=60, concurrency=2)
    cluster.start('alpha', 'beta', concurrency=2)
    # Half of them go by way of its own queue; all are read, and most are prefetched.
    numbers = cluster.numbers('victim', 8)
    for n in numbers:
        cluster.send('keyed', n, routed=n % 2 == 0)
    eventually(lambda: len(cluster.notes.of('start')) >= (1 if setup.kind == 'single' else 2))
    if setup.broker == 'redis':
        eventually(
            lambda: (
                sum(count for name, count in cluster.left().items() if 'unacked' in name)
                >= (1 if setup.kind == 'single' else 4)
            )
        )  # a solo worker reads nothing while it works
    since = moment()
    cluster['victim'].crash()
    keys = [f'k:{n}' for n in numbers]
    within(30, lambda: len({note.key for note in cluster.ended(*keys)}) == 8)
    took = max(note.at for note in cluster.ended(*keys)) - since
    print(f'{setup}: what a killed worker held had run again {took:.2f} s after SIGKILL')
    assert took < QUICK['heartbeat_timeout_sec'] + 2 + _SLOW_SEC
    cluster.finish()


@on_threads
def test_messages_sent_to_a_dead_nodes_queue_are_found(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('victim', 'alpha')
    numbers = cluster.numbers('victim', 10)
    cluster.send('keyed', 5000, routed=True)
    cluster.finish()
    cluster['victim'].crash()
    # The sender's owner map still names the dead node.
    for n in numbers:
        cluster.send('keyed', n, routed=True)
    cluster.finish()


@on_threads
def test_a_cluster_that_died_as_a_whole_leaves_nothing_behind_for_its_successors(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('old-1', 'old-2', pause=60)
    for n in range(20):
        cluster.send('keyed', n, routed=n % 2 == 0)
    eventually(lambda: len(cluster.notes.of('start')) >= 4)
    for name in ('old-1', 'old-2'):
        cluster[name].crash()
    for n in range(20, 30):
        cluster.send('keyed', n, routed=True)
    cluster.start('new')
    cluster.finish()
    assert {cluster.worker_of(node) for _, _, node in cluster.ledger.effects()} == {'new'}


@pytest.mark.parametrize('setup', setups('threads', brokers=('rabbitmq',)), ids=str)
def test_the_queue_of_a_node_that_never_comes_back_is_deleted_and_forgotten(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('victim', 'alpha')
    cluster['victim'].crash()
    # It is kept for a while: a message may be on its way to it.
    eventually(
        lambda: (
            {cluster.worker_of(node) for node in cluster.ledger.node_queues().values()} == {'alpha'}
        ),
        40,
    )
    server = cluster.place.server
    assert isinstance(server, RabbitServer)
    eventually(
        lambda: not [name for name in server.queues(cluster.place.space) if 'victim' in name]
    )


@on_processes
def test_a_worker_stopped_beyond_its_lease_runs_nothing_that_others_took_over(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('alpha', 'beta', concurrency=2)
    for n in range(80):
        cluster.send('keyed' if n % 2 else 'body', n, 0.1, routed=n % 4 == 0)
    cluster.wait_progress(10)
    before = cluster.lives('alpha')
    cluster['alpha'].pause()
    eventually(lambda: cluster.owning() == {'beta'}, 20)
    # Everything is completed while it sleeps, but for nothing: what it held came back too.
    keys = {item.key for item in cluster.sent}
    cluster.wait_ended(keys)
    woken = moment()
    cluster['alpha'].resume()
    eventually(lambda: not cluster.lives('alpha') & before, 20)
    cluster.settle()
    numbers = itertools.count(100)

    def alpha_works() -> bool:
        """It takes keys again when it consumes again, which takes a reconnect where the broker has
        dropped it.
        """
        sent = [next(numbers) for _ in range(20)]
        for n in sent:
            cluster.send('keyed', n)
        cluster.wait_ended(f'k:{n}' for n in sent)
        return 'alpha' in cluster.ran_on('k', least=100)

    eventually(alpha_works, 60, every=1.0)
    cluster.finish()
    # It may not begin anything of what it had read before. It may have begun before it was stopped
    # (the database had been asked, and its answer was not read), and come to the first line of the
    # task now: that is an attempt that somebody took over, and no thread has two of them.
    late = [
        note
        for note in cluster.notes.of('start', keys)
        if note.at > woken and cluster.worker_of(note.node) == 'alpha'
    ]
    attempts = Counter(note.key for note in cluster.notes.of('start', keys))
    assert all(attempts[note.key] >= 2 for note in late), late
    assert len(late) <= 2, 'its threads'


@on_threads
def test_a_task_that_one_node_does_not_know_is_not_lost(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.launch('old', without=['keyed', 'plain'])
    cluster.start('new')
    for n in range(40):
        cluster.send('keyed', n, routed=n % 2 == 0)
    for n in range(40):
        cluster.send('body', n)
    known = [item for item in cluster.sent if item.key.startswith('b:')]
    cluster.wait_ended(item.key for item in known)
    unknown = cluster.numbers('new', 5)
    cluster.wait_ended(f'k:{n}' for n in unknown if n < 40)
    # Those that belong to the old node wait, until it is replaced by one that knows the task.
    cluster['old'].stop()
    cluster.finish()
