"""What waits at Celery's brokers, counted and deleted wherever the plugin has put it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from celery import Celery
from kombu.common import Broadcast
from kombu.entity import Queue

from jobsync_celery import JobSync
from jobsync_celery.broker.counting import CeleryCounter
from jobsync_celery.broker.queues import Queues
from jobsync_celery.redis.keys import node_options
from jobsync_core.belonging import Belonging
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.store.queues import QueueStore
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from jobsync_core.worker.backlog import HomeBacklog, purge, read_backlog
from jobsync_core.worker.routing import (
    HOME,
    home_of_queue,
    node_queue,
    old_node_queue,
    parked_queue,
)
from tests.support.brokers import BrokerServer

_PARKED = parked_queue('reports', 'sync_')
_N1, _N2 = (node_queue('reports', 'sync_', node) for node in ('n1', 'n2'))
_OLD = old_node_queue('sync_', 'n0')


class Place:
    """An app, its cluster's registry, and a broker.

    Args:
        prefix: What Redis' keys begin with.
    """

    def __init__(
        self, server: BrokerServer, config: CoordinationConfig, stack: ExitStack, prefix: str
    ) -> None:
        self.kind = server.kind
        self.config = config
        space = server.new_space()
        stack.callback(server.drop_space, space)
        self.app = Celery('backlog', broker=server.url(space), set_as_current=False)
        self.app.conf.task_queues = [Queue('celery'), Queue('reports'), Broadcast('news')]
        if prefix and self.kind == 'redis':
            self.app.conf.broker_transport_options = {'global_keyprefix': prefix}
        self.counter = JobSync(self.app, config=config).countable()
        create_schema(config)
        sessions = Sessions(config, 'jobsync test')
        stack.callback(sessions.close_all)
        with sessions.session() as connection:
            store = QueueStore(connection, Tables.of(config))
            for queue, node in ((_N1, 'n1'), (_N2, 'n2'), (_OLD, 'n0')):
                store.record(
                    queue, node, home_of_queue(queue, config.appname) or '', Belonging('celery')
                )

    def put(self, queue: str, number: int, **headers: object) -> None:
        with self.app.connection_for_write() as connection:
            with connection.channel() as channel:
                channel.queue_declare(queue, durable=True, auto_delete=False)
            producer = connection.Producer()
            for n in range(number):
                producer.publish(
                    {}, routing_key=queue, exchange='', retry=False, priority=n % 2, headers=headers
                )

    def take(self, stack: ExitStack, queue: str, node: str | None = None) -> None:
        """Take a message and acknowledge it never, as a node or as a worker without the plugin."""
        given = node_options('sync_', node) if node and self.kind == 'redis' else {}
        options = {**(self.app.conf.broker_transport_options or {}), **given}
        connection = self.app.connection_for_write(transport_options=options)
        stack.callback(connection.release)
        assert connection.default_channel.basic_get(queue, no_ack=False) is not None

    def found(self, queue: str) -> HomeBacklog:
        return read_backlog(self.counter, self.config, queue).of(queue)


@pytest.fixture(params=['redis', 'redis with a prefix', 'rabbitmq'])
def place(request: pytest.FixtureRequest, config: CoordinationConfig) -> Iterator[Place]:
    kind, _, prefix = request.param.partition(' ')
    server = request.getfixturevalue(f'{kind}_server')
    with ExitStack() as stack:
        yield Place(server, config, stack, 'shop:' if prefix else '')


def test_all_places_of_a_queue_are_counted(place: Place) -> None:
    assert place.found('reports') == HomeBacklog('reports')
    for queue, number in (('reports', 3), (_N1, 5), (_N2, 7), (_PARKED, 2), ('celery', 4)):
        place.put(queue, number)
    place.put('jobsync.sync_.unknown', 1, **{HOME: 'reports'})
    with ExitStack() as stack:
        place.take(stack, 'reports')
        place.take(stack, _N1, 'n1')
        place.take(stack, _N1, 'n1')
        found = read_backlog(place.counter, place.config)
        assert [each.queue for each in found.queues] == ['celery', 'reports']
        reports = found.of('reports')
        assert (reports.ready, reports.parked) == (2 + 3 + 7, 2)
        # AMQP does not tell.
        assert reports.unacknowledged == (3 if place.kind == 'redis' else None)
        assert (found.of('celery').backlog, found.others) == (4, {'jobsync.sync_.unknown': 1})


@pytest.mark.parametrize(
    'routes',
    [
        {'feed.*': {'queue': 'feeds'}, 'x.*': 'reports', 'y.*': {'exchange': 'y'}},
        [('feed.*', 'feeds'), lambda *_, **__: None],
        [{'a.*': {'queue': Queue('feeds')}}, ('b.*', {'queue': 'news'})],
        None,
    ],
)
def test_a_queue_that_only_a_route_names_is_counted_too(routes: Any) -> None:
    app = Celery('routes', broker='memory://', set_as_current=False)
    app.conf.task_queues = [Queue('celery'), Queue('reports'), Broadcast('news')]
    app.conf.task_routes = routes
    expected = ['celery', 'feeds', 'reports'] if routes else ['celery', 'reports']
    assert CeleryCounter(app, Queues(app, 'memory', 'sync_')).homes() == expected


def test_a_purge_deletes_what_waits_and_nothing_else(place: Place) -> None:
    for queue, number in (('reports', 3), (_N1, 5), (_PARKED, 2), ('celery', 4), (_OLD, 1)):
        place.put(queue, number)
    with ExitStack() as stack:
        place.take(stack, _N1, 'n1')
        done = purge(place.counter, place.config, 'reports')
        assert (done.home, dict(done.nodes), done.parked) == (3, {_N1: 4, _N2: 0}, 2)
        assert (done.total, done.unsorted) == (9, 1)
        if place.kind == 'redis':
            assert place.found('reports').unacknowledged == 1
    assert purge(place.counter, place.config, 'nobody knows it').total == 0
    assert (place.found('celery').backlog, place.found('nobody knows it').known) == (4, False)


@pytest.mark.parametrize('place', ['redis', 'redis with a prefix'], indirect=True)
def test_what_is_no_queue_is_neither_counted_nor_deleted(place: Place) -> None:
    place.put('reports', 3)
    with ExitStack() as stack:
        place.take(stack, 'reports')
        for ask in (purge, read_backlog):
            with pytest.raises(ConfigurationError, match="'unacked' is no queue"):
                ask(place.counter, place.config, 'unacked')
        found = place.found('reports')
        assert (found.ready, found.unacknowledged) == (2, 1)


@pytest.mark.parametrize('place', ['redis', 'redis with a prefix'], indirect=True)
def test_many_taken_messages_are_told_apart_by_a_sample(place: Place) -> None:
    with place.app.connection_for_write() as connection:
        channel: Any = connection.default_channel
        record = f'{channel.global_keyprefix}{node_options("sync_", "n1")["unacked_key"]}'
        rows = {f'tag{n}': json.dumps([{}, '', 'celery' if n % 4 else _N1]) for n in range(8000)}
        rows['nonsense'] = 'no record'
        with channel.conn_or_acquire() as client:
            for start in range(0, len(rows), 1000):
                part = list(rows.items())[start : start + 1000]
                client.eval(
                    "return redis.call('hset', KEYS[1], unpack(ARGV))",
                    1,
                    record,
                    *(each for row in part for each in row),
                )
    found = read_backlog(place.counter, place.config)
    taken = found.of('celery').unacknowledged, found.of('reports').unacknowledged
    assert taken[0] == pytest.approx(6000, rel=0.1) and taken[1] == pytest.approx(2000, rel=0.2)
