"""A worker shows that it uses a queue of its node at RabbitMQ, where that is possible."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from dramatiq.errors import ConnectionClosed
from pika.exceptions import ChannelClosedByBroker

from jobsync_dramatiq.broker.rabbit_consumer import RabbitQueueConsumer

_QUEUE = 'default.jobsync.shop_.n1'


class _Channel:
    """A channel of pika.

    Args:
        consumed: Queues that were consumed.
        error: What RabbitMQ says of the presence.
    """

    def __init__(self, consumed: list[str], error: Exception | None) -> None:
        self._consumed, self._error = consumed, error

    def __enter__(self) -> _Channel:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def basic_qos(self, **options: Any) -> None:
        pass

    def queue_declare(self, name: str, **options: Any) -> None:
        if self._error is not None:
            raise self._error

    def add_on_cancel_callback(self, callback: Any) -> None:
        pass

    def basic_consume(self, name: str, *args: Any, **options: Any) -> None:
        self._consumed.append(name)

    def consume(self, name: str, **options: Any) -> None:
        self._consumed.append(name)


def _consume(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    consumed: list[str] = []
    connection = SimpleNamespace(channel=lambda: _Channel(consumed, error), is_open=False)
    monkeypatch.setattr(
        'jobsync_dramatiq.broker.rabbit_consumer.pika.BlockingConnection',
        lambda parameters: connection,
    )
    publisher: Any = SimpleNamespace(is_own=lambda queue: True)
    RabbitQueueConsumer(publisher, None, _QUEUE, 1, 0.1)
    return consumed


def test_it_is_shown_before_anything_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _consume(monkeypatch, None) == [f'{_QUEUE}.present', _QUEUE]


@pytest.mark.parametrize(
    'error',
    [
        ChannelClosedByBroker(403, 'ACCESS_REFUSED - configure access to queue refused'),
        ChannelClosedByBroker(404, "NOT_FOUND - home node 'rabbit@b' of durable queue is down"),
    ],
)
def test_where_it_cannot_be_shown_the_queue_is_consumed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The queue of the node may be a quorum queue, which outlives a server of RabbitMQ."""
    assert _consume(monkeypatch, error) == [_QUEUE]
    assert f'{_QUEUE}.present' in caplog.text


def test_whatever_else_is_wrong_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionClosed):
        _consume(monkeypatch, ChannelClosedByBroker(406, 'PRECONDITION_FAILED'))
