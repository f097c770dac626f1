"""What the queues of nodes keep of their home queue, and which queue a message was sent to."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from kombu.common import Broadcast
from kombu.entity import Exchange, Queue, binding

from jobsync_celery.broker.homes import arguments_for, home_name, is_only_place, is_way_into
from jobsync_celery.broker.queues import Queues
from jobsync_celery.home_queues import HomeQueues
from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.incoming import read_stamps
from jobsync_core.worker.routing import HOME

_TOPIC, _DIRECT = Exchange('tasks', type='topic'), Exchange('work')
_DELAY = '0.' * 26 + '1.0.'


@pytest.mark.parametrize(
    ('home', 'expected'),
    [
        (Queue('jobs'), {}),
        (
            Queue('jobs', queue_arguments={'x-queue-type': 'quorum', 'x-delivery-limit': 3}),
            {'x-queue-type': 'quorum', 'x-delivery-limit': 3},
        ),
        (
            Queue('jobs', max_priority=9, message_ttl=1.5),
            {'x-max-priority': 9, 'x-message-ttl': 1500},
        ),
        (
            Queue(
                'jobs', _DIRECT, routing_key='go', queue_arguments={'x-dead-letter-exchange': ''}
            ),
            {'x-dead-letter-exchange': '', 'x-dead-letter-routing-key': 'jobs'},
        ),
        (
            Queue(
                'jobs', _TOPIC, routing_key='go', queue_arguments={'x-dead-letter-exchange': 'd'}
            ),
            {'x-dead-letter-exchange': 'd', 'x-dead-letter-routing-key': 'go'},
        ),
        (
            Queue(
                'jobs', _TOPIC, routing_key='a.#', queue_arguments={'x-dead-letter-exchange': 'd'}
            ),
            {'x-dead-letter-exchange': 'd', 'x-dead-letter-routing-key': 'a.#'},
        ),
        (
            Queue(
                'jobs',
                queue_arguments={
                    'x-dead-letter-exchange': 'd',
                    'x-dead-letter-routing-key': 'k',
                    'x-dead-letter-strategy': 'at-least-once',
                    'x-overflow': 'reject-publish',
                },
            ),
            {
                'x-dead-letter-exchange': 'd',
                'x-dead-letter-routing-key': 'k',
                'x-dead-letter-strategy': 'at-least-once',
                'x-overflow': 'reject-publish',
            },
        ),
        (
            Queue(
                'jobs',
                expires=60,
                max_length=10,
                queue_arguments={
                    'x-max-length': 10,
                    'x-overflow': 'drop-head',
                    'x-single-active-consumer': True,
                    'x-expires': 60000,
                    'x-message-deduplication': True,
                },
            ),
            {},
        ),
    ],
)
def test_a_node_keeps_what_is_promised_of_each_message(home: Any, expected: dict[str, Any]) -> None:
    assert arguments_for(home) == expected


@pytest.mark.parametrize(
    ('queue', 'exchange', 'key', 'expected'),
    [
        (Queue('jobs', _DIRECT, routing_key='go'), '', 'jobs', True),
        (Queue('jobs', _DIRECT, routing_key='go'), '', 'go', False),
        (Queue('jobs', _DIRECT, routing_key='go'), 'work', 'go', True),
        (Queue('jobs', _DIRECT, routing_key='go'), 'other', 'go', False),
        (Queue('jobs', _TOPIC, routing_key='task.#'), 'tasks', 'task', True),
        (Queue('jobs', _TOPIC, routing_key='task.#'), 'tasks', 'task.a.b', True),
        (Queue('jobs', _TOPIC, routing_key='task.#'), 'tasks', 'tasks.a', False),
        (Queue('jobs', _TOPIC, routing_key='#.mail'), 'tasks', 'mail', True),
        (Queue('jobs', _TOPIC, routing_key='#.mail'), 'tasks', 'a.b.mail', True),
        (Queue('jobs', _TOPIC, routing_key='task.*'), 'tasks', 'task.a', True),
        (Queue('jobs', _TOPIC, routing_key='task.*'), 'tasks', 'task.a.b', False),
        (Queue('jobs', _TOPIC, routing_key='t+k'), 'tasks', 'tk', False),
        (Queue('jobs', _TOPIC, routing_key='go'), 'celery_delayed_delivery', f'{_DELAY}go', True),
        (Queue('jobs', _TOPIC, routing_key='go'), 'celery_delayed_delivery', f'{_DELAY}no', False),
        (Queue('jobs', _TOPIC, routing_key='go'), 'celery_delayed_delivery', 'go', False),
        (Broadcast('news'), 'news', '', True),
    ],
)
def test_a_message_shows_which_queue_it_was_sent_to(
    queue: Any, exchange: str, key: str, expected: bool
) -> None:
    assert is_way_into(queue, exchange, key) is expected


def test_all_queues_of_a_broadcast_are_one_home() -> None:
    assert home_name(Broadcast('news')) == home_name(Broadcast('news')) == 'news'
    assert home_name(Queue('jobs', _DIRECT, alias='other')) == 'jobs'


def _queues(*own: Queue, select: str = '') -> Queues:
    app: Any = Celery('homes', broker='amqp://', set_as_current=False)
    app.conf.task_queues = own or None
    if select:
        app.amqp.queues.select(select.split(','))
    return Queues(app, 'amqp', 'shop_')


def test_the_homes_are_what_the_worker_consumes() -> None:
    queues = _queues(Queue('light'), Queue('heavy'), Broadcast('news'), select='light,news')
    queues._app.amqp.queues.select_add(queues.make('light.jobsync.shop_.n1'))
    assert queues.homes() == ['light', 'news']


def test_keys_of_node_queues_mean_one_queue_each() -> None:
    queues = _queues()
    names = [f'{home}.jobsync.shop_.n1' for home in ('b', 'a.b', 'a/b', '#', 'x.*')]
    keys = [queues.way_to(name)[1] for name in names]
    assert keys[0] == names[0]
    for number, key in enumerate(keys):
        for other in keys[number + 1 :]:
            assert not key.endswith(f'.{other}') and not other.endswith(f'.{key}') and key != other
        assert set(key.split('.')).isdisjoint('*#')
    for name in names:
        queue: Any = queues.make(name)
        message = SimpleNamespace(
            delivery_info={'exchange': 'jobsync.shop_.nodes', 'routing_key': queue.routing_key}
        )
        assert queues.home_of(message) == name.partition('.jobsync.')[0]


def test_queues_of_the_old_layout_are_sent_to_as_before() -> None:
    queues = _queues()
    assert queues.way_to('jobsync.shop_.n1') == ('jobsync.shop_', 'jobsync.shop_.n1')
    assert queues.way_to('b.jobsync.shop_.n1') == ('jobsync.shop_.nodes', 'b.jobsync.shop_.n1')


@pytest.mark.parametrize(
    ('home', 'place', 'queue', 'expected'),
    [
        ('heavy', ('', 'light'), '', 'light'),
        ('light', ('elsewhere', 'key'), '', 'light'),
        ('nobodys', ('elsewhere', 'key'), '', 'celery'),
        ('heavy', ('', 'light'), 'jobsync.shop_.unknown', 'heavy'),
        ('heavy', ('', 'light'), 'light', 'light'),
        (None, ('', 'light'), '', 'light'),
        ('light.jobsync.shop_.n1', ('', 'light'), '', 'light'),
        (None, ('jobsync.shop_.nodes', 'heavy.jobsync.shop_.n1'), '', 'heavy'),
        (None, ('', 'heavy.jobsync.shop_.n1'), '', 'heavy'),
        (None, ('tasks', 'go.a'), '', 'topical'),
        (None, ('tasks', 'go.a'), 'heavy.jobsync.shop_.n2', 'heavy'),
        (None, ('jobsync.shop_', 'jobsync.shop_.n1'), '', 'celery'),
        (None, ('elsewhere', 'key'), '', 'celery'),
    ],
)
def test_the_home_of_a_message(
    home: str | None, place: tuple[str, str], queue: str, expected: str
) -> None:
    queues = _queues(Queue('light'), Queue('topical', _TOPIC, routing_key='go.#'))
    message = SimpleNamespace(delivery_info={'exchange': place[0], 'routing_key': place[1]})
    assert queues.own_home(read_stamps({HOME: home}), message, queue) == expected


@pytest.mark.parametrize(
    ('queue', 'options', 'expected'),
    [
        (Queue('light'), {}, True),
        ('unheard', {}, True),
        (Queue('light'), {'routing_key': 'key'}, True),
        (Queue('light'), {'exchange': 'tasks'}, True),  # Celery takes neither without the other
        (Queue('light'), {'exchange': 'tasks', 'routing_key': 'go.a'}, False),
        (Queue('light'), {'exchange': 'tasks', 'exchange_type': 'topic'}, False),
        (Queue('light', _DIRECT, 'key'), {}, True),
        (Queue('topical', _TOPIC, 'go.#'), {}, False),
        (Queue('own', Exchange('own', 'topic'), 'own'), {}, True),
        (Queue('own', Exchange('own', 'topic'), 'own'), {'routing_key': 'own.a'}, False),
        (Queue('bound', Exchange('bound', 'topic'), 'bound'), {}, False),
        (Queue('sole', Exchange('events', 'topic'), 'user.#'), {}, False),
        (Queue('sole', Exchange('events', 'topic'), 'sole'), {}, True),
        ('unheard', {'exchange_type': 'topic'}, False),
        (Queue('all', Exchange('all', 'fanout')), {}, False),
        (Queue('some', Exchange('some', 'headers')), {}, False),
        (Broadcast('news'), {}, True),
    ],
)
def test_only_what_no_other_queue_gets_is_sent_straight_to_a_node(
    queue: Any, options: dict[str, str], expected: bool
) -> None:
    known = [
        Queue('topical', _TOPIC, routing_key='go.#'),
        Queue('other', _TOPIC, routing_key='go.#'),
        Queue('own', Exchange('own', 'topic'), 'own'),
        Queue('several', [binding(Exchange('bound', 'topic'), 'bound')]),
    ]
    assert is_only_place(queue, known, options) is expected


class _Consumer:
    """Celery's, as far as it has queues."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.consumed: set[str] = set(app.amqp.queues.consume_from)
        self.later: list[Callable[[], object]] = []
        self.task_consumer: Any = self

    def add_task_queue(self, queue: str, *args: Any, **options: Any) -> None:
        self.add_queue(self.app.amqp.queues.select_add(self.app.amqp.queues[queue]))

    def cancel_task_queue(self, queue: str) -> None:
        self.app.amqp.queues.deselect(queue)
        self.consumed.discard(queue)

    def call_soon(self, call: Callable[..., object], *args: Any) -> None:
        self.later.append(lambda: call(*args))

    def consuming_from(self, queue: str) -> bool:
        return queue in self.consumed

    def add_queue(self, queue: Any) -> None:
        self.consumed.add(queue.name)

    def turn(self) -> None:
        while self.later:
            self.later.pop()()  # in any order


class _Node:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.last: Any = None
        self.refuses = False

    def add_home(self, home: str, ready: Any) -> None:
        if self.refuses:
            raise ConfigurationError('its name is too long')
        self.calls.append(('add', home))
        self.last = ready

    def drop_home(self, home: str, done: Any) -> None:
        self.calls.append(('drop', home))
        self.last = done


class TestHomeQueues:
    @pytest.fixture
    def stage(self) -> Any:
        queues = _queues(Queue('light'), Queue('heavy'), select='light')
        consumer, node, changes = _Consumer(queues._app), _Node(), list[int]()
        homes = HomeQueues(
            queues._app, consumer, queues, lambda: stage.node, lambda: changes.append(1)
        )
        stage = SimpleNamespace(consumer=consumer, node=node, changes=changes, homes=homes)
        return stage

    def test_one_that_is_added_is_consumed_and_then_its_node_queue(self, stage: Any) -> None:
        stage.consumer.add_task_queue('heavy')
        assert stage.consumer.consumed == {'light', 'heavy'} and stage.changes == [1]
        assert stage.node.calls == [('add', 'heavy')]
        for _ in range(2):  # a duty that fails later on comes again
            stage.node.last('heavy.jobsync.shop_.n1')
            stage.consumer.turn()
        assert stage.consumer.consumed == {'light', 'heavy', 'heavy.jobsync.shop_.n1'}
        assert stage.changes == [1, 1]

    def test_the_node_queue_of_one_that_is_cancelled_is_consumed_until_all_is_given(
        self, stage: Any
    ) -> None:
        stage.consumer.add_task_queue('heavy')
        stage.node.last('heavy.jobsync.shop_.n1')
        stage.consumer.turn()
        stage.consumer.cancel_task_queue('heavy')
        assert stage.consumer.consumed == {'light', 'heavy.jobsync.shop_.n1'}
        assert stage.node.calls[1:] == [('drop', 'heavy')]
        stage.node.last('heavy.jobsync.shop_.n1')
        stage.consumer.turn()
        assert stage.consumer.consumed == {'light'}

    def test_the_last_word_counts_whatever_order_the_loop_keeps(self, stage: Any) -> None:
        stage.consumer.add_task_queue('heavy')
        ready = stage.node.last
        stage.consumer.cancel_task_queue('heavy')
        done = stage.node.last
        ready('heavy.jobsync.shop_.n1')
        done('heavy.jobsync.shop_.n1')
        ready('heavy.jobsync.shop_.n1')
        stage.consumer.turn()
        assert 'heavy.jobsync.shop_.n1' in stage.consumer.consumed

    def test_without_a_connection_it_is_consumed_with_the_next_one(self, stage: Any) -> None:
        stage.consumer.add_task_queue('heavy')
        stage.consumer.task_consumer = None
        stage.node.last('heavy.jobsync.shop_.n1')
        stage.consumer.turn()
        assert 'heavy.jobsync.shop_.n1' in stage.consumer.app.amqp.queues.consume_from

    def test_a_worker_that_is_no_node_consumes_as_any_other(self, stage: Any) -> None:
        stage.node = None
        stage.consumer.add_task_queue('heavy')
        assert stage.consumer.consumed == {'light', 'heavy'}
        stage.consumer.cancel_task_queue('heavy')
        assert stage.consumer.consumed == {'light'}

    def test_one_that_can_have_no_node_queue_is_not_consumed(
        self, stage: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        stage.node.refuses = True
        stage.consumer.add_task_queue('heavy')
        assert stage.consumer.consumed == {'light'}
        assert 'its name is too long' in caplog.text

    @pytest.mark.parametrize(
        'queue', ['light.jobsync.shop_.n1', 'light.jobsync.shop_.parked', 'jobsync.shop_.unknown']
    )
    def test_queues_of_the_cluster_are_no_homes(
        self, stage: Any, caplog: pytest.LogCaptureFixture, queue: str
    ) -> None:
        stage.consumer.add_task_queue(queue)
        assert stage.consumer.consumed == {'light'} and 'is not consumed' in caplog.text
        # Whatever `inspect active_queues` shows: what is for keys of this node would wait there.
        stage.consumer.consumed.add(queue)
        stage.consumer.cancel_task_queue(queue)
        assert queue in stage.consumer.consumed and 'is not cancelled' in caplog.text
        assert stage.node.calls == []

    @pytest.mark.parametrize('queue', ['', 'a\0b', '\ud800', 'x' * 256, 7])
    def test_what_can_be_no_queue_is_not_begun_with(
        self, stage: Any, caplog: pytest.LogCaptureFixture, queue: Any
    ) -> None:
        stage.consumer.add_task_queue(queue)
        assert stage.consumer.consumed == {'light'} and stage.node.calls == []
        stage.consumer.cancel_task_queue(queue)
        assert caplog.text.count('give the name of a queue') == 2
