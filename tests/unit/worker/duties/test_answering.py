"""Whether the broker counts as away."""

from __future__ import annotations

import pytest

from jobsync_core.worker.duties import answering
from jobsync_core.worker.duties.answering import BrokerAnswers
from jobsync_core.worker.duties.duty import Moment


class Broker:
    """A broker that a test takes away."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked = 0

    def ask(self) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time


def moment(now: float, leased: bool = True) -> Moment:
    return Moment(now, leased, 1)


def never() -> bool:
    return False


@pytest.fixture
def broker() -> Broker:
    return Broker()


def test_each_node_asks_now_and_then_with_a_lease_or_without(broker: Broker) -> None:
    duty = BrokerAnswers(broker.ask)
    assert duty.problem() == '' and duty.due(moment(1.0, leased=False)) <= 0
    duty.run(moment(1.0, leased=False), never)
    assert broker.asked == 1 and duty.due(moment(1.0)) == 2.0 and duty.problem() == ''


def test_one_that_refuses_is_away_until_it_answers_and_its_address_is_not_told(
    broker: Broker,
) -> None:
    duty = BrokerAnswers(broker.ask)
    broker.error = ConnectionError('amqp://guest:secret@rabbit')
    with pytest.raises(ConnectionError):
        duty.run(moment(1.0), never)
    assert duty.problem() == 'the broker does not answer: ConnectionError'
    broker.error = None
    duty.run(moment(3.0), never)
    assert duty.problem() == ''


def test_one_that_is_silent_is_away_before_the_question_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(answering, 'clock', clock)
    seen: list[str] = []

    def ask() -> None:
        for seconds in (0.0, 3.0, 0.1):
            clock.time += seconds
            seen.append(duty.problem())

    duty = BrokerAnswers(ask)
    duty.run(moment(clock.time), never)
    assert seen == ['', '', 'the broker does not answer'] and duty.problem() == ''


def test_what_another_duty_has_met_counts_and_is_looked_into_at_once(broker: Broker) -> None:
    duty = BrokerAnswers(broker.ask)
    duty.run(moment(1.0), never)
    duty.failed()
    assert duty.problem() == 'the broker does not answer' and duty.due(moment(1.1)) <= 0
    duty.run(moment(1.1), never)
    assert duty.problem() == ''
