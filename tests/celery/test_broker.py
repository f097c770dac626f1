"""Node queues on RabbitMQ: what is declared, and where a message goes whose queue has gone. On
Redis, what is given back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import amqp
import pytest
from celery import Celery
from kombu import compression
from kombu.entity import Exchange, Queue
from kombu.exceptions import DecodeError
from kombu.message import Message
from kombu.transport.native_delayed_delivery import (
    bind_queue_to_native_delayed_delivery_exchange,
    declare_native_delayed_delivery_exchanges_and_queues,
)

from jobsync_celery import JobSync
from jobsync_celery.application import Application
from jobsync_celery.broker.broker import CeleryBroker, CeleryDelivery
from jobsync_celery.broker.declaring import _is_idle, declare_exchange, declare_queue, delete_empty
from jobsync_celery.broker.forwarding import Forwarder
from jobsync_celery.broker.presence import Presence
from jobsync_celery.broker.queues import Queues
from jobsync_celery.redis.carried_over import CarriedOver
from jobsync_celery.redis.keys import node_options
from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.passage import Passage
from jobsync_core.worker.routing import HOME, KEY, REDELIVERED, RETURNS
from tests.support.brokers import BrokerServer, RabbitServer, RedisServer
from tests.support.waiting import eventually

_HOME, _QUEUE = 'celery', 'celery.jobsync.shop_.n1'
_HOME_PARKED = 'celery.jobsync.shop_.parked'
_PARKED, _UNKNOWN = 'jobsync.shop_.parked', 'jobsync.shop_.unknown'


@pytest.fixture
def space(rabbitmq_server: RabbitServer) -> Iterator[str]:
    name = rabbitmq_server.new_space()
    yield name
    rabbitmq_server.drop_space(name)


@pytest.mark.parametrize(
    ('priorities', 'shared', 'conf'),
    [
        (None, None, {'task_queues': [Queue('celery')]}),
        (10, 10, {'task_queue_max_priority': 10}),
        (10, None, {'task_queues': [Queue('celery', queue_arguments={'x-max-priority': 10})]}),
        (
            9,
            3,
            {
                'task_queues': [Queue('celery', max_priority=9), Queue('slow')],
                'task_queue_max_priority': 3,
            },
        ),
    ],
)
def test_queues_are_declared_alike_each_time_and_strays_are_parked(
    rabbitmq_server: RabbitServer,
    space: str,
    priorities: int | None,
    shared: int | None,
    conf: dict[str, Any],
) -> None:
    app = Celery('declaring', broker=rabbitmq_server.url(space), set_as_current=False)
    app.conf.update(conf)
    plugin = JobSync(app, config=CoordinationConfig(appname='shop_'), route_producers=False)
    broker = plugin.evacuable()
    with contextlib.ExitStack() as stack:
        stack.callback(broker.close)
        broker.declare({_HOME: _QUEUE})
        broker.declare({_HOME: _QUEUE})
        own, common = (
            {} if most is None else {'x-max-priority': most} for most in (priorities, shared)
        )
        found = {
            item['name']: item['arguments']
            for item in rabbitmq_server.api('GET', f'queues/{space}?disable_stats=true')
        }
        for given in found.values():
            given.pop('x-queue-type', None)  # RabbitMQ 4.3 shows its default
        # Longer than any task: the app gives none of its own queues a limit.
        assert found[_QUEUE].pop('x-consumer-timeout') == 365 * 24 * 60 * 60 * 1000
        shared_ones = {_PARKED: common, _UNKNOWN: common}
        assert found == {_QUEUE: own, _HOME_PARKED: own, **shared_ones}
        with app.connection_for_write(transport_options={'confirm_publish': True}) as connection:
            producer = connection.Producer()
            for queue in (_QUEUE, 'celery.jobsync.shop_.gone'):
                exchange, key = broker._queues.way_to(queue)
                producer.publish({}, exchange=exchange, routing_key=key, retry=False)
        eventually(lambda: rabbitmq_server.depths(space) == {_QUEUE: 1, _PARKED: 1})


def test_fifty_home_queues_take_one_connection(
    rabbitmq_server: RabbitServer, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Celery('many', broker=rabbitmq_server.url(space), set_as_current=False)
    plugin = JobSync(app, config=CoordinationConfig(appname='shop_'), route_producers=False)
    broker = plugin.evacuable()
    opened: list[int] = []
    establish = amqp.Connection.connect

    def connect(self: Any, *args: Any, **options: Any) -> Any:
        opened.append(1)
        return establish(self, *args, **options)

    monkeypatch.setattr(amqp.Connection, 'connect', connect)
    with contextlib.closing(broker):
        broker.declare({f'q{n}': f'q{n}.jobsync.shop_.n1' for n in range(50)})
    assert len(opened) == 1
    assert {f'q{n}.jobsync.shop_.n1' for n in range(50)} <= rabbitmq_server.queues(space)


def test_a_queue_whose_arguments_rabbitmq_refuses_is_there_without_them(
    rabbitmq_server: RabbitServer, space: str
) -> None:
    app = Celery('refused', broker=rabbitmq_server.url(space), set_as_current=False)
    exchange = Exchange('jobsync.shop_', type='direct', durable=True)
    arguments = {'x-queue-type': 'quorum', 'x-max-priority': 10}
    queue = Queue(_QUEUE, exchange, routing_key=_QUEUE, queue_arguments=arguments)
    with app.connection_for_write() as connection:
        declare_exchange(connection, exchange)
        for _ in range(2):
            assert declare_queue(connection, queue, lambda: True)
        connection.Producer().publish({}, exchange=exchange, routing_key=_QUEUE, retry=False)
    eventually(lambda: rabbitmq_server.depths(space) == {_QUEUE: 1})


@pytest.fixture
def broker(
    rabbitmq_server: RabbitServer, space: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CeleryBroker]:
    """The broker of a cluster whose queues are quorum ones, as they are by default."""
    app = Celery('quorum', broker=rabbitmq_server.url(space), set_as_current=False)
    app.conf.task_queue_max_priority = 5
    plugin = JobSync(app, config=CoordinationConfig(appname='shop_'), route_producers=False)
    broker = plugin.evacuable()
    make = broker._queues.make

    def quorum(name: str, declare: bool = True) -> Any:
        queue: Any = make(name, declare)
        queue.queue_arguments = {**(queue.queue_arguments or {}), 'x-queue-type': 'quorum'}
        return queue

    monkeypatch.setattr(broker._queues, 'make', quorum)
    broker.declare({_HOME: _QUEUE})
    yield broker
    broker.close()


def _bindings(server: RabbitServer, space: str, name: str) -> set[tuple[str, str]]:
    return {
        (item['source'], item['routing_key'])
        for item in server.api('GET', f'bindings/{space}')
        if item['destination'] == name and item['source']
    }


def _put(broker: CeleryBroker, queue: str, *ids: str) -> None:
    with broker._app.connection_for_write() as connection:
        for number in ids:
            headers = {'task': 'gone', 'id': number, KEY: number}
            connection.Producer().publish({}, routing_key=queue, headers=headers, retry=False)


class TestQuorum:
    def test_one_that_is_empty_is_deleted_and_another_is_not(
        self, rabbitmq_server: RabbitServer, space: str, broker: CeleryBroker
    ) -> None:
        _put(broker, _QUEUE, '1')
        eventually(lambda: broker.size(_QUEUE) == 1)
        assert not broker.delete(_QUEUE)
        delivery = broker.take(_QUEUE)
        assert delivery is not None
        with broker._app.connection_for_write() as connection:
            plugin = JobSync.of(broker._app)
            assert plugin is not None
            other = plugin.evacuable()
            with contextlib.closing(other):
                assert not other.delete(_QUEUE), 'somebody has a message of it in hand'
            delivery.forward(_PARKED)
            consumer = connection.Consumer(Queue(_QUEUE, no_declare=True), on_message=id)
            consumer.consume()
            assert not broker.delete(_QUEUE), 'somebody consumes it'
        eventually(lambda: broker.delete(_QUEUE))
        assert rabbitmq_server.queues(space) == {_PARKED, _HOME_PARKED, _UNKNOWN}
        assert broker.delete(_QUEUE), 'it is gone'
        assert broker.size(_PARKED) == 1, 'the connection is of use still'

    def test_what_comes_while_it_is_deleted_is_parked_and_what_came_before_stays(
        self,
        rabbitmq_server: RabbitServer,
        space: str,
        broker: CeleryBroker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        ways = _bindings(rabbitmq_server, space, _QUEUE)
        assert ways == {('jobsync.shop_.nodes', _QUEUE)}
        looks: list[bool] = []

        def is_idle(channel: Any, name: str) -> bool:
            looks.append(_is_idle(channel, name))
            if len(looks) % 2:
                _put(broker, _QUEUE, '1')  # past all exchanges, as a client of its own may
                eventually(lambda: broker.size(_QUEUE) == 1)
            else:
                for exchange in ('jobsync.shop_', 'jobsync.shop_.nodes'):
                    with broker._app.connection_for_write() as connection:
                        connection.Producer().publish(
                            {}, exchange=exchange, routing_key=_QUEUE, retry=False
                        )
            return looks[-1]

        monkeypatch.setattr('jobsync_celery.broker.declaring._is_idle', is_idle)
        assert not broker.delete(_QUEUE)
        assert looks == [True, False]
        eventually(lambda: rabbitmq_server.depths(space) == {_QUEUE: 1, _PARKED: 2})
        assert _bindings(rabbitmq_server, space, _QUEUE) >= ways

    def test_one_whose_consumer_has_stopped_and_is_connected_still_is_left_alone(
        self, space: str, broker: CeleryBroker, caplog: pytest.LogCaptureFixture
    ) -> None:
        app: Any = broker._app
        app.amqp.queues.select_add(broker._queues.make(_QUEUE))
        with app.connection_for_read() as connection:
            presence = Presence(app, SimpleNamespace(connection=connection), broker._queues)
            for _ in range(2):
                presence.announce()
            assert not broker.delete(_QUEUE)
            # Nor is it made anew: a former life of the node may be running something of it.
            app.amqp.queues[_QUEUE].queue_arguments = None
            broker._queues.settle(_QUEUE, {'x-max-length': 5}, True)
            broker.declare({_HOME: _QUEUE})
            assert 'is used as it is' in caplog.text
            presence.withdraw(_QUEUE)
            eventually(lambda: broker.delete(_QUEUE))
            presence.announce()
        eventually(lambda: broker.delete(_QUEUE))

    def test_how_often_a_message_came_back_goes_along(self, broker: CeleryBroker) -> None:
        def take(queue: str) -> Any:
            return eventually(lambda: broker.take(queue))

        _put(broker, _QUEUE, '1')
        take(_QUEUE).requeue()
        take(_QUEUE).forward(_PARKED)
        delivery = take(_PARKED)
        assert delivery._message.headers[RETURNS] == 1
        delivery.requeue()
        take(_PARKED).forward(_HOME_PARKED)
        assert take(_HOME_PARKED)._message.headers[RETURNS] == 2

    def test_one_whose_leader_is_away_is_not_taken_for_empty(self) -> None:
        """RabbitMQ says of it that nothing is in it, and would delete it with all that it has."""
        log: list[str] = []
        messages: list[Any] = [SimpleNamespace(delivery_tag='1')]
        channel = SimpleNamespace(
            queue_declare=lambda *args, **options: SimpleNamespace(
                message_count=0, consumer_count=0
            ),
            queue_unbind=lambda *args: log.append('unbind'),
            queue_bind=lambda *args: log.append('bind'),
            basic_get=lambda name: messages.pop() if messages else None,
            basic_reject=lambda tag, requeue: log.append(f'requeue {tag}'),
            queue_delete=lambda name: log.append('delete'),
        )
        assert not delete_empty(channel, _QUEUE, [('exchange', 'key')])
        assert log == ['unbind', 'requeue 1', 'bind']
        assert delete_empty(channel, _QUEUE, [('exchange', 'key')])
        assert log[3:] == ['unbind', 'delete']

    def test_what_stays_parked_is_given_back_to_nobody_and_keeps_its_order(
        self, broker: CeleryBroker
    ) -> None:
        _put(broker, _PARKED, *'1234')
        eventually(lambda: broker.size(_PARKED) == 4)
        passage = Passage(broker, 'n1')
        for _ in range(3):
            passed = passage.go(_PARKED, lambda delivery: None, lambda: False)
            assert (passed.moved, passed.stayed, passed.whole) == (0, 4, True)
        found = []
        while (message := broker._get(_PARKED)) is not None:
            found.append((message.headers['id'], message.headers.get('x-delivery-count', 0)))
            message.ack()
        assert found == [(number, 0) for number in '1234']

    def test_priorities_are_left_out(
        self, broker: CeleryBroker, caplog: pytest.LogCaptureFixture
    ) -> None:
        app: Any = broker._app
        own = app.amqp.queues.select_add(broker._queues.make(_QUEUE))
        assert own.queue_arguments.pop('x-consumer-timeout')
        assert own.queue_arguments == {'x-queue-type': 'quorum', 'x-max-priority': 5}
        assert broker.delete(_QUEUE)
        for _ in range(2):
            broker.declare({_HOME: _QUEUE})
            assert not own.no_declare
            with app.connection_for_write() as connection:
                own(connection.default_channel).declare()
        assert 'was made anew' not in caplog.text


def test_what_native_delayed_delivery_keeps_of_a_node_goes_with_its_queue(
    rabbitmq_server: RabbitServer, space: str
) -> None:
    app: Any = Celery('delaying', broker=rabbitmq_server.url(space), set_as_current=False)
    plugin = JobSync(app, config=CoordinationConfig(appname='shop_'), route_producers=False)
    broker = plugin.evacuable()
    with contextlib.closing(broker), app.connection_for_write() as connection:
        broker.declare({_HOME: _QUEUE})
        declare_native_delayed_delivery_exchanges_and_queues(connection, 'quorum')
        bind_queue_to_native_delayed_delivery_exchange(connection, broker._queues.make(_QUEUE))
        nodes = _bindings(rabbitmq_server, space, 'jobsync.shop_.nodes')
        assert nodes == {('celery_delayed_delivery', f'#.{_QUEUE}')}
        assert broker.delete(_QUEUE)
        assert not _bindings(rabbitmq_server, space, 'jobsync.shop_.nodes')


def test_a_node_whose_name_has_wildcards_gets_its_own_messages_alone() -> None:
    app = Celery('wild', broker='amqp://', set_as_current=False)
    queues = Queues(app, 'amqp', 'shop_')
    for name in ('celery.jobsync.shop_.a.#', 'celery.jobsync.shop_.*'):
        assert set(queues.make(name).routing_key.split('.')).isdisjoint('*#')


def test_a_broker_that_came_back_empty_parks_strays_again(
    rabbitmq_server: RabbitServer, space: str
) -> None:
    app = Celery('emptied', broker=rabbitmq_server.url(space), set_as_current=False)
    plugin = JobSync(app, config=CoordinationConfig(appname='shop_'), route_producers=False)
    broker = plugin.evacuable()
    with contextlib.ExitStack() as stack:
        stack.callback(broker.close)
        broker.declare({_HOME: _QUEUE})
        broker.mark('the cluster')
        for queue in (_PARKED, _UNKNOWN):
            rabbitmq_server.api('DELETE', f'queues/{space}/{queue}')
        rabbitmq_server.api('DELETE', f'exchanges/{space}/jobsync.shop_.unrouted')
        broker.mark('the cluster')
        for exchange in ('jobsync.shop_', 'jobsync.shop_.nodes'):
            rabbitmq_server.api('DELETE', f'exchanges/{space}/{exchange}')
            broker.mark('the cluster')
        broker.mark('the cluster')
        with app.connection_for_write(transport_options={'confirm_publish': True}) as connection:
            for exchange in ('jobsync.shop_', 'jobsync.shop_.nodes'):
                connection.Producer().publish(
                    {}, exchange=exchange, routing_key='jobsync.shop_.gone', retry=False
                )
        eventually(lambda: rabbitmq_server.depths(space) == {_PARKED: 2})
    assert rabbitmq_server.queues(space) == {_QUEUE, _HOME_PARKED, _PARKED, _UNKNOWN}


@pytest.mark.parametrize('kind', ['redis', 'rabbitmq'])
def test_a_broker_is_known_again_by_whatever_address(
    kind: str, request: pytest.FixtureRequest
) -> None:
    server: BrokerServer = request.getfixturevalue(f'{kind}_server')
    spaces = [server.new_space(), server.new_space()]

    def broker_at(url: str, **options: object) -> CeleryBroker:
        app = Celery('marked', broker=url, set_as_current=False, broker_transport_options=options)
        return JobSync(
            app, config=CoordinationConfig(appname='shop_'), route_producers=False
        ).evacuable()

    with contextlib.ExitStack() as stack:
        for space in spaces:
            stack.callback(server.drop_space, space)
        first, other = (broker_at(server.url(space)) for space in spaces)
        mine = broker_at(server.url(spaces[0]).replace('127.0.0.1', 'localhost'))
        if kind == 'redis':
            assert first.identify(False) is None
        mark = first.identify(True)
        assert mark and mine.identify(True) == mark and mine.identify(False) == mark
        assert other.identify(True) not in (mark, None)
        assert 'guest:guest' not in first.place and str(server.port) in first.place
        if kind == 'redis':
            assert broker_at(server.url(spaces[0]), global_keyprefix='{crm}').identify(
                True
            ) not in (mark, None)
            server.drop_space(spaces[0])
            assert mine.identify(False) is None
            first.mark(str(mark))
            assert mine.identify(False) == mark
            first.mark('another')
            assert mine.identify(False) == mark, 'one that is there stays'
            first.close()


def test_nodes_that_are_gone_are_asked_about_together(redis_server: RedisServer) -> None:
    space = redis_server.new_space()
    app = Celery('asking', broker=redis_server.url(space), set_as_current=False)
    app.conf.broker_transport_options = {'global_keyprefix': 'p:'}
    broker = JobSync(
        app, config=CoordinationConfig(appname='shop_'), route_producers=False
    ).evacuable()
    queues = {f'jobsync.shop_.n{number}': f'n{number}' for number in range(250)}
    with contextlib.ExitStack() as stack:
        stack.callback(redis_server.drop_space, space)
        stack.callback(broker.close)
        client = stack.enter_context(contextlib.closing(redis_server.client(space)))
        broker.left(queues)
        before = client.info('commandstats').get('cmdstat_exists', {'calls': 0})['calls']
        assert broker.left(queues) == frozenset()
        assert client.info('commandstats')['cmdstat_exists']['calls'] - before == 3
        client.rpush('p:jobsync.shop_.n7', 'message')
        client.hset('p:jobsync.shop_.n200.unacked', 'tag', 'message')
        assert broker.left(queues) == {'jobsync.shop_.n7', 'jobsync.shop_.n200'}
        assert broker.size('jobsync.shop_.n7') == 1 and broker.size('jobsync.shop_.n8') == 0


def test_what_a_lost_connection_had_acknowledged_is_not_given_back(
    redis_server: RedisServer,
) -> None:
    space = redis_server.new_space()
    app = Celery('restoring', broker=redis_server.url(space), set_as_current=False)
    application = Application(app, {'config': CoordinationConfig(appname='shop_')})
    with contextlib.ExitStack() as stack:
        stack.callback(redis_server.drop_space, space)
        holder = stack.enter_context(
            app.connection_for_write(transport_options=node_options('shop_', 'n1'))
        )
        source = stack.enter_context(holder.SimpleQueue('celery'))
        for number in range(3):
            source.put(number)
        messages = [source.get(timeout=20) for _ in range(3)]
        carried = CarriedOver(acknowledged={messages[1].delivery_tag})
        assert application.broker(carried).restore_own('n1') == 2
        assert carried == CarriedOver()
        assert sorted(source.get(timeout=20).payload for _ in range(2)) == [0, 2]


@pytest.mark.parametrize(
    ('source', 'given', 'home', 'arrives'),
    [
        (_PARKED, 'celery', 'celery', 'celery'),
        (_PARKED, 'own', 'own', 'own'),
        (_PARKED, 'gone', 'gone', 'celery'),
        (_PARKED, _QUEUE, 'celery', 'celery'),
        # A queue that serves one home queue tells it, whatever the message says.
        ('own', 'celery', 'own', 'own'),
        (_HOME_PARKED, 'own', 'celery', 'celery'),
    ],
)
def test_what_goes_home_arrives_there(
    rabbitmq_server: RabbitServer, space: str, source: str, given: str, home: str, arrives: str
) -> None:
    """Not through the exchange of the node queues, and not to a queue that is gone: that would lose
    it.
    """
    app = Celery('homing', broker=rabbitmq_server.url(space), set_as_current=False)
    broker = JobSync(
        app, config=CoordinationConfig(appname='shop_'), route_producers=False
    ).evacuable()
    with contextlib.ExitStack() as stack:
        stack.callback(broker.close)
        broker.declare({_HOME: _QUEUE})
        with app.connection_for_write(transport_options={'confirm_publish': True}) as connection:
            Queue('own', durable=True)(connection.default_channel).declare()
            connection.Producer().publish(
                [[1], {}, {}],
                exchange='',
                routing_key=source,
                headers={'task': 'nobody', 'id': 'm1', HOME: given},
                retry=False,
            )
        delivery = broker.take(source)
        assert delivery is not None
        assert (delivery.home, delivery.task, delivery.route) == (home, 'nobody', None)
        delivery.forward(delivery.home)
        eventually(lambda: rabbitmq_server.depths(space) == {arrives: 1})


@pytest.mark.parametrize('kind', ['redis', 'rabbitmq'])
@pytest.mark.parametrize('came_before', [False, True])
def test_what_a_duty_has_looked_at_is_not_redelivered_by_that(
    request: pytest.FixtureRequest, kind: str, came_before: bool
) -> None:
    """A task may take it for a sign that it has begun before."""
    server: BrokerServer = request.getfixturevalue(f'{kind}_server')
    space = server.new_space()
    request.addfinalizer(lambda: server.drop_space(space))
    app = Celery('looking', broker=server.url(space), set_as_current=False)
    broker = JobSync(
        app, config=CoordinationConfig(appname='shop_'), route_producers=False
    ).evacuable()
    marked = {'redelivered': True, REDELIVERED: True} if came_before else {}
    with contextlib.ExitStack() as stack:
        stack.callback(broker.close)
        broker.declare({_HOME: _QUEUE})
        source = stack.enter_context(app.connection_for_write()).SimpleQueue(_HOME)
        for number in range(3):
            source.put([[number], {}, {}], headers={'task': 'nobody', 'id': f'm{number}', **marked})
        eventually(lambda: broker.size(_HOME) == 3)
        passed = Passage(broker, 'n1').go(_HOME, lambda delivery: None, lambda: False)
        assert (passed.moved, passed.stayed) == (0, 3)
        found = [source.get(timeout=20) for _ in range(3)]
        assert [message.headers['id'] for message in found] == ['m0', 'm1', 'm2']
        for message in found:
            said = message.headers.get(REDELIVERED), message.headers.get('redelivered')
            came = bool(message.delivery_info.get('redelivered') or said[0] or said[1])
            assert came == came_before


def test_what_cannot_be_sent_on_keeps_nothing_behind_it_waiting_on_redis(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = redis_server.new_space()
    app = Celery('failing', broker=redis_server.url(space), set_as_current=False)
    broker = JobSync(
        app, config=CoordinationConfig(appname='shop_'), route_producers=False
    ).evacuable()
    send = broker.forwarder.send

    def fails_for_three(queue: str, message: Any, headers: Any) -> None:
        if headers['id'] in ('m0', 'm1', 'm2'):
            raise ValueError(headers['id'])
        send(queue, message, headers)

    monkeypatch.setattr(broker.forwarder, 'send', fails_for_three)
    with contextlib.ExitStack() as stack:
        stack.callback(redis_server.drop_space, space)
        stack.callback(broker.close)
        connection = stack.enter_context(app.connection_for_write())
        source, target = connection.SimpleQueue(_HOME), connection.SimpleQueue('target')
        for number in range(5):
            source.put([[], {}, {}], headers={'task': 'nobody', 'id': f'm{number}'})
        passage = Passage(broker, 'n1')
        with pytest.raises(ValueError, match='m2'):  # for all it knows the broker has failed
            passage.go(_HOME, lambda delivery: 'target', lambda: False)
        with contextlib.suppress(ValueError):
            passage.go(_HOME, lambda delivery: 'target', lambda: False)
        assert {target.get(timeout=20).headers['id'] for _ in range(2)} == {'m3', 'm4'}


def _task(n: int) -> int:
    return n


@pytest.mark.parametrize(
    ('headers', 'expected'),
    [
        ({'task': 'keyed', KEY: 'forged'}, ('k:1', 'celery')),
        ({'task': 'keyed', HOME: 'gpu'}, ('k:1', 'celery')),  # nobody consumes it
        ({'task': 'plain', KEY: 'forged'}, (None, 'celery')),
        # Whoever sweeps the queue would find it there again and again, and nothing behind it.
        ({'task': 'plain', HOME: 'jobsync.sync_.gone'}, (None, 'celery')),
        ({'task': 'plain', HOME: 'jobsync.sync_.parked'}, (None, 'celery')),
        ({'task': 'nobody', KEY: 'k:9'}, ('k:9', 'celery')),
        ({'task': 'nobody', KEY: ['k'], HOME: 5}, (None, 'celery')),
        ({'task': []}, (None, 'celery')),
        ({'task': 'keyless'}, (None, 'celery')),
        ([], (None, 'celery')),
    ],
)
def test_a_route_is_made_from_the_arguments_where_the_task_is_known(
    headers: Any, expected: tuple[str | None, str]
) -> None:
    def fails(n: int) -> str:
        raise LookupError

    app = Celery('addressing', broker='memory://', set_as_current=False)
    for name, key in (('keyed', 'k:{n}'), ('plain', None), ('keyless', fails)):
        app.task(name=name, shared=False, jobsync_key=key)(_task)
    broker = JobSync(app, config=CoordinationConfig(), route_producers=False).evacuable()
    message = Message(
        body=b'[[1], {}, {}]', content_type='application/json', content_encoding='utf-8'
    )
    message.headers = {**headers, 'id': 'm1'} if headers else headers
    assert broker.address_of(message, '') == expected


@pytest.mark.parametrize(
    ('headers', 'body', 'known'),
    [
        ({'task': 'keyed', 'id': 'm1'}, b'[[1], {}, {}]', ('keyed', 'm1')),
        # Protocol 1: its headers say nothing of the task.
        ({}, b'{"task": "keyed", "id": "m1", "args": [1]}', ('keyed', 'm1')),
        ({KEY: 'k:1'}, b'{"task": "nobody", "id": "m1", "args": [1]}', ('nobody', 'm1')),
        # A worker that knows it sets it aside.
        ({'task': 'keyed', 'id': 'm1'}, b'{', ('keyed', 'm1')),
        ({}, b'{', ('', 'None')),
    ],
)
def test_a_message_that_is_taken_tells_its_task_in_either_protocol(
    headers: dict[str, Any], body: bytes, known: tuple[str, str]
) -> None:
    app = Celery('addressing', broker='memory://', set_as_current=False)
    app.task(name='keyed', shared=False, jobsync_key='k:{n}')(_task)
    broker = JobSync(app, config=CoordinationConfig(), route_producers=False).evacuable()
    message = Message(body=body, content_type='application/json', content_encoding='utf-8')
    message.headers = headers
    taken = CeleryDelivery(broker, message, 'jobsync.sync_.unknown')
    assert (taken.task, taken.id) == known


@contextlib.contextmanager
def known(name: str) -> Iterator[None]:
    """A compression that this process knows for a while."""
    compression.register(lambda body: b'odd' + body[::-1], lambda body: body[3:][::-1], name)
    try:
        yield
    finally:
        compression._decoders.pop(name)
        compression._encoders.pop(name)


@pytest.mark.parametrize('serializer', ['json', 'pickle'])
@pytest.mark.parametrize('method', ['zlib', 'bzip2', 'application/x-odd'])
@pytest.mark.parametrize('way', ['redis', 'redis by publishing', 'rabbitmq'])
def test_a_compressed_message_arrives_as_it_was(
    request: pytest.FixtureRequest, way: str, method: str, serializer: str
) -> None:
    server: BrokerServer = request.getfixturevalue(f'{way.split()[0]}_server')
    check_compressed(server, way == 'redis by publishing', method, serializer)


def check_compressed(
    server: BrokerServer, by_publishing: bool, method: str, serializer: str
) -> None:
    """A message is passed on twice, the second time by one who cannot decompress it, where nobody
    has to know how.
    """
    space, odd = server.new_space(), method.startswith('application')
    app = Celery('compressed', broker=server.url(space), set_as_current=False)
    app.conf.accept_content = ['json', 'pickle']
    broker = JobSync(
        app, config=CoordinationConfig(appname='shop_'), route_producers=False
    ).evacuable()
    if by_publishing:
        vars(broker.forwarder)['_in_one_trip'] = False
    body = [['x' * 2000, 7], {}, {}]
    with contextlib.ExitStack() as stack:
        stack.callback(server.drop_space, space)
        stack.callback(broker.close)
        broker.declare({_HOME: _QUEUE})
        with app.connection_for_write(transport_options={'confirm_publish': True}) as connection:
            Queue('celery', durable=True)(connection.default_channel).declare()
            with known(method) if odd else contextlib.nullcontext():
                connection.Producer().publish(
                    body,
                    exchange='',
                    routing_key='celery',
                    compression=method,
                    serializer=serializer,
                    retry=False,
                    headers={'task': 'nobody', 'id': 'm1'},
                )
        for source, target in (('celery', _PARKED), (_PARKED, _QUEUE)):
            delivery = eventually(lambda source=source: broker.take(source))  # type: ignore[misc]
            assert delivery is not None
            delivery.forward(target)
        with known(method) if odd else contextlib.nullcontext():
            message = eventually(lambda: broker._get(_QUEUE))
        assert (message.headers['id'], list(map(list, message.payload[:1]))) == ('m1', body[:1])
        message.ack()
        eventually(lambda: server.depths(space) == {})


def test_without_its_header_a_compressed_message_is_lost(
    rabbitmq_server: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Forwarder._publish

    def forget(self: Forwarder, queue: str, message: Any, headers: dict[str, Any]) -> None:
        message.errors = []
        publish(self, queue, message, headers)

    monkeypatch.setattr(Forwarder, '_publish', forget)
    with pytest.raises((ValueError, DecodeError)):
        check_compressed(rabbitmq_server, False, 'application/x-odd', 'json')
