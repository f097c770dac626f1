"""A chord's member whose process is lost after its result was stored: newer Celerys acknowledge it,
and its chord may not know of it.
"""

from __future__ import annotations

import threading
from typing import Any

from billiard.exceptions import WorkerLostError
from celery import states

from jobsync_core.worker.come_back import come_back_sec

from ..logs import get_logger
from .chords import close_connections, count_member, waits_for_others
from .once import options_of

__all__ = ['comes_back', 'count_lost']

logger = get_logger(__name__)

#: How often the count is tried, and the most seconds between two tries: for a day or so.
_MAX_TRIES, _MOST_SEC = 1440, 60.0


def comes_back(request: Any, exc_info: Any) -> bool:
    """Whether the message is to be delivered again, as a duplicate that waits for the chord's other
    members. Raises nothing.

    That outlives this worker. A task that is not exactly-once would run again: see count_lost.

    Args:
        request: The worker's request, which is about to fail.
        exc_info: Why.
    """
    if (
        not _is_lost_member(request, exc_info)
        or request.acknowledged
        or options_of(request.task) is None
    ):
        return False
    try:
        backend = request.task.backend
        try:
            return (
                waits_for_others(backend)
                and backend.get_task_meta(request.id)['status'] == states.SUCCESS
            )
        finally:
            close_connections(backend)
    except Exception as trouble:  # a result backend is whatever the user configured
        logger.warning(
            'Task %s[%s]: the result backend does not tell whether it succeeded: %r',
            request.name,
            request.id,
            trouble,
        )
        return False


def count_lost(request: Any, exc_info: Any, tries: int = 0) -> None:
    """Count a member for its chord, if its process is lost and newer Celerys acknowledged it, as
    its result is stored. Raises nothing.

    Args:
        request: The worker's request, which has failed.
        exc_info: Why.
        tries: How often that was tried.
    """
    if not _is_lost_member(request, exc_info) or not request.acknowledged:
        return
    counted = False
    try:
        backend = request.task.backend
        try:
            found = backend.get_task_meta(request.id)
            counted = found['status'] != states.SUCCESS or count_member(
                backend, request._context, found['result']
            )
        finally:
            close_connections(backend)
    except Exception as trouble:  # a result backend is whatever the user configured
        logger.warning(
            'Task %s[%s] may not be counted for its chord yet: %r',
            request.name,
            request.id,
            trouble,
        )
    if not counted and tries < _MAX_TRIES:
        # Others are to end first, or a worker that may be dead is about to send the body. The
        # consumer's timer ends with its connection.
        again = threading.Timer(
            come_back_sec(tries, _MOST_SEC), count_lost, (request, exc_info, tries + 1)
        )
        again.daemon = True
        again.start()


def _is_lost_member(request: Any, exc_info: Any) -> bool:
    error = getattr(exc_info, 'exception', None)
    return isinstance(getattr(error, 'exc', error), WorkerLostError) and bool(
        request._context.chord
    )
