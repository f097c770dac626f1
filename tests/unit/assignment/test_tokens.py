"""TokenSet against frozenset, and the bitmap that other processes read."""

from __future__ import annotations

import copy
import operator
import pickle
import sys
from collections.abc import Callable, Set
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.assignment.tokens import TokenSet

SIZE = 80
quick = settings(deadline=None, max_examples=200)
ranges = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=12)


def plain(pairs: list[tuple[int, int]]) -> frozenset[int]:
    return frozenset(token for lo, hi in pairs for token in range(lo, hi))


def shown(bits: bytes | bytearray) -> frozenset[int]:
    return frozenset(token for token in range(len(bits) * 8) if bits[token >> 3] >> (token & 7) & 1)


@quick
@given(ranges)
def test_a_set_holds_the_tokens_of_its_ranges_in_normal_form(pairs: list[tuple[int, int]]) -> None:
    made = TokenSet(pairs)
    assert list(made) == sorted(plain(pairs)) and list(reversed(made)) == sorted(
        plain(pairs), reverse=True
    )
    assert len(made) == len(plain(pairs)) and bool(made) == bool(plain(pairs))
    assert all(lo < hi for lo, hi in made.ranges)
    assert all(one[1] < other[0] for one, other in zip(made.ranges, made.ranges[1:], strict=False))
    assert [token in made for token in range(-1, SIZE + 1)] == [
        token in plain(pairs) for token in range(-1, SIZE + 1)
    ]
    assert TokenSet.of(plain(pairs)) == made and hash(TokenSet.of(iter(sorted(made)))) == hash(made)


@quick
@given(ranges, ranges, st.sampled_from([operator.and_, operator.or_, operator.sub, operator.xor]))
def test_operations_agree_with_frozenset(
    one: list[tuple[int, int]],
    other: list[tuple[int, int]],
    operation: Callable[[Set[int], Set[int]], Set[int]],
) -> None:
    expected = operation(plain(one), plain(other))
    for result in (
        operation(TokenSet(one), TokenSet(other)),
        operation(TokenSet(one), plain(other)),
        operation(plain(one), TokenSet(other)),
    ):
        assert set(result) == expected
    made = operation(TokenSet(one), TokenSet(other))
    assert isinstance(made, TokenSet) and made.ranges == TokenSet(made.ranges).ranges


@quick
@given(ranges, ranges)
def test_comparisons_agree_with_frozenset(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    for compare in (operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne):
        expected = compare(plain(one), plain(other))
        assert compare(TokenSet(one), TokenSet(other)) == expected, compare
        assert compare(TokenSet(one), plain(other)) == expected, compare
    assert TokenSet(one).isdisjoint(TokenSet(other)) == plain(one).isdisjoint(plain(other))
    assert TokenSet(one).isdisjoint(plain(other)) == plain(one).isdisjoint(plain(other))


@quick
@given(ranges, ranges, st.integers(0, SIZE))
def test_a_bitmap_shows_the_new_set_and_nothing_of_the_old(
    old: list[tuple[int, int]], new: list[tuple[int, int]], total: int
) -> None:
    bits = bytearray((SIZE + 7) // 8 + 1)
    TokenSet(old).write_bitmap(bits, SIZE)
    beyond = bits[(total + 7) // 8 :]
    TokenSet(new).write_bitmap(memoryview(bits), total)
    end = (total + 7) // 8
    assert shown(bits[:end]) == {token for token in plain(new) if token < total}
    assert bits[end:] == beyond


def test_no_write_to_the_bitmap_shows_a_token_of_neither_set_or_hides_one_of_both() -> None:
    seen: list[frozenset[int]] = []

    class Watched(bytearray):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            seen.append(shown(self))

    old, new = TokenSet([(3, 17), (40, 41)]), TokenSet([(5, 9), (30, 62)])
    bits = Watched(8)
    old.write_bitmap(bits, 64)
    seen.clear()
    new.write_bitmap(bits, 64)
    assert seen and all(frozenset(old & new) <= state <= frozenset(old | new) for state in seen)
    assert seen[-1] == frozenset(new)


def test_a_million_tokens_in_a_few_ranges_are_small() -> None:
    tokens = TokenSet([(at, at + 20_000) for at in range(0, 1_000_000, 20_001)])
    size = sum(map(sys.getsizeof, (tokens, tokens.ranges, tokens._starts))) + sum(
        sys.getsizeof(pair) + sum(map(sys.getsizeof, pair)) for pair in tokens.ranges
    )
    assert len(tokens) > 900_000 and size < 200_000


def test_only_whole_numbers_are_members() -> None:
    tokens: Set[object] = TokenSet([(0, 5)])
    assert 'x' not in tokens and None not in tokens and 4 in tokens


def test_a_negative_token_is_refused() -> None:
    with pytest.raises(ValueError, match='negative'):
        TokenSet([(-1, 3)])


def test_other_types_are_no_operands() -> None:
    with pytest.raises(TypeError):
        TokenSet([(0, 3)]) | [1]  # type: ignore[operator]
    assert TokenSet() != []


def test_copies_are_equal() -> None:
    tokens = TokenSet([(0, 3), (5, 9)])
    assert pickle.loads(pickle.dumps(tokens)) == copy.deepcopy(tokens) == tokens
    assert TokenSet.of(range(2, 9)).ranges == ((2, 9),) and TokenSet.of(tokens) == tokens


def test_the_representation_stays_short() -> None:
    assert repr(TokenSet([(0, 3), (5, 6)])) == '<TokenSet of 4: 0-2, 5>'
    assert repr(TokenSet()) == '<TokenSet of 0>'
    assert len(repr(TokenSet((at, at + 1) for at in range(0, 10_000, 2)))) < 100
