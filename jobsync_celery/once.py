"""`@exactly_once` on a task's function: the core's, with answers that Celery understands.

A message that cannot run now comes back: a copy of it, with the same id, is published with a countdown before this one
is acknowledged. A duplicate returns the stored result, so that chords, chains and groups go on.
"""
from __future__ import annotations

from typing import Any, NoReturn

from celery import current_task, states
from celery.exceptions import Ignore

from jobsync_core.adapter import MessageOnce
from jobsync_core.current_ledger import LocalLedger, current_ledger, message_ledger
from jobsync_core.errors import DuplicateExecution, JobSyncError
from jobsync_core.ledger import Ledger

from .logs import get_logger

__all__ = ['COME_BACK_SEC', 'exactly_once']

logger = get_logger(__name__)

#: Seconds until a message comes back that could not run.
COME_BACK_SEC = 1.0

_local = LocalLedger()


class _CeleryOnce(MessageOnce):
    """See MessageOnce. With `task_always_eager` and `apply()` there is no message that could come back; all else is as in a worker."""

    def message_id(self) -> str | None:
        request = _request()
        return request.id if request is not None else None

    def is_processing(self) -> bool:
        request = _request()
        return request is not None and not request.called_directly

    def ledger(self) -> Ledger | LocalLedger:
        request = _request()
        if request is None or not request.is_eager:
            return message_ledger()
        # In this process there may be no node at all; where there is one, its ledger counts.
        try:
            return current_ledger()
        except JobSyncError:
            return _local

    def duplicate(self, error: DuplicateExecution) -> None:
        task, request = current_task, _request()
        if not request.is_eager:
            task.send_event('task-duplicate', name=task.name, key=error.key)
            logger.info('Task %s[%s] is a duplicate of the completed key %r', task.name, request.id, error.key)

    def replay(self, error: DuplicateExecution) -> None:
        task, request = current_task, _request()
        # The same message again, whose result is stored: its link and its chain went out before that, and once is enough.
        if request.is_eager or request.id is None or not (request.callbacks or request.chain or request.chord or request.group):
            return
        try:
            known = task.backend.get_state(request.id) == states.SUCCESS
        except Exception as trouble:  # a result backend is whatever the user configured
            logger.warning('Task %s[%s]: the result backend does not tell whether it succeeded before: %r', task.name, request.id, trouble)
            known = False
        if known:
            raise Ignore

    def come_back(self, error: JobSyncError) -> NoReturn:
        task, request = current_task, _request()
        if request.is_eager:
            raise error
        logger.info('Task %s[%s] comes back in %g s: %s', task.name, request.id, COME_BACK_SEC, error)
        task.signature_from_request(
            request, request.args, request.kwargs, countdown=COME_BACK_SEC, retries=request.retries).apply_async()
        raise Ignore


def _request() -> Any:
    return current_task.request if current_task else None


exactly_once = _CeleryOnce().exactly_once
