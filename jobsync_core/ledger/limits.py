"""What the ledger can hold: keys, retentions and the texts of errors."""

from __future__ import annotations

import datetime

from ..errors import ConfigurationError

__all__ = ['DEFAULT_RETENTION', 'check_key', 'check_max_lost', 'describe', 'retention_seconds']

#: How long a completed key is remembered, unless the caller says otherwise.
DEFAULT_RETENTION = datetime.timedelta(days=7)
#: Longest key, in bytes of UTF-8: it is a primary key.
MAX_KEY_BYTES = 2000
_MAX_RETENTION_SEC = 36_500 * 86_400.0
_ERROR_LENGTH = 2000
#: PostgreSQL's largest integer.
_MOST_LOST = 2**31 - 1


def check_key(key: object) -> str:
    """The key, if the ledger can hold it.

    Raises:
        ConfigurationError: It is no string, empty, too long, or has characters that PostgreSQL
            cannot store.
    """
    if not isinstance(key, str):
        raise ConfigurationError(f'execution key {key!r} is a {type(key).__name__}: give a string')
    if not key or '\0' in key:
        raise ConfigurationError(
            f'execution key {key!r}: give a non-empty string without NUL characters'
        )
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise ConfigurationError(
            f'execution key {key!r} has lone surrogates: give text that UTF-8 can encode'
        ) from None
    if size > MAX_KEY_BYTES:
        raise ConfigurationError(
            f'execution key {key[:40]!r}... has {size} bytes, {MAX_KEY_BYTES} are allowed: use a '
            'hash of it'
        )
    return key


def retention_seconds(retention: datetime.timedelta | float) -> float:
    """Seconds of a retention that is given as a timedelta or as seconds.

    Raises:
        ConfigurationError: It is not more than zero, or more than 100 years.
    """
    seconds = retention.total_seconds() if isinstance(retention, datetime.timedelta) else retention
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, (int, float))
        or not 0 < seconds <= _MAX_RETENTION_SEC
    ):
        raise ConfigurationError(
            f'retention={retention!r}: give a timedelta or seconds, more than zero, at most 100 '
            'years'
        )
    return float(seconds)


def check_max_lost(value: object) -> int | None:
    """How many attempts at a key may be lost; 0: any number, None: as the Job says.

    Raises:
        ConfigurationError: It is no whole number, or less than zero.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigurationError(
            f'max_lost={value!r}: give a whole number of at least 1, 0 for no limit, or None for '
            'what the Job says'
        )
    return value if value is None else min(value, _MOST_LOST)


def describe(error: BaseException) -> str:
    """An exception as text that PostgreSQL can store, also where it cannot tell its text."""
    try:
        text = str(error)
    except Exception as trouble:  # whatever the user's __str__ raises
        text = f'(its text cannot be made: {type(trouble).__name__})'
    return (
        f'{type(error).__name__}: {text}'[:_ERROR_LENGTH]
        .replace('\0', '?')
        .encode(errors='replace')
        .decode()
    )
