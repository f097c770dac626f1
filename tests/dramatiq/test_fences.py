"""Fences of the plugin, each taken away in turn: the check that rests on it fails then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker

from jobsync_core.worker import inbox
from jobsync_core.worker.inbox import place
from jobsync_core.worker.routing import KEY
from jobsync_dramatiq import incoming
from jobsync_dramatiq import once as once_module
from jobsync_dramatiq.actors import Actors
from jobsync_dramatiq.broker import redis_broker
from jobsync_dramatiq.broker.interface import UnknownOrigins
from jobsync_dramatiq.broker.redis_broker import RedisWorkerBroker
from jobsync_dramatiq.consumer import GatedConsumer
from jobsync_dramatiq.gate import WorkerGate
from tests.support.brokers import BrokerServer
from tests.support.fakes import FakeLedger

from ..hostile.dramatiq_wire import UNREADABLE
from .stage import Stage, message, stage
from .test_gate import (
    check_failure_leaves_it_unacknowledged,
    check_hop_limit,
    check_late,
    check_never_to_self,
    check_published_before_acknowledged,
)
from .test_once import Bench, check_group_counts_once, ledger

__all__ = ['ledger']


def acknowledge_first(monkeypatch: pytest.MonkeyPatch) -> None:
    send = GatedConsumer._send

    def early(self: GatedConsumer, message: Any, *args: Any) -> bool:
        self._source.ack(message)
        return send(self, message, *args)

    monkeypatch.setattr(GatedConsumer, '_send', early)


def without_hop_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inbox,
        'place',
        lambda found, here, rules, now: place(found, here, replace(rules, max_hops=10**9), now),
    )


def also_to_self(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inbox,
        'place',
        lambda found, here, rules, now: place(found, replace(here, node=''), rules, now),
    )


def without_late_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerGate, 'begin', lambda self, message: None)


def with_all_ears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerGate, 'hides', lambda self, signal, message: False)


def without_incarnations(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same(str):
        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = str.__hash__

    receive = GatedConsumer._receive

    def blind(self: GatedConsumer, message: Any) -> None:
        receive(self, message)
        note = vars(message)['jobsync_note']
        note.received = replace(note.received, incarnation=Same())

    monkeypatch.setattr(GatedConsumer, '_receive', blind)


def check_late_is_unheard(made: Stage) -> None:
    check_late(made)
    assert made.middleware == []


def check_earlier_life(made: Stage) -> None:
    found = made.receive(message('mine'))
    made.job.incarnation = 'life-2'
    assert made.process(found) == ['requeue']


FENCES: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Stage], None]]] = [
    (acknowledge_first, check_published_before_acknowledged),
    (acknowledge_first, check_failure_leaves_it_unacknowledged),
    (without_hop_limit, check_hop_limit),
    (also_to_self, check_never_to_self),
    (without_late_check, check_late),
    (with_all_ears, check_late_is_unheard),
    (without_incarnations, check_earlier_life),
]


@pytest.mark.parametrize(('remove', 'check'), FENCES, ids=lambda item: item.__name__)
def test_without_the_fence_the_check_fails(
    monkeypatch: pytest.MonkeyPatch,
    remove: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Stage], None],
) -> None:
    with stage() as made:
        check(made)
    remove(monkeypatch)
    with stage() as made, pytest.raises(AssertionError):
        check(made)


def test_without_the_duplicate_rule_a_group_s_callback_runs_early(
    ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_group_counts_once(Bench(), ledger)
    ledger.begin_error = None
    monkeypatch.setattr(once_module, 'was_counted', lambda broker, message: False)
    with pytest.raises(AssertionError):
        check_group_counts_once(Bench(), ledger)


def check_rescue_spares_the_living(server: BrokerServer) -> None:
    space = server.new_space()
    brokers = [RedisBroker(url=server.url(space)) for _ in range(3)]
    nodes = [RedisWorkerBroker(broker, 'shop_', UnknownOrigins()) for broker in brokers]
    try:
        for number, node in enumerate(nodes):
            node.join(f'n{number}')
            node.declare('default', f'default.jobsync.shop_.n{number}')
        for _ in range(3):
            nodes[0].send(message(None), 'default', None)
        assert all(node.take('default') is not None for node in nodes)
        assert nodes[0].restore('n2') == 1
        assert brokers[0].client.llen('dramatiq:default') == 1
    finally:
        for broker in brokers:
            broker.client.close()
        server.drop_space(space)


def test_without_an_id_of_its_own_a_live_node_s_messages_are_taken(
    redis_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rescue_spares_the_living(redis_server)
    monkeypatch.setattr(redis_broker, 'broker_id', lambda appname, node: 'all')
    with pytest.raises(AssertionError):
        check_rescue_spares_the_living(redis_server)


def trust_the_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Actors.read_route
    monkeypatch.setattr(
        Actors,
        'read_route',
        lambda self, message, stamps: stamps.key or read(self, message, stamps),
    )


def trust_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes) -> Any:
        return dramatiq.Message.decode(data)

    monkeypatch.setattr(incoming, 'read_message', read)


def test_without_the_route_from_the_arguments_a_message_goes_around_a_pin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trust_the_stamp(monkeypatch)
    with stage() as made:
        assert made.receive(message('7', None, 'pinned', **{KEY: 'mine'})) is not None, (
            'the node would run what its pin excludes'
        )


def test_without_the_boundary_odd_fields_reach_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    trust_the_fields(monkeypatch)
    passed = []
    for data in UNREADABLE.values():
        with contextlib.suppress(dramatiq.errors.DecodeError):
            passed.append(incoming.read_message(data))
    assert len(passed) > 10


def test_without_the_last_place_a_message_that_has_no_key_is_retried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WorkerGate, 'is_refused', lambda self, signal, message: False)
    with stage() as made:
        retried: list[Any] = []
        dramatiq.actor(
            actor_name='stubborn', broker=made.broker, jobsync_key='{n}', retry_when=lambda *_: True
        )(made._run)
        vars(made.broker)['enqueue'] = lambda found, delay=None: retried.append(found)
        found = made.receive(message(None, None, 'stubborn', args=()))
        monkeypatch.setattr(WorkerGate, 'refuse', without_throws(WorkerGate.refuse))
        made.process(found)
        assert retried


def without_throws(refuse: Callable[..., None]) -> Callable[..., None]:
    def changed(self: WorkerGate, found: Any) -> None:
        try:
            refuse(self, found)
        finally:
            found.options.pop('throws', None)

    return changed
