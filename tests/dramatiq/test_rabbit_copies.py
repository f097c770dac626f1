"""What RabbitMQ says of a message that it delivers again its copies say themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import dramatiq
import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.incoming import read_stamps
from jobsync_core.worker.routing import node_queue
from jobsync_dramatiq.broker.interface import UnknownOrigins
from jobsync_dramatiq.broker.rabbit_broker import RabbitWorkerBroker

_OWN, _OTHER = (node_queue('reports', 'sync_', node) for node in ('n1', 'n2'))


@pytest.mark.parametrize('target', [_OWN, _OTHER], ids=['it stays', 'it goes on'])
@pytest.mark.parametrize('redelivered', [False, True])
def test_a_message_that_came_before_says_so_when_the_backlog_is_passed_over(
    redelivered: bool, target: str
) -> None:
    message: dramatiq.Message[Any] = dramatiq.Message('reports', 'report', (), {}, {})
    native = MagicMock(confirm_delivery=True)
    native._build_queue_arguments.return_value = {}
    native.channel.basic_get.return_value = (
        SimpleNamespace(delivery_tag=1, redelivered=redelivered),
        SimpleNamespace(headers=None, priority=None),
        message.encode(),
    )
    broker = RabbitWorkerBroker(native, CoordinationConfig(), UnknownOrigins())
    taken = broker.take(_OWN)
    assert taken is not None
    taken.forward(target)
    (sent,) = native.channel.basic_publish.call_args_list
    assert sent.args[1] == target
    copy: dramatiq.Message[Any] = dramatiq.Message.decode(sent.args[2])
    assert read_stamps(copy.options).waits == int(redelivered)
    native.channel.basic_ack.assert_called_once_with(1)
