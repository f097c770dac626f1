"""What a test says that has waited in vain."""

from __future__ import annotations

import pytest

from tests.support.waiting import eventually


def test_a_failure_shows_both_sides_of_each_comparison() -> None:
    found, wanted = ['a', 'b'], 3
    with pytest.raises(AssertionError) as told:
        eventually(lambda: len(found) == wanted and found < ['c'], 0)
    text = str(told.value)
    assert 'last result False' in text and 'len(found) = 2' in text and 'wanted = 3' in text
    assert "found = ['a', 'b']" in text


def test_a_condition_without_a_lambda_or_with_names_of_its_own_is_shown_alone() -> None:
    def never() -> bool:
        return 1 > 2

    for condition in (never, lambda: any(n == 3 for n in range(2))):
        with pytest.raises(AssertionError, match=r'not true within 0 s') as told:
            eventually(condition, 0)
        assert ' = ' not in str(told.value).partition('\n')[2].replace('3 = 3', '')
