"""The boundary of Dramatiq's messages: what comes off a queue is decoded and checked here, before a
worker or a duty reads it.

See jobsync_core.worker.incoming. Dramatiq's consumers stumble over each of these: over one that
cannot be decoded again and again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dramatiq import Message, get_encoder
from dramatiq.common import q_name
from dramatiq.errors import DecodeError

from jobsync_core.logs import shown
from jobsync_core.worker.incoming import Refused, Stamps, read_name, read_stamps
from jobsync_core.worker.routing import HOME, HOPS, KEY, QUEUE_BYTES, WAITS

__all__ = ['Said', 'homes_in', 'priority_of', 'read_message', 'unstamped']

#: Options that Dramatiq and its brokers read in a consumer's thread, or while they handle an error.
_MOST_PRIORITY = 255
#: Names of queues that actors can be declared with.
_QUEUE = re.compile(r'[a-zA-Z_][a-zA-Z0-9._-]*')


def read_message(data: bytes) -> Message[Any] | Refused:
    """A message as it came off a queue; or why no worker can have it.

    Its options are as Dramatiq's threads can stand them: what cannot be right is left out.
    """
    try:
        found: Message[Any] = Message.decode(data)
    except DecodeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # those in between repeat what the message says
            cause = cause.__cause__
        return Refused(f'it cannot be decoded: {type(cause).__name__}: {shown(str(cause))}')
    for value, what in ((found.actor_name, 'its actor'), (found.queue_name, 'its queue')):
        name = read_name(value, what)
        if isinstance(name, Refused):
            return name
    if type(found.options) is not dict or not all(isinstance(name, str) for name in found.options):
        return Refused(f'its options are {shown(found.options, 60)}: give a mapping of names')
    try:
        hash(found.message_id)
    except TypeError:
        return Refused(
            f'its id {shown(found.message_id, 60)} cannot be right: give a text, a UUID for example'
        )
    _clean(found.options)
    return found


@dataclass(frozen=True)
class Said:
    """What a message that no worker can have says of its home queue; None where it says nothing
    that can be right.

    Attributes:
        stamp: What JobSync wrote on it.
        actor: Its actor.
        queue: Its queue.
    """

    stamp: str | None = None
    actor: str | None = None
    queue: str | None = None


def homes_in(data: bytes) -> Said:
    """What a message says of its home queue, as far as it can be decoded at all."""
    try:
        found: object = get_encoder().decode(data)
    except Exception:  # whatever it holds, and whichever encoder the user has
        return Said()
    if not isinstance(found, Mapping):
        return Said()
    stamp, actor, queue = (
        read_stamps(found.get('options')).home,
        found.get('actor_name'),
        found.get('queue_name'),
    )
    return Said(
        stamp if stamp is not None and _is_queue(stamp) else None,
        actor if isinstance(actor, str) else None,
        q_name(queue) if isinstance(queue, str) and _is_queue(queue) else None,
    )


def _is_queue(name: str) -> bool:
    """Whether this can be a queue of the user's: Dramatiq takes no other names for actors'
    queues.
    """
    return (
        _QUEUE.fullmatch(q_name(name)) is not None
        and len(name) <= QUEUE_BYTES
        and not name.startswith('jobsync.')
        and '.jobsync.' not in name
        and not name.endswith('.XQ')
    )


def _clean(options: dict[str, Any]) -> None:
    if 'eta' in options:
        _clean_eta(options)
    if 'broker_priority' in options and priority_of(options) is None:
        del options['broker_priority']
    if 'throws' in options and not _are_errors(options['throws']):
        del options['throws']  # asked for by isinstance() while an error is handled


def _clean_eta(options: dict[str, Any]) -> None:
    eta = options['eta']
    if eta is None:
        del options['eta']
    elif isinstance(eta, bool) or not isinstance(eta, (int, float)) or not math.isfinite(eta):
        options['eta'] = 0  # it is due: what never is would wait in some worker's memory for ever


def _are_errors(value: object) -> bool:
    kinds = value if isinstance(value, tuple) else (value,)
    return all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds)


def priority_of(options: dict[str, Any]) -> int | None:
    """The priority at RabbitMQ, if there is one that AMQP can carry."""
    found = options.get('broker_priority')
    return found if type(found) is int and 0 <= found <= _MOST_PRIORITY else None


def unstamped(options: dict[str, Any]) -> Stamps:
    """Take what JobSync wrote out of a message's options; what of it can be right."""
    stamps = read_stamps(options)
    for name in (KEY, HOPS, HOME, WAITS):
        options.pop(name, None)
    return stamps
