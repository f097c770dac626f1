"""A node is dead after one whole timeout of the observer's own clock without a change, and not a
moment before.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.protocol.liveness import Liveness
from jobsync_core.protocol.messages.signs import Sign

TIMEOUT, GAP = 10.0, 3.0
quick = settings(deadline=None, max_examples=200)


def sign(beat: int = 1, incarnation: str = 'i', name: str = 'a') -> Sign:
    return Sign(name, incarnation, beat)


def watched(*times: float) -> Liveness:
    liveness = Liveness(TIMEOUT, GAP)
    for now in times:
        liveness.look([sign()], now)
    return liveness


def test_a_node_is_dead_when_its_sign_stood_for_the_whole_timeout() -> None:
    liveness = watched(*range(100, 111))
    assert not liveness.is_dead(sign(), 109.9)
    assert liveness.is_dead(sign(), 110.0) and liveness.dead(110.0) == (sign(),)


def test_a_node_that_was_never_seen_is_not_dead() -> None:
    assert not watched().is_dead(sign(), 1e9) and watched().dead(1e9) == ()


def test_a_change_of_beat_begins_the_wait_anew() -> None:
    liveness = watched(*range(100, 109))
    liveness.look([sign(2)], 109.0)
    for now in range(110, 119):
        liveness.look([sign(2)], float(now))
    assert not liveness.is_dead(sign(2), 118.9) and liveness.is_dead(sign(2), 119.0)


def test_a_beat_that_goes_back_begins_the_wait_anew_and_is_no_sign_of_life() -> None:
    liveness = watched(100.0)
    assert not liveness.shows_life(sign(-5))
    liveness.look([sign(-5)], 101.0)
    assert (
        not liveness.dead(110.5)
        and liveness.shows_life(sign(1))
        and not liveness.shows_life(sign(-5))
    )


def test_a_new_incarnation_begins_the_wait_anew_and_its_predecessor_is_not_judged_by_it() -> None:
    liveness = watched(*range(100, 110))
    liveness.look([sign(1, 'other')], 110.0)
    assert not liveness.is_dead(sign(1, 'other'), 111.0) and not liveness.is_dead(sign(), 111.0)


def test_an_observer_that_could_not_look_waits_again() -> None:
    liveness = watched(100.0, 101.0, 102.0)
    assert not liveness.is_dead(sign(), 112.0), 'the last look was too long ago'
    liveness.look([sign()], 112.0)
    assert not liveness.is_dead(sign(), 112.0), 'the wait began anew'
    for now in range(113, 123):
        liveness.look([sign()], float(now))
    assert liveness.is_dead(sign(), 122.0)


def test_a_gap_of_the_allowed_length_does_no_harm() -> None:
    liveness = watched(100.0, 103.0, 106.0, 109.0)
    assert liveness.is_dead(sign(), 110.0)


def test_forgotten_nodes_are_watched_from_the_start() -> None:
    liveness = watched(*range(100, 110))
    liveness.look([sign(name='b')], 109.0)
    liveness.keep(['b'])
    assert not liveness.is_dead(sign(), 110.0) and not liveness.shows_life(sign(2))
    liveness.forget(['b', 'unknown'])
    assert liveness.dead(1e9) == ()


def test_the_next_death_is_the_nearest_one_ahead() -> None:
    liveness = watched(100.0)
    liveness.look([sign(name='b')], 102.0)
    assert [liveness.next_death(now) for now in (101.0, 110.0, 112.0)] == [
        110.0,
        112.0,
        float('inf'),
    ]


@quick
@given(st.lists(st.tuples(st.floats(0.01, 6), st.booleans()), max_size=40))
def test_nobody_is_dead_sooner_than_one_timeout_after_a_change_or_without_being_watched(
    looks: list[tuple[float, bool]],
) -> None:
    """Against a model that keeps the whole history."""
    liveness = Liveness(TIMEOUT, GAP)
    now, beat = 0.0, 0
    history: list[tuple[float, int]] = []
    for pause, beats in looks:
        now += pause
        beat += beats
        liveness.look([sign(beat)], now)
        history.append((now, beat))
        since = now
        for (earlier, value), (later, _) in zip(
            reversed(history[:-1]), reversed(history), strict=False
        ):
            if value != beat or later - earlier > GAP:
                break
            since = earlier
        assert liveness.is_dead(sign(beat), now) == (now - since >= TIMEOUT)
