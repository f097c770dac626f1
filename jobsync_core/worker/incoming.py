"""The boundary: what comes from a message is checked, typed and bounded here, before anything else
reads it.

Messages are written by others: by another version, another program, or somebody who does not wish
us well. Nothing in here raises, whatever they hold. What has a type and a bound goes on as a value;
what cannot be right becomes a reason, which is shown to people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..assignment.hashing import check_task_id
from ..errors import JobSyncError
from ..ledger.limits import check_key
from ..logs import shown
from .routing import HOME, HOPS, KEY, QUEUE_BYTES, WAITS, Coordination

__all__ = [
    'MAX_COUNT',
    'MAX_NAME',
    'MAX_WAITS',
    'Refused',
    'Stamps',
    'find_route',
    'read_id',
    'read_name',
    'read_stamps',
]

#: The most that a counter in a message says: whatever is more is as good as this.
MAX_COUNT = 1_000
#: Higher numbers of waits, half a minute each, are taken for this one: a month.
MAX_WAITS = 100_000
#: Longest name of a task, an actor or a queue, in characters; AMQP allows 255 bytes for a queue.
MAX_NAME = 1_000


@dataclass(frozen=True)
class Stamps:
    """What JobSync wrote on a message on its way, if it can be right.

    Attributes:
        key: The message's key, as its sender made it.
        hops: How often it was handed on.
        home: The queue that it was sent to.
        waits: How often it came back because its key was running.
        wrong: What cannot be right and counts as absent, for people; '' where there is none.
    """

    key: str | None = None
    hops: int = 0
    home: str | None = None
    waits: int = 0
    wrong: str = ''


@dataclass(frozen=True)
class Refused:
    """Why a message cannot be processed; for people."""

    reason: str


def read_stamps(values: object) -> Stamps:
    """The stamps of a message.

    A stamp that cannot be right is as good as none: all of them can be made anew from the message
    itself. So it is named in `wrong` and left out, and the message goes the way that it would have
    gone without it.

    Args:
        values: The message's headers, or options, as they came.
    """
    if not isinstance(values, Mapping):
        return Stamps()
    wrong: list[str] = []

    def text(name: str, usable: Any) -> str | None:
        value = values.get(name)
        if value is None:
            return None
        if type(value) is str and usable(value):
            return value
        wrong.append(f'{name}={shown(value, 60)}')
        return None

    def count(name: str, most: int) -> int:
        value = values.get(name)
        if value is None:
            return 0
        if type(value) is int and value >= 0:
            return min(value, most)
        wrong.append(f'{name}={shown(value, 60)}')
        return 0

    return Stamps(
        text(KEY, _is_key),
        count(HOPS, MAX_COUNT),
        text(HOME, _is_queue),
        count(WAITS, MAX_WAITS),
        ', '.join(wrong),
    )


def read_name(value: object, what: str) -> str | Refused:
    """The name of a task, an actor or a queue.

    Args:
        value: As it came.
        what: What it names, for the reason.
    """
    if type(value) is str and _is_name(value):
        return value
    return Refused(
        f'{what} {shown(value, 60)} is no name: a message says what it is for with a text of 1 to '
        f'{MAX_NAME} characters'
    )


def read_id(value: object) -> str | Refused:
    """The id of a message.

    Args:
        value: As it came.
    """
    if type(value) is str and value:
        try:
            return check_task_id(value)
        except JobSyncError as error:
            return Refused(f'its id cannot be right: {error}')
    return Refused(f'its id {shown(value, 60)} cannot be right: give a text, a UUID for example')


def find_route(
    found: Coordination, args: object, kwargs: object, message_id: object, stamps: Stamps
) -> str | Refused | None:
    """The route of a message, made from its arguments, as what the message itself says of it may be
    forged or old.

    Its stamp counts only where its arguments make no key here: where the key needs what only the
    sender had. For a pinned task it has to be one of the task's own virtual keys, so that no
    message goes around a pin.

    None is the route of what runs wherever it is taken, whatever an older sender has stamped on it.

    Args:
        found: How the message's task is coordinated.
        args, kwargs: Its arguments, as they came.
        message_id: Its id.
        stamps: Its stamps.
    """
    if not isinstance(args, (list, tuple)):
        return Refused(f'its arguments are {shown(args, 60)}: give a list')
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        return Refused(f'its keyword arguments are {shown(kwargs, 60)}: give a mapping of names')
    try:
        return found.route_of(args, kwargs, message_id)
    except (
        Exception
    ) as error:  # whatever a key function raises, or the attributes and texts of the arguments do
        if stamps.key is not None and found.is_route(stamps.key):
            return stamps.key if found.affinity else None
        return Refused(f'no key can be made for it: {type(error).__name__}: {shown(_text(error))}')


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an exception's text is code of the user's, too
        return '(its text cannot be shown)'


def _is_key(value: str) -> bool:
    try:
        check_key(value)
    except JobSyncError:
        return False
    return True


def _is_queue(value: str) -> bool:
    return _is_name(value) and len(value.encode()) <= QUEUE_BYTES


def _is_name(value: str) -> bool:
    if not 0 < len(value) <= MAX_NAME or '\0' in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
