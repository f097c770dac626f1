"""Checks of what a user passes to a Job: each returns the value or says what is wrong with it."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from typing import TypeAlias

from ..errors import ConfigurationError
from ..task import task_id_of
from .hashing import check_task_id
from .patterns import check_patterns

__all__ = [
    'LockRow',
    'check_callables',
    'check_creator',
    'check_date',
    'check_flags',
    'check_group',
    'check_groups',
    'check_lock',
    'check_locks',
    'check_name',
    'check_number',
]

#: Characters of a node's name, and of the reason of a lock.
NAME_LENGTH = 200
REASON_LENGTH = 1000
_LOCK_FORM = '(task_id, node_patterns, reason[, expires_in_days[, queue]])'
#: Bytes of a queue's name at brokers.
QUEUE_LENGTH = 255

#: Task id as text, ordered patterns, reason, days until it expires (None: never), the queue group
#: in which it counts (None: in all).
LockRow: TypeAlias = 'tuple[str, tuple[str, ...], str | None, float | None, str | None]'


def check_name(name: object) -> str:
    """A node name: it stands in notifications, between commas, and in logs."""
    if (
        isinstance(name, str)
        and 0 < len(name) <= NAME_LENGTH
        and name == name.strip()
        and name.isprintable()
        and ',' not in name
    ):
        return name
    raise ConfigurationError(
        f'node_name={name!r:.300}: give 1 to {NAME_LENGTH} printable characters, no comma, no '
        'space at either end'
    )


def check_group(group: object) -> str:
    """The name of a queue group: that of a queue."""
    if isinstance(group, str) and group and '\0' not in group:
        try:
            if len(group.encode()) <= QUEUE_LENGTH:
                return group
        except UnicodeEncodeError:
            pass
    raise ConfigurationError(
        f'queue group {group!r:.300}: give the name of a queue, 1 to {QUEUE_LENGTH} bytes of text'
    )


def check_groups(groups: object) -> tuple[str, ...]:
    """Names of queue groups, each once, in order."""
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Iterable):
        raise ConfigurationError(f'groups={groups!r:.200}: give an iterable of names of queues')
    return tuple(sorted({check_group(group) for group in groups}))


def check_date(date: object) -> datetime.date:
    """The date of a date or datetime; today for None."""
    if date is None:
        return datetime.date.today()
    if isinstance(date, datetime.datetime):
        return date.date()
    if isinstance(date, datetime.date):
        return date
    raise ConfigurationError(f'date={date!r}: give a date, a datetime, or None for today')


def check_flags(**values: object) -> None:
    """Each is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ConfigurationError(f'{name}={value!r}: give True or False')


def check_callables(**values: object) -> None:
    """Each is a callable, or None."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise ConfigurationError(f'{name}={value!r}: give a callable, or None')


def check_creator(creator: object) -> str:
    """The name of a node that registered locks."""
    if isinstance(creator, str):
        return creator
    raise ConfigurationError(
        f'creator={creator!r:.100}: give the name of the node that registered the locks'
    )


def check_number(name: str, value: object, least: float) -> float:
    """A finite number of at least `least`."""
    try:
        good = (
            not isinstance(value, bool)
            and isinstance(value, (int, float))
            and math.isfinite(value)
            and value >= least
        )
    except OverflowError:  # an integer beyond all floats
        good = False
    if not good:
        raise ConfigurationError(f'{name}={value!r:.100}: give a number of at least {least:g}')
    return value  # type: ignore[return-value]  # checked


def check_locks(locks: object) -> list[LockRow]:
    """Rows for the lock table from what `register_locks_bulk` was given."""
    if isinstance(locks, (str, bytes)) or not isinstance(locks, Iterable):
        raise ConfigurationError(f'locks={locks!r:.200}: give an iterable of tuples {_LOCK_FORM}')
    return [check_lock(item) for item in locks]


def check_lock(item: object) -> LockRow:
    """One row for the lock table."""
    if not isinstance(item, (tuple, list)) or not 3 <= len(item) <= 5:
        raise ConfigurationError(f'lock {item!r:.200}: give a tuple {_LOCK_FORM}')
    task_id, patterns, reason = item[:3]
    days = item[3] if len(item) > 3 else None
    queue = check_group(item[4]) if len(item) > 4 and item[4] is not None else None
    if reason is not None and (
        not isinstance(reason, str)
        or any(character == '\0' or '\ud800' <= character <= '\udfff' for character in reason)
    ):
        raise ConfigurationError(f'lock on {task_id!r:.100}: the reason must be text, or None')
    if reason is not None and len(reason) > REASON_LENGTH:
        raise ConfigurationError(
            f'lock on {task_id!r:.100}: the reason has {len(reason)} characters, {REASON_LENGTH} '
            'at most: shorten it'
        )
    if days is not None and (
        isinstance(days, bool) or not isinstance(days, (int, float)) or not 0 < days <= 36_500
    ):
        raise ConfigurationError(
            f'lock on {task_id!r:.100}: expires_in_days={days!r} must be above 0 and at most '
            '36500 days, or None for never'
        )
    return check_task_id(task_id_of(task_id)), check_patterns(patterns), reason, days, queue
