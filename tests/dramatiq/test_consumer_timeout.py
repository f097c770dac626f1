"""Real workers at a RabbitMQ that lets nobody keep a message for longer than some seconds
(`consumer_timeout`): actors that take longer.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.brokers import BrokerServer
from tests.support.impatience import outlast
from tests.support.waiting import eventually

from .conftest import Workers, workers

__all__ = ['options', 'server', 'workers']


@pytest.fixture
def server(impatient_rabbitmq: BrokerServer) -> BrokerServer:
    return impatient_rabbitmq


@pytest.fixture(params=[True, False], ids=['of the node', "of the user's own"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {'route_producers': request.param}


def test_an_actor_that_takes_long_completes_once(workers: Workers, options: dict[str, Any]) -> None:
    workers.start(1)
    workers.wait_for_nodes(1)
    workers.app.held.send(1)
    eventually(lambda: workers.lines('held:1'), 30)
    (place,) = workers.server.depths(workers.space)
    routed = options['route_producers']
    assert ('.jobsync.' in place) is routed, place
    outlast(workers.server.url(workers.space))
    if not routed:
        eventually(lambda: 'set_policy' in workers.output(), 30)
    workers.app.keyed.send(2)  # it consumes
    eventually(lambda: workers.lines('keyed:2'), 30)
    workers.app.log.set('go', 1)
    eventually(lambda: workers.lines('heldend:1'), 30)
    eventually(lambda: not workers.server.depths(workers.space), 30)
    assert workers.counts('held') == {'held:1': 1, 'heldend:1': 1}
    assert ('set_policy' in workers.output()) is not routed
