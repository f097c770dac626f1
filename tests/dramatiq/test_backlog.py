"""What waits at Dramatiq's brokers, counted and deleted wherever the plugin has put it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import dq_name

from jobsync_core.belonging import Belonging
from jobsync_core.config import CoordinationConfig
from jobsync_core.store.queues import QueueStore
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from jobsync_core.worker.backlog import HomeBacklog, purge, read_backlog
from jobsync_core.worker.routing import home_of_queue, node_queue, parked_queue
from jobsync_dramatiq import JobSync
from jobsync_dramatiq.broker.redis_keys import broker_id
from tests.support.brokers import BrokerServer
from tests.support.waiting import eventually

from .conftest import ROOT, Workers, options, server, workers

__all__ = ['options', 'server', 'workers']

_PARKED = parked_queue('reports', 'sync_')
_N1, _N2 = (node_queue('reports', 'sync_', node) for node in ('n1', 'n2'))
_AGE_SEC = 500.0


class Place:
    """A broker with an actor, and its cluster's registry."""

    def __init__(self, server: BrokerServer, config: CoordinationConfig, stack: ExitStack) -> None:
        self.kind = server.kind
        self.config = config
        space = server.new_space()
        stack.callback(server.drop_space, space)
        url = server.url(space)
        plugin = JobSync(config=config)
        make: Any = RedisBroker if self.kind == 'redis' else RabbitmqBroker
        self.native: Any = make(url=url, middleware=[plugin])
        stack.callback(self.native.close if self.kind != 'redis' else self.native.client.close)

        @dramatiq.actor(queue_name='reports', broker=self.native)
        def report() -> None: ...

        self.counter = plugin.countable()
        create_schema(config)
        sessions = Sessions(config, 'jobsync test')
        stack.callback(sessions.close_all)
        with sessions.session() as connection:
            store = QueueStore(connection, Tables.of(config))
            for queue, node in ((_N1, 'n1'), (_N2, 'n2')):
                store.record(
                    queue, node, home_of_queue(queue, config.appname) or '', Belonging('dramatiq')
                )

    def put(self, queue: str, number: int) -> None:
        for _ in range(number):
            message: dramatiq.Message[Any] = dramatiq.Message(
                queue_name='reports',
                actor_name='report',
                args=(),
                kwargs={},
                options={'redis_message_id': str(uuid.uuid4())},
                message_timestamp=int((time.time() - _AGE_SEC) * 1000),
            )
            if self.kind == 'redis':
                number_of = message.options['redis_message_id']
                self.native.do_enqueue(queue, number_of, message.encode())
            else:
                self.native.channel.queue_declare(queue, durable=True)
                self.native.channel.basic_publish('', queue, message.encode())

    def declare(self) -> None:
        """Make the queues of the actor, where they have to be made."""
        if self.kind != 'redis':
            self.native.declare_queue('reports', ensure=True)
            for queue in (_N1, _N2, _PARKED):
                self.native.channel.queue_declare(queue, durable=True)

    def take(self, queue: str, owner: str) -> None:
        """Take a message and acknowledge it never."""
        if self.kind == 'redis':
            self.native.broker_id = owner
            assert len(self.native.do_fetch(queue, 1)) == 1
        else:
            assert self.native.channel.basic_get(queue)[0] is not None

    def found(self, queue: str = 'reports') -> HomeBacklog:
        return read_backlog(self.counter, self.config, queue).of(queue)


@pytest.fixture(params=['redis', 'rabbitmq'])
def place(request: pytest.FixtureRequest, config: CoordinationConfig) -> Iterator[Place]:
    with ExitStack() as stack:
        made = Place(request.getfixturevalue(f'{request.param}_server'), config, stack)
        assert made.found().backlog == 0 and made.found().known
        made.declare()
        yield made


def test_all_places_of_a_queue_are_counted(place: Place) -> None:
    for queue, number in ((_N1, 5), (_N2, 7), (_PARKED, 2)):
        place.put(queue, number)
    place.native.actors['report'].send()
    for _ in range(3):
        place.native.actors['report'].send_with_options(delay=60_000)
    for _ in range(2):
        place.take(_N1, broker_id('sync_', 'n1'))
    place.take(dq_name('reports'), 'a worker without the plugin')
    found = place.found()
    assert (found.ready, found.parked) == (1 + 3 + 7, 2)
    if place.kind == 'redis':
        assert (found.unacknowledged, found.delayed) == (2, 3)
        assert found.oldest_sec == pytest.approx(_AGE_SEC, abs=30)
    else:
        # AMQP does not tell what was taken.
        assert (found.unacknowledged, found.delayed, found.oldest_sec) == (None, 2, None)


def test_a_purge_deletes_what_waits_and_nothing_else(place: Place) -> None:
    for queue, number in ((_N1, 1500), (_PARKED, 2)):
        place.put(queue, number)
    place.native.actors['report'].send_with_options(delay=60_000)
    place.take(_N1, broker_id('sync_', 'n1'))
    done = purge(place.counter, place.config, 'reports')
    assert (done.home, dict(done.nodes), done.parked) == (0, {_N1: 1499, _N2: 0}, 2)
    found = place.found()
    assert (found.backlog, found.delayed) == (0, 1)
    if place.kind == 'redis':
        # Its data is there for whoever runs it, and for whoever rescues it.
        (left,) = place.native.client.hvals(f'dramatiq:{_N1}.msgs')
        assert json.loads(left)['actor_name'] == 'report'
    assert purge(place.counter, place.config, 'nobody knows it').total == 0


def test_the_command_finds_the_broker_by_its_name(workers: Workers) -> None:
    def jobsync(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, '-m', 'jobsync_core.cli', *words],
            cwd=ROOT,
            env={**workers._environment, 'JOBSYNC_APP': 'tests.dramatiq.worker_app:broker'},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert 'guest:guest' not in done.stdout + done.stderr
        return done.stdout if not code else done.stderr

    create_schema(workers.app.plugin.settings.config)
    for n in range(3):
        workers.app.broker.enqueue(workers.app.slow.message(n))
    found = json.loads(jobsync('backlog', '--json'))
    assert {each['queue']: each['backlog'] for each in found['queues']}['default'] == 3
    assert json.loads(jobsync('backlog', '--queue', 'default', '--json'))['backlog'] == 3
    assert 'default' in jobsync('backlog')
    assert json.loads(jobsync('purge', 'default', '--yes', '--json'))['home'] == 3
    assert '0 messages of default deleted' in jobsync('purge', 'default', '--yes')
    assert 'is a str' in jobsync('backlog', '--app', 'tests.dramatiq.worker_app:ADDRESS', code=1)


def test_what_waits_behind_a_busy_worker_is_counted_and_deleted(workers: Workers) -> None:
    workers.start(1)
    workers.wait_for_nodes(1)
    for n in range(60):
        workers.app.slow.send(n)
    config = workers.app.plugin.settings.config
    counter = workers.app.plugin.countable()

    def found() -> HomeBacklog:
        return read_backlog(counter, config).of('default')

    own = f'default.jobsync.{config.appname}.'
    eventually(lambda: any(place.startswith(own) for place in found().places), 30)
    done = purge(counter, config, 'default')
    assert done.total and sum(done.nodes.values()) == done.total - done.home
    eventually(lambda: not found().backlog, 30)
    # What was taken runs, and nothing else does.
    eventually(lambda: len(workers.counts('slowend:')) == 60 - done.total, 60)
