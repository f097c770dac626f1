"""`@exactly_once` on a task's function: the core's, with answers that Celery understands.

A message that cannot run now comes back: a copy of it, with the same id, is published with a countdown before this one
is acknowledged. A duplicate returns the stored result, so that chords, chains and groups go on.
"""
from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

from celery import current_task, states
from celery.exceptions import Ignore
from celery.utils.log import get_logger

from jobsync_core import once as core
from jobsync_core.errors import DuplicateExecution, ExecutionRunning, JobSyncError
from jobsync_core.execution import DEFAULT_RETENTION
from jobsync_core.ledger import Ledger, LocalLedger, current_ledger, message_ledger
from jobsync_core.once import ExactlyOnce

__all__ = ['COME_BACK_SEC', 'exactly_once']

logger = get_logger(__name__)

#: Seconds until a message comes back that could not run.
COME_BACK_SEC = 1.0

F = TypeVar('F', bound=Callable[..., Any])
_local = LocalLedger()


def exactly_once(
    *bare: object, key: str | Callable[..., str] | None = None, retention: datetime.timedelta | float = DEFAULT_RETENTION,
    on_duplicate: str = 'result', on_running: str = 'requeue', store_result: bool = True, scope: str | None = None,
) -> Callable[[F], F]:
    """Make a task complete once per key: put it below `@app.task`.

    Args:
        bare: Nothing: it is here to refuse `@exactly_once` without parentheses.
        key: A format string over the task's arguments, or a callable that takes them. Default: the message's id, which
            suppresses redeliveries.
        retention: For how long a completion is remembered: a timedelta, or seconds.
        on_duplicate: What a message with a completed key returns: 'result' the stored result, 'skip' None; 'raise' raises
            DuplicateExecution.
        on_running: What becomes of a message whose key is running: 'requeue' brings it back, 'skip' returns None, 'raise' raises.
        store_result: Store what the task returns, as JSON.
        scope: What keys begin with; default: the function's qualified name.

    Raises:
        ConfigurationError: An option cannot work.
    """
    return core.exactly_once(
        *bare, key=key, retention=retention, on_duplicate=on_duplicate, on_running=on_running, store_result=store_result, scope=scope,
        default_key=_message_id, refuse=_refuse, ledger=_ledger)


def _message_id() -> str | None:
    request = current_task.request if current_task else None
    return request.id if request is not None else None


def _ledger() -> Ledger | LocalLedger:
    request = current_task.request if current_task else None
    if request is not None and request.is_eager:
        # In this process there may be no node at all; where there is one, its ledger counts.
        try:
            return current_ledger()
        except JobSyncError:
            return _local
    return message_ledger()


def _refuse(options: ExactlyOnce, error: JobSyncError, ran: bool) -> Any:
    task = current_task
    request = task.request if task else None
    if request is None or request.called_directly:
        raise error
    if request.is_eager:
        # No message can come back; all else is as in a worker.
        if isinstance(error, DuplicateExecution) and options.on_duplicate != 'raise':
            return error.result if options.on_duplicate == 'result' else None
        if isinstance(error, ExecutionRunning) and options.on_running == 'skip':
            return None
        raise error
    if isinstance(error, DuplicateExecution):
        return _duplicate(options, error, task, request)
    if isinstance(error, ExecutionRunning) and options.on_running != 'requeue':
        if options.on_running == 'skip':
            return None
        raise error
    # Running elsewhere, the ledger out of reach, this node evicted, or the completion unknown: the next delivery finds out.
    logger.info('Task %s[%s] comes back in %g s: %s', task.name, request.id, COME_BACK_SEC, error)
    task.signature_from_request(
        request, request.args, request.kwargs, countdown=COME_BACK_SEC, retries=request.retries).apply_async()
    raise Ignore


def _duplicate(options: ExactlyOnce, error: DuplicateExecution, task: Any, request: Any) -> Any:
    task.send_event('task-duplicate', name=task.name, key=error.key)
    logger.info('Task %s[%s] is a duplicate of the completed key %r', task.name, request.id, error.key)
    if options.on_duplicate == 'raise':
        raise error
    # The same message again, whose result is stored: its link and its chain went out before that, and once is enough.
    if request.id is not None and (request.callbacks or request.chain or request.chord or request.group):
        try:
            known = task.backend.get_state(request.id) == states.SUCCESS
        except Exception as trouble:  # a result backend is whatever the user configured
            logger.warning('Task %s[%s]: the result backend does not tell whether it succeeded before: %r', task.name, request.id, trouble)
            known = False
        if known:
            raise Ignore
    return error.result if options.on_duplicate == 'result' else None
