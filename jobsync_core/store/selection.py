r"""Which rows of the ledger are meant, and in which range of keys they are. Pure.

Patterns are SQL LIKE, as those of locks: `%` is any text, `_` one character, `\` takes the meaning
from the character behind it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigurationError

__all__ = ['Selection', 'after_all', 'check_text', 'literal_prefix']

#: Characters of a pattern: more than a key has.
_LENGTH = 4000
_LAST, _FIRST_SURROGATE, _AFTER_SURROGATES = 0x10FFFF, 0xD800, 0xE000
_PIECE = re.compile(r'\\(.)|([^\\%_])', re.DOTALL)


@dataclass(frozen=True)
class Selection:
    """Rows to which all of this applies; None is anything.

    Args:
        states: Of these: 'running', 'lost', 'done', 'failed'.
        prefix: What the key begins with; '' is any.
        pattern: A pattern that matches the whole key.
        node: Name of the node that made the last attempt.
        older_than_sec: Seconds since the end of the last attempt, or since its begin while it has
            none.
    """

    states: tuple[str, ...] | None = None
    prefix: str = ''
    pattern: str | None = None
    node: str | None = None
    older_than_sec: float | None = None

    @property
    def first(self) -> str:
        """No key of the selection comes before this text."""
        return max(self.prefix, self._literal)

    @property
    def end(self) -> str | None:
        """All keys of the selection come before this text; None: there is no such text."""
        ends = [end for end in map(after_all, (self.prefix, self._literal)) if end is not None]
        return min(ends, default=None)

    @property
    def _literal(self) -> str:
        return literal_prefix(self.pattern) if self.pattern is not None else ''


def literal_prefix(pattern: str) -> str:
    """What every text begins with that a pattern matches."""
    found, at = '', 0
    while match := _PIECE.match(pattern, at):
        found += match[1] or match[2]
        at = match.end()
    return found


def after_all(prefix: str) -> str | None:
    """The first text, by code points, behind all that begin with a prefix; None where there is
    none.
    """
    for length in range(len(prefix), 0, -1):
        last = ord(prefix[length - 1])
        if last < _LAST:
            following = last + 1 if last + 1 != _FIRST_SURROGATE else _AFTER_SURROGATES
            return prefix[: length - 1] + chr(following)
    return None


def check_text(name: str, value: str, pattern: bool = False) -> str:
    """A text to look for, if the database can.

    Args:
        name: What it is called in the error.
        value: The text.
        pattern: It is a pattern.

    Raises:
        ConfigurationError: It cannot.
    """
    if not isinstance(value, str):
        raise ConfigurationError(f'{name}={value!r}: give a string')
    if not value or '\0' in value or len(value) > _LENGTH:
        raise ConfigurationError(
            f'{name}={value[:40]!r}: give 1 to {_LENGTH} characters, and no NUL among them'
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f'{name}={value!r}: give text that UTF-8 can encode') from None
    if pattern and (len(value) - len(value.rstrip('\\'))) % 2:
        raise ConfigurationError(
            f'{name}={value!r}: nothing stands behind the last backslash; write it twice where it '
            'is meant as it stands'
        )
    return value
