"""Which rows of the ledger are meant: the range of keys holds each key that the filter means."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterable

import pytest

from jobsync_core.errors import ConfigurationError
from jobsync_core.executions import ExecutionFilter
from jobsync_core.store.selection import Selection, after_all, literal_prefix

_TEXTS = [''.join(each) for size in range(4) for each in itertools.product('ab%_', repeat=size)]


def like(pattern: str) -> re.Pattern[str]:
    """SQL's LIKE, read character by character."""
    found, at = '', 0
    while at < len(pattern):
        if pattern[at] == '\\':
            at += 1
            found += re.escape(pattern[at])
        else:
            found += {'%': '.*', '_': '.'}.get(pattern[at], re.escape(pattern[at]))
        at += 1
    return re.compile(found, re.DOTALL)


@pytest.mark.parametrize(
    ('pattern', 'prefix'),
    [
        ('', ''),
        ('order:7', 'order:7'),
        ('order:%', 'order:'),
        ('%:7', ''),
        ('a_c', 'a'),
        (r'a\_c', 'a_c'),
        (r'100\%%', '100%'),
        ('a\\\\%', 'a\\'),
        ('a\n%', 'a\n'),
    ],
)
def test_a_pattern_begins_with_its_literal_text(pattern: str, prefix: str) -> None:
    assert literal_prefix(pattern) == prefix


@pytest.mark.parametrize(
    ('prefix', 'end'),
    [
        ('', None),
        ('a', 'b'),
        ('shop.charge:', 'shop.charge;'),
        ('a\U0010ffff', 'b'),
        ('\U0010ffff', None),
        # the code points of surrogates are no text
        ('\ud7ff', '\ue000'),
    ],
)
def test_the_end_of_a_prefix(prefix: str, end: str | None) -> None:
    assert after_all(prefix) == end


def _chosen(selection: Selection, keys: Iterable[str]) -> list[str]:
    pattern = like(selection.pattern) if selection.pattern is not None else None
    return [
        key
        for key in keys
        if key.startswith(selection.prefix) and (pattern is None or pattern.fullmatch(key))
    ]


@pytest.mark.parametrize('prefix', ['', 'a', 'b%'])
def test_every_key_that_is_meant_lies_in_the_range(prefix: str) -> None:
    for pattern in _TEXTS:
        selection = Selection(prefix=prefix, pattern=pattern)
        end = selection.end
        for key in _chosen(selection, _TEXTS):
            assert selection.first <= key and (end is None or key < end), (pattern, key)


def test_the_range_is_as_narrow_as_prefix_and_pattern_allow() -> None:
    wide, narrow = Selection(prefix='a'), Selection(prefix='a', pattern='abc%')
    assert (wide.first, wide.end) == ('a', 'b')
    assert (narrow.first, narrow.end) == ('abc', 'abd')
    assert (Selection().first, Selection().end) == ('', None)


def test_a_function_is_the_scope_that_its_keys_begin_with() -> None:
    assert ExecutionFilter(function='shop.charge').selection.prefix == 'shop.charge:'
    assert ExecutionFilter(function='shop:eu').selection.prefix == 'shop%3Aeu:'


def test_states_are_one_or_several() -> None:
    assert ExecutionFilter().selection.states is None
    assert ExecutionFilter(state='lost').selection.states == ('lost',)
    assert ExecutionFilter(state=['lost', 'failed']).selection.states == ('lost', 'failed')
    assert ExecutionFilter().selects_all
    assert not ExecutionFilter(older_than=0).selects_all


def test_an_age_is_a_timedelta_or_seconds() -> None:
    day = datetime.timedelta(days=1)
    assert ExecutionFilter(older_than=day).selection.older_than_sec == 86_400
    assert ExecutionFilter(older_than=1.5).selection.older_than_sec == 1.5


@pytest.mark.parametrize(
    'wrong',
    [
        {'state': 'over'},
        {'state': ()},
        {'state': ['done', 'gone']},
        {'key': ''},
        {'key': 'a\0'},
        {'key': 'a\\'},
        {'key': '\ud800'},
        {'key': 7},
        {'function': ''},
        {'node': 'x' * 4001},
        {'older_than': -1},
        {'older_than': float('nan')},
        {'older_than': True},
        {'older_than': '1h'},
    ],
)
def test_what_cannot_be_looked_for_is_refused_by_its_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        ExecutionFilter(**wrong)  # type: ignore[arg-type]
