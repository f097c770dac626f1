r"""Node-name patterns of locks: SQL LIKE (`%` any text, `_` one character, `\` escapes),
case-sensitive, tried in order.

A pattern without `@` also matches the part of a node name before its `@`, because worker names
often end in `@host`.

A pattern is what stands between its `%`. The earliest place for such a part is as good as any later
one, so that one pass over the name is enough, whatever the pattern: no pattern can take more than
(its length) × (the name's length) steps.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from ..errors import ConfigurationError

__all__ = [
    'PATTERNS',
    'PATTERN_BYTES',
    'PATTERN_LENGTH',
    'NodeNames',
    'Pattern',
    'check_patterns',
    'compile_pattern',
    'eligible',
    'matched_pattern',
    'matches',
    'read_patterns',
]

#: Characters of a pattern, and patterns of one lock. A node's name has at most 200 characters.
PATTERN_LENGTH = 1000
PATTERNS = 100
#: More than the JSON of a lock's patterns can take; a row that exceeds it is not read.
PATTERN_BYTES = 8 * PATTERNS * PATTERN_LENGTH

_SPECIAL = re.compile(r'[\\%_]')
_PIECE = re.compile(r'\\(.)|(%+)|(_)|([^\\%_]+)', re.DOTALL)
#: Stands for `_` in a part: neither patterns nor names contain it.
_ANY = '\0'


class Pattern:
    """One pattern, ready to be matched.

    Args:
        text: The pattern, as `check_patterns` lets it pass.

    Attributes:
        prefix: What every name that matches begins with.
        suffix: What it ends with.
        literal: The longest text that it contains.
    """

    __slots__ = ('_parts', 'literal', 'prefix', 'suffix')

    def __init__(self, text: str) -> None:
        parts = _split(text)
        self.prefix = parts[0].partition(_ANY)[0]
        self.suffix = parts[-1].rpartition(_ANY)[2]
        self.literal = max((run for part in parts for run in part.split(_ANY)), key=len)
        self._parts = tuple([_Part(part) for part in parts])

    def fits(self, name: str) -> bool:
        """Whether the pattern matches the whole of the name."""
        first, last = self._parts[0], self._parts[-1]
        if len(self._parts) == 1:
            return first.length == len(name) and first.is_at(name, 0)
        at, end = first.length, len(name) - last.length
        if at > end or not first.is_at(name, 0) or not last.is_at(name, end):
            return False
        for part in self._parts[1:-1]:
            at = part.find(name, at, end)
            if at < 0:
                return False
            at += part.length
        return True


class _Part:
    """What stands between two `%`: literal texts, each with its distance from the part's
    beginning.
    """

    __slots__ = ('_runs', 'length')

    def __init__(self, text: str) -> None:
        self.length = len(text)
        at = 0
        runs = []
        for run in text.split(_ANY):
            if run:
                runs.append((at, run))
            at += len(run) + 1
        self._runs = runs

    def is_at(self, name: str, at: int) -> bool:
        """Whether it stands at this place of the name, which is long enough."""
        for offset, run in self._runs:  # noqa: SIM110  # a generator takes three times as long
            if not name.startswith(run, at + offset):
                return False
        return True

    def find(self, name: str, at: int, end: int) -> int:
        """The first place from `at` on at which it stands, and ends no later than `end`; -1 where
        there is none.
        """
        last = end - self.length
        if not self._runs:
            return at if at <= last else -1
        offset, run = self._runs[0]
        while at <= last:
            at = name.find(run, at + offset, end) - offset
            if at < 0 or at > last:
                return -1
            if self.is_at(name, at):
                return at
            at += 1
        return -1


def _split(text: str) -> tuple[str, ...]:
    if '\\' not in text:
        parts = text.replace('_', _ANY).split('%')
        # Nothing between two `%` asks for nothing.
        return tuple(parts) if len(parts) < 3 else (parts[0], *filter(None, parts[1:-1]), parts[-1])
    found = ['']
    for escaped, anything, single, literal in _PIECE.findall(text):
        if anything:
            found.append('')
        else:
            found[-1] += _ANY if single else escaped or literal
    return tuple(found)


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> Pattern:
    """The pattern, ready to be matched; those used last are kept."""
    return Pattern(pattern)


class NodeNames:
    """The names that patterns are matched with, in an order that spares most comparisons: many
    patterns meet many names.

    Args:
        names: Of nodes.
    """

    def __init__(self, names: Iterable[str]) -> None:
        whole = sorted(set(names))
        cut: dict[str, list[str]] = {}
        for name in whole:
            if '@' in name:
                cut.setdefault(name.partition('@')[0], []).append(name)
        #: Each text that a pattern may match, and the names that this finds: for patterns with `@`,
        #: and for those without.
        self._with_at = _Texts({name: (name,) for name in whole})
        self._without = _Texts(
            {
                text: tuple(
                    sorted({*cut.get(text, ()), *((text,) if text in self._with_at.names else ())})
                )
                for text in {*whole, *cut}
            }
        )
        self._known: dict[tuple[str, ...], frozenset[str]] = {}

    def eligible(self, patterns: Sequence[str]) -> frozenset[str]:
        """The names that the first pattern with a match matches; empty where no pattern matches.
        Equal sets are one object.
        """
        for pattern in patterns:
            found = self.matching(pattern)
            if found:
                return self._one(found)
        return self._one(())

    def matching(self, pattern: str) -> tuple[str, ...]:
        """The names that the pattern matches, sorted."""
        texts = self._with_at if '@' in pattern else self._without
        plain = pattern.rstrip('%')
        if _SPECIAL.search(plain):
            return texts.matching(compile_pattern(pattern))
        # Most patterns are a name, or the beginning of one.
        return texts.names.get(plain, ()) if plain == pattern else texts.beginning_with(plain)

    def _one(self, names: tuple[str, ...]) -> frozenset[str]:
        known = self._known.get(names)
        return known if known is not None else self._known.setdefault(names, frozenset(names))


class _Texts:
    """Texts, and the names that each stands for."""

    def __init__(self, names: Mapping[str, tuple[str, ...]]) -> None:
        self.names = names
        self._sorted = sorted(names)
        self._backwards: list[str] = []

    def matching(self, pattern: Pattern) -> tuple[str, ...]:
        literal = pattern.literal
        return self._named(
            [text for text in self._candidates(pattern) if literal in text and pattern.fits(text)]
        )

    def beginning_with(self, prefix: str) -> tuple[str, ...]:
        return self._named(_beginning_with(self._sorted, prefix) if prefix else self._sorted)

    def _named(self, found: Sequence[str]) -> tuple[str, ...]:
        if len(found) == 1:
            return self.names[found[0]]
        return tuple(sorted({name for text in found for name in self.names[text]}))

    def _candidates(self, pattern: Pattern) -> Iterable[str]:
        if pattern.prefix:
            return _beginning_with(self._sorted, pattern.prefix)
        if pattern.suffix:
            self._backwards = self._backwards or sorted(text[::-1] for text in self._sorted)
            return [text[::-1] for text in _beginning_with(self._backwards, pattern.suffix[::-1])]
        return self._sorted


def _beginning_with(texts: Sequence[str], prefix: str) -> Sequence[str]:
    first = bisect_left(texts, prefix)
    # The last character plus one ends what begins with the prefix; there is none after the last of
    # all.
    last = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix[-1] < chr(0x10FFFF) else None
    return texts[first : bisect_left(texts, last, first) if last is not None else len(texts)]


def matches(pattern: str, node_name: str) -> bool:
    """Whether the pattern matches the node name, or its part before `@` where the pattern has
    none.
    """
    return bool(NodeNames((node_name,)).matching(pattern))


def matched_pattern(patterns: Sequence[str], names: Iterable[str]) -> str | None:
    """The first of the patterns that matches one of the names; None where none does."""
    known = NodeNames(names)
    return next((pattern for pattern in patterns if known.matching(pattern)), None)


def eligible(patterns: Sequence[str], names: Iterable[str]) -> frozenset[str]:
    """`NodeNames.eligible`, for one lock alone."""
    return NodeNames(names).eligible(patterns)


def check_patterns(value: object) -> tuple[str, ...]:
    """The patterns of a lock from what a caller gave: one, or several in order.

    Raises:
        ConfigurationError: No pattern, no text, NUL in it, a `\\` that escapes nothing, or more
            than PATTERNS patterns or PATTERN_LENGTH characters.
    """
    if isinstance(value, str):
        patterns: tuple[object, ...] = (value,)
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        patterns = tuple(value)
    else:
        raise ConfigurationError(
            f"node_patterns={_short(value)}: give a pattern such as 'gpu-%', or a list of them"
        )
    if not patterns:
        raise ConfigurationError(
            "node_patterns is empty: give at least one pattern; '%' matches every node"
        )
    if len(patterns) > PATTERNS:
        raise ConfigurationError(
            f'node_patterns has {len(patterns)} patterns, {PATTERNS} at most: let a wildcard '
            'stand for several'
        )
    return tuple([_checked(pattern) for pattern in patterns])


def read_patterns(encoded: str | None) -> tuple[str, ...]:
    """The patterns of a row of the lock table, by the same rule by which they were checked when
    they were registered.

    Args:
        encoded: The row's JSON; None where it was too long to be read.

    Raises:
        ConfigurationError: It holds no patterns.
    """
    if encoded is None:
        raise ConfigurationError(f'its patterns take more than {PATTERN_BYTES} bytes')
    try:
        value = json.loads(encoded)
    except ValueError:
        raise ConfigurationError('its patterns are no JSON') from None
    return check_patterns(value)


def _checked(pattern: object) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigurationError(
            f"node pattern {_short(pattern)}: give a non-empty string such as 'gpu-%'"
        )
    if len(pattern) > PATTERN_LENGTH:
        raise ConfigurationError(
            f'node pattern {_short(pattern)} has {len(pattern)} characters, {PATTERN_LENGTH} at '
            'most: node names are shorter than that'
        )
    if '\0' in pattern:
        raise ConfigurationError(
            f'node pattern {_short(pattern)} contains a NUL character: remove it'
        )
    if any('\ud800' <= character <= '\udfff' for character in pattern):
        raise ConfigurationError(
            f'node pattern {_short(pattern)} cannot be encoded as UTF-8: remove lone surrogates'
        )
    if pattern[-1] == '\\' and (len(pattern) - len(pattern.rstrip('\\'))) % 2:
        raise ConfigurationError(
            f'node pattern {_short(pattern)} ends in a backslash that escapes nothing: double it, '
            'or remove it'
        )
    return pattern


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f'{text[:197]}...'
