"""When a worker takes messages: with a lease, and while the database begins work."""

from __future__ import annotations

import pytest

from jobsync_core.errors import DatabaseRefused
from jobsync_core.protocol.pausing import Pausing
from jobsync_core.worker.when_to_consume import Consume, WhenToConsume

FULL = DatabaseRefused('no space left', '53100', True)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_with_a_lease_and_a_database_that_begins_work() -> None:
    assert WhenToConsume().look(True, Pausing(), 0.0) is Consume.NOW


def test_not_without_a_lease_whatever_the_database_does() -> None:
    pausing = Pausing()
    assert WhenToConsume().look(False, pausing, 0.0) is Consume.NO_LEASE
    pausing.refused(FULL, 0.0)
    assert WhenToConsume().look(False, pausing, 1.0) is Consume.NO_LEASE


def test_a_pause_is_told_when_it_begins_and_when_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level('INFO')
    when, pausing = WhenToConsume(), Pausing()
    pausing.refused(FULL, 1.0)
    assert [when.look(True, pausing, now) for now in (1.0, 2.0, 3.0)] == [Consume.PAUSED] * 3
    (line,) = lines(caplog)
    assert 'consuming stops for 5 s' in line and 'no space left; free disk space' in line
    assert when.look(True, pausing, pausing.until) is Consume.NOW  # one message tries
    assert len(caplog.records) == 1
    pausing.answered()
    assert when.look(True, pausing, 9.0) is Consume.NOW
    assert lines(caplog)[1:] == ['JobSync: the database begins work again; consuming goes on']


def test_one_pause_after_the_other_is_told_at_most_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    when, pausing, now = WhenToConsume(), Pausing(), 0.0
    while now < 200.0:
        pausing.refused(FULL, now)
        assert when.look(True, pausing, now) is Consume.PAUSED
        now = pausing.until
        assert when.look(True, pausing, now) is Consume.NOW
    told = lines(caplog)
    assert 2 <= len(told) <= 4 and 'more like it' in told[1]


def test_a_pause_that_ends_without_a_lease_is_told_when_consuming_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level('INFO')
    when, pausing = WhenToConsume(), Pausing()
    pausing.refused(FULL, 1.0)
    assert when.look(True, pausing, 1.0) is Consume.PAUSED
    pausing.answered()
    assert when.look(False, pausing, 2.0) is Consume.NO_LEASE
    assert len(caplog.records) == 1
    assert when.look(True, pausing, 3.0) is Consume.NOW
    assert len(caplog.records) == 2
