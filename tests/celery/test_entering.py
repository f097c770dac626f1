"""When a worker's node waits for its first tokens, and what the worker does meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker.consumer import Consumer
from kombu.utils.imports import symbol_by_name

from jobsync_celery.entering import Entry, KeepAlive
from jobsync_celery.steps import GateStep, ReadyStep
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
    events = _Connection()
    keep_alive = KeepAlive(connection, events, redis, None)
    for _ in range(8):
        keep_alive.look()
        time.time += 0.5
    assert (connection.beats, events.beats, redis.beats) == (3, 3, 0)
    connection.fails = True
    for _ in range(8):
        keep_alive.look()
        time.time += 0.5
    assert (connection.beats, events.beats, connection.opened) == (3, 7, 0)


def _required(step: Any) -> set[Any]:
    found = {symbol_by_name(each) for each in step.requires}
    return found.union(*map(_required, found))


def test_a_node_takes_part_after_all_that_comes_before_the_event_loop() -> None:
    """Celery orders by chance what does not require one another."""
    others = {symbol_by_name(step) for step in Consumer.Blueprint.default_steps}
    left = others - _required(ReadyStep)
    assert {step.__name__ for step in left} == {'Evloop'} and GateStep in _required(ReadyStep)


@pytest.mark.parametrize('error', [OSError('away'), SystemExit(3)])
def test_a_worker_hears_of_whatever_ends_the_thread_that_enters(error: BaseException) -> None:
    def enter(waits: bool) -> None:
        raise error

    node: Any = SimpleNamespace(enter=enter, registered=False)
    with pytest.raises(type(error)) as found:
        Entry(node).register(lambda: None)
    assert found.value is error
