"""What is sent and when to wake for it come from the same values."""

from __future__ import annotations

import pytest

from jobsync_core.protocol.agenda import NEVER, NOTHING, NOW, Due, first_due
from jobsync_core.protocol.messages import Request
from jobsync_core.protocol.messages.connection import Connect
from jobsync_core.protocol.messages.leadership import Observe
from jobsync_core.protocol.messages.membership import Leave

LEAVE = Leave('me', 'life')


def unwanted() -> Request:
    raise AssertionError('made, though it is not sent')


def test_of_those_that_are_due_the_first_is_sent_however_long_another_has_been_due() -> None:
    agenda: list[Due] = [(11.0, unwanted), (10.0, Connect), (NOW, unwanted), (1.0, unwanted)]
    request, wake_at = first_due(agenda, 10.0)
    assert request == Connect() and wake_at <= 10.0


@pytest.mark.parametrize('now', [0.0, 4.9, 5.0, 7.0, 1e9])
def test_something_is_sent_exactly_when_it_is_time_to_wake(now: float) -> None:
    agenda: list[Due] = [NOTHING, (7.0, lambda: LEAVE), (5.0, Observe)]
    request, wake_at = first_due(agenda, now)
    assert (request is not None) == (now >= 5.0) == (now >= wake_at)
    assert wake_at == 5.0 or request is not None


def test_where_there_is_nothing_to_send_nobody_wakes() -> None:
    assert first_due([NOTHING], 1e9) == first_due([], 1e9) == (None, NEVER)
