"""How long a Celery worker counts as deaf."""

from __future__ import annotations

import pytest

from jobsync_celery.listening import Listening
from jobsync_celery.redis.leftovers import Leftovers
from jobsync_core import clock


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(clock, 'now', lambda: now[0])
    return now


def test_what_comes_before_the_event_loop_is_no_silence(time: list[float]) -> None:
    """Mingle waits for neighbours, longer than a short heartbeat timeout."""
    listening = Listening(Leftovers(), solo=False)
    listening.connected()
    time[0] += 20.0
    assert listening.silence() == 0.0
    time[0] += 20.0
    assert listening.silence() == 40.0, 'but not for ever'
    listening.turned(None)
    assert listening.silence() == 0.0
    time[0] += 3.0
    assert listening.silence() == 3.0, 'once it has turned, it has to turn'


def test_without_a_connection_it_is_deaf(time: list[float]) -> None:
    listening = Listening(Leftovers(), solo=False)
    listening.connected()
    listening.disconnected()
    time[0] += 4.0
    assert listening.silence() == 4.0
    listening.connected()
    assert listening.silence() == 0.0
