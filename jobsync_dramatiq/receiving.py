"""A message comes off a queue: it is in its home queue for all who look at it, has its route, and a
note of where it came from.
"""

from __future__ import annotations

from typing import Any

from dramatiq.common import q_name

from jobsync_core.logs import get_logger
from jobsync_core.worker.inbox import Received
from jobsync_core.worker.incoming import Refused, Stamps
from jobsync_core.worker.routing import WAITS, home_of_queue

from .actors import Actors
from .broker.interface import QueueConsumer
from .incoming import unstamped
from .notes import Note, attach_note

__all__ = ['receive']

logger = get_logger(__name__)


def receive(
    message: Any, source: QueueConsumer, actors: Actors, incarnation: str, until: float
) -> Note:
    """Read what JobSync wrote on a message, and attach a note to it.

    Args:
        message: The message.
        source: Where it came from.
        actors: The actors of this process.
        incarnation: The node's life that took it.
        until: When it is parked if nobody owns it, on the monotonic clock.
    """
    stamps = unstamped(message.options)
    if stamps.wrong:
        logger.warning(
            'actor=%s id=%s: what cannot be right is left out: %s',
            message.actor_name,
            message.message_id,
            stamps.wrong,
        )
    if stamps.waits:
        message.options[WAITS] = stamps.waits
    home = home_of_queue(source.queue, actors.appname)
    if home is not None:
        # To all middleware, and to who asks for the result, it is in its actor's own queue.
        home = home or actors.home_of(message, stamps.home)
        message._message = message.copy(queue_name=home)
    elif not actors.has_queue(message.queue_name):
        # A retry would go where nobody looks.
        message._message = message.copy(queue_name=source.queue)
    route = _route_of(message, stamps, actors)
    problem = route.reason if isinstance(route, Refused) else ''
    note = Note(
        source,
        Received(
            incarnation,
            None if isinstance(route, Refused) else route,
            stamps.hops,
            until,
            actors.is_known(message),
            problem,
            home if home is not None else q_name(source.queue),
        ),
    )
    attach_note(message, note)
    return note


def _route_of(message: Any, stamps: Stamps, actors: Actors) -> str | Refused | None:
    if 'eta' in message.options:
        return stamps.key
    try:
        return actors.read_route(message, stamps)
    # an actor that was declared after the worker began, with a key that cannot work
    except Exception as error:
        return Refused(f'its actor cannot be coordinated: {error}')
