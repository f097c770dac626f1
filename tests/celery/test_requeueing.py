"""Giving a message back to a queue that counts how often that happens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from celery import Celery
from celery.worker import state
from kombu.entity import Queue

from jobsync_celery.broker.queues import Queues
from jobsync_celery.gate.refusal import Refusals
from jobsync_celery.gate.requeueing import requeue
from jobsync_core.worker.routing import HOME, REDELIVERED, REFUSED, RETURNS

from .consumers import Message, bench


class _Message:
    def __init__(self, headers: Any, acknowledged: bool = False) -> None:
        self.headers, self.acknowledged = headers, acknowledged

    def ack(self) -> None:
        self.acknowledged = True


def _requeue(
    message: Any, home: str = 'jobs', error: Exception | None = None, deleted: bool = False
) -> list[Any]:
    log: list[Any] = []

    def send(queue: str, message: Any, headers: dict[str, Any]) -> None:
        if error is not None:
            raise error
        log.append((queue, headers))

    def plainly() -> None:
        log.append('requeued' if not message.acknowledged else 'done')

    forwarder: Any = SimpleNamespace(send=send)
    requeue(message, home, forwarder, plainly, deleted)
    return log


@pytest.mark.parametrize('headers', [{}, None, {'x-delivery-count': 'many'}, ['odd']])
def test_to_a_queue_that_does_not_count_it_goes_back_as_it_is(headers: Any) -> None:
    assert _requeue(_Message(headers)) == ['requeued']


@pytest.mark.parametrize('count', [{'x-delivery-count': 0}, {'x-delivery-count': 1}, {RETURNS: 1}])
def test_to_one_that_counts_it_is_published_anew(count: dict[str, int]) -> None:
    message = _Message({**count, 'id': 'm1'})
    ((queue, headers), done) = _requeue(message)
    assert (queue, headers[HOME], headers['id'], done) == ('jobs', 'jobs', 'm1', 'done')


def test_a_dead_letter_that_was_sent_again_is_not_published_as_one_to_be_rejected() -> None:
    message = _Message({REFUSED: True, 'x-death': [{'count': 1}], 'x-delivery-count': 0})
    ((_, headers), _) = _requeue(message)
    assert REFUSED not in headers and headers['x-death'] == [{'count': 1}]
    ((_, headers), _) = _requeue(_Message({REFUSED: True, 'x-delivery-count': 0}))
    assert headers[REFUSED] is True  # on its way to be rejected


def test_to_a_queue_that_may_be_deleted_it_is_published_the_first_time() -> None:
    ((queue, headers), done) = _requeue(_Message({'id': 'm1'}), deleted=True)
    assert (queue, headers[HOME], headers[REDELIVERED], done) == ('jobs', 'jobs', True, 'done')
    assert _requeue(_Message({}), deleted=True, error=OSError('away')) == ['requeued']


def test_where_that_cannot_be_it_goes_back_all_the_same() -> None:
    counted = {'x-delivery-count': 5}
    assert _requeue(_Message(counted), error=OSError('away')) == ['requeued']
    assert _requeue(_Message(counted), home='') == ['requeued']
    assert _requeue(_Message(counted, acknowledged=True)) == ['done']


@pytest.mark.parametrize('late', [False, True])
def test_the_gate_gives_back_like_that(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    with bench(monkeypatch) as stage:
        message = Message('mine' if late else 'nobody', hops=0)
        message.headers['x-delivery-count'] = 3
        vars(message)['ack'] = lambda: stage.log.append('acknowledged')
        stage.receive(message)
        if late:
            stage.job.leased = False
            stage.dispatch(message)
        stage.log.clear()
        stage.gate.requeue_waiting()
        assert stage.log[:2] == ['send celery hops=0', 'acknowledged']


@pytest.mark.parametrize(
    ('of_node', 'expected'), [(True, 'send celery hops=0'), (False, 'requeue')]
)
def test_what_an_earlier_life_has_from_its_own_queue_is_not_lost_with_that(
    monkeypatch: pytest.MonkeyPatch, of_node: bool, expected: str
) -> None:
    monkeypatch.setattr(Queues, 'is_of_node', lambda self, message: of_node)
    with bench(monkeypatch) as stage:
        message = Message('mine', hops=0)
        vars(message)['ack'] = lambda: stage.log.append('acknowledged')
        stage.receive(message)
        stage.job.incarnation = 'another life'  # its ETA has come, after an eviction
        assert stage.dispatch(message)[0] == expected


def test_what_runs_without_a_lease_is_not_lost_with_its_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Queues, 'is_of_node', lambda self, message: True)
    with bench(monkeypatch) as stage:
        message = Message('mine', hops=0, task='once')
        vars(message)['ack'] = lambda: stage.log.append('acknowledged')
        stage.receive(message)
        stage.dispatch(message)
        stage.log.clear()
        state.active_requests.add(stage.request)
        stage.gate.requeue_running()
        assert stage.log[:2] == ['send celery hops=0', 'acknowledged']


@pytest.mark.parametrize('of_node', [True, False])
def test_what_is_in_hand_from_the_queue_of_this_node_is_known_until_it_is_acknowledged(
    monkeypatch: pytest.MonkeyPatch, of_node: bool
) -> None:
    monkeypatch.setattr(Queues, 'is_of_node', lambda self, message: of_node)
    with bench(monkeypatch) as stage:
        message, lost = Message('mine'), Message('mine')
        receive = stage.consumer.create_task_handler()
        receive(message)
        assert stage.gate.in_hand('celery') == of_node and not stage.gate.in_hand('gpu')
        message.state = 'ack'
        assert not stage.gate.in_hand('celery')
        receive(lost)
        stage.gate.disconnected()
        assert not stage.gate.in_hand('celery'), 'the broker has it back'


@pytest.mark.parametrize(
    ('driver', 'connected', 'expected'),
    [('amqp', True, True), ('amqp', False, False), ('redis', True, False)],
)
def test_what_has_come_back_too_often_is_known_on_rabbitmq_alone(
    driver: str, connected: bool, expected: bool
) -> None:
    app = Celery('worn', broker='memory://', set_as_current=False)
    limit = {'x-queue-type': 'quorum', 'x-delivery-limit': 2}
    app.conf.task_queues = [Queue('heavy', queue_arguments=limit)]
    connection = SimpleNamespace(connected=connected, connection=object())
    consumer, forwarder = SimpleNamespace(connection=connection), cast(Any, None)
    queues = Queues(app, driver, 'shop_')
    refusals = Refusals(app, consumer, lambda event: None, queues, forwarder)
    message = Message('a')
    message.headers.update({RETURNS: 3, HOME: 'heavy'})
    assert refusals.is_worn_out(message) is expected
