"""Loggers whose records stay on one line, whatever is in the names, keys and errors that they tell."""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

__all__ = ['escaping', 'get_logger', 'one_line']

_AS_THEY_ARE = (int, float, type(None))


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: what its messages are given is escaped where it would begin a new line or move a terminal's cursor.

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
    """The text with backslash escapes in place of line ends, control characters and lone surrogates."""
    if text.isprintable():
        return text
    return ''.join(part if part.isprintable() else part.encode('unicode_escape').decode('ascii') for part in text)


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
    """Anything else, an error for example, shown when the message is made, and never at the price of the message."""

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
