"""Dramatiq with JobSync does what plain Dramatiq does, whatever is configured and sent."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import cast

import pytest

from jobsync_core.embedded.postgres import EmbeddedPostgres
from tests.support.brokers import BrokerServer
from tests.support.taking import take

from .dramatiq_side import CONFIGURATIONS, KINDS, DramatiqSide
from .harness import Configuration, Side, cases, compare, order_of

#: A busy machine must not look like a death.
_SETTINGS = {
    'heartbeat_interval_sec': 0.5,
    'heartbeat_timeout_sec': 5,
    'rebalance_check_interval_sec': 1,
    'total_tokens': 1000,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(('configuration', 'broker'), cases(CONFIGURATIONS))
def test_dramatiq_does_the_same_with_and_without(
    configuration: Configuration,
    broker: str,
    request: pytest.FixtureRequest,
    postgres: EmbeddedPostgres,
    tmp_path: Path,
) -> None:
    server, new_space = take(request, broker)
    results = cast(BrokerServer, request.getfixturevalue('redis_server'))
    name = f'parity_{uuid.uuid4().hex[:12]}'
    postgres.create_database(name)
    spaces = []

    def make(mode: str) -> Side:
        space, own = new_space(), results.new_space()
        spaces.extend([(server, space), (results, own)])
        order = order_of(
            mode,
            configuration,
            server,
            space,
            results.url(own),
            postgres.config(name),
            tmp_path,
            _SETTINGS,
        )
        return DramatiqSide(order, configuration, server, space, tmp_path)

    try:
        compare(make, KINDS, configuration, broker)
    finally:
        for place, space in spaces:
            place.drop_space(space)
        postgres.drop_database(name)
