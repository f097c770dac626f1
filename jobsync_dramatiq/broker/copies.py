"""Copies of messages for other queues: what is written on them, and where the unreadable go."""

from __future__ import annotations

from typing import Any

from dramatiq import Message
from dramatiq.common import q_name, xq_name

from jobsync_core.worker.incoming import Refused, read_stamps
from jobsync_core.worker.routing import HOME, HOPS, KEY, home_of_queue, old_parked_queue

from ..incoming import homes_in
from .interface import Origins

__all__ = ['copy_for', 'dead_letters', 'home_of', 'route_and_home']


def home_of(message: Any) -> str:
    """The queue that a message's actor was declared with."""
    return str(read_stamps(message.options).home or message.queue_name)


def route_and_home(
    origins: Origins, message: Any, queue: str, appname: str
) -> tuple[str | None, str]:
    """The route of a message that lies in a queue of the cluster, and its home queue.

    Args:
        origins: What the process knows of actors.
        message: The message.
        queue: Where it lies.
        appname: The cluster.
    """
    stamps = read_stamps(message.options)
    route = origins.read_route(message, stamps)
    home = home_of_queue(queue, appname) or origins.home_of(message, stamps.home)
    return None if isinstance(route, Refused) else route, home


def dead_letters(queue: str, data: bytes, appname: str, origins: Origins) -> str:
    """Where a message goes that no worker can have: to the dead letters that the user knows, else
    to those of the parked queue.

    Args:
        queue: Where it was found.
        data: The message.
        appname: The cluster.
        origins: What the process knows of actors.
    """
    home = home_of_queue(queue, appname)
    if home is None:
        return xq_name(q_name(queue))
    if home:
        return xq_name(home)
    return xq_name(origins.home_of_unreadable(homes_in(data)) or old_parked_queue(appname))


def copy_for(
    queue: str, message: Any, route: str | None, hops: int = 0, **options: Any
) -> Message[Any]:
    """A copy of a message for a queue: same id, arguments and time, so that its age counts from the
    first sending as without the plugin.

    Args:
        queue: The queue.
        message: The message.
        route: Its route; None where its actor is not coordinated.
        hops: How often it was handed on.
        options: Options that the copy gets.
    """
    home = home_of(message)
    kept = {name: value for name, value in message.options.items() if name not in (KEY, HOPS, HOME)}
    if route is not None:
        kept[KEY] = route
    if queue != home:
        kept.update({HOME: home, HOPS: hops})
    return Message(
        queue_name=queue,
        actor_name=message.actor_name,
        args=message.args,
        kwargs=message.kwargs,
        options={**kept, **options},
        message_id=message.message_id,
        message_timestamp=message.message_timestamp,
    )
