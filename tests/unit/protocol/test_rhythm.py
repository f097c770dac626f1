"""When heartbeats are sent, and when what failed is tried again."""

from __future__ import annotations

import random

import pytest

from jobsync_core.protocol.rhythm import Backoff, beat_delay

INTERVAL = 5.0


def beats(
    rates: list[float], offsets: list[float], seconds: float, interval: float = INTERVAL
) -> list[list[float]]:
    """The moments at which nodes beat, the oldest first, whose clocks run at these rates."""
    due = list(offsets)
    sent: list[list[float]] = [[] for _ in rates]
    now = 0.0
    while now < seconds:
        place = min(range(len(due)), key=due.__getitem__)
        now = due[place]
        sent[place].append(now)
        ages = [now - (moments[-1] if moments else now - interval) for moments in sent[:place]]
        due[place] = now + beat_delay(ages, interval) / rates[place]
    return sent


@pytest.mark.parametrize('seed', range(20))
def test_each_of_the_oldest_beats_within_a_second_after_all_that_are_older_without_more_heartbeats(
    seed: int,
) -> None:
    rng = random.Random(seed)
    rates = [1 + rng.uniform(-1e-3, 1e-3) for _ in range(4)]
    sent = beats(rates, [rng.random() * INTERVAL for _ in range(4)], 100 * INTERVAL)
    for place in range(1, 4):
        settled = [moment for moment in sent[place] if moment > 10 * INTERVAL]
        for elder in sent[:place]:
            assert max(moment - max(m for m in elder if m <= moment) for moment in settled) < 0.8
        assert len(settled) <= 90 * 1.02 + 2


def test_without_anybody_to_follow_and_where_heartbeats_are_frequent_nothing_is_shifted() -> None:
    assert beat_delay([], INTERVAL) == INTERVAL
    assert beat_delay([0.3, 0.2], 0.5) == 0.5
    assert beat_delay([INTERVAL + 1], INTERVAL) == INTERVAL, 'the leader is late'
    assert beat_delay([-100.0], INTERVAL) == INTERVAL, "the server's clock has been set back"


def test_whoever_beats_long_after_the_leader_comes_earlier_the_next_time() -> None:
    assert 2.0 < beat_delay([3.0], INTERVAL) < 2.3


def test_a_backoff_doubles_up_to_a_limit_and_begins_anew_after_a_success() -> None:
    backoff = Backoff(1.0, 5.0)
    waits = []
    now = 0.0
    for _ in range(5):
        backoff.failed(now)
        waits.append(backoff.not_before - now)
        now = backoff.not_before
    assert waits == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert backoff.failing_for == 12.0
    backoff.reset()
    assert backoff.not_before == backoff.failing_for == 0.0
    backoff.failed(now)
    assert backoff.failing_for == 0.0 and backoff.not_before == now + 1.0
