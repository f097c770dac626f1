"""Two queue groups of real `dramatiq` processes, on Redis and on RabbitMQ with classic and with
quorum queues: a queue's messages run on the workers that consume it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from jobsync_core.worker.routing import old_parked_queue
from jobsync_dramatiq.broker.copies import copy_for
from tests.support.brokers import BrokerServer
from tests.support.waiting import eventually

from .conftest import Workers
from .test_quorum import make_quorum_by_default

LIGHT, HEAVY = 'default', 'second'


@pytest.fixture(params=['redis', 'rabbitmq', 'quorum'])
def server(request: pytest.FixtureRequest) -> BrokerServer:
    name = 'rabbitmq' if request.param == 'quorum' else request.param
    found: BrokerServer = request.getfixturevalue(f'{name}_server')
    return found


@pytest.fixture
def fleet(workers: Workers, request: pytest.FixtureRequest) -> Workers:
    if request.node.callspec.params['server'] == 'quorum':
        make_quorum_by_default(workers.server, workers.space)
    return workers


_THREADS = 2


def start(fleet: Workers, *queues: str) -> subprocess.Popen[bytes]:
    return fleet.start(1, '-t', str(_THREADS), '--queues', *queues)


def nodes_of(fleet: Workers, line: str) -> set[str]:
    """Nodes that wrote such lines, by the number of their master's process."""
    return {found.split()[1].rpartition('@')[2].split('-')[0] for found in fleet.lines(line)}


def pids(*workers: subprocess.Popen[bytes]) -> set[str]:
    return {str(worker.pid) for worker in workers}


def all_ran(fleet: Workers, line: str, number: int) -> Callable[[], bool]:
    return lambda: len(fleet.counts(line)) == number


def dead(fleet: Workers, queue: str) -> list[dict[str, Any]]:
    """The dead letters of a queue."""
    server: Any = fleet.server
    if server.kind == 'redis':
        raw = server.client(fleet.space).hgetall(f'dramatiq:{queue}.XQ.msgs').values()
        return [json.loads(data) for data in raw]
    body = {'count': 100, 'ackmode': 'ack_requeue_true', 'encoding': 'auto'}
    found = server.api('POST', f'queues/{fleet.space}/{queue}.XQ/get', body)
    return [json.loads(item['payload']) for item in found]


def test_a_queue_s_keys_run_on_those_workers_that_consume_it(fleet: Workers) -> None:
    app = fleet.app
    for n in range(30):  # nobody owns anything yet: these go to the home queue
        app.keyed.send(n)
        app.on_second.send(n)
    light, heavy = start(fleet, LIGHT), start(fleet, HEAVY)
    both = start(fleet, LIGHT, HEAVY)
    fleet.wait_for_nodes(2)
    fleet.wait_for_nodes(2, HEAVY)
    for n in range(30, 90):
        app.keyed.send(n)
        app.on_second.send(n)
    eventually(all_ran(fleet, 'keyed:', 90), 40)
    eventually(all_ran(fleet, 'second:', 90), 40)
    assert set(fleet.counts('keyed:').values()) == set(fleet.counts('second:').values()) == {1}
    assert nodes_of(fleet, 'keyed:') == pids(light, both)
    assert nodes_of(fleet, 'second:') == pids(heavy, both)


def test_what_fails_is_among_the_dead_letters_of_its_queue_as_it_was_sent(fleet: Workers) -> None:
    start(fleet, LIGHT)
    start(fleet, HEAVY)
    start(fleet, HEAVY)
    fleet.wait_for_nodes(2, HEAVY)
    sent = {fleet.app.failing.send(n).message_id for n in range(10)}
    eventually(lambda: len(dead(fleet, HEAVY)) == 10, 30)
    found = dead(fleet, HEAVY)
    assert {message['message_id'] for message in found} == sent
    assert {message['queue_name'] for message in found} == {HEAVY}
    assert not any('jobsync_home' in message['options'] for message in found)


def test_what_a_killed_worker_left_runs_where_its_queue_is_consumed(fleet: Workers) -> None:
    light, victim, other = start(fleet, LIGHT), start(fleet, HEAVY), start(fleet, HEAVY)
    fleet.wait_for_nodes(1)
    fleet.wait_for_nodes(2, HEAVY)
    for n in range(40):
        fleet.app.slow_second.send(n)
    eventually(lambda: nodes_of(fleet, 'slow_second_end:') == pids(victim, other), 30)
    os.killpg(victim.pid, signal.SIGKILL)
    eventually(all_ran(fleet, 'slow_second_end:', 40), 40)
    fleet.wait_until_empty()
    fleet.check_ends('slow_second_end:', victim, _THREADS)
    # The last one of its group goes too: what comes then waits at home for the next one.
    os.killpg(other.pid, signal.SIGKILL)
    for n in range(20):
        fleet.app.on_second.send(n)
    eventually(lambda: fleet.depth(HEAVY) == 20, 30)
    late = start(fleet, HEAVY)
    eventually(all_ran(fleet, 'second:', 20), 30)
    assert nodes_of(fleet, 'second:') == pids(late)
    assert light.poll() is None and not nodes_of(fleet, 'second:') & pids(light)


def test_a_worker_that_joins_a_group_gets_its_share_and_one_that_leaves_gives_it(
    fleet: Workers,
) -> None:
    first = start(fleet, HEAVY)
    fleet.wait_for_nodes(1, HEAVY)
    second = start(fleet, HEAVY)
    start(fleet, LIGHT)
    fleet.wait_for_nodes(2, HEAVY)
    for n in range(40):
        fleet.app.on_second.send(n)
    eventually(all_ran(fleet, 'second:', 40), 30)
    assert nodes_of(fleet, 'second:') == pids(first, second)
    first.send_signal(signal.SIGTERM)
    first.wait(30)
    fleet.wait_for_nodes(1, HEAVY)
    for n in range(40, 60):
        fleet.app.on_second.send(n)
    eventually(all_ran(fleet, 'second:', 60), 30)
    assert set(fleet.counts('second:').values()) == {1}


def test_delays_and_retries_stay_in_their_group(fleet: Workers) -> None:
    light, heavy = start(fleet, LIGHT), start(fleet, HEAVY)
    fleet.wait_for_nodes(1)
    fleet.wait_for_nodes(1, HEAVY)
    for n in range(10):
        fleet.app.on_second.send_with_options(args=(n,), delay=300)
        fleet.app.flaky.send(n)
    eventually(all_ran(fleet, 'second:', 10), 30)
    eventually(lambda: sum(fleet.counts('flaky:').values()) == 20, 30)
    assert nodes_of(fleet, 'second:') == pids(heavy)
    assert nodes_of(fleet, 'flaky:') == pids(light)


def test_a_queue_that_is_declared_while_a_worker_runs_is_one_of_its_own(fleet: Workers) -> None:
    worker = fleet.start(1, '-t', '2')
    fleet.wait_for_nodes(1)
    fleet.app.declare_late.send()
    fleet.wait_for_nodes(1, 'late')
    for n in range(10):
        fleet.app.send_late(n)
    eventually(all_ran(fleet, 'late:', 10), 30)
    assert nodes_of(fleet, 'late:') == pids(worker)


def test_what_lies_in_queues_of_the_old_layout_comes_to_its_owners(fleet: Workers) -> None:
    app = fleet.app
    heavy = start(fleet, HEAVY)
    start(fleet, LIGHT)
    fleet.wait_for_nodes(1)
    fleet.wait_for_nodes(1, HEAVY)
    parked = old_parked_queue(app.plugin.settings.config.appname)
    for n in range(5):
        message = app.on_second.message(n)
        app.plugin.producer.broker.send(
            copy_for(parked, message, f'second:{n}'), parked, f'second:{n}'
        )
    eventually(all_ran(fleet, 'second:', 5), 30)
    assert nodes_of(fleet, 'second:') == pids(heavy)
