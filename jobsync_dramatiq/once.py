"""`@exactly_once` on an actor's function: the core's, with answers that Dramatiq understands.

A message that cannot run now comes back: a copy with the same id is published with a delay before this one is acknowledged.
A duplicate returns the stored result, so that groups and pipelines go on.
"""
from __future__ import annotations

import contextvars
import datetime
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from dramatiq.middleware import SkipMessage

from jobsync_core import once as core
from jobsync_core.errors import DuplicateExecution, ExecutionRunning, JobSyncError
from jobsync_core.execution import DEFAULT_RETENTION
from jobsync_core.ledger import message_ledger
from jobsync_core.once import ExactlyOnce

from .gate import give_back, note_of
from .groups import was_counted

__all__ = ['exactly_once', 'processing']

logger = logging.getLogger(__name__)

#: Milliseconds until a message comes back that could not run.
_COME_BACK_MS = 1000

F = TypeVar('F', bound=Callable[..., Any])
#: The broker and the message that this thread, or task, works on.
processing: contextvars.ContextVar[tuple[Any, Any] | None] = contextvars.ContextVar('jobsync_processing', default=None)


def exactly_once(
    *bare: object, key: str | Callable[..., str] | None = None, retention: datetime.timedelta | float = DEFAULT_RETENTION,
    on_duplicate: str = 'result', on_running: str = 'requeue', store_result: bool = True, scope: str | None = None,
) -> Callable[[F], F]:
    """Make an actor complete once per key: put it below `@dramatiq.actor`.

    Args:
        bare: Nothing: it is here to refuse `@exactly_once` without parentheses.
        key: A format string over the arguments, or a callable that takes them. Default: the message's id, which suppresses
            redeliveries.
        retention: For how long a completion is remembered: a timedelta, or seconds.
        on_duplicate: What a message with a completed key returns: 'result' the stored result, 'skip' None; 'raise' raises
            DuplicateExecution.
        on_running: What becomes of a message whose key is running: 'requeue' brings it back, 'skip' returns None, 'raise' raises.
        store_result: Store what the actor returns, as JSON.
        scope: What keys begin with; default: the function's qualified name.

    Raises:
        ConfigurationError: An option cannot work.
    """
    return core.exactly_once(
        *bare, key=key, retention=retention, on_duplicate=on_duplicate, on_running=on_running, store_result=store_result, scope=scope,
        default_key=_message_id, refuse=_refuse, ledger=message_ledger)


def _message_id() -> str | None:
    found = processing.get()
    return found[1].message_id if found is not None else None


def _refuse(options: ExactlyOnce, error: JobSyncError, ran: bool) -> Any:
    found = processing.get()
    if found is None:
        raise error
    broker, message = found
    if isinstance(error, DuplicateExecution):
        return _duplicate(options, error, broker, message)
    if isinstance(error, ExecutionRunning) and options.on_running != 'requeue':
        if options.on_running == 'skip':
            return None
        raise error
    # Running elsewhere, the ledger out of reach, this node evicted, or the completion unknown: the next delivery finds out.
    logger.info('actor=%s id=%s comes back in %d ms: %s', message.actor_name, message.message_id, _COME_BACK_MS, error)
    try:
        broker.enqueue(message.copy(), delay=_COME_BACK_MS)
    except Exception as trouble:
        note = note_of(message)
        if note is None:
            raise
        logger.warning('id=%s cannot be sent now, and goes back: %r', message.message_id, trouble)
        raise give_back(message, note) from error
    message.options['store_results'] = False
    raise SkipMessage('jobsync: the message comes back later') from error


def _duplicate(options: ExactlyOnce, error: DuplicateExecution, broker: Any, message: Any) -> Any:
    logger.info('actor=%s id=%s is a duplicate of the completed key %r', message.actor_name, message.message_id, error.key)
    if options.on_duplicate == 'raise':
        raise error
    # The same message again. What its end sends on (the next step of a pipeline, on_success) is sent again, as nobody can tell
    # whether it was; but a group that has counted it counts it no more.
    if was_counted(broker, message):
        message.options.pop('group_completion_uuid')
    return error.result if options.on_duplicate == 'result' else None
