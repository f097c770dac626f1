"""Fences of the plugin, each taken away in turn: the check that rests on it fails then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pickle import PicklingError
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.backends.base import Backend
from celery.exceptions import Ignore

from jobsync_celery import JobSync
from jobsync_celery.gate import gate as gate_module
from jobsync_celery.gate import placing as placing_module
from jobsync_celery.gate import pool_entry as pool_entry_module
from jobsync_celery.gate import refusal as refusal_module
from jobsync_celery.gate import retries as retries_module
from jobsync_celery.gate.delivery import Delivery
from jobsync_celery.gate.gate import ConsumerGate
from jobsync_celery.gate.placing import Placing
from jobsync_celery.gate.pool_entry import PoolEntry
from jobsync_celery.gate.refusal import Refusals
from jobsync_celery.redis import broker as redis_module
from jobsync_celery.redis import keys as keys_module
from jobsync_celery.tasks import coordinated as tasks_module
from jobsync_celery.tasks import once as once_module
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import Unroutable
from jobsync_core.worker import come_back as come_back_module
from jobsync_core.worker import inbox
from jobsync_core.worker.adapter import MessageOnce
from jobsync_core.worker.inbox import place
from jobsync_core.worker.incoming import find_route
from tests.support.brokers import BrokerServer
from tests.support.fakes import FakeLedger

from .consumers import Bench, bench
from .test_gate import (
    BackendAway,
    check_begun_once,
    check_celery_falls,
    check_each_on_its_own,
    check_end_told_later,
    check_failure_leaves_it_unacknowledged,
    check_forged_key,
    check_goes_back,
    check_hop_limit,
    check_late,
    check_never_to_self,
    check_not_held_up,
    check_odd_connection,
    check_published_before_acknowledged,
    check_set_aside,
    check_slot,
)
from .test_once import (
    app,
    check_back_off,
    check_direct_call,
    check_duplicate_rule,
    check_message_stays,
    check_result_that_cannot_be_sent,
    ledger,
    published,
)

__all__ = ['app', 'ledger', 'published']


def acknowledge_first(monkeypatch: pytest.MonkeyPatch) -> None:
    send = Placing._send

    def early(self: Placing, waiting: Delivery, *args: Any) -> bool:
        waiting.ack()
        waiting.ack = lambda: None
        return send(self, waiting, *args)

    monkeypatch.setattr(Placing, '_send', early)


def without_hop_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inbox,
        'place',
        lambda delivery, here, rules, now: place(
            delivery, here, replace(rules, max_hops=10**9), now
        ),
    )


def also_to_self(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        inbox,
        'place',
        lambda delivery, here, rules, now: place(delivery, replace(here, node=''), rules, now),
    )


def without_late_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ConsumerGate, 'dispatch', lambda self, request: self._pool_entry.to_pool(request)
    )
    without_look_at_the_slot(monkeypatch)


def without_look_at_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoolEntry, '_begins', lambda self, request: True)


FENCES: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Bench], None]]] = [
    (acknowledge_first, check_published_before_acknowledged),
    (acknowledge_first, check_failure_leaves_it_unacknowledged),
    (without_hop_limit, check_hop_limit),
    (also_to_self, check_never_to_self),
    (without_late_check, check_late),
]


@pytest.mark.parametrize(('remove', 'check'), FENCES, ids=lambda item: item.__name__)
def test_without_the_fence_the_check_fails(
    monkeypatch: pytest.MonkeyPatch,
    remove: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Bench], None],
) -> None:
    with bench(monkeypatch) as stage:
        check(stage)
    remove(monkeypatch)
    with bench(monkeypatch) as stage, pytest.raises(AssertionError):
        check(stage)


def blame_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gate_module, placing_module):
        monkeypatch.setattr(module, 'is_its_fault', lambda error: True)


def requeue_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries_module, '_EVERY', 1)


def without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries_module, 'come_back_sec', lambda times, most: 0.0)


def keep_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = PoolEntry.failed

    def greedy(self: PoolEntry, request: Any, error: Exception) -> None:
        self._takes_slot = False
        failed(self, request, error)

    monkeypatch.setattr(PoolEntry, 'failed', greedy)


def the_worker_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoolEntry, 'process', lambda self, request: self._process(request))


def never_withdraw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_entry_module._Acceptance, 'withdraw', lambda self: True)


def hold_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PoolEntry, '_hold', lambda self, request, error, act, stays: request.reject(requeue=True)
    )


def one_failure_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    send = Placing._send

    def impatient(self: Placing, waiting: Delivery, *args: Any) -> bool:
        waiting.failed = True
        return send(self, waiting, *args)

    monkeypatch.setattr(Placing, '_send', impatient)


def check_away(stage: Bench) -> None:
    check_goes_back(stage, BackendAway('away'))


def check_not_begun_twice(stage: Bench) -> None:
    check_begun_once(stage, begun=True)


TROUBLES: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Bench], None]]] = [
    (blame_the_message, check_away),
    (without_a_pause, check_away),
    (requeue_at_once, check_away),
    (keep_the_slot, check_slot),
    (the_worker_s_own, check_slot),
    (never_withdraw, check_not_begun_twice),
    (hold_no_end, check_end_told_later),
    (one_failure_is_enough, check_odd_connection),
]


@pytest.mark.parametrize(('remove', 'check'), TROUBLES, ids=lambda item: item.__name__)
def test_without_the_fence_trouble_costs_a_message(
    monkeypatch: pytest.MonkeyPatch,
    remove: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Bench], None],
) -> None:
    slots = check is check_slot
    with bench(monkeypatch, slots=slots) as stage:
        check(stage)
    remove(monkeypatch)
    with bench(monkeypatch, slots=slots) as stage, pytest.raises((AssertionError, PicklingError)):
        check(stage)


def test_without_a_thread_for_it_errbacks_hold_up_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        refusal_module, '_teller', SimpleNamespace(tell=lambda action: (action(), True))
    )
    with bench(monkeypatch) as stage, pytest.raises(AssertionError):
        check_not_held_up(stage, monkeypatch, 0.01)


def test_without_the_return_a_copy_that_is_not_sent_is_the_task_s_failure(
    app: Celery, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_message_stays(app, ledger, monkeypatch, ConnectionError('away'))
    app.tasks.pop('double')
    monkeypatch.setattr(
        once_module, 'RequeueLater', lambda reason, requeue: ConnectionError(reason)
    )
    with pytest.raises(ConnectionError):
        check_message_stays(app, ledger, monkeypatch, ConnectionError('away'))


def test_without_the_duplicate_rule_a_link_goes_out_twice(
    app: Celery, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_duplicate_rule(app, ledger)
    app.tasks.pop('double')
    monkeypatch.setattr(once_module, 'states', SimpleNamespace(SUCCESS='never'))
    with pytest.raises(pytest.fail.Exception):
        check_duplicate_rule(app, ledger)


def hold(app: Celery, node: str) -> Any:
    """Take a message off 'celery' as a node, and keep it unacknowledged."""
    connection = app.connection_for_write(transport_options=keys_module.node_options('shop_', node))
    with connection.SimpleQueue('celery') as source:
        source.get(timeout=20)
    return connection


def check_rescue_spares_the_living(broker: BrokerServer) -> None:
    space = broker.new_space()
    made = Celery('fences', broker=broker.url(space), set_as_current=False)
    plugin = JobSync(made, config=CoordinationConfig(appname='shop_'), route_producers=False)
    with ExitStack() as stack:
        stack.callback(broker.drop_space, space)
        with made.connection_for_write() as connection, connection.SimpleQueue('celery') as target:
            for number in range(2):
                target.put({'n': number})
        for node in ('n1', 'n2'):
            stack.callback(hold(made, node).release)
        assert plugin.evacuable().restore('n2') == 1
        assert broker.depths(space)['celery'] == 1


def test_without_unacked_keys_of_its_own_a_live_node_s_messages_are_taken(
    redis_server: BrokerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rescue_spares_the_living(redis_server)
    for module in (redis_module, keys_module):
        monkeypatch.setattr(module, 'node_options', lambda appname, node: {})
    with pytest.raises(AssertionError):
        check_rescue_spares_the_living(redis_server)


def trust_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(found: Any, args: object, kwargs: object, message_id: object, stamps: Any) -> Any:
        return stamps.key or find_route(found, args, kwargs, message_id, stamps)

    monkeypatch.setattr(tasks_module, 'find_route', find)


def run_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = Refusals.refuse

    def let_through(
        self: Refusals, message: Any, reason: str, cause: Any = None, reject: Any = None
    ) -> None:
        if cause is not Unroutable:
            refuse(self, message, reason)

    monkeypatch.setattr(Refusals, 'refuse', let_through)


def raise_into_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ConsumerGate,
        'create_task_handler',
        lambda self: lambda message: self._make_handler()(message),
    )


def one_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placing, '_run', lambda self, item: item.run())


BOUNDARY: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Bench], None]]] = [
    (trust_the_header, check_forged_key),
    (run_without_a_key, lambda stage: check_set_aside(stage, ([], {}, {}))),
    (raise_into_the_consumer, check_celery_falls),
    (one_for_all, check_each_on_its_own),
]


@pytest.mark.parametrize(('remove', 'check'), BOUNDARY, ids=lambda item: item.__name__)
def test_without_the_boundary_a_message_does_harm(
    monkeypatch: pytest.MonkeyPatch,
    remove: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Bench], None],
) -> None:
    with bench(monkeypatch) as stage:
        check(stage)
    remove(monkeypatch)
    with bench(monkeypatch) as stage, pytest.raises((AssertionError, KeyError)):
        check(stage)


def test_without_a_back_off_a_running_key_is_asked_for_every_second(
    app: Celery, ledger: Any, published: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_back_off(app, ledger, published)
    app.tasks.pop('double')
    published.clear()
    monkeypatch.setattr(come_back_module, 'come_back_sec', lambda waits: 1.0)
    with pytest.raises(AssertionError):
        check_back_off(app, ledger, published)


def test_without_the_check_a_result_that_cannot_be_sent_completes_its_key(
    app: Celery, ledger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_result_that_cannot_be_sent(app, ledger)
    app.tasks.pop('odd')
    ledger.ends.clear()
    monkeypatch.setattr(Backend, 'encode', lambda self, data: data)
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        check_result_that_cannot_be_sent(app, ledger)


def test_without_its_own_copy_told_apart_a_direct_call_is_taken_for_the_message(
    app: Celery, ledger: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_direct_call(app, ledger)
    app.tasks.pop('outer')
    monkeypatch.setattr(once_module, '_call_of', lambda request: ([], {}))
    monkeypatch.setattr(MessageOnce, '_is_own', lambda self, options: True)
    with pytest.raises((Ignore, AssertionError)):
        check_direct_call(app, ledger)
