"""Redis and RabbitMQ as the plugin uses them: what is published, taken, given back, buried and
rescued, on real servers.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.errors import ConnectionClosed
from pika import URLParameters
from pika.exceptions import UnroutableError
from redis import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout
from redis.sentinel import Sentinel

from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.incoming import read_stamps
from jobsync_core.worker.settings import PluginSettings
from jobsync_dramatiq import JobSync
from jobsync_dramatiq.actors import Actors
from jobsync_dramatiq.broker.interface import WorkerBroker
from jobsync_dramatiq.broker.opening import open_broker
from jobsync_dramatiq.broker.rabbit_errors import BROKEN
from tests.support.brokers import BrokerServer, RabbitServer
from tests.support.fakes import Clock
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

from ..hostile.dramatiq_wire import TELLING, UNREADABLE, body

PARKED = 'default.jobsync.shop_.parked'
N1, N2 = 'default.jobsync.shop_.n1', 'default.jobsync.shop_.n2'
OLD_PARKED = 'jobsync.shop_.parked'


class Place:
    """A part of a broker's server, and the processes that use it."""

    def __init__(self, server: BrokerServer, stack: ExitStack) -> None:
        self.server = server
        self.space = server.new_space()
        self._stack = stack
        stack.callback(server.drop_space, self.space)

    def node(self, name: str, **options: Any) -> Any:
        """The broker of a process that is a node."""
        opened = self.producer(**options)
        opened.join(name)
        opened.declare('default', f'default.jobsync.shop_.{name}')
        return opened

    def node_behind(self, proxy: Proxy, name: str) -> Any:
        """The broker of a node that reaches Redis by a proxy, and waits for a second for an
        answer.
        """
        broker = RedisBroker(url=f'{self.server.url(self.space, proxy.port)}?socket_timeout=1')
        self._stack.callback(broker.client.close)
        opened = open_broker(broker, CoordinationConfig(appname='shop_'))
        opened.join(name)
        opened.declare('default', f'default.jobsync.shop_.{name}')
        return opened

    def producer(self, **options: Any) -> Any:
        url = self.server.url(self.space)
        broker: Any = (
            RedisBroker(url=url)
            if self.server.kind == 'redis'
            else RabbitmqBroker(url=url, **options)
        )
        self._stack.callback(
            broker.close if self.server.kind == 'rabbitmq' else broker.client.close
        )
        return open_broker(broker, CoordinationConfig(appname='shop_'))

    def put(self, opened: WorkerBroker, queue: str, number: int = 1) -> None:
        for n in range(number):
            opened.send(message(n), queue, f'k:{n}')

    def put_raw(self, opened: Any, queue: str, data: bytes) -> None:
        """Put bytes into a queue, which may be no message."""
        if self.server.kind == 'redis':
            number = uuid.uuid4().hex
            opened.native.client.hset(f'dramatiq:{queue}.msgs', number, data)
            opened.native.client.rpush(f'dramatiq:{queue}', number)
        else:
            opened.native._ensure_queue('default')
            opened.native.channel.basic_publish(
                'jobsync.shop_' if queue.startswith('jobsync.') else '', queue, data
            )

    def dead(self, opened: Any, queue: str) -> list[bytes]:
        """What is among the dead letters of a queue."""
        if self.server.kind == 'redis':
            return list(opened.native.client.hgetall(f'dramatiq:{queue}.XQ.msgs').values())
        found: list[bytes] = []
        if not opened.size(f'{queue}.XQ'):
            return found  # perhaps there is no such queue
        while (data := opened.native.channel.basic_get(f'{queue}.XQ')[2]) is not None:
            found.append(data)
        opened.native.channel.basic_nack(0, multiple=True)
        return found

    def take_all(self, opened: WorkerBroker, queue: str) -> list[Any]:
        """The messages of a queue, which stay taken."""
        found: list[Any] = []
        while (delivery := opened.take(queue)) is not None:
            found.append(delivery.message)  # type: ignore[attr-defined]  # of either broker
        return found


@pytest.fixture
def place(server: BrokerServer) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(server, stack)


@pytest.fixture
def rabbit(rabbitmq_server: BrokerServer) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(rabbitmq_server, stack)


@pytest.fixture
def redis(redis_server: BrokerServer) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(redis_server, stack)


def message(n: int, **options: Any) -> Any:
    return dramatiq.Message(
        queue_name='default', actor_name='keyed', args=(n,), kwargs={}, options=options
    )


def next_of(consumer: Any) -> Any:
    return eventually(lambda: consumer.next(patient=True))


def came_before(found: Any) -> bool:
    return getattr(found, 'redelivered', False) or read_stamps(found.options).waits > 0


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def in_thread(action: Callable[[], Any]) -> None:
    """Run in a thread of its own, as a worker's threads do."""
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_where_a_broker_is_names_what_decides_and_no_password() -> None:
    untyped: Any = Sentinel
    sentinel = untyped(
        [('127.0.0.1', 1)], sentinel_kwargs={'password': 'secret1'}, password='secret2'
    )
    by_sentinel = RedisBroker(client=sentinel.master_for('shop', db=3), namespace='jobs')
    with_tls = RedisBroker(url='rediss://u:secret1@h:7/3?ssl_password=secret2', namespace='jobs')
    places = [
        open_broker(native, CoordinationConfig(appname='shop_')).place
        for native in (by_sentinel, with_tls)
    ]
    assert places == ['Redis, the master shop of Sentinel/3 (jobs)', 'redis://h:7/3 (jobs)']


class TestBothBrokers:
    def test_a_broker_is_known_again_and_another_part_of_it_is_another(
        self, place: Place, server: BrokerServer
    ) -> None:
        with ExitStack() as stack:
            other = Place(server, stack)
            mark = place.producer().identify(True)
            assert mark and place.producer().identify(False) == mark
            assert other.producer().identify(True) not in (mark, None)
            assert (
                'guest:guest' not in place.producer().place
                and str(server.port) in place.producer().place
            )
            if server.kind == 'redis':
                server.drop_space(place.space)
                assert place.producer().identify(False) is None
                place.producer().mark(mark)
                place.producer().mark('another')
                assert place.producer().identify(False) == mark

    def test_what_nodes_that_are_gone_left_is_seen_and_nothing_else(self, place: Place) -> None:
        gone, opened = place.node('gone'), place.node('n1')
        queues = {
            'default.jobsync.shop_.gone': 'gone',
            N2: 'n2',
            **{f'jobsync.shop_.never-{each}': f'never-{each}' for each in range(210)},
        }
        assert opened.left(queues) == set()
        place.put(gone, 'default.jobsync.shop_.gone', 2)
        eventually(lambda: opened.size('default.jobsync.shop_.gone') == 2)
        assert opened.size('jobsync.shop_.never') == 0
        delivery = opened.take('default.jobsync.shop_.gone')
        assert (delivery.route, delivery.task, delivery.home) == (
            'k:0',
            'keyed',
            'default',
        ) and opened.size('default.jobsync.shop_.gone') == 1
        delivery.requeue()
        eventually(lambda: opened.size('default.jobsync.shop_.gone') == 2)
        assert opened.left(queues) == {'default.jobsync.shop_.gone'}

    def test_what_a_node_that_is_gone_had_taken_is_seen_where_the_broker_does_not_return_it(
        self, place: Place
    ) -> None:
        gone, opened = place.node('gone'), place.node('n1')
        place.put(gone, 'default', 1)
        consumer = gone.consume('default', 1, 1000)
        eventually(lambda: consumer.next(True) is not None)
        redis = place.server.kind == 'redis'
        queue = 'default.jobsync.shop_.gone'
        assert opened.left({queue: 'gone', N2: 'n2'}) == ({queue} if redis else set())
        consumer.close([])

    def test_a_copy_comes_out_as_it_was_sent(self, place: Place) -> None:
        node = place.node('n1')
        sent = message(7, broker_priority=3, retries=1)
        node.send(sent, N1, 'k:7', 2)
        [found] = place.take_all(node, N1)
        assert (found.message_id, found.message_timestamp, found.args) == (
            sent.message_id,
            sent.message_timestamp,
            (7,),
        )
        options = {
            name: value for name, value in found.options.items() if name != 'redis_message_id'
        }
        assert options == {
            'broker_priority': 3,
            'retries': 1,
            'jobsync_key': 'k:7',
            'jobsync_home': 'default',
            'jobsync_hops': 2,
        }

    def test_what_a_queue_holds_goes_to_its_new_owner_and_home(self, place: Place) -> None:
        one, two = place.node('n1'), place.node('n2')
        place.put(one, N2, 2)
        delivery = one.take(N2)
        assert (delivery.route, delivery.home) == ('k:0', 'default')
        delivery.forward(N1)
        one.take(N2).forward('default')
        assert one.take(N2) is None
        assert [found.args for found in place.take_all(two, N1)] == [(0,)]
        [back] = place.take_all(two, 'default')
        assert (back.args, back.queue_name, 'jobsync_home' in back.options) == (
            (1,),
            'default',
            False,
        )

    def test_a_letter_that_is_put_back_stays(self, place: Place) -> None:
        node = place.node('n1')
        place.put(node, PARKED)
        node.take(PARKED).requeue()
        assert eventually(lambda: node.take(PARKED), 10).route == 'k:0'

    def test_an_empty_queue_is_deleted_and_a_full_one_stays(self, place: Place) -> None:
        node, two = place.node('n1'), place.node('n2')
        place.put(node, N2)
        assert not node.delete(N2)
        node.take(N2).forward(PARKED)
        assert eventually(lambda: node.delete(N2))
        assert two.take(N2) is None

    def test_a_dead_letter_of_a_node_s_queue_goes_to_its_actor_s(self, place: Place) -> None:
        node = place.node('n1')
        consumer = node.consume(N1, 5, 50)
        place.put(node, N1)
        found = next_of(consumer)
        in_thread(lambda: consumer.nack(found))
        consumer.close([])
        if place.server.kind == 'redis':
            client = node.native.client
            [raw] = client.hvals('dramatiq:default.XQ.msgs')
            assert client.zcard('dramatiq:default.XQ') == 1
        else:

            def dead() -> Any:
                return node.native.channel.basic_get('default.XQ', auto_ack=True)[2]

            raw = eventually(dead)
        buried = dramatiq.Message.decode(raw)
        assert (buried.queue_name, buried.args, 'jobsync_home' in buried.options) == (
            'default',
            (0,),
            False,
        )
        assert node.take(N1) is None

    def test_a_pause_gives_back_what_was_fetched_and_not_handed_out(self, place: Place) -> None:
        node = place.node('n1')
        consumer = node.consume(N1, 10, 50)
        place.put(node, N1, 5)
        first = next_of(consumer)
        consumer.pause()
        other = place.node('n2')
        taken: list[Any] = []

        def take_more() -> bool:
            consumer.idle(0.01)  # what was on its way goes back as well
            taken.extend(place.take_all(other, N1))
            return len(taken) == 4

        eventually(take_more)
        consumer.ack(first)
        consumer.resume()
        node.send(message(9), N1, None)
        assert next_of(consumer).args == (9,)
        consumer.close([])

    def test_what_is_given_back_comes_again(self, place: Place) -> None:
        node = place.node('n1')
        consumer = node.consume(N1, 10, 50)
        place.put(node, N1)
        found = next_of(consumer)
        in_thread(lambda: consumer.requeue(found))
        assert next_of(consumer).message_id == found.message_id
        consumer.close([])

    def test_what_is_given_back_while_it_runs_says_that_it_came_before(self, place: Place) -> None:
        node = place.node('n1')
        consumer = node.consume(N1, 10, 50)
        place.put(node, N1)
        found = next_of(consumer)
        assert not came_before(found)
        in_thread(lambda: consumer.requeue(found, begun=True))
        again = next_of(consumer)
        assert again.message_id == found.message_id and again.args == found.args
        assert came_before(again)
        consumer.ack(again)
        consumer.close([])

    def test_a_closed_consumer_leaves_nothing_in_hand(self, place: Place) -> None:
        node, two = place.node('n1'), place.node('n2')
        consumer = node.consume(N1, 10, 50)
        place.put(node, N1, 5)
        waiting = [next_of(consumer), next_of(consumer)]
        consumer.close(waiting)
        taken: list[Any] = []

        def take_more() -> bool:
            taken.extend(place.take_all(two, N1))
            return len(taken) == 5

        eventually(take_more)


def dead_by_queue(queue: str | None) -> dict[str, list[bytes]]:
    """Where each message goes that no worker can have: all to one, or, found in a queue of the
    plugin's, as far as they tell it.
    """
    found: dict[str, list[bytes]] = {'default': [], OLD_PARKED: []}
    for name, data in UNREADABLE.items():
        found[queue or ('default' if name in TELLING else OLD_PARKED)].append(data)
    return {name: sorted(data) for name, data in found.items()}


class TestUnreadable:
    """What no worker can have is set aside once, as it is, and what lies beside it goes its way."""

    @pytest.mark.parametrize('queue', ['default', N1])
    def test_a_consumer_sets_it_aside(
        self, place: Place, queue: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        node = place.node('n1')
        consumer = node.consume(queue, 100, 50)
        for n, data in enumerate(UNREADABLE.values()):
            place.put_raw(node, queue, data)
            node.send(message(n), queue, None)
        good = [next_of(consumer) for _ in UNREADABLE]
        assert sorted(each.args[0] for each in good) == list(range(len(UNREADABLE)))
        dead = dead_by_queue('default')
        eventually(lambda: {name: sorted(place.dead(node, name)) for name in dead} == dead)
        for each in good:
            in_thread(partial(consumer.ack, each))
        consumer.idle(0.05)
        consumer.close([])
        lines = [record.getMessage() for record in caplog.records if '.XQ: ' in record.getMessage()]
        assert sorted(line.split('.XQ: ')[0].rpartition(' ')[2] for line in lines) == sorted(
            name for name in dead for _ in dead[name]
        )
        assert all(len(line) < 600 and '\n' not in line for line in lines)
        eventually(
            lambda: (
                not [name for name in place.server.depths(place.space) if not name.endswith('.XQ')]
            )
        )

    @pytest.mark.parametrize('queue', [PARKED, OLD_PARKED])
    def test_who_sweeps_a_queue_sets_it_aside(self, place: Place, queue: str) -> None:
        node = place.node('n1')
        for n, data in enumerate(UNREADABLE.values()):
            place.put_raw(node, queue, data)
            node.send(message(n), queue, f'k:{n}')
        assert [each.args[0] for each in place.take_all(node, queue)] == list(
            range(len(UNREADABLE))
        )
        dead = dead_by_queue('default' if queue == PARKED else None)
        assert eventually(
            lambda: {name: sorted(place.dead(node, name)) for name in dead} == dead, 10
        )

    def test_a_worker_that_knows_the_actors_knows_where_their_dead_letters_are(
        self, place: Place
    ) -> None:
        node = place.node('n1')
        node.native.add_middleware(JobSync(config=CoordinationConfig(appname='shop_')))
        for queue in ('default', 'mail'):
            dramatiq.actor(actor_name=f'to_{queue}', queue_name=queue, broker=node.native)(print)
        config = CoordinationConfig(appname='shop_')
        node = open_broker(node.native, config, Actors(node.native, PluginSettings(config=config)))
        node.declare('default', N1)
        stamped = {'jobsync_home': 'mail'}
        expected = {
            'mail': [
                body(options=stamped, args=3),
                body(actor_name='to_mail', args=3),
                body(queue_name='mail', actor_name='?', args=3),
            ],
            # Nobody looks at queues that are not declared: what only a forger can have written
            # counts for nothing.
            'default': [
                body(options={'jobsync_home': 'nowhere'}, args=3),
                body(queue_name=PARKED, args=3),
                b'no message',
            ],
        }
        for data in (*expected['mail'], *expected['default']):
            place.put_raw(node, OLD_PARKED, data)
        assert node.take(OLD_PARKED) is None
        assert eventually(
            lambda: (
                {name: sorted(place.dead(node, name)) for name in expected}
                == {name: sorted(data) for name, data in expected.items()}
            )
        )

    def test_without_a_right_to_write_there_it_goes_to_the_plugin_s_own(
        self, rabbit: Place, caplog: pytest.LogCaptureFixture
    ) -> None:
        node = rabbit.node('n1')
        bad = UNREADABLE['no args']
        for _ in range(2):
            rabbit.put_raw(node, OLD_PARKED, bad)
        assert isinstance(rabbit.server, RabbitServer)
        rabbit.server.api(
            'PUT',
            f'permissions/{rabbit.space}/guest',
            {'configure': '.*', 'write': '^jobsync.*', 'read': '.*'},
        )
        node.reset()
        with suppress(*BROKEN):  # the refusal has closed the channel: it comes once more
            node.take(OLD_PARKED)
        eventually(lambda: node.take(OLD_PARKED) is None and node.size(OLD_PARKED) == 0)
        eventually(lambda: len(rabbit.dead(node, OLD_PARKED)) == 2)
        assert caplog.text.count('may not write to default.XQ') == 1

    def test_a_consumer_that_is_closed_or_paused_with_some_of_it_gives_it_back(
        self, place: Place
    ) -> None:
        node = place.node('n1')
        consumer = node.consume(N1, 50, 50)
        node.send(message(0), N1, None)
        for data in UNREADABLE.values():
            place.put_raw(node, N1, data)
        first = next_of(consumer)
        consumer.pause()
        consumer.resume()
        consumer.close([first])
        consumer = node.consume(N1, 50, 50)
        dead = dead_by_queue('default')
        eventually(
            lambda: (
                consumer.next(patient=True) is None
                and {name: sorted(place.dead(node, name)) for name in dead} == dead
            )
        )
        consumer.close([])


class TestRedis:
    def test_what_a_node_had_taken_comes_back_whatever_the_queue(self, redis: Place) -> None:
        one, two = redis.node('n1'), redis.node('n2')
        for queue in ('default', 'default.DQ', N1, PARKED):
            redis.put(one, queue, 2)
        for queue in ('default', 'default.DQ', N1):
            consumer = one.consume(queue, 1, 50)
            assert consumer.next(patient=False) is not None
        assert one.take(PARKED) is not None
        assert two.restore('n1') == 4
        assert two.restore('n1') == 0
        assert {
            queue: len(redis.take_all(two, queue))
            for queue in ('default', 'default.DQ', N1, PARKED)
        } == {'default': 2, 'default.DQ': 2, N1: 2, PARKED: 2}

    def test_who_deletes_one_of_a_node_s_queues_leaves_what_it_has_taken_from_others(
        self, redis: Place
    ) -> None:
        one, two = redis.node('n1'), redis.node('n2')
        redis.put(one, 'default')
        assert next_of(one.consume('default', 1, 50)) is not None
        assert two.delete('second.jobsync.shop_.n1')  # which it does not consume any more
        assert two.restore('n1') == 1
        assert two.delete(N1)
        assert [text for text in two.native.client.scan_iter() if b'.sources' in text] == []

    def test_what_is_passed_on_is_acknowledged_with_it(self, redis: Place) -> None:
        node = redis.node('n1')
        redis.put(node, 'default', 4)
        consumer, client = node.consume('default', 4, 50), node.native.client
        acks = f'dramatiq:__acks__.{node.native.broker_id}.default'
        found = [next_of(consumer) for _ in range(4)]
        for each, target in zip(found[:3], (N2, 'jobsync.shop_.n3', N2), strict=True):
            node.send(each, target, f'k:{each.args[0]}', 1, consumer)
            consumer.ack(each)
        assert (
            client.hlen('dramatiq:default.msgs') == client.scard(acks) == 4
        )  # nothing is gone before its copy is there
        assert consumer.next(patient=False) is None
        assert client.hlen('dramatiq:default.msgs') == client.scard(acks) == 1
        consumer.ack(found[3])
        assert not client.exists('dramatiq:default.msgs', acks)
        assert consumer.outstanding == 0 and not consumer.leaving and not consumer._in_hand
        copies = redis.take_all(node, N2)
        assert [(copy.message_id, copy.args, copy.options['jobsync_hops']) for copy in copies] == [
            (each.message_id, each.args, 1) for each in (found[0], found[2])
        ]
        assert [copy.args for copy in redis.take_all(node, 'jobsync.shop_.n3')] == [found[1].args]

    def test_a_full_consumer_goes_on_once_half_of_it_is_done_and_takes_nothing_before(
        self, redis: Place
    ) -> None:
        node = redis.node('n1')
        consumer = node.consume('default', 4, 600_000)
        redis.put(node, 'default', 8)
        held = [next_of(consumer) for _ in range(4)]
        assert consumer.next(patient=False) is None
        assert node.native.client.llen('dramatiq:default') == 4

        for _ in range(2):
            consumer._misses = 30  # now Dramatiq would sleep for five minutes
            found: list[Any] = []
            thread = threading.Thread(
                target=lambda found=found: found.append(consumer.next(patient=True)), daemon=True
            )
            thread.start()
            eventually(lambda: consumer._waits)
            in_thread(lambda: consumer.ack(held.pop()))
            thread.join(0.2)
            assert thread.is_alive(), 'one by one each would be a trip'
            in_thread(lambda: consumer.ack(held.pop()))
            thread.join(20)
            held.extend((*found, next_of(consumer)))
        assert sorted(each.args for each in held) == [(0,), (1,), (6,), (7,)]
        consumer.close([])

    @pytest.mark.parametrize('queue', ['default', N1])
    @pytest.mark.parametrize('way', ['ack', 'nack', 'requeue'])
    def test_whatever_becomes_of_messages_makes_room_for_others(
        self, redis: Place, queue: str, way: str
    ) -> None:
        node = redis.node('n1')
        consumer = node.consume(queue, 2, 600_000)
        redis.put(node, queue, 3)
        held = [next_of(consumer) for _ in range(2)]
        consumer._misses = 30  # now Dramatiq would sleep for five minutes
        found: list[Any] = []
        thread = threading.Thread(
            target=lambda: found.append(consumer.next(patient=True)), daemon=True
        )
        thread.start()
        eventually(lambda: consumer._waits)
        in_thread(lambda: getattr(consumer, way)(held[0]))
        thread.join(20)
        assert [each.args for each in found] == [(2,)]
        assert consumer.outstanding == 2
        consumer.close([])

    def test_what_cannot_be_passed_on_goes_back(self, redis: Place) -> None:
        node = redis.node('n1')
        redis.put(node, 'default', 3)
        consumer, client = node.consume('default', 3, 50), node.native.client
        found = [next_of(consumer) for _ in range(3)]
        client.set('dramatiq:jobsync.shop_.n3', 'no list')
        for each, target in zip(found, (N2, 'jobsync.shop_.n3', N2), strict=True):
            node.send(each, target, None, 1, consumer)
            consumer.ack(each)
        with pytest.raises(ConnectionClosed):
            consumer.next(patient=False)
        consumer.close([])
        assert not client.exists(f'dramatiq:__acks__.{node.native.broker_id}.default')
        assert [copy.args for copy in redis.take_all(node, N2)] == [found[0].args]
        assert sorted(copy.args for copy in redis.take_all(node, 'default')) == sorted(
            each.args for each in found[1:]
        )

    def test_what_is_to_be_passed_on_goes_back_when_the_lease_is_away(self, redis: Place) -> None:
        node = redis.node('n1')
        redis.put(node, 'default')
        consumer = node.consume('default', 1, 50)
        found = next_of(consumer)
        node.send(found, N2, None, 1, consumer)
        consumer.ack(found)
        consumer.pause()
        assert redis.take_all(node, N2) == []
        assert consumer.next(patient=False).message_id == found.message_id

    @pytest.mark.parametrize('lost', ['connection', 'script'])
    def test_an_acknowledgement_outlives_what_its_connection_loses(
        self, redis: Place, lost: str
    ) -> None:
        node = redis.node('n1')
        redis.put(node, 'default', 2)
        consumer, client = node.consume('default', 2, 50), node.native.client
        consumer.ack(next_of(consumer))
        if lost == 'connection':
            client.client_kill_filter(_type='normal', skipme=True)
        else:
            client.script_flush()
        consumer.ack(next_of(consumer))
        assert not client.exists(
            'dramatiq:default.msgs', f'dramatiq:__acks__.{node.native.broker_id}.default'
        )
        assert consumer.outstanding == 0

    def test_what_a_lost_answer_held_comes_back_and_what_runs_does_not(self, redis: Place) -> None:
        node = redis.node('n1')
        redis.put(node, N1, 3)
        consumer = node.consume(N1, 1, 50)
        running = next_of(consumer)
        node.native.do_fetch(N1, 1)  # nobody gets to know what it brought
        consumer = node.consume(N1, 5, 50)
        found = [next_of(consumer), next_of(consumer)]
        assert running.message_id not in {each.message_id for each in found}
        assert consumer.next(patient=False) is None

    @pytest.mark.parametrize(
        'mode', [Mode.SWALLOW_TO_CLIENT, Mode.HOLD_TO_SERVER], ids=['answer lost', 'request late']
    )
    @pytest.mark.parametrize('who', ['duty', 'consumer'])
    def test_what_an_answer_brought_that_never_came_goes_back_soon(
        self, redis: Place, monkeypatch: pytest.MonkeyPatch, mode: Mode, who: str
    ) -> None:
        monkeypatch.setattr('jobsync_dramatiq.broker.redis_queues._LOOK_SEC', 0.0)
        other = redis.node('n2')
        queue = PARKED if who == 'duty' else 'default'
        redis.put(other, queue, 3)
        with Proxy('127.0.0.1', redis.server.port) as proxy:
            node = redis.node_behind(proxy, 'n1')
            consumer = node.consume(queue, 1, 1) if who == 'consumer' else None
            taken = f'dramatiq:__acks__.{node.native.broker_id}.{queue}'
            client, fetch = other.native.client, node.queues.fetch
            fetch(queue, 0)  # the connection is there, and Redis knows the script

            def fetch_badly(queue: str, number: int) -> Any:
                proxy.switch(mode)
                try:
                    return fetch(queue, number)
                finally:
                    proxy.switch(
                        Mode.REFUSE
                    )  # what is asked next fails as well; and what was held up goes on
                    eventually(lambda: client.scard(taken) == 1)
                    proxy.reset()

            with monkeypatch.context() as patch:
                patch.setattr(node.queues, 'fetch', fetch_badly)
                with pytest.raises((RedisError, ConnectionClosed)):
                    _ = node.take(queue) if consumer is None else consumer.next(patient=True)
            with pytest.raises(RedisError):
                node.requeue_failed() if consumer is None else node.queues.recheck(queue)
            assert client.llen(f'dramatiq:{queue}') == 2
            proxy.heal()
            if consumer is None:
                node.requeue_failed()
            else:
                found = next_of(consumer)
                assert client.scard(taken) == 1 and client.llen(f'dramatiq:{queue}') == 2
                consumer.close([found])
            assert client.llen(f'dramatiq:{queue}') == 3 and not client.exists(taken)

    def test_a_queue_stays_doubtful_for_a_minute_as_a_request_may_come_late(
        self, redis: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = Clock()
        monkeypatch.setattr('jobsync_dramatiq.broker.redis_queues.clock', clock)
        node = redis.node('n1')
        redis.put(node, PARKED, 2)
        node.take(PARKED).requeue()
        with monkeypatch.context() as patch:
            patch.setattr(node.queues.connection, 'run', raising(RedisTimeout('no answer')))
            with pytest.raises(RedisTimeout):
                node.take(PARKED)
        node.requeue_failed()
        node.native.do_fetch(PARKED, 1)  # only now it gets there
        clock.time += 0.9
        node.requeue_failed()
        assert node.size(PARKED) == 1  # not more often than once a second
        clock.time += 0.1
        node.requeue_failed()
        assert node.size(PARKED) == 2
        clock.time += 60
        node.requeue_failed()
        assert not node.queues.doubtful

    def test_what_cannot_be_set_aside_goes_back(
        self, redis: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = redis.node('n1')
        redis.put_raw(node, PARKED, b'no message')
        with monkeypatch.context() as patch:
            patch.setattr(node.queues, 'set_aside', raising(RedisTimeout('no answer')))
            with pytest.raises(RedisTimeout):
                node.take(PARKED)
        assert node.size(PARKED) == 0
        node.requeue_failed()
        assert node.size(PARKED) == 1

    def test_whoever_evacuates_leaves_nothing_in_hand(
        self, redis: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = redis.producer()
        opened.begin_evacuation()
        redis.put(opened, PARKED)
        fetch = opened.queues.connection.run
        with monkeypatch.context() as patch:
            patch.setattr(
                opened.queues.connection,
                'run',
                lambda *args: (fetch(*args), raising(RedisTimeout('no answer'))()),
            )
            with pytest.raises(RedisTimeout):
                opened.take(PARKED)
        opened.close()
        assert redis.node('n1').size(PARKED) == 1

    def test_no_thread_waits_for_ever_for_an_answer(
        self, redis: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr('jobsync_dramatiq.broker.redis_scripts._ANSWER_SEC', 0.2)
        with Proxy('127.0.0.1', redis.server.port) as proxy:
            broker = RedisBroker(
                client=Redis.from_url(
                    redis.server.url(redis.space, proxy.port), socket_timeout=None
                )
            )
            opened: Any = open_broker(broker, CoordinationConfig(appname='shop_'))
            opened.join('n1')
            assert opened.queues.fetch('default', 1) == []
            proxy.switch(Mode.SWALLOW)
            with pytest.raises(RedisTimeout):
                opened.queues.fetch('default', 1)
            proxy.heal()
            broker.client.close()

    def test_what_waited_for_its_time_comes_back_when_its_consumer_begins_anew(
        self, redis: Place
    ) -> None:
        node = redis.node('n1')
        redis.put(node, 'default.DQ')
        consumer = node.consume('default.DQ', 5, 50)
        first = next_of(consumer)
        consumer = node.consume('default.DQ', 5, 50)
        assert next_of(consumer).message_id == first.message_id

    @pytest.mark.parametrize(('timeout', 'pause'), [(60_000, 10.0), (2_000, 0.5)])
    def test_a_consumer_that_takes_nothing_shows_that_it_lives_before_others_put_back_what_it_holds(
        self, redis: Place, monkeypatch: pytest.MonkeyPatch, timeout: int, pause: float
    ) -> None:
        clock = Clock()
        monkeypatch.setattr('jobsync_dramatiq.broker.redis_consumer.clock', clock)
        node = redis.node('n1')
        node.native.heartbeat_timeout = timeout
        consumer = node.consume('default', 1, 50)
        client = node.native.client
        client.delete('dramatiq:__heartbeats__')
        clock.time += pause
        consumer.idle(0.001)
        assert not client.exists('dramatiq:__heartbeats__')
        clock.time += 0.1
        consumer.idle(0.001)
        assert client.zrange('dramatiq:__heartbeats__', 0, -1) == [b'jobsync.shop_.n1|']

    def test_what_cannot_go_back_now_goes_back_later(
        self, redis: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = redis.node('n1')
        redis.put(node, N1)
        consumer = node.consume(N1, 1, 50)
        found = next_of(consumer)
        with monkeypatch.context() as patch:

            def fail(*_: Any) -> None:
                raise ConnectionError('away')

            patch.setattr(node.native, 'do_requeue', fail, raising=False)
            consumer.close([found])
        assert redis.take_all(redis.node('n2'), N1) == []
        node.requeue_failed()
        assert len(redis.take_all(redis.node('n2'), N1)) == 1

    def test_the_names_of_its_queues_come_back_where_redis_has_forgotten_them(
        self, redis: Place
    ) -> None:
        node = redis.node('n1')
        for _ in range(2):
            redis.put(node, PARKED)
            redis.put(node, 'default')
            node.take(PARKED)
            next_of(node.consume('default', 1, 50))
            names = node.native.client.smembers('dramatiq:jobsync.shop_.n1.sources')
            assert names == {b'default', PARKED.encode()}
            node.native.client.flushdb()
            node.reset()  # as a node's duties do after an error


class TestRabbit:
    def test_a_message_for_a_deleted_queue_is_parked_by_whomever_it_is_sent(
        self, rabbit: Place
    ) -> None:
        node, producer = rabbit.node('n1'), rabbit.producer()
        rabbit.node('n2')
        assert node.delete(N2)
        rabbit.put(node, N2)
        rabbit.put(producer, N2)
        assert not producer.native.confirm_delivery
        found: list[Any] = []

        def parked() -> bool:
            found.extend(rabbit.take_all(node, OLD_PARKED))
            return len(found) == 2

        eventually(parked)
        assert node.take(N2) is None

    def test_what_is_passed_on_says_still_that_it_came_before(self, rabbit: Place) -> None:
        node, two = rabbit.node('n1'), rabbit.node('n2')
        consumer = node.consume(N1, 10, 50)
        rabbit.put(node, N1)
        first = next_of(consumer)
        node.send(first, N2, None)
        in_thread(lambda: consumer.requeue(first))
        again = next_of(consumer)
        node.send(again, N2, None)
        found = rabbit.take_all(two, N2)
        assert [read_stamps(each.options).waits for each in found] == [0, 1]
        consumer.close([])

    def test_a_producer_that_is_the_first_of_all_loses_nothing(self, rabbit: Place) -> None:
        producer = rabbit.producer()
        rabbit.put(producer, N2)  # nobody has made the exchange
        assert len(eventually(lambda: rabbit.take_all(producer, OLD_PARKED), 10)) == 1

    def test_workers_publish_with_confirms_from_then_on(self, rabbit: Place) -> None:
        producer = rabbit.producer()
        assert producer.native.channel.is_open  # without confirms
        producer.join('n1')
        assert producer.native.confirm_delivery
        with pytest.raises(UnroutableError):
            producer.native.channel.basic_publish('', 'nowhere.at.all', b'', mandatory=True)

    def test_a_broken_connection_is_replaced(self, rabbit: Place) -> None:
        node = rabbit.node('n1')
        node.native.connection.close()
        rabbit.put(node, N1)
        node.native.channel.close()
        rabbit.put(node, N1)
        assert len(rabbit.take_all(node, N1)) == 2

    @pytest.mark.parametrize('what', ['connection', 'channel'])
    def test_a_consumer_begins_anew_after_its_thread_s_connection_broke(
        self, rabbit: Place, what: str
    ) -> None:
        node = rabbit.node('n1')
        rabbit.put(node, N1)
        getattr(node.native, what).close()
        consumer = node.consume(N1, 1, 50)
        assert next_of(consumer).args == (0,)
        consumer.close([])

    def test_a_home_queue_that_is_gone_is_made_again(self, rabbit: Place) -> None:
        node = rabbit.node('n1')
        rabbit.put(node, 'default')
        eventually(lambda: rabbit.server.depths(rabbit.space).get('default') == 1)
        assert 'default' not in node.native.queues  # and it is not consumed here

    def test_what_a_broken_consumer_had_taken_is_delivered_again_and_no_thread_waits_for_it(
        self, rabbit: Place
    ) -> None:
        node = rabbit.node('n1')
        rabbit.put(node, N1, 2)
        consumer = node.consume(N1, 5, 50)
        first, second = next_of(consumer), next_of(consumer)
        consumer.connection.close()
        in_thread(lambda: consumer.ack(first))
        in_thread(lambda: consumer.requeue(second))
        with pytest.raises(ConnectionClosed):
            consumer.idle(0.01)
        again = node.consume(N1, 5, 50)
        assert {next_of(again).args, next_of(again).args} == {(0,), (1,)}
        again.close([])

    def test_closing_a_consumer_whose_connection_is_gone_says_nothing(
        self, rabbit: Place, caplog: pytest.LogCaptureFixture
    ) -> None:
        consumer = rabbit.node('n1').consume(N1, 1, 50)
        consumer.connection.close()
        consumer.close([])
        assert [record for record in caplog.records if record.name.startswith('dramatiq')] == []

    @pytest.mark.parametrize('place', ['broker', 'consumer'])
    def test_a_broker_that_accepts_and_says_nothing_is_one_that_cannot_be_reached(
        self, rabbit: Place, place: str
    ) -> None:
        node = rabbit.node('n1')
        with Proxy('127.0.0.1', rabbit.server.port) as proxy:
            proxy.switch(Mode.SWALLOW)
            silent = URLParameters(rabbit.server.url(rabbit.space, proxy.port))
            silent.stack_timeout = 0.3
            if place == 'broker':
                node.native.parameters = silent
                node.reset()
            else:
                node.consumer_parameters = silent
            with pytest.raises(ConnectionClosed, match='Timeout during AMQP handshake'):
                node.consume('default', 1, 50)

    def test_consumers_notice_a_stopped_worker_s_broker_soon_and_the_user_s_heartbeat_stays(
        self, rabbit: Place
    ) -> None:
        assert rabbit.node('n1').consumer_parameters.heartbeat == 15
        assert rabbit.node('n1').native.parameters.heartbeat is None
        given = open_broker(
            RabbitmqBroker(host='127.0.0.1', port=1, heartbeat=33),
            CoordinationConfig(appname='shop_'),
        )
        with pytest.raises(ConnectionClosed, match=r'RabbitMQ at 127\.0\.0\.1:1 cannot be used: '):
            given.declare('default', N1)
        assert given.consumer_parameters.heartbeat == 33  # type: ignore[attr-defined]  # of RabbitMQ's

    def test_a_node_s_queue_that_was_deleted_is_made_as_it_was(self, rabbit: Place) -> None:
        node = rabbit.node('n1', max_priority=5)
        assert isinstance(rabbit.server, RabbitServer)
        before = rabbit.server.api('GET', f'queues/{rabbit.space}/{N1}')['arguments']
        assert before['x-max-priority'] == 5
        node.delete(N1)
        node.native.queues.add(N1)
        node.native.queues_pending.add(N1)  # as Dramatiq's consumer notes it
        node.consume(N1, 1, 50).close([])
        assert rabbit.server.api('GET', f'queues/{rabbit.space}/{N1}')['arguments'] == before
        assert f'{N1}.DQ' not in rabbit.server.queues(rabbit.space)
