"""The end of a message whose key is dead, without a worker: what is kept, and what is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery, states
from celery.app.task import Context
from kombu.entity import Queue

from jobsync_celery.tasks.dead_letters import DeadLetter, fail_for_good, resend
from jobsync_core.errors import AttemptsExhausted, ExecutionRunning, JobSyncError

_DEAD = {'x-dead-letter-exchange': 'dead'}


def make(broker: str, arguments: dict[str, Any] | None = None) -> Any:
    """A task of an app whose results are in memory."""
    app = Celery('shop', broker=broker, backend='cache+memory://', set_as_current=False)
    app.conf.task_queues = [Queue('celery', queue_arguments=arguments)]

    def work(*args: Any) -> None:
        raise NotImplementedError

    return app.task(work, name='work', shared=False)


def end(task: Any, *args: Any) -> list[tuple[str, Any]]:
    """Let the key of a message with these arguments be dead; what is kept."""
    kept: list[tuple[str, Any]] = []

    def keep(key: str, text: str) -> bool:
        kept.append((key, json.loads(text)))
        return True

    error = AttemptsExhausted('the key is dead')
    error.key = 'work:1'
    request = Context(
        id='an id',
        args=args,
        kwargs={},
        retries=1,
        headers={'mine': 'x'},
        delivery_info={'exchange': '', 'routing_key': 'celery'},
    )
    with pytest.raises(DeadLetter) as raised:
        fail_for_good(task, request, error, keep)
    assert not raised.value.requeue
    found = task.app.backend.get_task_meta('an id')
    assert found['status'] == states.FAILURE
    assert type(found['result']).__name__ == 'AttemptsExhausted'
    return kept


@pytest.mark.parametrize(
    ('broker', 'arguments', 'is_kept'),
    [
        ('amqp://localhost', None, True),
        ('amqp://localhost', _DEAD, False),
        ('redis://localhost', None, True),
        ('redis://localhost', _DEAD, True),
    ],
)
def test_it_is_kept_where_its_queue_is_not_known_to_have_dead_letters(
    broker: str, arguments: dict[str, Any] | None, is_kept: bool
) -> None:
    assert bool(end(make(broker, arguments), 1)) is is_kept


def test_what_is_kept_is_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make('redis://localhost')
    ((key, document),) = end(task, 1, 'two')
    assert (key, document['framework']) == ('work:1', 'celery')
    sent: list[Any] = []
    monkeypatch.setattr(
        'jobsync_celery.tasks.dead_letters.send_again',
        lambda app, signature: sent.append(signature),
    )
    resend(task.app, document)
    (again,) = sent
    assert (again.task, again.args, again.id) == ('work', [1, 'two'], 'an id')
    assert again.options['queue'] == 'celery' and again.options['headers'] == {'mine': 'x'}
    assert again.options['retries'] == 1


@pytest.mark.parametrize(
    ('argument', 'why'), [(object(), 'it is no JSON'), ('x' * 1_000_001, 'characters')]
)
def test_what_cannot_be_kept_is_named(
    caplog: pytest.LogCaptureFixture, argument: object, why: str
) -> None:
    assert end(make('redis://localhost'), argument) == []
    assert 'work[an id] is not kept' in caplog.text and why in caplog.text


def test_a_message_of_another_framework_is_not_sent() -> None:
    with pytest.raises(JobSyncError, match='dramatiq'):
        resend(make('redis://localhost').app, {'framework': 'dramatiq'})


def test_a_message_whose_key_was_freed_meanwhile_comes_again() -> None:
    task, error = make('redis://localhost'), AttemptsExhausted('the key is dead')
    request = Context(id='freed', args=(), kwargs={}, headers={}, delivery_info={})
    with pytest.raises(ExecutionRunning):
        fail_for_good(task, request, error, lambda key, text: False)
    assert task.app.backend.get_task_meta('freed')['status'] == states.PENDING
