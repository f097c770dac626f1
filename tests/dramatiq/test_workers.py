"""Real `dramatiq` processes, on Redis and on RabbitMQ."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from functools import partial
from types import SimpleNamespace
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from jobsync_core.worker.owners import Place
from jobsync_dramatiq import JobSync
from tests.support.brokers import free_port
from tests.support.waiting import eventually

from .conftest import Workers


def test_each_message_runs_once_on_its_owner(workers: Workers) -> None:
    for n in range(100):
        workers.app.keyed.send(n)  # nobody owns anything yet: these go to the home queue
    workers.start(2)
    workers.wait_for_nodes(2)
    for n in range(100, 300):
        workers.app.keyed.send(n)
    eventually(lambda: len(workers.lines('keyed:')) >= 300, 40)
    assert set(workers.counts('keyed:').values()) == {1}
    owners = workers.owners
    late = [line for line in workers.lines('keyed:') if int(line.split()[0].split(':')[1]) >= 100]
    assert all(
        owners.find('k:' + line.split()[0].split(':')[1], 'default').node == line.split()[1]
        for line in late
    )
    assert len({line.split()[1] for line in late}) == 2


def test_results_groups_pipelines_retries_and_delays(workers: Workers) -> None:
    workers.start(2)
    workers.wait_for_nodes(2)
    app = workers.app
    assert app.keyed.send(7).get_result(block=True, timeout=10_000) == 14
    assert (
        app.keyed.send(7).get_result(block=True, timeout=10_000) == 14
    )  # a duplicate has the stored result
    assert workers.counts('keyed:') == {'keyed:7': 1}
    group = dramatiq.group([app.add.message(1, n) for n in range(30)])
    group.add_completion_callback(app.seal.message('g'))
    group.run()
    assert list(group.get_results(block=True, timeout=20_000)) == [1 + n for n in range(30)]
    eventually(lambda: workers.counts('seal:') == {'seal:g': 1})
    pipe = dramatiq.pipeline(
        [app.add.message(1, 100), app.add.message(1000), app.add.message(10_000)]
    ).run()
    assert pipe.get_result(block=True, timeout=10_000) == 11_101
    assert app.flaky.send(1).get_result(block=True, timeout=20_000) == 1
    assert workers.counts('flaky:') == {'flaky:1': 2}
    delayed = app.keyed.send_with_options(args=(500,), delay=500)
    assert delayed.get_result(block=True, timeout=10_000) == 1000


def test_what_a_killed_process_held_runs_elsewhere(workers: Workers) -> None:
    first, second = workers.start(1), workers.start(1)
    workers.wait_for_nodes(2)
    for n in range(80):
        workers.app.slow.send(n)
    eventually(lambda: len(workers.lines('slow:')) >= 8, 20)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert second.poll() is None
    eventually(lambda: len(workers.counts('slowend:')) == 80, 30)
    workers.check_ends('slowend:', first, 8)


@pytest.mark.parametrize('options', [{'route_producers': False}], ids=['no producer routing'])
def test_workers_hand_on_what_is_not_theirs(workers: Workers) -> None:
    workers.start(2)
    workers.wait_for_nodes(2)
    for n in range(300):
        workers.app.unledgered.send(n)
    eventually(lambda: len(workers.lines('routed:')) >= 300, 40)
    assert set(workers.counts('routed:').values()) == {1}
    owners = workers.owners
    assert all(
        owners.find('r:' + line.split()[0].split(':')[1], 'default').node == line.split()[1]
        for line in workers.lines('routed:')
    )


def test_a_rebalance_runs_nothing_twice(workers: Workers) -> None:
    workers.start(1)
    workers.wait_for_nodes(1)
    for n in range(60):
        workers.app.slow.send(n)
    second = workers.start(1)
    workers.wait_for_nodes(2)
    for n in range(60, 120):
        workers.app.slow.send(n)
    second.send_signal(signal.SIGTERM)
    assert second.wait(30) == 0
    eventually(lambda: len(workers.counts('slowend:')) == 120, 40)
    assert set(workers.counts('slow:').values()) == {1}


@pytest.mark.parametrize('method', ['fork', 'forkserver'])
def test_orphans_of_a_killed_master_leave(workers: Workers, method: str) -> None:
    first = workers.start(2, method=method)
    workers.start(1)
    workers.wait_for_nodes(3)
    for n in range(60):
        workers.app.slow.send(n)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    workers.wait_for_nodes(1)
    eventually(lambda: len(workers.counts('slowend:')) == 60, 30)
    assert set(workers.counts('slowend:').values()) == {1}


@pytest.mark.parametrize('method', ['fork', 'forkserver'])
def test_orphans_that_have_not_told_their_master_that_they_are_up_end_their_work_and_leave(
    workers: Workers, method: str
) -> None:
    workers._environment['TEST_SLOW_START'] = '3'
    first = workers.start(2, method=method)
    workers.wait_for_nodes(2)
    os.kill(
        first.pid, signal.SIGKILL
    )  # it waits to be told; now they wait for it, and would for ever
    first.wait()
    # This one begins, and does not end before the first orphan is told to stop.
    workers.app.lasting.send(1)
    eventually(lambda: workers.lines('lasting:'))
    del workers._environment['TEST_SLOW_START']
    workers.start(1)
    workers.wait_for_nodes(1)
    for n in range(20):
        workers.app.slow.send(n)
    eventually(lambda: len(workers.counts('slowend:')) == 20, 30)
    eventually(lambda: workers.lines('lasting_end:'), 40)
    assert len(workers.lines('lasting:')) == 1


def test_only_chosen_queues_are_consumed_and_pins_without_a_node_are_parked(
    workers: Workers,
) -> None:
    workers.start(1, '--queues', 'second')
    workers.wait_for_nodes(1, 'second')
    workers.app.keyed.send(1)
    workers.app.homeless.send(1)
    workers.app.on_second.send(1)
    eventually(lambda: workers.counts('second:') == {'second:1': 1})
    assert workers.depth('default') == 2 and workers.lines('keyed:') == []
    workers.start(1)
    eventually(lambda: workers.counts('keyed:') == {'keyed:1': 1}, 20)
    eventually(lambda: workers.depth('default.jobsync.sync_.parked') == 1, 20)
    assert workers.lines('homeless:') == []
    workers._environment['JOBSYNC_NODE_NAME'] = 'gpu-1'
    workers.start(1)
    eventually(lambda: workers.counts('homeless:') == {'homeless:1': 1}, 20)
    assert 'gpu-1' in workers.lines('homeless:')[0]


def test_a_start_that_fails_ends_the_worker(workers: Workers, monkeypatch: Any) -> None:
    workers._environment |= {
        'TEST_DATABASE': 'postgresql://nobody@127.0.0.1:1/none',
        'JOBSYNC_WAIT_FOR_DATABASE_SEC': '2',
    }
    process = workers.start(1)
    assert process.wait(60) == 3
    assert 'cannot start' in workers.output()


def test_a_callback_of_the_user_s_that_fails_at_the_start_ends_the_worker(workers: Workers) -> None:
    workers._environment['TEST_LOCK_PROVIDER'] = 'gpu'
    process = workers.start(1)
    workers.app.keyed.send(1)
    assert process.wait(60) == 3
    assert "cannot start: KeyError: 'gpu'" in workers.output()
    assert workers.lines('keyed:') == []


def test_each_process_answers_probes_on_a_port_of_its_own(workers: Workers) -> None:
    port = free_port()
    workers._environment['TEST_OPTIONS'] = json.dumps({'http': f'127.0.0.1:{port}'})
    workers.start(2, '--use-spawn')

    def node_at(number: int) -> str:
        try:
            with urllib.request.urlopen(
                f'http://127.0.0.1:{number}/health/ready', timeout=5
            ) as answer:
                return str(json.load(answer)['node'])
        except urllib.error.HTTPError as error:
            error.close()
            return ''
        except OSError:
            return ''

    names = [eventually(partial(node_at, number), 30) for number in (port, port + 1)]
    assert [name.split('-')[-2] for name in names] == ['1', '2']
    with urllib.request.urlopen(f'http://127.0.0.1:{port}/metrics', timeout=5) as answer:
        assert b'jobsync' in answer.read()


def test_a_producer_that_rabbitmq_refuses_the_exchange_sends_to_the_home_queue(
    rabbitmq_server: Any, make_config: Any
) -> None:
    config = make_config()
    space = rabbitmq_server.new_space()
    broker = RabbitmqBroker(url=rabbitmq_server.url(space))
    plugin = JobSync(config=config)
    broker.add_middleware(plugin)
    actor: Any = dramatiq.actor(actor_name='keyed', broker=broker, jobsync_key='k')(lambda: None)
    owners: Any = SimpleNamespace(find_fresh=lambda route, home: Place('n1', 'jobsync.sync_.n1'))
    plugin.producer.lookup.use(owners)
    rabbitmq_server.api(
        'PUT', f'permissions/{space}/guest', {'configure': '^default', 'write': '.*', 'read': '.*'}
    )
    try:
        actor.send()
        eventually(
            lambda: rabbitmq_server.depths(space) == {'default': 1}, 10
        )  # sent without confirms
    finally:
        broker.close()
        rabbitmq_server.drop_space(space)
