"""Slots: the moments at which a periodic task is due, as a function of its schedule and of the slot
before, never of the clock.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import takewhile
from typing import Any

from celery.schedules import crontab, schedule, solar

__all__ = ['newest_slot', 'slot_id', 'slots_after']

_NAMESPACE = uuid.UUID('0d9f3d0e-6a53-5c0c-9a86-3f6a1f0b7f0c')
#: A search that begins at an event may find that same event again, since its time is a numerical
#: approximation.
_SOLAR_APART = timedelta(minutes=1)
#: How far back to look for the newest slot of a crontab: from a moment that has one soon after it,
#: the way is short.
_CRONTAB_VIEWS = tuple(timedelta(seconds=seconds) for seconds in (120, 7_200, 172_800, 6_000_000))


def slot_id(appname: str, name: str, slot: datetime) -> str:
    """Id of the task that is sent for a slot: the same in every process."""
    return str(
        uuid.uuid5(_NAMESPACE, f'{appname}/{name}/{slot.astimezone(timezone.utc).isoformat()}')
    )


def slots_after(rule: Any, after: datetime) -> Iterator[datetime]:
    """The slots of a schedule after a moment, in order, in UTC; it ends where the schedule knows no
    later one.

    Args:
        rule: A schedule of Celery's, or one with its methods `remaining_estimate` and `now`.
        after: Aware.

    Raises:
        ValueError: An interval that is not positive.
    """
    if isinstance(rule, schedule) and rule.run_every <= timedelta(0):
        raise ValueError(f'{rule!r}: the interval of a periodic task must be more than zero')
    at = after.astimezone(timezone.utc)
    # A schedule tells how long it is from its own now until the slot that follows a moment. In a
    # copy whose now is that moment, the answer depends on nothing else. (copy.copy would go through
    # __reduce__, which parses a crontab again.)
    still = object.__new__(type(rule))
    still.__dict__.update(rule.__dict__)
    plain = isinstance(rule, schedule) and not rule.relative
    zone = timezone.utc if plain else getattr(rule, 'tz', timezone.utc)
    while True:
        upcoming = _next(still, at, zone)
        if isinstance(rule, solar) and upcoming - at < _SOLAR_APART:
            upcoming = _next(still, at + _SOLAR_APART, zone)
        if upcoming <= at:
            return
        yield upcoming
        at = upcoming


def _next(still: Any, at: datetime, zone: Any) -> datetime:
    # Its now is in UTC: older Celery subtracts local times of one zone as if their clocks had not
    # changed in between.
    still.now = lambda: at
    remaining: timedelta = still.remaining_estimate(at.astimezone(zone))
    return at + remaining


def newest_slot(rule: Any, after: datetime, now: datetime) -> datetime | None:
    """The newest slot after `after` that is not after `now`; None where nothing is due.

    Raises:
        ValueError: As `slots_after`.
    """
    due = deque(
        takewhile(lambda slot: slot <= now, slots_after(rule, _near(rule, after, now))), maxlen=1
    )
    return due[0] if due else None


def _near(rule: Any, after: datetime, now: datetime) -> datetime:
    """A moment, not before `after`, from which the same newest slot is reached in few steps,
    however long ago `after` is.
    """
    if isinstance(rule, crontab):
        for view in _CRONTAB_VIEWS:
            if now - view <= after:
                break
            if next(slots_after(rule, now - view)) <= now:
                return now - view
    elif isinstance(rule, schedule):
        first = next(slots_after(rule, after))
        steps = (now - first) // rule.run_every - 1
        if steps > 0 and not (rule.relative and rule.run_every >= timedelta(days=1)):
            near: datetime = first + steps * rule.run_every
            return near
    return after
