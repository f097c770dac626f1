"""Two queues, of which each has consumers of its own, and some consume both: each key runs on a
worker that consumes its queue, whatever becomes of the others.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

import pytest

from tests.support.waiting import eventually

from .fleets import FIRST, SECOND, Fleet
from .harness import STEADY, Cluster
from .setups import BROKERS, SOAK, Setup, setups

_BROKERS = (*BROKERS, 'quorum')
MakeCluster = Callable[..., Cluster]


def on(*kinds: str, framework: str | None = None, whole: bool = True) -> pytest.MarkDecorator:
    """Setups; where not the whole, those of the distribution's RabbitMQ are left to soak: quorum
    queues are harder.
    """
    return pytest.mark.parametrize(
        'setup',
        [
            pytest.param(
                setup,
                id=str(setup),
                marks=[] if whole or setup.broker != 'rabbitmq' else [pytest.mark.soak],
            )
            for setup in setups(*kinds, framework=framework, brokers=_BROKERS)
        ],
    )


def send_mixed(
    fleet: Fleet, count: int, start: int = 0, seconds: float = 0.05, safe: bool = False
) -> None:
    """Messages of both queues, some of which their sender routes.

    Args:
        fleet: The workers.
        count: How many.
        start: The first number.
        seconds: How long a task takes, on average.
        safe: None that a killed worker loses, as it acknowledges them before it runs them.
    """
    chance = random.Random(start)
    tasks = ['keyed', 'body', 'keyed', 'body', 'flaky', *([] if safe else ['routed', 'plain'])]
    for n in range(start, start + count):
        task = chance.choice(tasks)
        sleep = (chance.uniform(0, 2 * seconds),) if task in ('keyed', 'body', 'plain') else ()
        fleet.send(task, n, *sleep, routed=chance.random() < 0.5)


@on('threads')
def test_each_queue_is_worked_on_by_its_consumers_alone(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    fleet = Fleet(make_cluster(setup, STEADY))
    fleet.start('first-1', 'second-1', 'both-1')
    before = fleet.cluster.ledger.incarnations()
    send_mixed(fleet, 120 * SOAK)
    fleet.finish()
    if fleet.cluster.ledger.incarnations() == before:
        fleet.check_owners()
    assert fleet.cluster.ran_on('k', 'r') == {'first-1', 'both-1'}
    assert fleet.cluster.ran_on('b', 'f') == {'second-1', 'both-1'}


@on('processes', whole=False)
def test_workers_that_come_and_go_lose_nothing_and_take_nothing_of_other_queues(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    fleet = Fleet(make_cluster(setup))
    cluster = fleet.cluster
    fleet.start('first-1', 'second-1', 'both-1')
    send_mixed(fleet, 60, safe=True)
    cluster.wait_progress(10)
    cluster['both-1'].crash()
    send_mixed(fleet, 40, start=100, safe=True)
    fleet.start('both-2', settle=False)
    cluster.wait_progress(60)
    assert cluster['second-1'].stop(signal.SIGTERM) == 0
    send_mixed(fleet, 40, start=200, safe=True)
    fleet.start('second-2')
    send_mixed(fleet, 40, start=300, seconds=0.1, safe=True)
    before = cluster.lives('first-1')
    cluster['first-1'].pause()
    eventually(lambda: not cluster.lives('first-1') & before, 20)
    cluster.wait_ended({item.key for item in cluster.sent})
    cluster['first-1'].resume()
    eventually(lambda: cluster.lives('first-1') - before, 20)
    send_mixed(fleet, 20, start=400, safe=True)
    fleet.settle(40)
    fleet.finish()


@pytest.mark.parametrize('crashes', [False, True], ids=['leaves', 'crashes'])
@on('threads', whole=False)
def test_a_queue_whose_last_consumer_is_gone_keeps_its_messages_for_the_next_one(
    setup: Setup, make_cluster: MakeCluster, crashes: bool
) -> None:
    fleet = Fleet(make_cluster(setup))
    cluster = fleet.cluster
    fleet.start('first-1', 'second-1')
    for n in range(20):
        fleet.send('body', n, routed=n % 2 == 0)
    fleet.finish()
    if crashes:
        cluster['second-1'].crash()
    else:
        assert cluster['second-1'].stop(signal.SIGTERM) == 0
    for n in range(100, 120):
        fleet.send('body', n, routed=n % 2 == 0)
    for n in range(200, 220):
        fleet.send('keyed', n, routed=n % 2 == 0)
    cluster.wait_ended(f'k:{n}' for n in range(200, 220))
    fleet.settle()
    # At home, where monitoring and other workers look for them, whoever sent them.
    home = fleet.name_of(SECOND)
    home = (
        f'dramatiq:{home}.msgs'
        if (setup.framework, setup.broker) == ('dramatiq', 'redis')
        else home
    )
    eventually(lambda: cluster.left() == {home: 20}, 30)
    assert not cluster.notes.of('start', [f'b:{n}' for n in range(100, 120)])
    fleet.start('second-2')
    fleet.finish()


@on('processes', 'threads', framework='celery', whole=False)
def test_a_queue_is_added_and_taken_away_under_load(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    fleet = Fleet(make_cluster(setup, STEADY))
    cluster = fleet.cluster
    fleet.start('first-1', 'second-1')
    control = cluster.adapter.app.control  # type: ignore[attr-defined]  # Celery's alone
    there = {'destination': [cluster.adapter.node_of('first-1')], 'reply': True, 'timeout': 10.0}
    send_mixed(fleet, 80)
    cluster.wait_progress(10)
    fleet.begins('first-1', SECOND)
    (answer,) = control.add_consumer(SECOND, **there)
    assert 'ok' in str(answer), answer
    fleet.settle()
    send_mixed(fleet, 80, start=100)
    cluster.wait_progress(100)
    (answer,) = control.cancel_consumer(SECOND, **there)
    assert 'ok' in str(answer), answer
    eventually(lambda: _owners_of(fleet, SECOND) == {'second-1'}, 30)
    fleet.ends('first-1', SECOND)
    send_mixed(fleet, 40, start=200)
    fleet.finish()
    fleet.settle()
    assert 'first-1' in {
        cluster.worker_of(note.node)
        for note in cluster.ended()
        if fleet.queue_of(note.key) == SECOND
    }
    assert FIRST in fleet.shares()


def _owners_of(fleet: Fleet, queue: str) -> set[str | None]:
    return {fleet.cluster.worker_of(node) for node in fleet.shares().get(queue, {})}
