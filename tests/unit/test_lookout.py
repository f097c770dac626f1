"""The leader and its successor: who looks, and when a round is asked for."""
from __future__ import annotations

from jobsync_core.lookout import Lookout
from jobsync_core.messages import Lead, Led, Member, Observe, Observed, Sign

TIMEOUT, POLL = 15.0, 0.75


def member(name: str, beat: int = 1, age: float = 0.0) -> Member:
    return Member(name, f'life of {name}', beat, age, 'active', 1.0)


def lookout() -> Lookout:
    return Lookout(TIMEOUT, 7.5, POLL)


def seen(watch: Lookout, now: float, *members: Member, stale: bool = False, next_expiry: float | None = None) -> bool:
    return watch.observed(Observed(members, 1, stale, next_expiry), 'life of me', now)


ELDER, ME, YOUNGER = member('elder', age=1.0), member('me', age=2.0), member('younger', age=3.0)


def test_nobody_looks_before_its_age_is_known() -> None:
    watch = lookout()
    assert watch.rank(0.0) is None
    assert watch.duty('me', 'life of me', 0.0, True) is None
    assert watch.wake_at(0.0, True) == float('inf')


def test_the_third_node_has_no_duty() -> None:
    watch = lookout()
    watch.heard((Sign('a', 'x', 1), Sign('b', 'y', 1)), 0.0)
    assert watch.rank(0.0) == 2
    assert watch.duty('me', 'life of me', 100.0, True) is None


def test_the_successor_looks_and_does_not_lead() -> None:
    watch = lookout()
    assert seen(watch, 0.0, ELDER, ME, YOUNGER, stale=True)
    assert watch.duty('me', 'life of me', 0.1, True) is None
    assert watch.duty('me', 'life of me', POLL, True) == Observe()


def test_the_leader_plans_at_once_what_has_changed_and_waits_a_moment_for_more_joins() -> None:
    watch = lookout()
    seen(watch, 0.0, ME, stale=True)
    assert watch.duty('me', 'life of me', 0.05, True) is None, 'the first look shows new nodes: more may be coming'
    assert isinstance(watch.duty('me', 'life of me', 0.11, True), Lead)
    watch.led(Lead('me', 'life of me', (), ''), Led(True, 2), 0.2)
    seen(watch, 1.0, ME, stale=True)
    assert isinstance(watch.duty('me', 'life of me', 1.0, True), Lead), 'no new node: nothing to wait for'


def test_without_a_lease_nobody_leads() -> None:
    watch = lookout()
    seen(watch, 0.0, ME, stale=True)
    assert watch.duty('me', 'life of me', 0.5, False) is None
    assert watch.duty('me', 'life of me', POLL, False) == Observe()


def test_the_successor_leads_when_the_leader_has_been_silent_for_the_whole_timeout() -> None:
    watch = lookout()
    now = 0.0
    while now < TIMEOUT:
        seen(watch, now, ELDER, ME)
        assert watch.rank(now) == 1
        now += POLL
    seen(watch, TIMEOUT, ELDER, ME)
    assert watch.rank(TIMEOUT) == 0
    asked = watch.duty('me', 'life of me', TIMEOUT, True)
    assert isinstance(asked, Lead)
    assert asked.dead == (Sign('elder', 'life of elder', 1),)


def test_a_round_that_found_one_of_the_dead_alive_is_not_repeated_before_a_look() -> None:
    watch = lookout()
    now = 0.0
    while now <= TIMEOUT:
        seen(watch, now, ME, YOUNGER)
        now += POLL
    asked = watch.duty('me', 'life of me', TIMEOUT, True)
    assert isinstance(asked, Lead) and asked.dead
    watch.led(asked, Led(True, 1), TIMEOUT)
    assert watch.duty('me', 'life of me', TIMEOUT, True) == Observe()


def test_an_expiry_is_looked_at_when_it_is_due() -> None:
    watch = lookout()
    seen(watch, 0.0, ME, next_expiry=0.3)
    assert watch.wake_at(0.0, True) == 0.3
    assert watch.duty('me', 'life of me', 0.3, True) == Observe()
    seen(watch, 0.3, ME, next_expiry=-0.001)
    assert isinstance(watch.duty('me', 'life of me', 0.3, True), Lead)


def test_whoever_is_not_in_the_table_is_told() -> None:
    assert not seen(lookout(), 0.0, ELDER)
