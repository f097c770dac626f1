"""What a worker does while its node waits for its first tokens."""

from __future__ import annotations

from typing import Any

import pytest

from jobsync_celery.entering import KeepAlive
from jobsync_core import clock
from tests.support.fakes import Clock


class _Connection:
    """Kombu's, which opens another one where it is lost and asked for."""

    connection_errors = (OSError,)

    def __init__(self, driver: str = 'amqp') -> None:
        self.transport = self
        self.driver_type = driver
        self.connected, self.fails = True, False
        self.beats = self.opened = 0

    @property
    def connection(self) -> Any:
        self.opened += not self.connected
        self.connected = True
        return self

    def send_heartbeat(self) -> None:
        if self.fails:
            self.connected = False
            raise OSError('broken pipe')
        self.beats += 1


def test_heartbeats_go_on_and_a_lost_connection_is_not_opened_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    time = Clock()
    monkeypatch.setattr(clock, 'now', time.now)
    connection, redis = _Connection(), _Connection('redis')
    keep_alive, others = KeepAlive(connection), KeepAlive(redis)
    for _ in range(8):
        keep_alive.look()
        others.look()
        time.time += 0.5
    assert (connection.beats, redis.beats) == (3, 0)
    connection.fails = True
    for _ in range(8):
        keep_alive.look()
        time.time += 0.5
    assert (connection.beats, connection.opened) == (3, 0)
