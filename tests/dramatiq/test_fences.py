"""Fences of the plugin, each taken away in turn: the check that rests on it fails then."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from dramatiq.brokers.redis import RedisBroker

from jobsync_core import plugin as core
from jobsync_core.routing import decide
from jobsync_dramatiq import once as once_module
from jobsync_dramatiq import redis_mail
from jobsync_dramatiq.gate import GatedConsumer, WorkerGate
from jobsync_dramatiq.redis_mail import RedisMail

from ..brokers import BrokerServer
from ..fakes import FakeLedger
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
        self._hold.ack(message)
        return send(self, message, *args)

    monkeypatch.setattr(GatedConsumer, '_send', early)


def without_hop_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, 'decide', lambda **given: decide(**{**given, 'max_hops': 10**9}))


def also_to_self(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, 'decide', lambda **given: decide(**{**given, 'node': ''}))


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
        vars(message)['jobsync_note'].incarnation = Same()

    monkeypatch.setattr(GatedConsumer, '_receive', blind)


def check_late_is_unheard(made: Stage) -> None:
    check_late(made)
    assert made.middleware == []


def check_earlier_life(made: Stage) -> None:
    found = made.receive(message('mine'))
    made.job.incarnation = 'life-2'
    assert made.process(found) == ['requeue']


FENCES: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Stage], None]]] = [
    (acknowledge_first, check_published_before_acknowledged), (acknowledge_first, check_failure_leaves_it_unacknowledged),
    (without_hop_limit, check_hop_limit), (also_to_self, check_never_to_self), (without_late_check, check_late),
    (with_all_ears, check_late_is_unheard), (without_incarnations, check_earlier_life)]


@pytest.mark.parametrize(('remove', 'check'), FENCES, ids=lambda item: item.__name__)
def test_without_the_fence_the_check_fails(
    monkeypatch: pytest.MonkeyPatch, remove: Callable[[pytest.MonkeyPatch], None], check: Callable[[Stage], None],
) -> None:
    with stage(monkeypatch) as made:
        check(made)
    remove(monkeypatch)
    with stage(monkeypatch) as made, pytest.raises(AssertionError):
        check(made)


def test_without_the_duplicate_rule_a_group_s_callback_runs_early(ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    check_group_counts_once(Bench(), ledger)
    ledger.begin_error = None
    monkeypatch.setattr(once_module, 'was_counted', lambda broker, message: False)
    with pytest.raises(AssertionError):
        check_group_counts_once(Bench(), ledger)


def check_rescue_spares_the_living(server: BrokerServer) -> None:
    space = server.new_space()
    brokers = [RedisBroker(url=server.url(space)) for _ in range(3)]
    nodes = [RedisMail(broker, 'shop_') for broker in brokers]
    try:
        for number, node in enumerate(nodes):
            node.join(f'n{number}', f'jobsync.shop_.n{number}')
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
    redis_server: BrokerServer, monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_rescue_spares_the_living(redis_server)
    monkeypatch.setattr(redis_mail, 'broker_id', lambda appname, node: 'all')
    with pytest.raises(AssertionError):
        check_rescue_spares_the_living(redis_server)
