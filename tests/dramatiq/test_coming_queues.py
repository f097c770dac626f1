"""A queue that is declared while a worker runs, until it is consumed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.consuming import Consuming
from jobsync_core.worker.routing import node_queue
from jobsync_core.worker.settings import PluginSettings
from jobsync_dramatiq.node import WorkerProcess

_OLD, _LATE = (node_queue(home, 'sync_', 'n1') for home in ('old', 'late'))


class _Native:
    def __init__(self) -> None:
        self.queues: set[str] = set()
        self.declared: list[str] = []

    def emit_after(self, signal: str, queue: str) -> None:
        self.declared.append(queue)


class _Node:
    name = 'n1'

    def __init__(self) -> None:
        self.queues = {'old': _OLD}
        self.begin: Callable[[str], object] = lambda queue: None

    def add_home(self, home: str, ready: Callable[[str], object]) -> None:
        self.queues, self.begin = {**self.queues, home: _LATE}, ready


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found = [100.0]
    monkeypatch.setattr('jobsync_core.clock.now', lambda: found[0])
    return found


def test_a_queue_that_cannot_be_consumed_yet_costs_the_worker_no_keys(now: list[float]) -> None:
    native, node = _Native(), _Node()
    producer: Any = SimpleNamespace(actors=None)
    process: Any = WorkerProcess(PluginSettings(config=CoordinationConfig()), producer, native)
    process._node, process._worker = node, SimpleNamespace(consumer_whitelist=None)
    process.consuming = consuming = Consuming(10.0)
    consuming.looked(_OLD)
    process.add_queue('late')
    now[0] += 3600  # RabbitMQ refuses to make it, for example
    consuming.looked(_OLD)
    assert process._silence() == 0
    assert consuming.problem() == ''
    node.begin(_LATE)
    assert native.declared == [_LATE]
    assert process._silence() == 0
    now[0] += 60
    assert process._silence() == 60
