"""What the queues of nodes keep of the arguments of their home queue."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

from jobsync_core.worker.routing import node_queue, parked_queue
from jobsync_dramatiq.broker.rabbit_declaring import RabbitDeclarations


def test_dead_letters_are_as_sure_as_those_of_the_home_queue() -> None:
    sure = {'x-dead-letter-strategy': 'at-least-once', 'x-overflow': 'reject-publish'}
    native = MagicMock()
    native._build_queue_arguments.return_value = {**sure, 'x-max-length': 10}
    own = node_queue('reports', 'sync_', 'n1')
    RabbitDeclarations(native, 'sync_').declare_node('reports', own)
    made: dict[str, Any] = {
        call.args[0]: call.kwargs['arguments']
        for call in native.connection.channel.return_value.queue_declare.call_args_list
    }
    for queue in (own, parked_queue('reports', 'sync_')):
        assert {name: made[queue].get(name) for name in sure} == sure
        assert 'x-max-length' not in made[queue]
