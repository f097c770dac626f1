"""The planner: balance, locks, and never a move without need. Each property is checked against a
formula of its own.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from random import Random
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.assignment.planner import plan

Owned: TypeAlias = 'tuple[int, int, str | None]'
Case: TypeAlias = 'tuple[list[Owned], dict[str, float], dict[int, frozenset[str]], int]'

NAMES = ['a', 'b', 'c', 'd', 'e']
quick = settings(deadline=None, max_examples=200)


def ranges_of(tokens: Sequence[str | None]) -> list[Owned]:
    found: list[Owned] = []
    at = 0
    for owner, run in itertools.groupby(tokens):
        end = at + len(list(run))
        found.append((at, end, owner))
        at = end
    return found


def tokens_of(owners: Iterable[Owned]) -> list[str | None]:
    return [
        owner for lo, hi, owner in sorted(owners, key=lambda owned: owned[0]) for _ in range(lo, hi)
    ]


@st.composite
def cases(draw: st.DrawFn, pinned: bool = True, least: int = 1) -> Case:
    total = draw(st.integers(1, 60))
    weight = st.one_of(st.just(1.0), st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0]))
    nodes = draw(st.dictionaries(st.sampled_from(NAMES), weight, min_size=least, max_size=5))
    runs = draw(
        st.lists(
            st.tuples(st.sampled_from([*NAMES, 'dead', None]), st.integers(1, 30)), max_size=12
        )
    )
    tokens = [owner for owner, length in runs for _ in range(length)][:total]
    tokens += [draw(st.sampled_from(['a', None]))] * (total - len(tokens))
    some = st.frozensets(st.sampled_from([*NAMES, 'dead']), max_size=4)
    pins = draw(st.dictionaries(st.integers(0, total - 1), some, max_size=30)) if pinned else {}
    return ranges_of(tokens), nodes, pins, total


def moved(
    before: Sequence[str | None], after: Sequence[str | None], nodes: Mapping[str, float]
) -> int:
    return sum(old in nodes and old != new for old, new in zip(before, after, strict=True))


def exact(nodes: Mapping[str, float]) -> dict[str, Fraction]:
    return {name: Fraction(str(weight)) for name, weight in nodes.items() if weight > 0}


def parts(size: int, weights: Mapping[str, Fraction]) -> dict[str, Fraction]:
    whole = sum(weights.values())
    return {name: size * weight / whole for name, weight in weights.items()}


def roundings(size: int, weights: Mapping[str, Fraction]) -> list[dict[str, int]]:
    """Every way to round the parts of a size down or up to whole numbers that sum to it."""
    fair = parts(size, weights)
    choices = [sorted({math.floor(part), math.ceil(part)}) for part in fair.values()]
    return [
        dict(zip(fair, counts, strict=True))
        for counts in itertools.product(*choices)
        if sum(counts) == size
    ]


def grouped(
    nodes: Mapping[str, float], pins: Mapping[int, frozenset[str]], total: int
) -> dict[frozenset[str], list[int]]:
    groups: dict[frozenset[str], list[int]] = {}
    for token in range(total):
        groups.setdefault(pins.get(token, frozenset(nodes)) & frozenset(nodes), []).append(token)
    return groups


@quick
@given(cases(least=0))
def test_a_plan_covers_every_token_with_sorted_and_merged_ranges(case: Case) -> None:
    planned = plan(*case)
    assert [lo for lo, _, _ in planned] == [0, *(hi for _, hi, _ in planned[:-1])] and planned[-1][
        1
    ] == case[3]
    assert planned == ranges_of(tokens_of(planned))


@quick
@given(cases(least=0))
def test_a_token_goes_to_a_node_its_lock_allows_or_to_nobody_where_there_is_none(
    case: Case,
) -> None:
    _, nodes, pins, total = case
    after = tokens_of(plan(*case))
    for token in range(total):
        allowed = pins.get(token, frozenset(nodes)) & frozenset(nodes)
        assert after[token] in (allowed or {None})


@quick
@given(cases())
def test_planning_again_moves_nothing(case: Case) -> None:
    _, nodes, pins, total = case
    planned = plan(*case)
    assert plan(planned, nodes, pins, total) == planned


@quick
@given(cases(pinned=False))
def test_without_locks_each_node_is_within_one_token_of_its_part(case: Case) -> None:
    _, nodes, _, total = case
    counts = Counter(tokens_of(plan(*case)))
    for name, part in parts(total, exact(nodes)).items():
        assert abs(counts[name] - part) < 1


@quick
@given(cases(pinned=False))
def test_without_locks_no_balanced_assignment_moves_fewer_tokens(case: Case) -> None:
    owners, nodes, _, total = case
    before = tokens_of(owners)
    held = Counter(before)
    fewest = min(
        sum(max(0, held[name] - count) for name, count in shares.items())
        for shares in roundings(total, exact(nodes))
    )
    assert moved(before, tokens_of(plan(*case)), nodes) == fewest


@quick
@given(cases())
def test_among_tokens_of_one_lock_nothing_moves_beyond_what_the_shares_ask(case: Case) -> None:
    owners, nodes, pins, total = case
    before, after = tokens_of(owners), tokens_of(plan(*case))
    for names, tokens in grouped(nodes, pins, total).items():
        held, share = (
            Counter(before[token] for token in tokens),
            Counter(after[token] for token in tokens),
        )
        needed = sum(max(0, held[name] - share[name]) for name in nodes)
        assert (
            moved([before[token] for token in tokens], [after[token] for token in tokens], nodes)
            == needed
        ), names


@quick
@given(cases())
def test_tokens_of_one_lock_are_spread_within_one_of_each_eligible_nodes_part(case: Case) -> None:
    _, nodes, pins, total = case
    after = tokens_of(plan(*case))
    weights = exact(nodes)
    for names, tokens in grouped(nodes, pins, total).items():
        if names in (frozenset(), frozenset(nodes)):
            continue
        share = Counter(after[token] for token in tokens)
        for name, part in parts(len(tokens), {name: weights[name] for name in names}).items():
            assert abs(share[name] - part) < 1


@quick
@given(cases())
def test_free_tokens_fill_all_nodes_to_one_level_above_what_locks_put_on_them(case: Case) -> None:
    _, nodes, pins, total = case
    after = tokens_of(plan(*case))
    groups = grouped(nodes, pins, total)
    free = groups.get(frozenset(nodes), [])
    counts = Counter(owner for owner in after if owner is not None)
    pinned = counts - Counter(owner for token in free if (owner := after[token]) is not None)
    weights = exact(nodes)
    above = [
        name for name in nodes if pinned[name] and not any(after[token] == name for token in free)
    ]
    levels = []
    # Which nodes stand above the level is unknown: try every set, and keep the levels that agree
    # with the set they came from.
    for size in range(len(above) + 1):
        for over in itertools.combinations(above, size):
            width = sum((weights[name] for name in nodes if name not in over), Fraction(0))
            if width:
                level = (sum(counts.values()) - sum(pinned[name] for name in over)) / width
                levels.append(
                    max(
                        abs(counts[name] - max(Fraction(pinned[name]), level * weights[name]))
                        for name in nodes
                    )
                )
    assert not levels or min(levels) < 1


@quick
@given(cases())
def test_no_node_stands_above_its_part_where_the_rounding_of_locked_tokens_can_avoid_it(
    case: Case,
) -> None:
    _, nodes, pins, total = case
    weights = exact(nodes)
    groups = {
        names: tokens
        for names, tokens in grouped(nodes, pins, total).items()
        if names and names != frozenset(nodes)
    }
    placed = sum(
        token not in pins or bool(pins[token] & frozenset(nodes)) for token in range(total)
    )
    limit = {name: math.ceil(part) for name, part in parts(placed, weights).items()}
    reachable = {tuple(0 for _ in weights)}
    for names, tokens in groups.items():
        options = roundings(len(tokens), {name: weights[name] for name in sorted(names)})
        sums = {
            tuple(count + option.get(name, 0) for name, count in zip(weights, counts, strict=True))
            for counts in reachable
            for option in options
        }
        reachable = {
            counts
            for counts in sums
            if all(count <= limit[name] for name, count in zip(weights, counts, strict=True))
        }
    if reachable:
        counts = Counter(tokens_of(plan(*case)))
        assert all(counts[name] <= limit[name] for name in weights)


@quick
@given(cases(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_or_the_cut_of_its_arguments(
    case: Case, random: Random
) -> None:
    owners, nodes, pins, total = case
    cut = [(token, token + 1, owner) for token, owner in enumerate(tokens_of(owners))]
    random.shuffle(cut)
    backwards = dict(reversed(nodes.items()))
    assert plan(cut, backwards, dict(reversed(pins.items())), total) == plan(*case)


@quick
@given(st.integers(1, 12), st.integers(12, 300))
def test_a_node_that_joins_gets_its_part_and_nothing_else_moves(count: int, total: int) -> None:
    nodes = {f'node-{number:02}': 1.0 for number in range(count)}
    before = plan([(0, total, None)], nodes, {}, total)
    after = plan(before, {**nodes, 'new': 1.0}, {}, total)
    changed = [
        new for old, new in zip(tokens_of(before), tokens_of(after), strict=True) if old != new
    ]
    assert set(changed) <= {'new'}
    assert total // (count + 1) <= len(changed) <= -(-total // (count + 1))
    assert len(after) <= 2 * count + 1


@quick
@given(st.integers(2, 12), st.integers(12, 300), st.data())
def test_when_a_node_leaves_only_its_tokens_move(
    count: int, total: int, data: st.DataObject
) -> None:
    nodes = {f'node-{number:02}': 1.0 for number in range(count)}
    before = plan([(0, total, None)], nodes, {}, total)
    gone = data.draw(st.sampled_from(sorted(nodes)))
    del nodes[gone]
    after = plan(before, nodes, {}, total)
    assert {
        old for old, new in zip(tokens_of(before), tokens_of(after), strict=True) if old != new
    } == {gone}


def test_a_node_that_comes_and_goes_leaves_the_ranges_as_they_were() -> None:
    nodes = {f'node-{number:02}': 1.0 for number in range(50)}
    before = plan([(0, 1_000_000, None)], nodes, {}, 1_000_000)
    assert (
        plan(plan(before, {**nodes, 'guest': 1.0}, {}, 1_000_000), nodes, {}, 1_000_000) == before
    )


def test_ranges_stay_few_while_nodes_come_and_go() -> None:
    random = Random(1)
    names = [f'node-{number}' for number in range(20)]
    owners: list[Owned] = [(0, 1_000_000, None)]
    most = 0
    for number in range(20, 320):
        if len(names) > 25 or (len(names) > 15 and random.random() < 0.5):
            names.remove(random.choice(names))
        else:
            names.append(f'node-{number}')
        owners = plan(owners, dict.fromkeys(names, 1.0), {}, 1_000_000)
        most = max(most, len(owners))
    # Without joining a range to its neighbour it would be a thousand; without giving the shortest
    # ranges first, 800.
    assert most < 700


def test_without_nodes_nobody_owns_anything() -> None:
    assert plan([(0, 10, 'a')], {}, {3: frozenset('a')}, 10) == [(0, 10, None)]


def test_a_node_of_weight_zero_gives_everything_away() -> None:
    assert plan([(0, 10, 'a')], {'a': 0.0, 'b': 1.0}, {}, 10) == [(0, 10, 'b')]
    assert plan([(0, 10, 'a')], {'a': 0.0}, {}, 10) == [(0, 10, None)]


def test_a_lock_on_a_node_of_weight_zero_blocks_its_token() -> None:
    assert plan([(0, 4, 'b')], {'a': 0.0, 'b': 1.0}, {2: frozenset('a')}, 4) == [
        (0, 2, 'b'),
        (2, 3, None),
        (3, 4, 'b'),
    ]


def test_weights_are_read_as_the_decimals_that_people_write() -> None:
    assert Counter(tokens_of(plan([(0, 10, None)], {'a': 0.1, 'b': 0.2, 'c': 0.7}, {}, 10))) == {
        'a': 1,
        'b': 2,
        'c': 7,
    }


def test_a_lock_keeps_an_eligible_owner() -> None:
    assert plan(
        [(0, 5, 'a'), (5, 10, 'b')], {'a': 1, 'b': 1, 'c': 0}, {7: frozenset('bc')}, 10
    ) == [(0, 5, 'a'), (5, 10, 'b')]


def test_a_locked_token_goes_to_the_eligible_node_with_the_most_room() -> None:
    owners: list[Owned] = [(0, 4, 'c'), (4, 8, 'a'), (8, 11, 'b')]
    after = tokens_of(plan(owners, {'a': 1, 'b': 1, 'c': 1}, {0: frozenset('ab')}, 11))
    assert after[0] == 'b' and moved(tokens_of(owners), after, {'a': 1, 'b': 1, 'c': 1}) == 1


def test_many_locks_with_the_same_nodes_are_spread_over_them_evenly() -> None:
    nodes = {'gpu-1': 1.0, 'gpu-2': 1.0, 'cpu-1': 1.0, 'cpu-2': 1.0}
    pins = {token: frozenset({'gpu-1', 'gpu-2'}) for token in range(0, 128, 2)}
    after = tokens_of(plan([(0, 1000, None)], nodes, pins, 1000))
    assert Counter(after[token] for token in pins) == {'gpu-1': 32, 'gpu-2': 32}
    assert Counter(after) == dict.fromkeys(nodes, 250)


def test_locks_that_overload_a_node_leave_the_free_tokens_to_the_others() -> None:
    counts = Counter(
        tokens_of(
            plan(
                [(0, 100, None)],
                {'a': 1, 'b': 1, 'c': 1},
                dict.fromkeys(range(60), frozenset('a')),
                100,
            )
        )
    )
    assert counts == {'a': 60, 'b': 20, 'c': 20}


def test_locks_of_many_different_sets_relieve_a_node_in_chains() -> None:
    pins = {
        **dict.fromkeys(range(4), frozenset('a')),
        4: frozenset('ab'),
        5: frozenset('bc'),
        6: frozenset('cd'),
        7: frozenset('b'),
    }
    owners: list[Owned] = [(0, 5, 'a'), (5, 6, 'b'), (6, 7, 'c'), (7, 8, 'b')]
    counts = Counter(tokens_of(plan(owners, dict.fromkeys('abcd', 1.0), pins, 8)))
    assert counts == {'a': 4, 'b': 2, 'c': 1, 'd': 1}


def test_a_light_node_with_room_relieves_a_heavy_one() -> None:
    pins = {**dict.fromkeys(range(11), frozenset('n')), 11: frozenset('nm'), 12: frozenset('m')}
    counts = Counter(
        tokens_of(plan([(0, 12, 'n'), (12, 22, 'm')], {'n': 10.0, 'm': 1.0, 'o': 9.0}, pins, 22))
    )
    assert counts == {'n': 11, 'm': 2, 'o': 9}


def test_ranges_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match='two owners'):
        plan([(0, 5, 'a'), (4, 8, 'b')], {'a': 1, 'b': 1}, {}, 8)
