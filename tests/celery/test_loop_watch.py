"""How long a Celery worker counts as deaf, and how often it tries to connect."""

from __future__ import annotations

import pytest

from jobsync_celery.loop_watch import LoopWatch, Reconnecting
from jobsync_celery.redis.carried_over import CarriedOver
from jobsync_core import clock


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(clock, 'now', lambda: now[0])
    return now


def test_what_comes_before_the_event_loop_is_no_silence(time: list[float]) -> None:
    """Mingle waits for neighbours, longer than a short heartbeat timeout."""
    loop_watch = LoopWatch(CarriedOver(), solo=False)
    loop_watch.connected()
    time[0] += 20.0
    assert loop_watch.silence() == 0.0
    time[0] += 20.0
    assert loop_watch.silence() == 40.0, 'but not for ever'
    loop_watch.turned(None)
    assert loop_watch.silence() == 0.0
    time[0] += 3.0
    assert loop_watch.silence() == 3.0, 'once it has turned, it has to turn'


def test_without_a_connection_it_is_deaf(time: list[float]) -> None:
    loop_watch = LoopWatch(CarriedOver(), solo=False)
    loop_watch.connected()
    loop_watch.disconnected()
    time[0] += 4.0
    assert loop_watch.silence() == 4.0
    loop_watch.connected()
    assert loop_watch.silence() == 0.0


def test_tries_that_come_to_nothing_are_made_less_and_less_often(time: list[float]) -> None:
    """As where a Redis answers, and has become a replica: it refuses what a connection begins
    with.
    """

    def sleep(seconds: float) -> None:
        time[0] += seconds

    def pause() -> float:
        before = time[0]
        reconnecting.wait()
        return round(time[0] - before, 3)

    looks: list[int] = []
    reconnecting = Reconnecting(lambda: looks.append(0), sleep)
    assert [pause() for _ in range(7)] == [0, 1, 2, 4, 8, 15, 15]
    assert len(looks) >= 45 / 0.2, 'a worker that is told to end does so'
    reconnecting.connected()
    assert [pause() for _ in range(2)] == [0, 1]
