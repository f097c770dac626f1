"""A broker that takes no messages is waited for once: when the circuit opens, who waits, and when
it closes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from jobsync_celery.broker import forwarding as forwarding_module
from jobsync_celery.broker.circuit import BrokerBusy, Circuit
from jobsync_celery.broker.forwarding import Forwarder
from jobsync_celery.broker.queues import Queues
from tests.support.fakes import Clock
from tests.support.waiting import eventually

_SOON = 0.01


class Broker:
    """Counts the probes, and takes them or not."""

    def __init__(self) -> None:
        self.takes = False
        self.probes = 0
        self.threads: set[str] = set()

    def probe(self) -> None:
        self.probes += 1
        self.threads.add(threading.current_thread().name)
        if not self.takes:
            raise TimeoutError('no confirm')


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def circuit(broker: Broker) -> Iterator[Circuit]:
    made = Circuit(broker.probe, _SOON)
    yield made
    made.close()
    eventually(lambda: 'jobsync-circuit' not in {thread.name for thread in threading.enumerate()})


def test_it_conducts_at_first_and_asks_nobody(circuit: Circuit, broker: Broker) -> None:
    circuit.check()
    assert (circuit.is_open, broker.probes) == (False, 0)


def test_once_open_everybody_is_refused_at_once(circuit: Circuit, broker: Broker) -> None:
    circuit.open(TimeoutError('no confirm'))
    assert circuit.is_open
    for _ in range(100):
        with pytest.raises(BrokerBusy):
            circuit.check()


def test_it_looks_on_a_thread_of_its_own_until_the_broker_takes_messages(
    circuit: Circuit, broker: Broker
) -> None:
    circuit.open(TimeoutError())
    eventually(lambda: broker.probes >= 3)
    assert circuit.is_open
    broker.takes = True
    eventually(lambda: not circuit.is_open)
    circuit.check()
    assert broker.threads == {'jobsync-circuit'}
    probes = broker.probes
    circuit.open(TimeoutError())  # another time
    eventually(lambda: broker.probes > probes and not circuit.is_open)


def test_one_thread_looks_and_one_line_says_so_however_many_failed(
    circuit: Circuit, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        circuit.open(TimeoutError())
    assert [thread.name for thread in threading.enumerate()].count('jobsync-circuit') == 1
    assert sum(record.levelname == 'WARNING' for record in caplog.records) == 1
    assert 'rabbitmq-diagnostics alarms' in caplog.text


def test_closed_for_good_it_neither_looks_nor_opens(broker: Broker) -> None:
    circuit = Circuit(broker.probe, _SOON)
    circuit.open(TimeoutError())
    circuit.close()
    eventually(lambda: 'jobsync-circuit' not in {thread.name for thread in threading.enumerate()})
    circuit = Circuit(broker.probe, _SOON)
    circuit.close()
    circuit.open(TimeoutError())
    assert not circuit.is_open


def test_without_a_thread_to_look_it_does_not_stay_open(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would close it: messages for others would wait here for ever."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    circuit = Circuit(broker.probe, _SOON)
    monkeypatch.setattr(threading.Thread, 'start', start)
    circuit.open(TimeoutError())
    assert not circuit.is_open


def publish_nothing(self: Forwarder) -> None:
    raise TimeoutError('no confirm')


def check_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred messages that wait in the event loop one asks a broker that takes nothing."""
    clock, asked = Clock(), []
    monkeypatch.setattr(forwarding_module, 'clock', clock)

    def publish(self: Forwarder, queue: str, message: Any, headers: dict[str, Any]) -> None:
        asked.append(queue)
        clock.time += 2.0
        raise TimeoutError('no confirm')

    monkeypatch.setattr(Forwarder, '_publish', publish)
    monkeypatch.setattr(Forwarder, '_probe', publish_nothing)
    app = Celery('busy', broker='memory://', set_as_current=False)
    forwarder = Forwarder(app, Queues(app, 'memory', 'sync_'), patient=False)
    try:
        for _ in range(100):
            with pytest.raises((TimeoutError, BrokerBusy)):
                forwarder.send('q', SimpleNamespace(channel=None, delivery_info={}), {})
    finally:
        forwarder.close()
    assert asked == ['q']


def test_one_message_asks_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    check_waited_for_once(monkeypatch)


def test_without_the_circuit_each_of_them_would_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Circuit, 'open', lambda self, error: None)
    with pytest.raises(AssertionError):
        check_waited_for_once(monkeypatch)
