"""Node-name patterns against PostgreSQL's own LIKE."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from jobsync_core import CoordinationConfig
from jobsync_core.assignment.patterns import check_patterns, compile_pattern
from tests.support.cluster import query

#: What patterns are made of, and names.
_PIECES = ['%', '%', '_', 'a', 'b', 'ab', 'é', '.', '*', '\n', '\\%', '\\_', '\\\\', '\\a', '日']
_LETTERS = 'aab%_\\.é日\n*'


def _pairs(rng: random.Random, count: int, longest: int) -> list[tuple[str, str]]:
    pairs = []
    for _ in range(count):
        pieces = [rng.choice(_PIECES) for _ in range(rng.randint(1, longest))]
        # A name that is made after the pattern matches often; one that is not hardly ever does.
        made = ''.join(
            ''.join(rng.choices(_LETTERS, k=rng.randint(0, 3)))
            if piece == '%'
            else rng.choice(_LETTERS)
            if piece == '_'
            else piece.removeprefix('\\')
            for piece in pieces
        )
        if rng.random() < 0.4 and made:
            at = rng.randrange(len(made))
            made = made[:at] + rng.choice(('', rng.choice(_LETTERS))) + made[at + 1 :]
        pairs.append((''.join(pieces), made))
    return pairs


@pytest.mark.parametrize(('count', 'longest'), [(20_000, 6), (5_000, 30), (300, 450)])
def test_a_pattern_matches_exactly_what_like_matches(
    make_config: Callable[..., CoordinationConfig], count: int, longest: int
) -> None:
    rng = random.Random(longest)
    pairs = [
        (pattern, name) for pattern, name in _pairs(rng, count, longest) if len(pattern) <= 1000
    ]
    for pattern, _ in pairs:
        check_patterns(pattern)
    answers = [
        row[0]
        for row in query(
            make_config(),
            'SELECT name LIKE pattern FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS p '
            '(pattern, name, place) '
            'ORDER BY place',
            ([pattern for pattern, _ in pairs], [name for _, name in pairs]),
        )
    ]
    wrong = [
        pair
        for pair, expected in zip(pairs, answers, strict=True)
        if compile_pattern(pair[0]).fits(pair[1]) != expected
    ]
    assert not wrong, wrong[:5]
    assert 0.2 < sum(answers) / len(answers) < 0.99  # both answers are asked for


@pytest.mark.parametrize('wildcards', [98, 99, 100, 101, 399, 400, 499])
def test_any_number_of_wildcards_is_as_in_like(
    make_config: Callable[..., CoordinationConfig], wildcards: int
) -> None:
    patterns = ['%a' * wildcards + tail for tail in ('', '%', 'b', '%b')]
    names = [
        'a' * wildcards,
        'ab' * wildcards,
        'a' * (wildcards - 1),
        'ba' * wildcards,
        'ab' * (wildcards - 1),
    ]
    pairs = [(pattern, name) for pattern in patterns for name in names]
    answers = [
        row[0]
        for row in query(
            make_config(),
            'SELECT name LIKE pattern FROM unnest(%s::text[], %s::text[]) WITH ORDINALITY AS p '
            '(pattern, name, place) '
            'ORDER BY place',
            ([pattern for pattern, _ in pairs], [name for _, name in pairs]),
        )
    ]
    assert [compile_pattern(pattern).fits(name) for pattern, name in pairs] == answers
