"""The leader and its successor: who looks, and when a round is asked for."""

from __future__ import annotations

from jobsync_core.assignment.model import Member
from jobsync_core.protocol.agenda import first_due
from jobsync_core.protocol.leadership import Duty, Leadership
from jobsync_core.protocol.liveness import Liveness
from jobsync_core.protocol.messages.leadership import (
    DEATHS,
    Evict,
    EvictReply,
    Lead,
    Observe,
    ObserveReply,
    RoundReply,
    StepDown,
)
from jobsync_core.protocol.messages.membership import ELDERS
from jobsync_core.protocol.messages.signs import Life, Sign

TIMEOUT, POLL = 15.0, 0.75


def member(name: str, beat: int = 1, age: float = 0.0) -> Member:
    return Member(name, f'life of {name}', beat, age, 'active', 1.0)


def leadership() -> Leadership:
    return Leadership(Liveness(TIMEOUT, 7.5), TIMEOUT, 7.5, POLL)


def asks(duties: Leadership, now: float, *, has_lease: bool = True) -> Duty | None:
    """What this node sends now."""
    asked, _ = first_due(duties.agenda(Life('me', 'life of me'), now, has_lease), now)
    assert asked is None or isinstance(asked, Duty)
    return asked


def wakes(duties: Leadership, now: float) -> float:
    """When it may have something to send."""
    return first_due(duties.agenda(Life('me', 'life of me'), now, True), now)[1]


def seen(
    duties: Leadership,
    now: float,
    *members: Member,
    stale: bool = False,
    next_expiry: float | None = None,
) -> bool:
    return duties.observed(ObserveReply(members, 1, stale, next_expiry), 'life of me', now)


ELDER, ME, YOUNGER = member('elder', age=1.0), member('me', age=2.0), member('younger', age=3.0)


def test_nobody_looks_before_its_age_is_known() -> None:
    duties = leadership()
    assert duties.rank(0.0) is None
    assert asks(duties, 0.0) is None
    assert wakes(duties, 0.0) == float('inf')


def test_another_thread_may_ask_for_the_rank_while_the_agent_begins_anew() -> None:
    duties = leadership()

    class Dying:
        def is_dead(self, sign: Sign, now: float) -> bool:
            duties.start_anew()
            return False

    duties.heard(tuple(Sign(str(number), 'x', 1) for number in range(ELDERS)), 0.0)
    duties.liveness = Dying()  # type: ignore[assignment]
    assert duties.rank(0.0) == ELDERS
    assert duties.rank(0.0) is None


def test_the_third_node_has_no_duty() -> None:
    duties = leadership()
    duties.heard((Sign('a', 'x', 1), Sign('b', 'y', 1)), 0.0)
    assert duties.rank(0.0) == 2
    assert asks(duties, 100.0) is None


def test_the_successor_looks_and_does_not_lead() -> None:
    duties = leadership()
    assert seen(duties, 0.0, ELDER, ME, YOUNGER, stale=True)
    assert asks(duties, 0.1) is None
    assert asks(duties, POLL) == Observe()


def test_the_leader_plans_at_once_what_has_changed_and_waits_a_moment_for_more_joins() -> None:
    duties = leadership()
    seen(duties, 0.0, ME, stale=True)
    assert asks(duties, 0.05) is None, 'the first look shows new nodes: more may be coming'
    assert isinstance(asks(duties, 0.11), Lead)
    duties.led(RoundReply(True, 2), 0.2)
    seen(duties, 1.0, ME, stale=True)
    assert isinstance(asks(duties, 1.0), Lead), 'no new node: nothing to wait for'


def test_without_a_lease_nobody_leads() -> None:
    duties = leadership()
    seen(duties, 0.0, ME, stale=True)
    assert asks(duties, 0.5, has_lease=False) is None
    assert asks(duties, POLL, has_lease=False) == Observe()


def test_the_successor_leads_when_the_leader_has_been_silent_for_the_whole_timeout() -> None:
    duties = leadership()
    now = 0.0
    while now < TIMEOUT:
        seen(duties, now, ELDER, ME)
        assert duties.rank(now) == 1
        now += POLL
    seen(duties, TIMEOUT, ELDER, ME)
    assert duties.rank(TIMEOUT) == 0
    asked = asks(duties, TIMEOUT)
    assert asked == Evict('me', 'life of me', (Sign('elder', 'life of elder', 1),))
    duties.evicted(asked, EvictReply(True, ('elder',)), TIMEOUT)
    assert asks(duties, TIMEOUT) == Lead('me', 'life of me', (), DEATHS)


def test_an_eviction_that_found_one_of_the_dead_alive_is_not_repeated_before_a_look() -> None:
    duties = leadership()
    now = 0.0
    while now <= TIMEOUT:
        seen(duties, now, ME, YOUNGER)
        now += POLL
    asked = asks(duties, TIMEOUT)
    assert isinstance(asked, Evict)
    duties.evicted(asked, EvictReply(True), TIMEOUT)
    assert asks(duties, TIMEOUT) == Observe()


def dead_for_the_leader(*members: Member) -> Leadership:
    """A leadership that has just found these dead."""
    duties = leadership()
    now = 0.0
    while now <= TIMEOUT:
        seen(duties, now, ME, *members)
        now += POLL
    return duties


def test_evictions_and_plans_fail_each_for_itself_and_are_tried_again_later_and_later() -> None:
    duties = dead_for_the_leader(YOUNGER)
    now = TIMEOUT
    evictions: list[float] = []
    plans: list[float] = []
    while now < 1.5 * TIMEOUT:
        asked = asks(duties, now)
        if asked == Observe():
            seen(duties, now, ME, YOUNGER, stale=True)
        elif asked is not None:
            assert isinstance(asked, (Evict, Lead))
            (evictions if isinstance(asked, Evict) else plans).append(now)
            duties.failed(asked, now)
        else:
            later = wakes(duties, now)
            assert later > now
            now = later
    assert 4 <= len(evictions) < 10 and 4 <= len(plans) < 10
    assert evictions[1] - evictions[0] < evictions[-1] - evictions[-2]


def test_where_evictions_fail_they_are_tried_one_by_one() -> None:
    other = member('other', age=4.0)
    duties = dead_for_the_leader(YOUNGER, other)
    first = asks(duties, TIMEOUT)
    assert isinstance(first, Evict) and len(first.dead) == 2
    duties.failed(first, TIMEOUT)
    names: set[str] = set()
    now = TIMEOUT
    while len(names) < 2:
        now += 0.1
        asked = asks(duties, now)
        if isinstance(asked, Evict):
            assert len(asked.dead) == 2 and asked.only is not None
            names.add(asked.only.name)
            duties.failed(asked, now)
        elif asked is not None:
            seen(duties, now, ME, YOUNGER, other)


def failing(duties: Leadership, until: float, *members: Member) -> StepDown | None:
    """Let each round fail until a moment; the stepping down, if it comes to that."""
    now = 0.0
    while now < until:
        asked = asks(duties, now)
        if asked == Observe():
            seen(duties, now, *members, stale=True)
        elif isinstance(asked, StepDown):
            return asked
        elif asked is not None:
            duties.failed(asked, now)
        now = max(now + 0.001, wakes(duties, now))
    return None


def test_a_leader_whose_rounds_fail_for_a_timeout_steps_down_and_one_alone_does_not() -> None:
    duties = leadership()
    seen(duties, 0.0, ME, YOUNGER, stale=True)
    assert failing(duties, 0.95 * TIMEOUT, ME, YOUNGER) is None
    assert failing(duties, 1.3 * TIMEOUT, ME, YOUNGER) is not None
    alone = leadership()
    seen(alone, 0.0, ME, stale=True)
    assert failing(alone, 3 * TIMEOUT, ME) is None


def test_a_round_that_works_forgives_the_failures_before() -> None:
    duties = leadership()
    seen(duties, 0.0, ME, YOUNGER, stale=True)
    failing(duties, 0.9 * TIMEOUT, ME, YOUNGER)
    duties.led(RoundReply(True, 2), 0.9 * TIMEOUT)
    assert failing(duties, 0.9 * TIMEOUT, ME, YOUNGER) is None


def signs(*names: str) -> tuple[Sign, ...]:
    return tuple(Sign(name, f'life of {name}', 1) for name in names)


def test_whoever_hears_of_as_many_older_nodes_as_a_heartbeat_names_is_no_successor() -> None:
    duties = leadership()
    duties.heard(signs(*'abcd'), 0.0)
    assert len(signs(*'abcd')) == ELDERS
    assert duties.rank(0.0) == ELDERS
    assert asks(duties, 0.0) is None
    duties.heard(signs(*'ab'), 1.0)
    assert duties.rank(1.0) == 2 and asks(duties, 1.0) is None


def test_where_all_that_a_heartbeat_names_are_dead_it_looks_before_it_leads() -> None:
    duties = leadership()
    now = 0.0
    while now < TIMEOUT:
        duties.heard(signs(*'abcd'), now)
        now += 5.0
    duties.heard(signs(*'abcd'), TIMEOUT)
    assert duties.rank(TIMEOUT) is None
    assert asks(duties, TIMEOUT) == Observe()
    oldest = [member(name, age=0.1 * place) for place, name in enumerate('abcde')]
    seen(duties, TIMEOUT, *oldest, ME)
    assert duties.rank(TIMEOUT) == 1, 'e lives'


def test_the_third_oldest_leads_when_two_have_been_silent_for_the_timeout() -> None:
    duties = leadership()
    now = 0.0
    while now < TIMEOUT:
        duties.heard(signs('a', 'b'), now)
        assert duties.rank(now) == 2
        now += 5.0
    assert wakes(duties, now - 0.001) == TIMEOUT, (
        'it wakes for their death, which it knows of from its heartbeats'
    )
    assert asks(duties, TIMEOUT) == Observe()


def test_a_look_that_took_long_is_followed_by_a_longer_rest() -> None:
    duties = leadership()
    duties.observed(ObserveReply((ME,), 1, False, None), 'life of me', 1.0, took=0.5)
    assert wakes(duties, 1.0) == 2.5


def test_an_expiry_is_looked_at_when_it_is_due() -> None:
    duties = leadership()
    seen(duties, 0.0, ME, next_expiry=0.3)
    assert wakes(duties, 0.0) == 0.3
    assert asks(duties, 0.3) == Observe()
    seen(duties, 0.3, ME, next_expiry=-0.001)
    assert isinstance(asks(duties, 0.3), Lead)


def test_whoever_is_not_in_the_table_is_told() -> None:
    assert not seen(leadership(), 0.0, ELDER)
