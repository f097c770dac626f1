"""Queue groups: each has a window of the number line, and is planned as if it were alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.assignment.groups import (
    GROUP_SPAN,
    MOST_GROUPS,
    cut_by_group,
    group_of,
    shifted,
    window,
)
from jobsync_core.assignment.model import Member, Segment
from jobsync_core.assignment.round import Decision, Pin, decide
from jobsync_core.config import MAX_TOKENS

NAMES = ['a-1', 'a-2', 'b-1', 'b-2']
GROUPS = [(0,), (0, 1), (0, 2), (0, 1, 2)]
quick = settings(deadline=None, max_examples=200)


def member(name: str, *groups: int, state: str = 'active', weight: float = 1.0) -> Member:
    return Member(name, 'incarnation', 0, 0.0, state, weight, (0, *groups))


def rows_of(decision: Decision, group: int, total: int) -> tuple[Segment, ...]:
    """The rows of one group, with tokens from 0 on."""
    return tuple(cut_by_group(decision.segments, total).get(group, ()))


def counts_of(decision: Decision, group: int, total: int) -> Counter[str | None]:
    counts: Counter[str | None] = Counter()
    for row in rows_of(decision, group, total):
        counts[row.moving_to if row.moving else row.node] += row.hi - row.lo
    return counts


def given_away(decision: Decision) -> list[Segment]:
    """The rows after every owner gave what it was asked for."""
    return [
        replace(row, node=row.moving_to, moving=False, moving_to=None) if row.moving else row
        for row in decision.segments
    ]


@st.composite
def rings(draw: st.DrawFn, total: int) -> list[Segment]:
    """Rows as one group may have them, some of them missing."""
    found: list[Segment] = []
    at = 0
    while at < total:
        hi = min(total, at + draw(st.integers(1, 8)))
        node = draw(st.sampled_from([*NAMES, 'gone', None]))
        kind = draw(st.sampled_from(['kept', 'moving', 'blocked', 'gap']))
        if kind == 'moving' and node is not None:
            to = draw(st.sampled_from([name for name in NAMES if name != node]))
            found.append(Segment(at, hi, node, True, to, version=1))
        elif kind == 'blocked':
            found.append(Segment(at, hi, node, node is not None, None, True, version=1))
        elif kind == 'kept':
            found.append(Segment(at, hi, node, version=1))
        at = hi
    return found


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Member], dict[int, list[Segment]], list[Pin], int]:
    total = draw(st.integers(1, 24))
    states = st.sampled_from(['active', 'active', 'active', 'draining'])
    members = [
        Member(
            name,
            'incarnation',
            0,
            0.0,
            draw(states),
            draw(st.sampled_from([1.0, 1.0, 2.0, 0.0])),
            draw(st.sampled_from(GROUPS)),
        )
        for name in draw(st.lists(st.sampled_from(NAMES), unique=True))
    ]
    pins = [
        Pin(
            f'task-{number}',
            draw(st.integers(0, total - 1)),
            draw(st.sampled_from([('a-%',), ('b-1', 'b-%'), ('nobody',), ('%-2',)])),
            float(number),
            draw(st.sampled_from([None, 0, 1])),
        )
        for number in range(draw(st.integers(0, 4)))
    ]
    present = {group: draw(rings(total)) for group in range(3)}
    return members, present, pins, total


def test_the_windows_of_the_largest_clusters_do_not_meet_and_fit_into_int4range() -> None:
    assert window(0, MAX_TOKENS)[1] <= window(1, MAX_TOKENS)[0]
    assert window(MOST_GROUPS, MAX_TOKENS)[1] < 2**31
    assert [group_of(token) for token in (0, *window(3, 10), GROUP_SPAN - 1)] == [0, 3, 3, 0]


def test_rows_are_cut_where_windows_end_and_left_out_where_there_is_none() -> None:
    rows = [Segment(5, GROUP_SPAN + 3, 'a'), Segment(2 * GROUP_SPAN + 10, 2 * GROUP_SPAN + 12, 'b')]
    assert cut_by_group(rows, 10) == {0: [Segment(5, 10, 'a')], 1: [Segment(0, 3, 'a')]}


@quick
@given(clusters())
def test_each_group_is_planned_as_if_it_were_alone(
    cluster: tuple[list[Member], dict[int, list[Segment]], list[Pin], int],
) -> None:
    members, present, pins, total = cluster
    rows = [shifted(row, group * GROUP_SPAN) for group, ring in present.items() for row in ring]
    together = decide(members, rows, pins, total, 9)
    assert list(together.segments) == sorted(together.segments, key=lambda row: row.lo)
    live = {one.name for one in members}
    for group, ring in present.items():
        alone = decide(
            # nobody else takes part; those who are there keep what they have until they give it
            [
                replace(one, groups=(0,), weight=one.weight if group in one.groups else 0.0)
                for one in members
            ],
            ring,
            [replace(pin, group=None) for pin in pins if pin.group in (None, group)],
            total,
            9,
        )
        has_members = any(
            one.state == 'active' and one.weight > 0 and group in one.groups for one in members
        )
        if group == 0 or has_members or any(row.node in live for row in ring):
            assert rows_of(together, group, total) == alone.segments
            assert group in together.formed
        else:
            assert rows_of(together, group, total) == ()
            assert group not in together.formed


@quick
@given(clusters())
def test_nobody_gets_a_token_of_a_group_that_it_does_not_belong_to(
    cluster: tuple[list[Member], dict[int, list[Segment]], list[Pin], int],
) -> None:
    members, present, pins, total = cluster
    groups = {one.name: one.groups for one in members}
    rows = [shifted(row, group * GROUP_SPAN) for group, ring in present.items() for row in ring]
    owners = {token: row.node for row in rows for token in range(row.lo, row.hi)}
    for row in decide(members, rows, pins, total, 9).segments:
        for token in range(row.lo, row.hi):
            if row.node is not None and row.node != owners.get(token):
                assert group_of(token) in groups[row.node]
            if row.moving_to is not None:
                assert group_of(token) in groups[row.moving_to]


@quick
@given(clusters())
def test_a_round_without_news_changes_nothing_in_any_group(
    cluster: tuple[list[Member], dict[int, list[Segment]], list[Pin], int],
) -> None:
    members, present, pins, total = cluster
    rows = [shifted(row, group * GROUP_SPAN) for group, ring in present.items() for row in ring]
    first = decide(members, rows, pins, total, 9)
    second = decide(members, first.segments, pins, total, 10)
    assert (second.segments, second.formed) == (first.segments, first.formed)
    assert (second.moved, second.assigned) == (0, 0)


def test_each_group_is_balanced_over_its_own_members() -> None:
    members = [member('a', 1), member('b', 1, 2), member('c')]
    decision = decide(members, [], [], 12, 1)
    assert counts_of(decision, 0, 12) == {'a': 4, 'b': 4, 'c': 4}
    assert counts_of(decision, 1, 12) == {'a': 6, 'b': 6}
    assert counts_of(decision, 2, 12) == {'b': 12}
    assert decision.formed == (0, 1, 2) and decision.assigned == 36


def test_who_leaves_a_group_is_asked_to_give_what_it_has_there_and_nothing_else() -> None:
    before = decide([member('a', 1), member('b', 1)], [], [], 8, 1)
    after = decide([member('a', 1), member('b')], before.segments, [], 8, 2)
    assert rows_of(after, 0, 8) == rows_of(before, 0, 8)
    assert [(row.node, row.moving_to) for row in rows_of(after, 1, 8)] == [('a', None), ('b', 'a')]
    assert after.moved == 4


def test_the_last_member_gives_to_nobody_before_its_groups_rows_go() -> None:
    before = decide([member('a', 1), member('b')], [], [], 8, 1)
    asked = decide([member('a'), member('b')], before.segments, [], 8, 2)
    assert rows_of(asked, 1, 8) == (Segment(0, 8, 'a', True, None, True, 2),)
    assert asked.formed == (0, 1), 'somebody may still claim its tokens'
    gone = decide([member('a'), member('b')], given_away(asked), [], 8, 3)
    assert rows_of(gone, 1, 8) == () and gone.formed == (0,)


def test_while_one_who_left_has_not_given_all_rows_of_the_group_stay() -> None:
    """Tokens without a row would count as new, and go to the next member at once."""
    rows = [Segment(GROUP_SPAN, GROUP_SPAN + 3, None), Segment(GROUP_SPAN + 3, GROUP_SPAN + 8, 'a')]
    decision = decide([member('a')], rows, [], 8, 2)
    assert rows_of(decision, 1, 8) == (
        Segment(0, 3, None, False, None, True, 2),
        Segment(3, 8, 'a', True, None, True, 2),
    )


def test_a_group_that_gets_a_member_again_takes_what_is_still_leaving_in_its_turn() -> None:
    rows = [Segment(GROUP_SPAN, GROUP_SPAN + 8, 'a', True, None, True, 2)]
    decision = decide([member('a'), member('b', 1)], rows, [], 8, 3)
    assert rows_of(decision, 1, 8) == (Segment(0, 8, 'a', True, 'b', False, 3),)


def test_a_group_whose_members_all_drain_or_have_no_weight_has_no_rows() -> None:
    members = [member('a', 1, state='draining'), member('b', 1, weight=0.0), member('c')]
    assert decide(members, [], [], 8, 1).formed == (0,)


def test_a_node_whose_grace_period_runs_gets_nothing_in_a_new_group_either() -> None:
    before = decide([member('a')], [], [], 8, 1)
    decision = decide([member('a'), member('b', 1, state='joining')], before.segments, [], 8, 2)
    assert decision.formed == (0,) and decision.activate == ()


def test_in_the_first_plan_all_take_part_in_all_their_groups() -> None:
    decision = decide([member('a', 1), member('b', 1, 2, state='joining')], [], [], 8, 1)
    assert decision.activate == ('b',)
    assert counts_of(decision, 1, 8) == {'a': 4, 'b': 4} and counts_of(decision, 2, 8) == {'b': 8}


def test_a_lock_counts_at_the_same_place_of_each_group_unless_it_names_one() -> None:
    members = [member('gpu-1', 1), member('cpu-1', 1)]
    everywhere = decide(members, [], [Pin('t', 5, ('gpu-%',), 1.0)], 8, 1)
    assert [
        next(row.node for row in rows_of(everywhere, group, 8) if row.lo <= 5 < row.hi)
        for group in (0, 1)
    ] == ['gpu-1', 'gpu-1']
    blocked = decide(members, [], [Pin('t', 5, ('nobody',), 1.0, group=1)], 8, 1)
    assert blocked.blocked == 1
    assert Segment(5, 6, None, False, None, True, 1) in rows_of(blocked, 1, 8)


def test_a_lock_that_matches_nobody_of_a_group_blocks_its_token_there() -> None:
    members = [member('gpu-1'), member('cpu-1', 1)]
    decision = decide(members, [], [Pin('t', 5, ('gpu-%',), 1.0)], 8, 1)
    assert decision.blocked == 1
    assert Segment(5, 6, None, False, None, True, 1) in rows_of(decision, 1, 8)


def test_a_pin_of_workers_that_no_member_of_a_group_matches_blocks_no_other_task_there() -> None:
    """Their gates hold what it pins."""
    members = [member('gpu-1', 2), member('cpu-1', 1), member('cpu-2', 1)]
    pins = [Pin('t#3', 5, ('gpu-%',), 1.0, loose=True)]
    decision = decide(members, [], pins, 8, 1)
    assert decision.blocked == 0 and counts_of(decision, 1, 8) == {'cpu-1': 4, 'cpu-2': 4}
    # A lock of somebody else on the same token counts, whichever is older.
    both = decide(members, [], [*pins, Pin('u', 5, ('cpu-2',), 2.0)], 8, 1)
    assert next(row.node for row in rows_of(both, 1, 8) if row.lo <= 5 < row.hi) == 'cpu-2'
    # In the plain Job's group nobody holds it: there it is a lock as any other.
    assert decide([member('cpu-1')], [], pins, 8, 1).blocked == 1


def test_a_conflict_names_the_group_in_which_it_is_one() -> None:
    pins = [Pin('t', 3, ('a',), 1.0), Pin('u', 3, ('b',), 2.0)]
    found = decide([member('a', 1), member('b', 1)], [], pins, 8, 1, {1: 'heavy'}).conflicts
    assert [text.split(' no live node')[0] for text in found] == [
        'token 3:',
        "token 3 of queue group 'heavy':",
    ]


def test_a_queue_that_nobody_consumes_any_more_does_not_count_for_all_of_them() -> None:
    drained = member('a-1', 1, state='draining')
    before = [Segment(0, 8, 'a-1'), *(shifted(row, GROUP_SPAN) for row in [Segment(0, 8, 'a-1')])]
    decision = decide([drained, member('b-1')], before, [], 8, 2)
    assert decision.blocked == 8 and not decision.is_for_nobody
    alone = decide([drained], before, [], 8, 2)
    assert alone.blocked == 16 and alone.is_for_nobody
    assert not decide([member('b-1')], [], [], 8, 2).is_for_nobody
