"""The leader and its successor: who looks, and when a round is asked for."""

from __future__ import annotations

from jobsync_core.assignment.model import Member
from jobsync_core.protocol.leadership import Leadership
from jobsync_core.protocol.messages import (
    DEATHS,
    ELDERS,
    Evict,
    EvictReply,
    Lead,
    Observe,
    ObserveReply,
    RoundReply,
    Sign,
    StepDown,
)

TIMEOUT, POLL = 15.0, 0.75


def member(name: str, beat: int = 1, age: float = 0.0) -> Member:
    return Member(name, f'life of {name}', beat, age, 'active', 1.0)


def leadership() -> Leadership:
    return Leadership(TIMEOUT, 7.5, POLL)


def seen(
    leads: Leadership,
    now: float,
    *members: Member,
    stale: bool = False,
    next_expiry: float | None = None,
) -> bool:
    return leads.observed(ObserveReply(members, 1, stale, next_expiry), 'life of me', now)


ELDER, ME, YOUNGER = member('elder', age=1.0), member('me', age=2.0), member('younger', age=3.0)


def test_nobody_looks_before_its_age_is_known() -> None:
    leads = leadership()
    assert leads.rank(0.0) is None
    assert leads.duty('me', 'life of me', 0.0, True) is None
    assert leads.wake_at(0.0, True) == float('inf')


def test_the_third_node_has_no_duty() -> None:
    leads = leadership()
    leads.heard((Sign('a', 'x', 1), Sign('b', 'y', 1)), 0.0)
    assert leads.rank(0.0) == 2
    assert leads.duty('me', 'life of me', 100.0, True) is None


def test_the_successor_looks_and_does_not_lead() -> None:
    leads = leadership()
    assert seen(leads, 0.0, ELDER, ME, YOUNGER, stale=True)
    assert leads.duty('me', 'life of me', 0.1, True) is None
    assert leads.duty('me', 'life of me', POLL, True) == Observe()


def test_the_leader_plans_at_once_what_has_changed_and_waits_a_moment_for_more_joins() -> None:
    leads = leadership()
    seen(leads, 0.0, ME, stale=True)
    assert leads.duty('me', 'life of me', 0.05, True) is None, (
        'the first look shows new nodes: more may be coming'
    )
    assert isinstance(leads.duty('me', 'life of me', 0.11, True), Lead)
    leads.led(RoundReply(True, 2), 0.2)
    seen(leads, 1.0, ME, stale=True)
    assert isinstance(leads.duty('me', 'life of me', 1.0, True), Lead), (
        'no new node: nothing to wait for'
    )


def test_without_a_lease_nobody_leads() -> None:
    leads = leadership()
    seen(leads, 0.0, ME, stale=True)
    assert leads.duty('me', 'life of me', 0.5, False) is None
    assert leads.duty('me', 'life of me', POLL, False) == Observe()


def test_the_successor_leads_when_the_leader_has_been_silent_for_the_whole_timeout() -> None:
    leads = leadership()
    now = 0.0
    while now < TIMEOUT:
        seen(leads, now, ELDER, ME)
        assert leads.rank(now) == 1
        now += POLL
    seen(leads, TIMEOUT, ELDER, ME)
    assert leads.rank(TIMEOUT) == 0
    asked = leads.duty('me', 'life of me', TIMEOUT, True)
    assert asked == Evict('me', 'life of me', (Sign('elder', 'life of elder', 1),))
    leads.evicted(asked, EvictReply(True, ('elder',)), TIMEOUT)
    assert leads.duty('me', 'life of me', TIMEOUT, True) == Lead('me', 'life of me', (), DEATHS)


def test_an_eviction_that_found_one_of_the_dead_alive_is_not_repeated_before_a_look() -> None:
    leads = leadership()
    now = 0.0
    while now <= TIMEOUT:
        seen(leads, now, ME, YOUNGER)
        now += POLL
    asked = leads.duty('me', 'life of me', TIMEOUT, True)
    assert isinstance(asked, Evict)
    leads.evicted(asked, EvictReply(True), TIMEOUT)
    assert leads.duty('me', 'life of me', TIMEOUT, True) == Observe()


def dead_for_the_leader(*members: Member) -> Leadership:
    """A leadership that has just found these dead."""
    leads = leadership()
    now = 0.0
    while now <= TIMEOUT:
        seen(leads, now, ME, *members)
        now += POLL
    return leads


def test_evictions_and_plans_fail_each_for_itself_and_are_tried_again_later_and_later() -> None:
    leads = dead_for_the_leader(YOUNGER)
    now = TIMEOUT
    evictions: list[float] = []
    plans: list[float] = []
    while now < 1.5 * TIMEOUT:
        asked = leads.duty('me', 'life of me', now, True)
        if asked == Observe():
            seen(leads, now, ME, YOUNGER, stale=True)
        elif asked is not None:
            assert isinstance(asked, (Evict, Lead))
            (evictions if isinstance(asked, Evict) else plans).append(now)
            leads.failed(asked, now)
        else:
            later = leads.wake_at(now, True)
            assert later > now
            now = later
    assert 4 <= len(evictions) < 10 and 4 <= len(plans) < 10
    assert evictions[1] - evictions[0] < evictions[-1] - evictions[-2]


def test_where_evictions_fail_they_are_tried_one_by_one() -> None:
    other = member('other', age=4.0)
    leads = dead_for_the_leader(YOUNGER, other)
    first = leads.duty('me', 'life of me', TIMEOUT, True)
    assert isinstance(first, Evict) and len(first.dead) == 2
    leads.failed(first, TIMEOUT)
    names: set[str] = set()
    now = TIMEOUT
    while len(names) < 2:
        now += 0.1
        asked = leads.duty('me', 'life of me', now, True)
        if isinstance(asked, Evict):
            assert len(asked.dead) == 2 and asked.only is not None
            names.add(asked.only.name)
            leads.failed(asked, now)
        elif asked is not None:
            seen(leads, now, ME, YOUNGER, other)


def failing(leads: Leadership, until: float, *members: Member) -> StepDown | None:
    """Let each round fail until a moment; the stepping down, if it comes to that."""
    now = 0.0
    while now < until:
        asked = leads.duty('me', 'life of me', now, True)
        if asked == Observe():
            seen(leads, now, *members, stale=True)
        elif isinstance(asked, StepDown):
            return asked
        elif asked is not None:
            leads.failed(asked, now)
        now = max(now + 0.001, leads.wake_at(now, True))
    return None


def test_a_leader_whose_rounds_fail_for_a_timeout_steps_down_and_one_alone_does_not() -> None:
    leads = leadership()
    seen(leads, 0.0, ME, YOUNGER, stale=True)
    assert failing(leads, 0.95 * TIMEOUT, ME, YOUNGER) is None
    assert failing(leads, 1.3 * TIMEOUT, ME, YOUNGER) is not None
    alone = leadership()
    seen(alone, 0.0, ME, stale=True)
    assert failing(alone, 3 * TIMEOUT, ME) is None


def test_a_round_that_works_forgives_the_failures_before() -> None:
    leads = leadership()
    seen(leads, 0.0, ME, YOUNGER, stale=True)
    failing(leads, 0.9 * TIMEOUT, ME, YOUNGER)
    leads.led(RoundReply(True, 2), 0.9 * TIMEOUT)
    assert failing(leads, 0.9 * TIMEOUT, ME, YOUNGER) is None


def signs(*names: str) -> tuple[Sign, ...]:
    return tuple(Sign(name, f'life of {name}', 1) for name in names)


def test_whoever_hears_of_as_many_older_nodes_as_a_heartbeat_names_is_no_successor() -> None:
    leads = leadership()
    leads.heard(signs(*'abcd'), 0.0)
    assert len(signs(*'abcd')) == ELDERS
    assert leads.rank(0.0) == ELDERS
    assert leads.duty('me', 'life of me', 0.0, True) is None
    leads.heard(signs(*'ab'), 1.0)
    assert leads.rank(1.0) == 2 and leads.duty('me', 'life of me', 1.0, True) is None


def test_where_all_that_a_heartbeat_names_are_dead_it_looks_before_it_leads() -> None:
    leads = leadership()
    now = 0.0
    while now < TIMEOUT:
        leads.heard(signs(*'abcd'), now)
        now += 5.0
    leads.heard(signs(*'abcd'), TIMEOUT)
    assert leads.rank(TIMEOUT) is None
    assert leads.duty('me', 'life of me', TIMEOUT, True) == Observe()
    oldest = [member(name, age=0.1 * place) for place, name in enumerate('abcde')]
    seen(leads, TIMEOUT, *oldest, ME)
    assert leads.rank(TIMEOUT) == 1, 'e lives'


def test_the_third_oldest_leads_when_two_have_been_silent_for_the_timeout() -> None:
    leads = leadership()
    now = 0.0
    while now < TIMEOUT:
        leads.heard(signs('a', 'b'), now)
        assert leads.rank(now) == 2
        now += 5.0
    assert leads.wake_at(now - 0.001, True) == TIMEOUT, (
        'it wakes for their death, which it knows of from its heartbeats'
    )
    assert leads.duty('me', 'life of me', TIMEOUT, True) == Observe()


def test_a_look_that_took_long_is_followed_by_a_longer_rest() -> None:
    leads = leadership()
    leads.observed(ObserveReply((ME,), 1, False, None), 'life of me', 1.0, took=0.5)
    assert leads.wake_at(1.0, True) == 2.5


def test_an_expiry_is_looked_at_when_it_is_due() -> None:
    leads = leadership()
    seen(leads, 0.0, ME, next_expiry=0.3)
    assert leads.wake_at(0.0, True) == 0.3
    assert leads.duty('me', 'life of me', 0.3, True) == Observe()
    seen(leads, 0.3, ME, next_expiry=-0.001)
    assert isinstance(leads.duty('me', 'life of me', 0.3, True), Lead)


def test_whoever_is_not_in_the_table_is_told() -> None:
    assert not seen(leadership(), 0.0, ELDER)
