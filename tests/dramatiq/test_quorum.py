"""Quorum queues on a real RabbitMQ: where the virtual host makes every queue one, and where a
subclass of the broker does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.errors import ConnectionClosed

from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.passage import Passage
from jobsync_core.worker.presence import presence_queue
from jobsync_core.worker.returns import returns_of
from jobsync_dramatiq.broker.opening import open_broker
from jobsync_dramatiq.broker.rabbit_declaring import _is_idle
from jobsync_dramatiq.broker.rabbit_errors import BROKEN
from tests.support.brokers import RabbitServer
from tests.support.waiting import eventually

from .conftest import Workers

PARKED, UNKNOWN = 'default.jobsync.shop_.parked', 'jobsync.shop_.unknown'
N1, N2 = 'default.jobsync.shop_.n1', 'default.jobsync.shop_.n2'
OLD_PARKED = 'jobsync.shop_.parked'


class QuorumBroker(RabbitmqBroker):
    """As users declare quorum queues."""

    def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_queue_arguments(queue_name)  # type: ignore[no-untyped-call]
        arguments.pop('x-max-priority', None)
        return {**arguments, 'x-queue-type': 'quorum'}


class LimitedBroker(QuorumBroker):
    """With a limit of how often a message may come back."""

    def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
        return {**super()._build_queue_arguments(queue_name), 'x-delivery-limit': 2}


def make_quorum_by_default(server: Any, space: str) -> None:
    """Have a virtual host make queues without a type quorum queues."""
    server.api('DELETE', f'vhosts/{space}')
    # Its second name is that of later versions.
    server.api(
        'PUT', f'vhosts/{space}', {'defaultqueuetype': 'quorum', 'default_queue_type': 'quorum'}
    )
    server.api(
        'PUT', f'permissions/{space}/guest', dict.fromkeys(('configure', 'write', 'read'), '.*')
    )


class Space:
    """A virtual host, and brokers of nodes in it."""

    def __init__(self, server: RabbitServer, stack: ExitStack, how: str) -> None:
        self.server, self.how = server, how
        self.name = server.new_space()
        self._stack = stack
        stack.callback(server.drop_space, self.name)
        if how == 'the virtual host':
            make_quorum_by_default(server, self.name)

    def node(self, name: str, **options: Any) -> Any:
        kinds = {'a subclass': QuorumBroker, 'a limit': LimitedBroker}
        kind = kinds.get(self.how, RabbitmqBroker)
        native = kind(url=self.server.url(self.name), **options)
        self._stack.callback(native.close)
        opened: Any = open_broker(native, CoordinationConfig(appname='shop_'))
        opened.join(name)
        opened.declare('default', f'default.jobsync.shop_.{name}')
        return opened

    def kinds(self) -> dict[str, str]:
        """The type of each queue."""
        found = self.server.api('GET', f'queues/{self.name}')
        return {item['name']: item['type'] for item in found}

    def limit_returns(self, limit: int) -> None:
        """As RabbitMQ 4 does by default; 20 there."""
        self.server.api(
            'PUT',
            f'policies/{self.name}/limit',
            {'pattern': '.*', 'apply-to': 'queues', 'definition': {'delivery-limit': limit}},
        )


@pytest.fixture(params=['the virtual host', 'a subclass'])
def quorum(request: pytest.FixtureRequest, rabbitmq_server: RabbitServer) -> Iterator[Space]:
    with ExitStack() as stack:
        yield Space(rabbitmq_server, stack, request.param)


@pytest.fixture
def by_default(rabbitmq_server: RabbitServer) -> Iterator[Space]:
    with ExitStack() as stack:
        yield Space(rabbitmq_server, stack, 'the virtual host')


def put(node: Any, queue: str, *numbers: int) -> None:
    for n in numbers:
        message: Any = dramatiq.Message(
            queue_name='default', actor_name='keyed', args=(n,), kwargs={}, options={}
        )
        node.send(message, queue, f'k:{n}')


def take_all(node: Any, queue: str) -> list[int]:
    found = []
    while (delivery := node.take(queue)) is not None:
        found.append(delivery.message.args[0])
    return found


class TestQueues:
    def test_a_node_s_queues_are_what_the_user_s_are(self, quorum: Space) -> None:
        node = quorum.node('n1')
        put(node, N1, 7)
        put(node, 'default', 8)
        kinds = quorum.kinds()
        assert {kinds[name] for name in (N1, PARKED, OLD_PARKED, UNKNOWN, 'default')} == {'quorum'}
        assert take_all(node, N1) == [7]

    def test_an_empty_queue_is_deleted_and_a_full_or_a_consumed_one_stays(
        self, quorum: Space
    ) -> None:
        node = quorum.node('n1')
        connection = node.native.connection
        put(node, N1, 1)
        assert not node.delete(N1)
        consumer = quorum.node('n2').consume(N2, 1, 50)
        assert consumer.next(patient=True) is None
        assert not node.delete(N2)
        consumer.close([])
        eventually(lambda: node.delete(N2))
        assert N2 not in quorum.kinds() and node.delete(N2)
        assert node.native.connection is connection and connection.is_open

    def test_one_whose_consumer_takes_nothing_and_has_something_in_hand_is_left_alone(
        self, quorum: Space
    ) -> None:
        node = quorum.node('n1')
        consumer = quorum.node('n2').consume(N2, 1, 50)
        put(node, N2, 1)
        assert eventually(lambda: consumer.next(patient=True))
        consumer.pause()
        for _ in range(2):
            assert not node.delete(N2)
            consumer.idle(0.05)
        consumer.close([])
        assert eventually(lambda: node.size(N2)) == 1

    def test_a_consumer_whose_presence_was_deleted_begins_anew(self, quorum: Space) -> None:
        node = quorum.node('n1')
        consumer = quorum.node('n2').consume(N2, 1, 50)
        assert consumer.next(patient=True) is None
        node.native.channel.queue_delete(presence_queue(N2))
        with pytest.raises(ConnectionClosed):
            consumer.idle(5)
        consumer.close([])

    def test_what_is_sent_to_a_queue_while_it_is_deleted_is_there_or_parked(
        self, quorum: Space
    ) -> None:
        node, deleted, gaps = quorum.node('n1'), threading.Event(), threading.Semaphore(0)
        sent = 0

        def delete() -> None:
            other = quorum.node('n2')
            until = time.monotonic() + 20
            while not other.delete(N1) and time.monotonic() < until:
                put(other, OLD_PARKED, *take_and_ack(other, N1))
                gaps.release()
            deleted.set()

        thread = threading.Thread(target=delete)
        thread.start()
        after = 0
        while after < 20:
            put(node, N1, sent)
            sent += 1
            after += deleted.is_set()
            # Deleted is what is empty at some moment; who sends without a pause keeps it.
            gaps.acquire(timeout=0 if deleted.is_set() else 0.5)
        thread.join(20)
        eventually(lambda: node.size(OLD_PARKED) == sent)
        assert set(take_all(node, OLD_PARKED)) == set(range(sent)) and N1 not in quorum.kinds()

    def test_one_that_stays_is_reached_still(
        self, quorum: Space, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = quorum.node('n1')
        looks: list[bool] = []

        def is_idle(channel: Any, queue: str) -> bool:
            looks.append(_is_idle(channel, queue))
            if len(looks) == 1:  # past the exchange, as a client of its own may
                node.native.channel.basic_publish('', N1, b'', mandatory=True)
                eventually(lambda: node.size(N1) == 1)
            return looks[-1]

        monkeypatch.setattr('jobsync_dramatiq.broker.rabbit_declaring._is_idle', is_idle)
        assert not node.delete(N1)
        assert not node.delete(N1)
        assert looks[0] and len(looks) == 3
        put(node, N1, 5)
        eventually(lambda: node.size(N1) == 2)

    def test_one_whose_node_comes_back_meanwhile_is_reached_again(self, quorum: Space) -> None:
        node = quorum.node('n1')
        node.native.channel.queue_unbind(N1, 'jobsync.shop_', N1)
        node.declare('default', N1)
        put(node, N1, 3)
        assert take_all(node, N1) == [3]


def take_and_ack(node: Any, queue: str) -> list[int]:
    found = []
    while (delivery := node.take(queue)) is not None:
        found.append(delivery.message.args[0])
        delivery._channel.basic_ack(delivery._raw.tag)
    return found


class TestLimitOfReturns:
    def test_what_stays_parked_is_passed_over_as_often_as_it_takes_and_keeps_its_order(
        self, quorum: Space
    ) -> None:
        node = quorum.node('n1')
        quorum.limit_returns(2)
        put(node, PARKED, *range(5))
        for _ in range(6):
            eventually(lambda: node.size(PARKED) == 5)
            passed = Passage(node, 'n1').go(PARKED, lambda delivery: None, lambda: False)
            assert (passed.moved, passed.stayed) == (0, 5)
        assert take_all(node, PARKED) == list(range(5))

    def test_what_cannot_go_on_stays_as_often_as_it_is_tried(self, quorum: Space) -> None:
        node = quorum.node('n1')
        quorum.limit_returns(1)
        put(node, PARKED, 1)
        for _ in range(5):
            delivery = eventually(lambda: node.take(PARKED))
            delivery.requeue()
        eventually(lambda: node.size(PARKED) == 1)

    def test_a_consumer_that_stops_and_goes_on_loses_nothing(self, quorum: Space) -> None:
        node = quorum.node('n1')
        quorum.limit_returns(1)
        put(node, N1, *range(3))
        consumer = node.consume(N1, 3, 200)
        for _ in range(5):
            handed_out = eventually(lambda: consumer.next(patient=True))
            consumer.requeue(handed_out)
            consumer.pause()
            consumer.idle(0.01)
            consumer.resume()
        found = [eventually(lambda: consumer.next(patient=True), 10) for _ in range(3)]
        assert {message.args[0] for message in found} == {0, 1, 2}
        consumer.close([])

    @pytest.mark.parametrize('before', [1, 2])
    def test_what_came_back_before_it_was_passed_on_counts(
        self, rabbitmq_server: RabbitServer, before: int
    ) -> None:
        """It is taken as often in all as it would be from one queue: three times, for two."""
        with ExitStack() as stack:
            space = Space(rabbitmq_server, stack, 'a limit')
            node, other = space.node('n1'), space.node('n2')
            put(node, N1, 1)
            for _ in range(before):
                dies = node.consume(N1, 1, 50)
                assert eventually(lambda: dies.next(patient=True))  # noqa: B023
                dies.close([])
            eventually(lambda: other.take(N1)).forward(N2)
            for _ in range(3 - before):
                dies = other.consume(N2, 1, 50)
                found = eventually(lambda: dies.next(patient=True))  # noqa: B023
                assert found.args == (1,)
                dies.close([])
            last = other.consume(N2, 1, 50)
            eventually(lambda: last.next(patient=True) or other.size('default.XQ') == 1)
            assert other.size('default.XQ') == 1 and other.size(N2) == 0
            last.close([])

    def test_what_the_plugin_gives_back_does_not_count(self, rabbitmq_server: RabbitServer) -> None:
        with ExitStack() as stack:
            node = Space(rabbitmq_server, stack, 'a limit').node('n1')
            put(node, N1, 1)
            consumer = node.consume(N1, 1, 50)
            for _ in range(6):
                consumer.requeue(eventually(lambda: consumer.next(patient=True), 10))
            assert returns_of(eventually(lambda: consumer.next(patient=True)).raw.headers) == 0
            consumer.close([])


class TestOtherArguments:
    def test_there_are_no_priorities_where_every_queue_is_a_quorum_queue(
        self, by_default: Space, caplog: pytest.LogCaptureFixture
    ) -> None:
        node = by_default.node('n1', max_priority=5)
        put(node, N1, 1)
        assert take_all(node, N1) == [1] and by_default.kinds()[N1] == 'quorum'
        assert f'queue={N1} is made without priorities' in caplog.text

    def test_what_is_there_from_before_is_used_as_it_is(
        self, by_default: Space, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = RabbitmqBroker(url=by_default.server.url(by_default.name))
        for queue in (OLD_PARKED, UNKNOWN, PARKED):
            first.channel.queue_declare(queue, durable=True, arguments={'x-queue-type': 'classic'})
        first.close()
        node = by_default.node('n1')
        put(node, PARKED, 1)
        put(node, N1, 2)
        assert take_all(node, PARKED) == [1] and take_all(node, N1) == [2]
        assert caplog.text.count('is there with other arguments, and is used as it is') == 3
        by_default.node('n1')

    def test_a_queue_that_cannot_be_asked_is_not_one_that_is_gone(self, by_default: Space) -> None:
        node = by_default.node('n1')
        by_default.server.control('eval', _stop_leader(by_default.name, N1))
        for ask in (node.size, node.delete, node.take):
            with suppress(*BROKEN):
                assert not ask(N1) and N1 in by_default.kinds()
            node.reset()


def _stop_leader(space: str, queue: str) -> str:
    return (
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"{space}">>, queue, <<"{queue}">>)), '
        'ra:stop_server(quorum_queues, amqqueue:get_pid(Q)).'
    )


@pytest.fixture
def server(rabbitmq_server: RabbitServer) -> RabbitServer:
    return rabbitmq_server


class TestWorkers:
    @pytest.fixture
    def quorum_workers(self, workers: Workers) -> Workers:
        make_quorum_by_default(workers.server, workers.space)
        return workers

    def test_what_a_killed_worker_left_runs_and_its_queue_goes(
        self, quorum_workers: Workers
    ) -> None:
        workers = quorum_workers
        victim = workers.start(1, '-t', '2')
        workers.start(1, '-t', '2')
        workers.wait_for_nodes(2)
        before = workers.queues()
        for n in range(40):
            workers.app.slow.send(n)
        eventually(lambda: len(workers.lines('slow:')) > 4, 20)
        os.killpg(victim.pid, signal.SIGKILL)
        eventually(lambda: len(workers.counts('slowend:')) == 40, 40)
        workers.check_ends('slowend:', victim, 2)
        workers.wait_for_nodes(1)
        [left] = workers.queues()
        [gone] = before - {left}
        server: Any = workers.server
        eventually(lambda: gone not in server.queues(workers.space), 40)
