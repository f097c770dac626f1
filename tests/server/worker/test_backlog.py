"""What waits for queues, counted by workers and deleted while they run; with a broker in memory."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from jobsync_core.belonging import Belonging
from jobsync_core.config import CoordinationConfig
from jobsync_core.store.queues import QueueStore
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from jobsync_core.worker.backlog import QueueCount, purge
from jobsync_core.worker.node import Framework, WorkerNode
from jobsync_core.worker.routing import node_queue, parked_queue
from jobsync_core.worker.settings import PluginSettings
from tests.support.brokers import free_port
from tests.support.fake_broker import Contents, FakeBroker
from tests.support.waiting import eventually

_N1 = node_queue('reports', 'sync_', 'n1')
_PARKED = parked_queue('reports', 'sync_')


class Counter:
    """A broker with numbers alone."""

    kind = 'celery'

    def __init__(self, **counts: int) -> None:
        self.counts = counts
        #: From which queue a worker passes a message on to which one, once that is purged.
        self.passes_on: dict[str, str] = {}

    def homes(self) -> Iterable[str]:
        return ['reports']

    def count(self, queues: Sequence[str], nodes: Mapping[str, str]) -> Mapping[str, QueueCount]:
        return {queue: QueueCount(self.counts[queue]) for queue in queues if queue in self.counts}

    def purge(self, queue: str) -> int:
        found = self.counts.pop(queue, 0)
        target = self.passes_on.pop(queue, None)
        if target is not None:
            self.counts[target] = self.counts.get(target, 0) + 1
        return found


class Broker(FakeBroker):
    """One that a node can enter with."""

    place = 'memory://test'

    def identify(self, make: bool) -> str | None:
        return 'mark'


@pytest.fixture
def node_of(config: CoordinationConfig) -> Iterator[Any]:
    """Makes nodes that serve HTTP."""
    with ExitStack() as stack:

        def made(name: str, port: int, counter: Counter) -> WorkerNode:
            node = WorkerNode(
                PluginSettings(config=config, http=f'127.0.0.1:{port}'),
                name,
                Framework(
                    kind='celery',
                    broker=Broker(Contents()),
                    homes=['reports'],
                    declare=lambda *_: None,
                    tasks=lambda: ['known'],
                    pins={},
                    busy=lambda tokens: False,
                    problem=lambda: '',
                    silence=lambda: 0.0,
                    patience=5.0,
                    on_lease=lambda leased: None,
                    counter=counter,
                ),
            )
            stack.callback(node.leave)
            node.serve()
            node.enter()
            node.start()
            return node

        yield made


def fetch(port: int, path: str = '/metrics') -> str:
    with urllib.request.urlopen(f'http://127.0.0.1:{port}{path}', timeout=10) as answer:
        text: bytes = answer.read()
        return text.decode()


def test_one_node_shows_the_gauges_which_are_those_of_all(node_of: Any) -> None:
    ports = [free_port(), free_port()]
    nodes = [
        node_of(f'n{number}', port, Counter(reports=7)) for number, port in enumerate(ports, 1)
    ]
    line = 'jobsync_backlog_ready{queue="reports"} 7.0'
    eventually(lambda: line in fetch(ports[0]), 20)
    # The other one knows the numbers as well, and whoever asks for them gets them.
    assert '"ready": 7' in fetch(ports[1], '/backlog?queue=reports')
    assert line not in fetch(ports[1])
    nodes[0].leave()
    eventually(lambda: line in fetch(ports[1]), 20)


def test_what_is_passed_on_meanwhile_is_deleted_as_well(config: CoordinationConfig) -> None:
    create_schema(config)
    sessions = Sessions(config, 'jobsync test')
    with sessions.session() as connection:
        QueueStore(connection, Tables.of(config)).record(_N1, 'n1', 'reports', Belonging('celery'))
    sessions.close_all()
    counter = Counter(**{'reports': 3, _N1: 5, _PARKED: 2, 'other': 9})
    # The parked ones come last in a pass: what leaves there is in a place that was empty by then.
    counter.passes_on = {_PARKED: _N1}
    done = purge(counter, config, 'reports')
    assert (done.home, dict(done.nodes), done.parked) == (3, {_N1: 6}, 2)
    assert counter.counts == {'other': 9}
