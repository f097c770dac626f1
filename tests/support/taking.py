"""The broker that a test takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .brokers import BrokerServer, RabbitServer

__all__ = ['take']


def take(
    request: pytest.FixtureRequest, broker: str, own: bool = False
) -> tuple[BrokerServer, Callable[[], str]]:
    """A server, and what makes a space of it.

    Args:
        request: Of the test.
        broker: 'redis', 'rabbitmq', or 'quorum': a RabbitMQ 4 that makes quorum queues of those
            whose type nobody says.
        own: The test may kill and restart it.
    """
    if broker == 'quorum':
        newer: RabbitServer = request.getfixturevalue('newer_rabbitmq')
        return newer, lambda: newer.new_space(default_queue_type='quorum')
    server: BrokerServer = request.getfixturevalue(f'own_{broker}' if own else f'{broker}_server')
    return server, server.new_space
