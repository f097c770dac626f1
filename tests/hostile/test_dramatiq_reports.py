"""What users of Dramatiq reported of it (their issues are named), tried with the plugin: real
workers, Redis and RabbitMQ.
"""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.brokers import BrokerServer, BrokerUnavailable, RedisServer, free_port
from tests.support.waiting import eventually

from ..dramatiq.conftest import Workers, options, server, workers

__all__ = ['options', 'server', 'workers']


def done(workers: Workers, start: str, number: int, seconds: float = 60) -> None:
    """Wait until so many keys have ended, each once, and nothing is left at the broker."""
    eventually(lambda: len(workers.counts(start)) == number, seconds)
    eventually(lambda: not left(workers), 20)
    assert set(workers.counts(start).values()) == {1}


def left(workers: Workers) -> dict[str, int]:
    return {
        name: count
        for name, count in workers.server.depths(workers.space).items()
        if '.XQ' not in name
    }


class TestDurableRedis:
    @pytest.fixture
    def server(self) -> Iterator[BrokerServer]:
        try:
            made = RedisServer(durable=True)
        except BrokerUnavailable as error:
            pytest.skip(str(error))
        with made:
            yield made

    def test_delayed_messages_run_in_time_after_redis_was_killed(self, workers: Workers) -> None:
        """Bogdanp/dramatiq#527: they ran hours later, when a worker was taken for dead by
        chance.
        """
        workers.start(1)
        workers.wait_for_nodes(1)
        for n in range(20):
            workers.app.keyed.send_with_options(args=(n,), delay=3000)
            workers.app.plain.send_with_options(args=(n,), delay=3000)
        # The worker holds them in memory by now.
        eventually(
            lambda: (
                not [
                    name
                    for name in workers.server.depths(workers.space)
                    if name.endswith('default.DQ')
                ]
            )
        )
        workers.server.restart(signal.SIGKILL)
        done(workers, 'keyed:', 20, 30)
        done(workers, 'plain:', 20, 30)


@pytest.mark.parametrize('server', ['redis'], indirect=True)
def test_maintenance_in_every_call_gives_nobody_what_a_live_worker_holds(workers: Workers) -> None:
    """Bogdanp/dramatiq#431, #266: messages ran on many threads, as others put back what a worker
    held that was busy.
    """
    workers._environment['TEST_BROKER_OPTIONS'] = json.dumps(
        {'maintenance_chance': 1_000_000, 'heartbeat_timeout': 3000}
    )
    for _ in range(2):
        workers.start(1, '--threads', '2')
    workers.wait_for_nodes(2)
    for n in range(4):
        workers.app.long.send(6.0)
        workers.app.slow.send(n)
    for n in range(30):
        workers.app.plain.send_with_options(args=(n,), delay=3000)
    done(workers, 'slowend:', 4)
    done(workers, 'plain:', 30)
    assert workers.counts('long') == {'long': 4}


def test_delayed_messages_of_two_queues_outlive_reloads(workers: Workers) -> None:
    """Bogdanp/dramatiq#224: after SIGHUP (and --watch, which sends it) delayed messages of some
    queues were never seen again.
    """
    first, _ = workers.start(2), workers.start(1, '--queues', 'default', 'second')
    workers.wait_for_nodes(3)
    for n in range(20):
        workers.app.keyed.send_with_options(args=(n,), delay=4000)
        workers.app.on_second.send_with_options(args=(n,), delay=4000)
    for _ in range(2):
        before = workers.output().count('Sending signal')
        first.send_signal(signal.SIGHUP)
        eventually(lambda before=before: workers.output().count('Sending signal') > before, 10)  # type: ignore[misc]
    done(workers, 'keyed:', 20)
    done(workers, 'second:', 20)


def test_an_attempt_that_a_shutdown_interrupts_is_made_again_elsewhere(workers: Workers) -> None:
    """Bogdanp/dramatiq#618: an interrupted actor is tried again by the worker that shuts down, and
    holds the shutdown up.
    """
    first = workers.start(1)
    workers.wait_for_nodes(1)
    for n in range(3):
        workers.app.notified.send(n)
    eventually(lambda: len(workers.counts('notified:')) == 3, 20)
    workers.start(1)
    workers.wait_for_nodes(2)
    first.terminate()
    assert first.wait(30) == 0
    done(workers, 'notifiedend:', 3, 30)
    assert set(workers.counts('notified:').values()) == {2}


def test_time_limits_cost_a_worker_no_thread(workers: Workers) -> None:
    """Bogdanp/dramatiq#445, #653: an exception of a time limit in the wrong moment ended a thread,
    until none was left.
    """
    workers.start(1, '--threads', '2')
    workers.wait_for_nodes(1)
    for n in range(12):
        workers.app.limited.send(n)
    done(workers, 'limitedend:', 12)
    assert workers.lines('limited:') and set(workers.counts('limited:').values()) == {2}
    for n in range(20):
        workers.app.slow.send(n)
    done(workers, 'slowend:', 20, 30)


def test_what_grows_too_old_while_it_is_parked_is_among_the_dead_letters_of_its_queue(
    workers: Workers,
) -> None:
    """Bogdanp/dramatiq#386: messages that nobody saw begin were in `.XQ`, for a reason that nobody
    saw either.
    """
    workers.start(1)
    workers.wait_for_nodes(1)
    for n in range(3):
        workers.app.aged.send(n)
    eventually(lambda: workers.depth('default.jobsync.sync_.parked') == 3, 20)
    too_old = time.monotonic() + workers.app.aged.options['max_age'] / 1000
    eventually(lambda: time.monotonic() > too_old, 20)
    workers._environment['JOBSYNC_NODE_NAME'] = 'gpu-1'
    workers.start(1)
    eventually(lambda: not left(workers), 30)
    assert workers.lines('aged:') == []
    if workers.server.kind == 'redis':
        assert workers.app.broker.client.hlen('dramatiq:default.XQ.msgs') == 3
    else:
        eventually(
            lambda: (
                workers.app.broker.channel.queue_declare(
                    'default.XQ', passive=True
                ).method.message_count
                == 3
            )
        )
    assert 'has exceeded its age limit' in workers.output()


def test_a_killed_process_of_several_takes_its_master_along_and_another_has_all_of_its_work(
    workers: Workers,
) -> None:
    """Bogdanp/dramatiq#376: the kernel kills one process for its memory; the master ends, with an
    exit code that says so.
    """
    first = workers.start(2)
    workers.start(1)
    # A master waits for half a minute to be told that a process is up which has been killed before
    # it could.
    eventually(lambda: workers.output().count('Worker process is ready for action.') == 3, 30)
    workers.wait_for_nodes(3)
    for n in range(60):
        workers.app.slow.send(n)
    child = eventually(partial(_child_of, first.pid))
    os.kill(child, signal.SIGKILL)
    assert first.wait(30) != 0
    eventually(lambda: len(workers.counts('slowend:')) == 60, 40)
    eventually(lambda: not left(workers), 20)


def _child_of(pid: int) -> int:
    found = Path(f'/proc/{pid}/task/{pid}/children').read_text(encoding='ascii').split()
    return int(found[0]) if found else 0


def test_prometheus_counts_under_the_actor_s_own_queue_and_none_twice(workers: Workers) -> None:
    """Bogdanp/dramatiq#104 of django_dramatiq, #127: its server is a process of its own, which must
    become no node.
    """
    port = free_port()
    values = workers._folder / 'values'
    values.mkdir()
    workers._environment.update(
        TEST_PROMETHEUS='1',
        dramatiq_prom_port=str(port),
        dramatiq_prom_db=str(values),
        PROMETHEUS_MULTIPROC_DIR=str(values),
        prometheus_multiproc_dir=str(values),
    )
    workers.start(2)
    workers.wait_for_nodes(2)
    for n in range(20):
        workers.app.keyed.send(n)
    done(workers, 'keyed:', 20)

    def shown() -> list[str]:
        try:
            with urllib.request.urlopen(f'http://127.0.0.1:{port}/metrics', timeout=5) as answer:
                return [
                    line
                    for line in answer.read().decode().splitlines()
                    if 'actor_name="keyed"' in line
                ]
        except OSError:
            return []

    def counted() -> bool:
        lines = shown()
        total = sum(
            float(line.rpartition(' ')[2])
            for line in lines
            if line.startswith('dramatiq_messages_total{')
        )
        running = sum(
            float(line.rpartition(' ')[2])
            for line in lines
            if line.startswith('dramatiq_messages_inprogress{')
        )
        return (total, running) == (20, 0) and all('queue_name="default"' in line for line in lines)

    eventually(counted, 20)
    workers.wait_for_nodes(2)
