"""Node-name patterns: SQL LIKE, with the part before `@` as a second chance, in order."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.assignment.patterns import (
    NodeNames,
    check_patterns,
    compile_pattern,
    eligible,
    matched_pattern,
    matches,
)
from jobsync_core.errors import ConfigurationError

quick = settings(deadline=None, max_examples=200)
patterns = st.lists(
    st.sampled_from(['%', '_', 'a', 'b', '.', '*', '\n', '\\%', '\\_', '\\\\', '\\a']), max_size=8
).map(''.join)
names = st.text('ab.%_\\\n*', max_size=8)


def like(pattern: str, name: str) -> bool:
    """LIKE by its definition, one character at a time."""
    if not pattern:
        return not name
    head, rest = pattern[0], pattern[1:]
    if head == '%':
        return any(like(rest, name[at:]) for at in range(len(name) + 1))
    if head == '\\':
        head, rest = rest[0], rest[1:]
        return name[:1] == head and like(rest, name[1:])
    return bool(name) and head in ('_', name[0]) and like(rest, name[1:])


@quick
@given(patterns, names)
def test_a_pattern_matches_as_sql_like_does(pattern: str, name: str) -> None:
    assert matches(pattern, name) == like(pattern, name)


@quick
@given(names)
def test_an_escaped_name_matches_itself_alone(name: str) -> None:
    literal = name.replace('\\', '\\\\').replace('%', '\\%').replace('_', '\\_')
    assert matches(literal, name) and not matches(literal, name + 'x')


@pytest.mark.parametrize(
    ('pattern', 'name', 'expected'),
    [
        ('gpu-%', 'gpu-01', True),
        ('gpu-%', 'GPU-01', False),
        ('gpu-_', 'gpu-01', False),
        ('%-gpu', 'worker-gpu@host.example', True),
        ('worker', 'worker@host', True),
        ('worker@%', 'worker@host', True),
        ('worker@%', 'worker', False),
        ('w%r@other', 'worker@host', False),
        ('host', 'worker@host', False),
        ('%host', 'worker@host', True),
        ('a', 'a@b@c', True),
        ('a@b', 'a@b@c', False),
        ('w.rker', 'worker', False),
        ('%', '', True),
        ('%', 'a\nb', True),
        ('a_%b', 'a\n\nb', True),
        ('%b%', 'a\nb\n', True),
    ],
)
def test_known_pairs(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_the_first_pattern_with_a_match_decides() -> None:
    live = ['us-east-2', 'us-west-1', 'us-east-3']
    wanted = ('us-east-1', 'us-east-%', 'us-%')
    assert matched_pattern(wanted, live) == 'us-east-%'
    assert eligible(wanted, live) == {'us-east-2', 'us-east-3'}
    assert matched_pattern(('eu-%',), live) is None and eligible(('eu-%',), live) == frozenset()
    assert (
        eligible(wanted, iter(live)) == eligible(wanted, live)
        and matched_pattern(wanted, iter(live)) == 'us-east-%'
    )


@quick
@given(
    st.lists(patterns, min_size=1, max_size=6),
    st.lists(st.text('ab.@', min_size=1, max_size=6), max_size=12),
)
def test_many_names_are_matched_as_each_alone(wanted: list[str], live: list[str]) -> None:
    for pattern in (*wanted, *(f'{pattern}@%' for pattern in wanted)):
        expected = {
            name
            for name in live
            if like(pattern, name) or ('@' not in pattern and like(pattern, name.partition('@')[0]))
        }
        assert set(NodeNames(live).matching(pattern)) == expected
        assert eligible((pattern,), live) == expected


@pytest.mark.parametrize('number', [1, 98, 99, 100, 101, 250, 399, 400, 499])
def test_any_number_of_wildcards_matches_as_one_would_say(number: int) -> None:
    name = 'ab' * number
    assert matches('%a' * number + '%', name)
    assert matches('%a' * number + 'b', name)
    assert not matches('%a' * (number + 1) + '%', name)
    assert not matches('%a' * number, name)


@pytest.mark.parametrize(
    'pattern',
    [
        '%' * 1000,
        '%_' * 500,
        '_%' * 500,
        '%a' * 500,
        '%_a' * 333,
        'a%' * 500,
        '%' + 'a_' * 400 + '%',
        '%' + '_' * 998 + '%',
        r'\%' * 300,
    ],
)
def test_no_pattern_is_expensive(pattern: str) -> None:
    check_patterns(pattern)
    names = ['a' * 200, 'ab' * 100, 'b' * 200, 'a' * 199 + 'b', '\\' * 100]
    began = time.process_time()
    for name in names:
        matches(pattern, name)
    assert time.process_time() - began < 0.5


def test_a_pattern_is_compiled_once() -> None:
    assert compile_pattern('once-%') is compile_pattern('once-%')


@pytest.mark.timeout(20)
def test_many_wildcards_do_not_take_exponential_time() -> None:
    assert not matches('%a' * 12 + 'b', 'a' * 60)


def test_one_pattern_or_several_are_taken_in_order() -> None:
    assert check_patterns('gpu-%') == ('gpu-%',)
    assert check_patterns(['b', 'a']) == check_patterns(('b', 'a')) == ('b', 'a')
    assert check_patterns('100\\\\') == ('100\\\\',)


@pytest.mark.parametrize(
    ('value', 'part'),
    [
        (None, 'give a pattern'),
        (5, 'give a pattern'),
        (b'gpu', 'give a pattern'),
        ({'a'}, 'give a pattern'),
        (iter(['a']), 'give a pattern'),
        ([], 'is empty'),
        ('', 'non-empty'),
        (['a', ''], 'non-empty'),
        (['a', None], 'non-empty'),
        ('a' * 1001, 'has 1001 characters, 1000 at most'),
        (['a'] * 101, 'has 101 patterns, 100 at most'),
        ('a\0', 'NUL'),
        ('a\ud800', 'surrogates'),
        ('a\\', 'backslash'),
        ('a\\\\\\', 'backslash'),
    ],
)
def test_what_is_no_pattern_is_refused_with_the_reason(value: object, part: str) -> None:
    with pytest.raises(ConfigurationError, match=part):
        check_patterns(value)
