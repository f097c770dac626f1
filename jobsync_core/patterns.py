r"""Node-name patterns of locks: SQL LIKE (`%` any text, `_` one character, `\` escapes), case-sensitive, tried in order.

A pattern without `@` also matches the part of a node name before its `@`, because worker names often end in `@host`.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from .errors import ConfigurationError

__all__ = ['check_patterns', 'compile_pattern', 'eligible', 'matched_pattern', 'matches']

_PIECE = re.compile(r'\\(.)|(%+)|(_)|(.)', re.DOTALL)


@lru_cache(maxsize=16_384)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern, for `fullmatch`."""
    parts = ['']
    for escaped, anything, single, literal in _PIECE.findall(pattern):
        if anything:
            parts.append('')
        else:
            parts[-1] += '.' if single else re.escape(escaped or literal)
    first, *others = parts
    if not others:
        return re.compile(first, re.DOTALL)
    # The earliest place for a part between two `%` is as good as any. A look-ahead is not entered again once it has matched,
    # so that a pattern of many `%` takes no exponential time. fnmatch in Python's standard library does likewise.
    middle = [f'(?=(.*?{part}))\\{number}' for number, part in enumerate(others[:-1], 1)]
    return re.compile(f'{first}{"".join(middle)}.*{others[-1]}', re.DOTALL)


def matches(pattern: str, node_name: str) -> bool:
    """Whether the pattern matches the node name, or its part before `@` where the pattern has none."""
    return bool(_matching(pattern, (node_name,)))


def matched_pattern(patterns: Sequence[str], names: Iterable[str]) -> str | None:
    """The first of the patterns that matches one of the names; None where none does."""
    known = tuple(names)
    return next((pattern for pattern in patterns if _matching(pattern, known)), None)


def eligible(patterns: Sequence[str], names: Iterable[str]) -> frozenset[str]:
    """The names that the first pattern with a match matches; empty where no pattern matches."""
    known = tuple(names)
    found = (_matching(pattern, known) for pattern in patterns)
    return frozenset(next((some for some in found if some), ()))


def _matching(pattern: str, names: tuple[str, ...]) -> list[str]:
    fits = compile_pattern(pattern).fullmatch
    if '@' in pattern:
        return [name for name in names if fits(name)]
    return [name for name in names if fits(name) or ('@' in name and fits(name.partition('@')[0]))]


def check_patterns(value: object) -> tuple[str, ...]:
    """The patterns of a lock from what a caller gave: one, or several in order.

    Raises:
        ConfigurationError: No pattern, no text, NUL in it, or a `\\` that escapes nothing.
    """
    if isinstance(value, str):
        patterns: tuple[object, ...] = (value,)
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        patterns = tuple(value)
    else:
        raise ConfigurationError(f"node_patterns={value!r}: give a pattern such as 'gpu-%', or a list of them")
    if not patterns:
        raise ConfigurationError("node_patterns is empty: give at least one pattern; '%' matches every node")
    return tuple(_checked(pattern) for pattern in patterns)


def _checked(pattern: object) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigurationError(f"node pattern {pattern!r}: give a non-empty string such as 'gpu-%'")
    if '\0' in pattern:
        raise ConfigurationError(f'node pattern {pattern!r} contains a NUL character: remove it')
    if (len(pattern) - len(pattern.rstrip('\\'))) % 2:
        raise ConfigurationError(f'node pattern {pattern!r} ends in a backslash that escapes nothing: double it, or remove it')
    return pattern
