"""Two threads of a worker take from one of the node's own queues at Redis, its consumer and the
node's own: neither takes for lost what the other has in hand, or puts back what went back already.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import dramatiq
import pytest

from jobsync_core.worker.routing import node_queue
from jobsync_dramatiq.broker import redis_scripts as scripts
from jobsync_dramatiq.broker.interface import UnknownOrigins
from jobsync_dramatiq.broker.redis_broker import RedisWorkerBroker

_OWN, _OTHER = (node_queue('reports', 'sync_', node) for node in ('n1', 'n2'))


class _Redis:
    """Lists, messages and what was taken, in memory."""

    def __init__(self) -> None:
        self.lists: dict[str, list[str]] = defaultdict(list)
        self.messages: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.taken: dict[str, set[str]] = defaultdict(set)

    def register_script(self, text: str) -> Any:
        return self._fetch if text == scripts.FETCH else None

    def _fetch(self, keys: Any, args: Any) -> list[Any]:
        found: list[Any] = []
        for _ in range(min(args[2], len(self.lists[keys[1]]))):
            number = self.lists[keys[1]].pop(0)
            self.taken[keys[0]].add(number)
            found += [number, self.messages[keys[1]][number]]
        return found

    def llen(self, key: str) -> int:
        return len(self.lists[key])

    def smembers(self, key: str) -> set[str]:
        return set(self.taken[key])


class _Native:
    """Dramatiq's broker, as far as it is used here."""

    namespace, maintenance_chance, heartbeat_timeout = 'd', 0, 60_000

    def __init__(self) -> None:
        self.client = _Redis()
        self.broker_id = ''

    def _mine(self, queue: str) -> set[str]:
        return self.client.taken[f'd:__acks__.{self.broker_id}.{queue}']

    def do_enqueue(self, queue: str, number: str, data: bytes) -> None:
        self.client.messages[f'd:{queue}'][number] = data
        self.client.lists[f'd:{queue}'].append(number)

    def do_requeue(self, queue: str, *numbers: str) -> None:
        for number in numbers:
            if number in self._mine(queue):
                self._mine(queue).discard(number)
                self.client.lists[f'd:{queue}'].append(number)

    def do_ack(self, queue: str, number: str) -> None:
        if number in self._mine(queue):
            self._mine(queue).discard(number)
            del self.client.messages[f'd:{queue}'][number]


@pytest.fixture
def native() -> _Native:
    found = _Native()
    for number in range(4):
        message: dramatiq.Message[Any] = dramatiq.Message('reports', 'report', (number,), {}, {})
        found.do_enqueue(_OWN, f'm{number}', message.encode())
    return found


@pytest.fixture
def broker(native: _Native) -> RedisWorkerBroker:
    made = RedisWorkerBroker(native, 'sync_', UnknownOrigins())
    made.join('n1')
    return made


def test_what_the_consumer_has_fetched_the_nodes_own_thread_leaves(
    native: _Native, broker: RedisWorkerBroker
) -> None:
    consumer = broker.consume(_OWN, 8, 1)
    kept = broker.take(_OWN)
    assert kept is not None
    kept.requeue()
    assert consumer.next(patient=False) is not None
    # Three are fetched and not handed out yet.
    broker.queues.doubt(_OWN)  # an answer was lost
    broker.requeue_failed()
    assert native.client.llen(f'd:{_OWN}') == 0


def test_what_the_nodes_own_thread_has_in_hand_the_consumer_leaves(
    native: _Native, broker: RedisWorkerBroker
) -> None:
    consumer = broker.consume(_OWN, 8, 1)
    moves, stays = broker.take(_OWN), broker.take(_OWN)
    assert moves is not None and stays is not None
    consumer.resume()  # the lease is back, and its plan is another one
    assert native.client.llen(f'd:{_OWN}') == 2
    moves.forward(_OTHER)
    assert native.client.llen(f'd:{_OTHER}') == 1
    stays.requeue()
    assert sorted(native.client.lists[f'd:{_OWN}']) == ['m1', 'm2', 'm3']


def test_what_an_error_made_the_nodes_own_thread_drop_goes_back(
    native: _Native, broker: RedisWorkerBroker
) -> None:
    consumer = broker.consume(_OWN, 8, 1)
    assert broker.take(_OWN) is not None
    broker.requeue_failed()
    assert [consumer.next(patient=False) is not None for _ in range(4)] == [True] * 4


def test_what_could_not_go_back_goes_back_once(
    native: _Native, broker: RedisWorkerBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = broker.consume(_OWN, 8, 1)
    assert consumer.next(patient=False) is not None
    with monkeypatch.context() as patch:
        patch.setattr(native, 'do_requeue', raising)
        consumer.close([])  # three are fetched and not handed out
    consumer = broker.consume(_OWN, 8, 1)  # Redis is back, before the node's own thread has looked
    taken = [consumer.next(patient=False)]
    broker.requeue_failed()
    taken += [consumer.next(patient=False) for _ in range(4)]
    assert sorted(each.args[0] for each in taken if each is not None) == [1, 2, 3]


def raising(*_: object) -> None:
    raise ConnectionError('Redis is away')
