"""Loggers whose records stay on one line, whatever is in the names, keys and errors that they
tell.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ['Repeats', 'escaping', 'forget_oldest', 'get_logger', 'one_line', 'shown']

_AS_THEY_ARE = (int, float, type(None))
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxtuple, _repr.maxdict, _repr.maxstring, _repr.maxother = (
    4,
    10,
    10,
    10,
    200,
    200,
)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: what its messages are given is escaped where it would begin a new
    line or move a terminal's cursor.

    Args:
        name: The module's `__name__`.
    """
    return escaping(logging.getLogger(name))


def escaping(logger: logging.Logger) -> logging.Logger:
    """The same logger, from now on with the escapes of `get_logger`."""
    if not any(isinstance(known, _OneLine) for known in logger.filters):
        logger.addFilter(_OneLine())
    return logger


def one_line(text: str) -> str:
    """The text with backslash escapes in place of line ends, control characters and lone
    surrogates.
    """
    if text.isprintable():
        return text
    return ''.join(
        part if part.isprintable() else part.encode('unicode_escape').decode('ascii')
        for part in text
    )


class _OneLine(logging.Filter):
    """Escapes what a message is given; a filter, since no caller can forget it."""

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args
        if isinstance(arguments, Mapping):
            record.args = {name: _shown(value) for name, value in arguments.items()}
        elif arguments:
            record.args = tuple(_shown(value) for value in arguments)
        return True


def _shown(value: object) -> object:
    if isinstance(value, str):
        return one_line(value)
    return value if isinstance(value, _AS_THEY_ARE) else _Shown(value)


class _Shown:
    """Anything else, an error for example, shown when the message is made, and never at the price
    of the message.
    """

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return self._show(str)

    def __repr__(self) -> str:
        return self._show(repr)

    def _show(self, how: Callable[[object], str]) -> str:
        try:
            return one_line(how(self._value))
        except Exception as error:
            return f'<{type(self._value).__name__} that cannot be shown: {type(error).__name__}>'


def shown(value: object, limit: int = 300) -> str:
    """A value on one line: text with its line breaks, control characters and lone surrogates
    escaped; anything else as its repr.

    Args:
        value: Anything; what cannot be shown is named by its type.
        limit: Characters after which it is cut.
    """
    try:
        # Not all of a long text is looked at.
        text = value[: limit + 1] if type(value) is str else _repr.repr(value)[: limit + 1]
    except Exception:  # a repr is code of whoever made the value
        text = f'<{type(value).__name__}>'
    cut = len(text) > limit
    text = one_line(text)
    return f'{text[:limit]}…' if cut else text


def forget_oldest(known: dict[Hashable, Any], most: int) -> None:
    """Make room for one more of `most`: what was put there first goes. Threads may do so at once.

    Args:
        known: What is remembered.
        most: How many are, at most.
    """
    while len(known) >= most:
        # The list is made at one go; an iterator raises where another thread has changed the dict.
        for kind in list(known)[:1]:
            known.pop(kind, None)


@dataclass
class _Said:
    at: float
    hushed: int = 0


class Repeats:
    """Which of many events that are alike are worth a line: the first, and then one in a while,
    with the number of those between.

    Threads may share it: a line too many harms nobody.

    Args:
        every_sec: Seconds until an event like one that was said is said again.
        most: How many kinds are remembered; of more, the oldest is forgotten.
    """

    def __init__(self, every_sec: float = 60.0, most: int = 1000) -> None:
        self._every = every_sec
        self._most = most
        self._said: dict[Hashable, _Said] = {}

    def say(self, kind: Hashable, now: float) -> str | None:
        """What to put at the end of the event's line: '' or ' (12 more like it)'; None: write no
        line.

        Args:
            kind: What makes events alike.
            now: Seconds on any clock.
        """
        known = self._said.get(kind)
        if known is not None and now - known.at < self._every:
            known.hushed += 1
            return None
        self._said.pop(kind, None)
        forget_oldest(self._said, self._most)
        self._said[kind] = _Said(now)
        return f' ({known.hushed} more like it)' if known is not None and known.hushed else ''
