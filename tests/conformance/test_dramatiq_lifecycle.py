"""What is Dramatiq's own in the life of a worker: a master with processes, reloading, orphans, and
a death while messages wait.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from jobsync_core.embedded.supervisor import running
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

from .harness import STEADY, Cluster
from .history import moment
from .setups import Setup, setups

on_processes = pytest.mark.parametrize('setup', setups('processes', framework='dramatiq'), ids=str)
on_threads = pytest.mark.parametrize('setup', setups('threads', framework='dramatiq'), ids=str)
MakeCluster = Callable[..., Cluster]
#: The master shows what its processes log when they have started, or after this many milliseconds;
#: by default after 30 s.
_SOON = ('--worker-fork-timeout', '1000')


def send_some(cluster: Cluster, count: int, start: int = 0, sleep: float = 0.05) -> None:
    for n in range(start, start + count):
        cluster.send('keyed' if n % 2 else 'body', n, sleep, routed=n % 3 == 0)


@on_processes
def test_a_reload_under_load_makes_new_nodes_and_loses_nothing(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, STEADY)
    cluster.start('alpha', 'beta')
    before, pool = cluster.lives('alpha'), cluster['alpha'].children
    send_some(cluster, 100)
    cluster.wait_progress(10)
    cluster['alpha'].send_signal(signal.SIGHUP)
    eventually(lambda: len(cluster.lives('alpha') - before) == 2, 30)
    cluster.settle()
    assert cluster['alpha'].is_running()
    assert not any(running(pid) for pid in pool)
    send_some(cluster, 40, start=100, sleep=0)
    cluster.finish()
    starts = [note.key for note in cluster.notes.of('start')]
    assert len(starts) == len(set(starts)), 'what was running was interrupted'
    assert any(note.pid in cluster['alpha'].children for note in cluster.ended())


@on_processes
def test_orphans_whose_master_was_killed_finish_their_work_and_leave(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, STEADY)
    cluster.start('alpha', 'beta')
    send_some(cluster, 40, sleep=0.3)
    cluster.wait_progress(5)
    orphans = cluster['alpha'].children
    assert len(orphans) == 2
    since = moment()
    cluster['alpha'].kill()
    eventually(lambda: cluster.owning() == {'beta'})
    eventually(lambda: not any(running(pid) for pid in orphans))
    print(f'{setup}: the orphans were gone {moment() - since:.1f} s after the master')
    assert not cluster.lives('alpha')
    cluster.finish()
    starts = [note.key for note in cluster.notes.of('start')]
    assert len(starts) == len(set(starts)), 'an orphan did not finish what it had begun'


@on_processes
def test_a_worker_that_is_killed_by_a_second_signal_loses_nothing(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    # Dramatiq's AsyncIO middleware has a thread that outlives the second signal, with JobSync or
    # without.
    cluster.start('alpha', 'beta', conf={'asyncio': False})
    send_some(cluster, 16, sleep=2.0)  # it is at it when the second signal comes
    cluster.wait_progress(4)
    cluster['alpha'].send_signal(signal.SIGTERM)
    eventually(lambda: 'Stopping worker process' in cluster['alpha'].log())
    since = moment()
    assert cluster['alpha'].stop(signal.SIGTERM) != 0
    print(f'ended in {moment() - since:.1f} s')
    cluster.settle()
    cluster.finish()


@on_threads
def test_two_workers_of_one_name_are_two_nodes(setup: Setup, make_cluster: MakeCluster) -> None:
    cluster = make_cluster(setup)
    cluster.start('alpha')
    first = cluster['alpha']
    second = cluster.launch('alpha').wait_ready()
    eventually(lambda: len(cluster.ledger.owned()) == 2, 20)
    send_some(cluster, 60)
    cluster.finish()
    assert len({note.node for note in cluster.ended()}) == 2
    for worker in (first, second):
        worker.send_signal(signal.SIGTERM)
    assert first.wait() == second.wait() == 0


@on_threads
def test_a_worker_that_is_stopped_while_it_joins_obeys_when_it_has_joined(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.send('keyed', 1)
    # Dramatiq's master holds signals back until its processes have started.
    worker = cluster.launch('alpha', wait_on_enter=3)
    eventually(lambda: cluster.lives('alpha'), 30)
    assert worker.stop(signal.SIGTERM) == 0
    assert not cluster.lives('alpha')
    cluster.start('beta')
    cluster.finish()


@on_threads
def test_delayed_messages_that_a_dead_node_had_taken_run_elsewhere_in_time(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('victim')
    due = moment() + 8
    for n in range(20):
        cluster.send('keyed', n, delay=8, routed=n % 2 == 0)
    # A worker takes what is delayed at once, and holds it until it is due.
    eventually(
        lambda: sum(count for name, count in cluster.left().items() if 'unacked' in name) == 20
    )
    cluster['victim'].crash()
    cluster.start('alpha')
    cluster.finish()
    starts = cluster.notes.of('start')
    assert {cluster.worker_of(note.node) for note in starts} == {'alpha'}
    assert min(note.at for note in starts) >= due - 0.05
    assert max(note.at for note in starts) < due + 10


@on_processes
def test_retries_across_a_rebalance_are_attempts_of_one_message(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, STEADY)
    cluster.start('alpha')
    for n in range(40):
        cluster.send('flaky', n, 3, routed=n % 2 == 0, min_backoff=3000, max_backoff=6000)
    eventually(lambda: len(cluster.notes.of('error')) >= 40)
    cluster.start('beta')
    cluster['alpha'].stop()
    stopped = moment()
    cluster.finish()
    by_key: dict[str, list[object]] = {}
    for note in cluster.notes.of('start'):
        by_key.setdefault(note.key, []).append(note.more)
    assert all(attempts == [0, 1, 2, 3] for attempts in by_key.values()), by_key
    later = [note for note in cluster.notes.of('start') if note.at > stopped]
    assert {cluster.worker_of(note.node) for note in later} == {'beta'}
    assert {note.key for note in later if note.more} & {
        note.key for note in cluster.notes.of('error') if cluster.worker_of(note.node) == 'alpha'
    }, 'retries of what had been tried on alpha'


@on_threads
def test_a_worker_that_is_up_before_its_broker_waits_for_it(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        proxy.switch(Mode.REFUSE)
        worker = cluster.launch(
            'alpha', broker=server.url(cluster.place.space, proxy.port), options=_SOON
        )
        eventually(lambda: 'cannot be reached' in worker.log() or not worker.is_running(), 30)
        assert worker.is_running() and 'waiting for it' in worker.log(), worker.log(3000)
        assert 'Traceback' not in worker.log()
        proxy.heal()
        worker.wait_ready()
        cluster.send('keyed', 1)
        cluster.finish()


@on_threads
def test_a_worker_that_is_up_before_its_database_waits_for_it(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    config = cluster.place.config
    with Proxy(config.host, int(config.port)) as proxy:
        proxy.switch(Mode.REFUSE)
        url = f'postgresql://{config.user}:{config.password}@127.0.0.1:{proxy.port}/{config.dbname}'
        worker = cluster.launch('alpha', database=url, options=_SOON)
        eventually(lambda: 'wait_for_database_sec' in worker.log() or not worker.is_running(), 30)
        assert worker.is_running(), worker.log(3000)
        proxy.heal()
        worker.wait_ready()
        cluster.send('keyed', 1)
        cluster.finish()


@on_threads
def test_a_worker_that_waits_for_its_broker_can_be_stopped(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        proxy.switch(Mode.REFUSE)
        worker = cluster.launch(
            'alpha', broker=server.url(cluster.place.space, proxy.port), options=_SOON
        )
        eventually(lambda: 'waiting for it' in worker.log() or not worker.is_running(), 30)
        assert worker.stop() == 0, worker.log(3000)
        assert 'Traceback' not in worker.log()
