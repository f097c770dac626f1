"""Giving a message back to a queue that counts how often that happens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jobsync_celery.gate.requeueing import requeue
from jobsync_core.worker.routing import HOME

from .consumers import Message, bench


class _Message:
    def __init__(self, headers: Any, acknowledged: bool = False) -> None:
        self.headers, self.acknowledged = headers, acknowledged

    def ack(self) -> None:
        self.acknowledged = True


def _requeue(message: Any, home: str = 'jobs', error: Exception | None = None) -> list[Any]:
    log: list[Any] = []

    def send(queue: str, message: Any, headers: dict[str, Any]) -> None:
        if error is not None:
            raise error
        log.append((queue, headers))

    def plainly() -> None:
        log.append('requeued' if not message.acknowledged else 'done')

    forwarder: Any = SimpleNamespace(send=send)
    requeue(message, home, forwarder, plainly)
    return log


@pytest.mark.parametrize(
    'headers', [{}, None, {'x-delivery-count': 0}, {'x-delivery-count': 'many'}, ['odd']]
)
def test_the_first_time_it_goes_back_as_it_is(headers: Any) -> None:
    assert _requeue(_Message(headers)) == ['requeued']


def test_the_next_time_it_is_published_anew() -> None:
    message = _Message({'x-delivery-count': 1, 'id': 'm1'})
    ((queue, headers), done) = _requeue(message)
    assert (queue, headers[HOME], headers['id'], done) == ('jobs', 'jobs', 'm1', 'done')


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
