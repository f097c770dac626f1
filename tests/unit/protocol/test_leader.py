"""The leader's round: who may be asked for what, and that a round without news changes nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.assignment.model import Member, Segment
from jobsync_core.assignment.patterns import eligible
from jobsync_core.assignment.round import Decision, Pin, decide

Case: TypeAlias = 'tuple[list[Member], list[Segment], list[Pin], int]'

NAMES = ['a-1', 'a-2', 'b-1', 'b-2']
PATTERNS = [('a-%',), ('b-1', 'b-%'), ('nobody', '%-2'), ('nobody',), ('%',), ('a-1',)]
quick = settings(deadline=None, max_examples=200)


def member(name: str, state: str = 'active', weight: float = 1.0) -> Member:
    return Member(name, 'incarnation', 0, 0.0, state, weight)


def members(*names: str) -> list[Member]:
    return [member(name) for name in names]


def by_token(rows: Iterable[Segment]) -> dict[int, Segment]:
    return {token: replace(row, lo=0, hi=0) for row in rows for token in range(row.lo, row.hi)}


def given_away(rows: Iterable[Segment], version: int) -> list[Segment]:
    """The rows after every owner gave what it was asked for."""
    return [
        replace(row, node=row.moving_to, moving=False, moving_to=None, version=version)
        if row.moving
        else row
        for row in rows
    ]


def activated(present: Sequence[Member], decision: Decision) -> list[Member]:
    return [
        replace(one, state='active') if one.name in decision.activate else one for one in present
    ]


def receivers(present: Sequence[Member], decision: Decision) -> dict[str, float]:
    return {
        one.name: one.weight
        for one in activated(present, decision)
        if one.state == 'active' and one.weight > 0
    }


@st.composite
def rows(draw: st.DrawFn, total: int, names: Sequence[str]) -> list[Segment]:
    """Rows as the table may hold them, and of nodes just deleted; the receiver of a moving row may
    have been deleted too.
    """
    found: list[Segment] = []
    at = 0
    while at < total and len(found) < 10:
        hi = min(total, at + draw(st.integers(1, 15)))
        node = draw(st.sampled_from([*names, 'gone', None]))
        kind = draw(
            st.sampled_from(
                ['kept', 'moving', 'orphaned', 'blocked'] if node else ['kept', 'blocked', 'gap']
            )
        )
        version = draw(st.integers(1, 3))
        if kind == 'moving':
            other = draw(st.sampled_from([name for name in NAMES if name != node]))
            found.append(
                Segment(at, hi, node, True, other if other in names else None, False, version)
            )
        elif kind != 'gap':
            moving = node is not None and kind != 'kept'
            found.append(Segment(at, hi, node, moving, None, kind == 'blocked', version))
        at = hi
    return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    total = draw(st.integers(1, 40))
    states = st.sampled_from(['active', 'active', 'active', 'draining', 'joining'])
    present = [
        member(name, draw(states), draw(st.sampled_from([1.0, 1.0, 2.0, 0.0])))
        for name in draw(st.lists(st.sampled_from(NAMES), unique=True))
    ]
    segments = draw(rows(total, [one.name for one in present if one.state != 'joining']))
    pins = [
        Pin(
            f'task-{number}',
            draw(st.integers(0, total - 1)),
            draw(st.sampled_from(PATTERNS)),
            draw(st.sampled_from([1.0, 2.0])),
        )
        for number in range(draw(st.integers(0, 8)))
    ]
    return present, segments, pins, total


@quick
@given(cases())
def test_a_round_without_news_changes_nothing(case: Case) -> None:
    present, segments, pins, total = case
    first = decide(present, segments, pins, total, 10)
    second = decide(activated(present, first), first.segments, pins, total, 11)
    assert second.segments == first.segments
    assert (second.activate, second.moved, second.assigned) == ((), 0, 0)
    assert second.blocked == first.blocked and second.conflicts == first.conflicts


@quick
@given(cases())
def test_when_all_was_given_away_the_next_round_changes_nothing(case: Case) -> None:
    present, segments, pins, total = case
    # Once nobody owns anything, joining nodes become active: that would be news.
    present = [one for one in present if one.state != 'joining']
    first = decide(present, segments, pins, total, 10)
    rows = given_away(first.segments, 11)
    second = decide(present, rows, pins, total, 12)
    assert (second.moved, second.assigned) == (0, 0)
    assert by_token(second.segments) == by_token(rows)


@quick
@given(cases())
def test_nobody_takes_a_token_from_its_live_owner(case: Case) -> None:
    present, segments, pins, total = case
    live = {one.name for one in present}
    before = by_token(segments)
    for token, row in by_token(decide(present, segments, pins, total, 10).segments).items():
        if token in before and before[token].node in live:
            assert row.node == before[token].node


@quick
@given(cases())
def test_every_token_has_one_row_and_neighbours_differ(case: Case) -> None:
    present, segments, pins, total = case
    planned = decide(present, segments, pins, total, 10).segments
    assert [row.lo for row in planned] == [0, *(row.hi for row in planned[:-1])] and planned[
        -1
    ].hi == total
    assert all(
        replace(one, lo=0, hi=0) != replace(other, lo=0, hi=0)
        for one, other in itertools.pairwise(planned)
    )


@quick
@given(cases())
def test_a_row_keeps_its_version_exactly_where_nothing_changed(case: Case) -> None:
    present, segments, pins, total = case
    before = by_token(segments)
    for token, row in by_token(decide(present, segments, pins, total, 10).segments).items():
        old = before.get(token)
        same = old is not None and replace(old, version=0) == replace(row, version=0)
        assert row.version == (old.version if old is not None and same else 10)


@quick
@given(cases())
def test_only_active_nodes_of_some_weight_receive_and_blocked_means_nobody_may(case: Case) -> None:
    present, segments, pins, total = case
    before = by_token(segments)
    live = {one.name for one in present}
    decision = decide(present, segments, pins, total, 10)
    may = receivers(present, decision)
    for token, row in by_token(decision.segments).items():
        kept = token in before and before[token].node in live
        target = row.moving_to if row.moving else row.node
        assert row.blocked == (target is None)
        assert target is None or target in may
        assert row.moving == (kept and target != row.node)
        sets = [eligible(pin.patterns, may) for pin in pins if pin.token == token]
        if len(sets) == 1:
            assert (target in sets[0]) if sets[0] else row.blocked
        elif not sets:
            assert row.blocked == (not may)


@quick
@given(cases())
def test_the_counts_are_those_of_the_rows(case: Case) -> None:
    present, segments, pins, total = case
    before = by_token(segments)
    live = {one.name for one in present}
    decision = decide(present, segments, pins, total, 10)
    after = by_token(decision.segments)
    unowned = [
        token for token in range(total) if token not in before or before[token].node not in live
    ]
    assert decision.assigned == sum(after[token].node is not None for token in unowned)
    assert decision.blocked == sum(row.blocked for row in after.values())
    assert decision.moved <= total - len(unowned)


@quick
@given(cases(), st.randoms(use_true_random=False))
def test_the_decision_does_not_depend_on_the_order_of_rows(case: Case, random: Random) -> None:
    present, segments, pins, total = case
    decision = decide(present, segments, pins, total, 10)
    shuffled = list(present), list(segments), list(pins)
    for some in shuffled:
        random.shuffle(some)
    assert decide(*shuffled, total, 10) == decision


def test_the_first_plan_includes_everybody_who_registered() -> None:
    present = [member('a'), member('b', 'joining'), member('c', 'joining')]
    decision = decide(present, [], [], 9, 1)
    assert decision.activate == ('b', 'c')
    assert Counter(row.node for row in by_token(decision.segments).values()) == {
        'a': 3,
        'b': 3,
        'c': 3,
    }
    assert (decision.moved, decision.assigned, decision.blocked) == (0, 9, 0)


def test_before_anybody_is_active_nothing_is_planned() -> None:
    decision = decide([member('a', 'joining')], [], [], 9, 1)
    assert decision.activate == () and decision.segments == (
        Segment(0, 9, None, blocked=True, version=1),
    )


def test_a_joiner_waits_in_a_cluster_that_is_formed() -> None:
    decision = decide(
        [member('a'), member('b', 'joining')], [Segment(0, 9, 'a', version=1)], [], 9, 2
    )
    assert decision.activate == () and decision.segments == (Segment(0, 9, 'a', version=1),)


def test_joiners_take_over_when_every_owner_is_dead() -> None:
    decision = decide(
        [member('b', 'joining'), member('c')], [Segment(0, 8, None, version=1)], [], 8, 2
    )
    assert decision.activate == ('b',) and decision.assigned == 8


def test_a_new_node_is_promised_tokens_by_their_owner() -> None:
    decision = decide(members('a', 'b'), [Segment(0, 10, 'a', version=1)], [], 10, 2)
    assert decision.segments == (
        Segment(0, 5, 'a', version=1),
        Segment(5, 10, 'a', True, 'b', version=2),
    )
    assert (decision.moved, decision.assigned) == (5, 0)


def test_the_tokens_of_a_dead_node_change_hands_at_once() -> None:
    rows = [
        Segment(0, 4, 'a', version=1),
        Segment(4, 8, 'b', version=1),
        Segment(8, 12, None, version=1),
    ]
    decision = decide(members('a', 'b'), rows, [], 12, 2)
    assert Counter(row.node for row in by_token(decision.segments).values()) == {'a': 6, 'b': 6}
    assert (decision.moved, decision.assigned) == (0, 4)


def test_a_move_under_way_goes_on_to_the_same_receiver() -> None:
    rows = [Segment(0, 5, 'a', version=1), Segment(5, 10, 'a', True, 'b', version=2)]
    assert decide(members('a', 'b'), rows, [], 10, 3).segments == tuple(rows)


def test_a_move_to_a_node_that_died_is_taken_back() -> None:
    rows = [Segment(0, 5, 'a', version=1), Segment(5, 10, 'a', True, None, version=2)]
    decision = decide(members('a'), rows, [], 10, 3)
    assert (
        decision.segments == (Segment(0, 5, 'a', version=1), Segment(5, 10, 'a', version=3))
        and decision.moved == 0
    )


def test_a_move_to_a_node_that_drains_goes_elsewhere() -> None:
    rows = [Segment(0, 5, 'a', version=1), Segment(5, 10, 'a', True, 'b', version=2)]
    decision = decide([member('a'), member('b', 'draining'), member('c')], rows, [], 10, 3)
    assert Counter(row.moving_to for row in by_token(decision.segments).values()) == {
        None: 5,
        'c': 5,
    }


def test_a_move_to_the_only_other_node_is_taken_back_when_that_one_drains() -> None:
    rows = [Segment(0, 5, 'a', version=1), Segment(5, 10, 'a', True, 'b', version=2)]
    decision = decide([member('a'), member('b', 'draining')], rows, [], 10, 3)
    assert (
        decision.segments == (Segment(0, 5, 'a', version=1), Segment(5, 10, 'a', version=3))
        and decision.moved == 0
    )


def test_a_token_whose_receiver_a_new_lock_excludes_stays_where_it_is_if_that_is_allowed() -> None:
    rows = [
        Segment(0, 5, 'x-2', version=1),
        Segment(5, 9, 'x-2', True, 'b', version=2),
        Segment(9, 12, 'x-1', version=1),
    ]
    decision = decide(members('x-1', 'x-2', 'b'), rows, [Pin('t', 7, ('x-%',), 1.0)], 12, 3)
    assert by_token(decision.segments)[7] == Segment(0, 0, 'x-2', version=3)


def test_a_fallback_pattern_counts_when_the_first_matches_a_node_of_weight_zero_alone() -> None:
    decision = decide(
        [member('a', weight=0.0), member('b')], [], [Pin('t', 3, ('a', 'b'), 1.0)], 8, 1
    )
    assert by_token(decision.segments)[3] == Segment(0, 0, 'b', version=1)


def test_a_move_to_a_node_that_a_new_lock_excludes_is_taken_back_for_the_locked_token_alone() -> (
    None
):
    rows = [Segment(0, 5, 'a', version=1), Segment(5, 10, 'a', True, 'b', version=2)]
    decision = decide(members('a', 'b'), rows, [Pin('t', 7, ('a',), 1.0)], 10, 3)
    after = by_token(decision.segments)
    assert after[7] == Segment(0, 0, 'a', version=3)
    assert [token for token, row in after.items() if row.moving_to == 'b' and row.version == 2] == [
        5,
        6,
        8,
        9,
    ]


def test_a_draining_node_gives_everything_away() -> None:
    decision = decide(
        [member('a', 'draining'), member('b')],
        [Segment(0, 6, 'a', version=1), Segment(6, 8, 'b', version=1)],
        [],
        8,
        2,
    )
    assert decision.segments == (
        Segment(0, 6, 'a', True, 'b', version=2),
        Segment(6, 8, 'b', version=1),
    )


def test_the_last_node_gives_to_nobody_when_it_drains() -> None:
    decision = decide([member('a', 'draining')], [Segment(0, 8, 'a', version=1)], [], 8, 2)
    assert decision.segments == (Segment(0, 8, 'a', True, None, blocked=True, version=2),)
    assert (decision.moved, decision.blocked) == (8, 8)


def test_a_lock_without_a_live_match_takes_its_token_from_its_owner_and_blocks_it() -> None:
    decision = decide(
        members('a'), [Segment(0, 8, 'a', version=1)], [Pin('t', 3, ('gpu-%',), 1.0)], 8, 2
    )
    assert by_token(decision.segments)[3] == Segment(0, 0, 'a', True, None, blocked=True, version=2)
    after = decide(
        members('a'), given_away(decision.segments, 3), [Pin('t', 3, ('gpu-%',), 1.0)], 8, 4
    )
    assert by_token(after.segments)[3].node is None and after.blocked == 1


def test_a_blocked_token_is_assigned_when_a_matching_node_comes() -> None:
    rows = [
        Segment(0, 3, 'a', version=1),
        Segment(3, 4, None, blocked=True, version=1),
        Segment(4, 8, 'a', version=1),
    ]
    decision = decide(members('a', 'gpu-1'), rows, [Pin('t', 3, ('gpu-%',), 1.0)], 8, 2)
    assert by_token(decision.segments)[3] == Segment(0, 0, 'gpu-1', version=2)


def test_a_fallback_pattern_counts_when_no_active_node_matches_the_first() -> None:
    present = [member('gpu-primary', 'draining'), member('b-gpu'), member('c')]
    decision = decide(present, [], [Pin('t', 3, ('gpu-primary', '%-gpu'), 1.0)], 8, 1)
    assert by_token(decision.segments)[3].node == 'b-gpu'


def test_two_locks_on_a_token_meet_in_the_nodes_that_both_allow() -> None:
    pins = [Pin('t', 3, ('a-%',), 1.0), Pin('u', 3, ('%-2',), 2.0)]
    decision = decide(members(*NAMES), [Segment(0, 8, 'b-2', version=1)], pins, 8, 2)
    assert by_token(decision.segments)[3].moving_to == 'a-2' and decision.conflicts == ()


def test_of_two_locks_that_exclude_each_other_the_older_counts_and_the_conflict_is_told() -> None:
    pins = [Pin('t', 3, ('a-%',), 2.0), Pin('u', 3, ('b-%',), 1.0)]
    decision = decide(members(*NAMES), [], pins, 8, 1)
    assert by_token(decision.segments)[3].node in ('b-1', 'b-2')
    [conflict] = decision.conflicts
    for part in ('token 3', "'t'", "'u'", 'clear one of the locks'):
        assert part in conflict


def test_locks_that_match_nobody_do_not_conflict() -> None:
    assert (
        decide(
            members('a'), [], [Pin('t', 3, ('x',), 1.0), Pin('u', 3, ('y',), 2.0)], 8, 1
        ).conflicts
        == ()
    )


def test_rows_beyond_the_tokens_of_the_cluster_are_dropped() -> None:
    decision = decide(
        members('a'), [Segment(0, 20, 'a', version=1)], [Pin('t', 15, ('b',), 1.0)], 8, 2
    )
    assert decision.segments == (Segment(0, 8, 'a', version=1),)
