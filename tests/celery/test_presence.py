"""A worker shows that it uses a queue of its node at RabbitMQ, where that is possible."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from amqp.exceptions import AccessRefused, NotFound, PreconditionFailed, RecoverableConnectionError

from jobsync_celery.broker.presence import Presence

_QUEUE = 'celery.jobsync.shop_.n1'


def _announce(error: Exception | None, is_open: bool = True) -> list[str]:
    """What is consumed, where RabbitMQ says this of the queue that shows it."""
    consumed: list[str] = []

    def declare(name: str, **options: Any) -> None:
        if error is not None:
            raise error

    channel = SimpleNamespace(
        is_open=is_open, basic_consume=lambda name, **options: consumed.append(name)
    )
    connection = SimpleNamespace(
        default_channel=channel, channel=lambda: nullcontext(SimpleNamespace(queue_declare=declare))
    )
    queues: Any = SimpleNamespace(is_of_cluster=lambda queue: queue == _QUEUE)
    app = SimpleNamespace(
        amqp=SimpleNamespace(queues=SimpleNamespace(consume_from=['celery', _QUEUE]))
    )
    Presence(app, SimpleNamespace(connection=connection), queues).announce()
    return consumed


def test_it_is_shown_for_the_queue_of_the_node() -> None:
    assert _announce(None) == [f'{_QUEUE}.present']


@pytest.mark.parametrize(
    'error',
    [
        AccessRefused('configure access to queue refused'),
        NotFound("home node 'rabbit@b' of durable queue is down or inaccessible"),
    ],
)
def test_where_it_cannot_be_shown_the_worker_goes_on(
    caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The queue of the node may be a quorum queue, which outlives a server of RabbitMQ."""
    assert _announce(error) == []
    assert f'{_QUEUE}.present' in caplog.text


@pytest.mark.parametrize(
    ('error', 'is_open'), [(PreconditionFailed('x'), True), (NotFound('x'), False)]
)
def test_whatever_else_is_wrong_is_tried_again(error: Exception, is_open: bool) -> None:
    with pytest.raises(RecoverableConnectionError):
        _announce(error, is_open)
