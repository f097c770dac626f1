"""`@exactly_once` on a task's function: the core's, with answers that Celery understands.

A message that cannot run now comes back: a copy of it, with the same id, is published with a
countdown before this one is acknowledged; if the broker does not confirm the copy, this one goes
back after a pause. A duplicate returns the stored result, so that chords, chains and groups go on.

A task that ends by `raise Ignore()` or `self.replace(…)` has done its work: its key is complete.
`Reject` and `Retry` are failed attempts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from celery import current_task, states
from celery.backends.base import Backend, DisabledBackend
from celery.exceptions import Ignore

from jobsync_core import clock
from jobsync_core.errors import (
    AttemptsExhausted,
    DuplicateExecution,
    ExecutionRunning,
    JobSyncError,
    NotEntered,
    ResultLost,
)
from jobsync_core.ledger.current import current_ledger, message_ledger
from jobsync_core.ledger.execution import Execution
from jobsync_core.ledger.interface import Ledger
from jobsync_core.ledger.once import ExactlyOnce
from jobsync_core.ledger.single import SingleLedger
from jobsync_core.worker.adapter import MessageOnce
from jobsync_core.worker.come_back import ComeBacks, waited_sec
from jobsync_core.worker.incoming import MAX_WAITS, read_stamps
from jobsync_core.worker.routing import WAITS

from ..logs import get_logger
from .chords import count_member
from .dead_letters import DeadLetter, fail_for_good
from .resending import RequeueLater, send_again

__all__ = ['exactly_once', 'made_here', 'options_of']

logger = get_logger(__name__)

#: How often a duplicate waits for the result of a task that replaced the first one, before it goes
#: without: an hour or so.
_MAX_WAITS = 120
#: What the ledger has for a result where the task was replaced: the id under which the replacement
#: stores its own.
_REPLACED = 'jobsync_replaced'
#: The text of the exception with which Celery ends a replaced task.
_REPLACED_TEXT = 'Replaced by new task'

_local = SingleLedger()
_come_backs = ComeBacks()


class _CeleryOnce(MessageOnce):
    """The messages of Celery. With `task_always_eager` and `apply()` there is no message that could
    come back; all else is as in a worker.
    """

    def message_id(self) -> str | None:
        request = _request()
        if request is None or request.id is None:
            return None
        # A replacement has the id of what it replaces, and is another piece of work.
        nesting = getattr(request, 'replaced_task_nesting', None) or 0
        return f'{request.id}~{nesting}' if nesting else str(request.id)

    def is_processing(self) -> bool:
        request = _request()
        return request is not None and not request.called_directly

    def came_before(self) -> bool:
        request = _request()
        place = getattr(request, 'delivery_info', None)
        redelivered = isinstance(place, Mapping) and place.get('redelivered') is True
        return redelivered or _waits(request) > 0

    def is_task_of_message(self, options: ExactlyOnce) -> bool:
        return options_of(current_task) is options

    def ledger(self) -> Ledger:
        request = _request()
        if request is None or not request.is_eager:
            try:
                return message_ledger()
            except NotEntered as error:
                if self.is_processing():
                    raise NotEntered(
                        f'task {current_task.name} runs in a worker whose app was never given to '
                        'JobSync, so that nobody can tell what was executed before: write '
                        'JobSync(app) where the app is made'
                    ) from error
                raise NotEntered(
                    'this process is no worker, so that it cannot tell what was executed before: '
                    'send the task with .delay(), run it '
                    'here with .apply(), or in tests let the Job of jobsync_core.testing stand in'
                ) from error
        # In this process there may be no node at all; where there is one, its ledger counts.
        try:
            return current_ledger()
        except JobSyncError:
            return _local

    def duplicate(self, error: DuplicateExecution) -> None:
        task, request = current_task, _request()
        if not request.is_eager:
            task.send_event('task-duplicate', name=task.name, key=error.key)
            logger.info(
                'Task %s[%s] is a duplicate of the completed key %r',
                task.name,
                request.id,
                error.key,
            )

    def replay(self, error: DuplicateExecution) -> None:
        task, request = current_task, _request()
        replaced = _replaced_by(error.result)
        if replaced is not None:
            error.result = self._result_of(replaced, error)
        # The same message again, whose result is stored: its link and its chain went out before
        # that, and once is enough. Nor is that result to be taken for lost.
        if (
            request.is_eager
            or request.id is None
            or not (
                request.callbacks
                or request.chain
                or request.chord
                or request.group
                or isinstance(error, ResultLost)
            )
        ):
            return
        try:
            found = task.backend.get_task_meta(request.id)
            known = found['status'] == states.SUCCESS
        except Exception as trouble:  # a result backend is whatever the user configured
            logger.warning(
                'Task %s[%s]: the result backend does not tell whether it succeeded before: %r',
                task.name,
                request.id,
                trouble,
            )
            known = False
        if known:
            # Celery stores a result first and counts it for its chord then; in between, the first
            # attempt may have been killed.
            if request.chord:
                self._count(task, request, found['result'])
            raise Ignore

    def _count(self, task: Any, request: Any, result: Any) -> None:
        """Let the chord know of its member; comes back until it does."""
        waits = _waits(request)
        try:
            if count_member(task.backend, request, result):
                return
            trouble = (
                f'the chord {request.group} is not complete yet, or about to be completed '
                'by another worker'
            )
        except Exception as error:  # a result backend is whatever the user configured
            trouble = f'the result backend does not tell about the chord {request.group}: {error!r}'
        # After its retention the key would be forgotten, and this message would run.
        if waits >= MAX_WAITS or waited_sec(waits) > options_of(task).retention_sec / 2:
            logger.warning(
                'Task %s[%s] is counted no more, and its chord may wait for ever: %s',
                task.name,
                request.id,
                trouble,
            )
            return
        waiting = ExecutionRunning(trouble)
        waiting.key = str(request.group)
        self.come_back(waiting)

    def stored_result(self, result: Any) -> Any:
        replaced = _replaced_by(result)
        if replaced is None:
            return result
        found = current_task.backend.get_task_meta(replaced) if current_task else {}
        return found.get('result') if found.get('status') == states.SUCCESS else None

    def _result_of(self, message_id: str, error: DuplicateExecution) -> Any:
        """What the task returned that replaced the first one; it bears the first one's id."""
        task, request = current_task, _request()
        if request.id == message_id:
            # the same message again: the replacement has taken over all that hangs on it
            raise Ignore
        if task.ignore_result or isinstance(task.backend, DisabledBackend):
            return None
        found = task.backend.get_task_meta(message_id)
        if found['status'] == states.SUCCESS:
            return found['result']
        if found['status'] in states.PROPAGATE_STATES:
            raise found['result']
        if _waits(request) >= _MAX_WAITS:
            logger.warning(
                'Task %s[%s] goes without a result: %s, which replaced the first, has none',
                task.name,
                request.id,
                message_id,
            )
            return None
        waiting = ExecutionRunning(
            f'the task that replaced the first one, {message_id}, has no result yet'
        )
        waiting.key = error.key
        self.come_back(waiting)

    def completes(self, execution: Execution, error: BaseException) -> bool:
        if not isinstance(error, Ignore):
            return False
        request = _request()
        if str(error) == _REPLACED_TEXT and request is not None and execution.result is None:
            execution.result = {_REPLACED: request.id}
        return True

    def check_result(self, result: Any) -> None:
        task, request = current_task, _request()
        if (
            request is None
            or request.called_directly
            or request.is_eager
            or request.ignore_result
            or task.ignore_result
        ):
            return
        result = self.as_sent(result)
        # Redis is no KeyValueStoreBackend; all of Celery's own encode what they store.
        if isinstance(task.backend, Backend) and not isinstance(task.backend, DisabledBackend):
            task.backend.encode(task.backend.prepare_value(result))

    def as_sent(self, result: Any) -> Any:
        # As Celery does with what a task with `pydantic=True` returns.
        options = getattr(current_task, 'jobsync_dump', None)
        dump = getattr(result, 'model_dump', None)
        return dump(**options) if options is not None and dump is not None else result

    def exhausted(self, error: AttemptsExhausted) -> NoReturn:
        task, request = current_task, _request()
        if request.is_eager:
            raise error
        try:
            fail_for_good(task, request, error, lambda *kept: self.ledger().keep(*kept))
        except DeadLetter:
            raise
        # The database or the result backend is away: told later, where the message comes again.
        except Exception as trouble:
            if not task.acks_late:
                raise error from trouble
            raise RequeueLater(
                f'its failure cannot be told: {trouble!r}', requeue=True
            ) from trouble

    def come_back(self, error: JobSyncError) -> NoReturn:
        task, request = current_task, _request()
        if request.is_eager:
            raise error
        waits = _waits(request)
        # Each process of a pool has a memory of its own; the first one that sent this message back
        # has told of it.
        back = _come_backs.next(task.name, error, waits, clock.now(), told=waits > 0)
        if back.more is not None:
            logger.info(
                'Task %s[%s] comes back in %g s: %s%s',
                task.name,
                request.id,
                back.delay_sec,
                error,
                back.more,
            )
        again = task.signature_from_request(
            request,
            request.args,
            request.kwargs,
            countdown=back.delay_sec,
            retries=request.retries,
            headers={**(request.headers or {}), WAITS: waits + 1},
        )
        try:
            send_again(task.app, again)
        except Exception as trouble:  # of the broker, of a signal's receiver, of a serializer
            if not task.acks_late:
                raise  # the message is acknowledged: its sender has to know
            raise RequeueLater(
                f'its copy is not known to be sent: {trouble!r}', requeue=True
            ) from trouble
        raise Ignore


def options_of(task: Any) -> Any:
    """The options of a task's @exactly_once, or None."""
    found = _options_of(task)
    if found is None and task:
        # What traces tasks may put an object around one that has a `run` of its own (New Relic).
        found = _options_of(task.app.tasks.get(task.name, task))
    return found


def _options_of(task: Any) -> Any:
    return getattr(getattr(task, '_orig_run', None) or task.run, 'exactly_once', None)


def _waits(request: Any) -> int:
    return read_stamps({WAITS: getattr(request, WAITS, None)}).waits


def _replaced_by(result: Any) -> str | None:
    found = result.get(_REPLACED) if isinstance(result, dict) and len(result) == 1 else None
    return found if isinstance(found, str) else None


def _request() -> Any:
    """The request of the message, or of the call to `apply()`, that the current task runs for; None
    where the user's own code calls it.
    """
    if not current_task:
        return None
    stack = current_task.request_stack.stack
    # A task that calls itself directly does so under a copy of its own request; one with a __call__
    # of its own has a copy as well.
    if (
        len(stack) > 1
        and stack[-1].id == stack[-2].id
        and _call_of(stack[-1]) != _call_of(stack[-2])
    ):
        return None
    return current_task.request


def _call_of(request: Any) -> tuple[list[Any], dict[str, Any]]:
    return list(request.args or ()), dict(request.kwargs or {})


_once = _CeleryOnce()
exactly_once = _once.exactly_once
made_here = _once.made
