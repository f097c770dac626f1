"""Giving a message back that cannot run here now, through no fault of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jobsync_core.worker.returns import COUNT
from jobsync_core.worker.routing import HOME, REDELIVERED, REFUSED, RETURNS

from ..broker.deaths import DEATHS
from ..broker.forwarding import Forwarder
from ..logs import get_logger

__all__ = ['requeue']

logger = get_logger(__name__)


def requeue(
    message: Any,
    home: str,
    forwarder: Forwarder,
    plainly: Callable[[], object],
    deleted: bool = False,
    counts: bool = False,
) -> None:
    """Requeue a message. One of a queue that counts what comes back is published to its own queue
    in place of it, so that a database that is away for long costs no message. So is one whose queue
    may have been deleted meanwhile: RabbitMQ drops what is requeued to such a queue. What a task
    itself gives back is counted: that limit is its user's.

    Args:
        message: Kombu's message.
        home: The queue that it was sent to.
        forwarder: Passes messages on.
        plainly: Requeues it, unless it is acknowledged.
        deleted: The queue that it came from may be gone.
        counts: The queue that it came from is known to count what comes back.
    """
    headers = message.headers if isinstance(message.headers, Mapping) else {}
    # What came back before may be a quorum queue's that does not say 0.
    counted = counts or isinstance(headers.get(COUNT), int) or RETURNS in headers
    if home and (counted or deleted) and not message.acknowledged:
        # A dead letter that was sent again runs, and its copy would not: see `is_refused`.
        drop = REFUSED if DEATHS in headers else ''
        rest = {name: value for name, value in headers.items() if name != drop}
        try:
            forwarder.send(home, message, {**rest, HOME: home, REDELIVERED: True})
            message.ack()
        except Exception as error:  # the broker takes nothing just now, for one
            logger.debug('given back, and counted: %r', error)
    plainly()
