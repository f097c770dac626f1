"""From the gate into the pool, and back: whatever fails there, the worker goes on, and the message
comes to the end that is right.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from copy import copy
from typing import Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import Reject, TaskRevokedError
from celery.worker import state

from ..faults import is_its_fault
from ..logs import get_logger
from ..tasks.dead_letters import DeadLetter
from ..tasks.lost_members import comes_back, count_lost
from ..tasks.resending import RequeueLater
from .retries import Retries

__all__ = ['PoolEntry', 'expires']

logger = get_logger(__name__)


class _OutOfMemory(Exception):
    """A task's MemoryError, by another name."""

    def __repr__(self) -> str:
        return f'MemoryError({str(self)!r})'


def expires(message: Any) -> bool:
    """Whether RabbitMQ drops a message, some time, that is requeued. Whoever waits for it
    would never hear of it.
    """
    return message.properties.get('expiration') is not None


def _raised(exc_info: Any) -> Any:
    error = getattr(exc_info, 'exception', None)
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def _bearable(exc_info: Any) -> Any:
    """How a task ended, as Celery can bear it: it raises a task's MemoryError in the main process
    again before it acknowledges.

    That ends the worker, and as the message of an exactly_once task is acknowledged late, every
    worker that gets it afterwards.
    """
    error = _raised(exc_info)
    if not isinstance(error, MemoryError):
        return exc_info
    found = copy(exc_info)
    found.exception = _OutOfMemory(*error.args)
    return found


class _Acceptance:
    """Whether a thread of the pool has begun a request, or may not any more.

    An executor queues the work before it starts a thread for it: where that fails, another thread
    may run it all the same; and where all threads are busy, it waits for long.

    Args:
        request: The request.
        begins: The last look: whether it may begin.
        late: Called when it may not.
    """

    def __init__(
        self, request: Any, begins: Callable[[], bool], late: Callable[[], object]
    ) -> None:
        self._request = request
        self._begins, self._late = begins, late
        self._lock = threading.Lock()
        self._begun = self._withdrawn = False
        self._accepted = request.on_accepted
        request.on_accepted = self._accept

    def _accept(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            if self._withdrawn:
                raise TaskRevokedError('its message goes back')
            self._begun = self._begins()
        if not self._begun:
            self._late()
            raise TaskRevokedError('its message goes on')
        return self._accepted(*args, **kwargs)

    def withdraw(self) -> bool:
        """Keep it from being begun; False where it was begun before."""
        with self._lock:
            self._withdrawn = not self._begun
            return self._withdrawn

    def take_back(self) -> bool:
        """The same, for a request that may come again; False where that was done before, too."""
        if self._withdrawn or not self.withdraw():
            return False
        self._request.on_accepted = self._accepted
        return True


class PoolEntry:
    """The last step to the pool, in place of the worker's own.

    Args:
        consumer: Celery's consumer.
        refuse: Sets a message aside: the message, why, and what rejects it.
        again: Takes a message as if it had just come.
        retries: Keeps what cannot be taken now.
        may_begin: Whether a request may run here still; a look into memory.
        late: Takes a request that may not, in the event loop.
    """

    def __init__(
        self,
        consumer: Any,
        refuse: Callable[[Any, str, Callable[[], object]], object],
        again: Callable[[Any], object],
        retries: Retries,
        may_begin: Callable[[Any], bool] = lambda request: True,
        late: Callable[[Any], object] = lambda request: None,
    ) -> None:
        self._consumer = consumer
        self._may_begin, self._late = may_begin, late
        #: Requests that the pool has, or threads of it have begun; those that wait for a process or
        #: for a thread; and how often one that waits was withdrawn.
        self._begun: weakref.WeakSet[Any] = weakref.WeakSet()
        self._waiting: weakref.WeakSet[Any] = weakref.WeakSet()
        self._withdrawn: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._acceptances: weakref.WeakKeyDictionary[Any, _Acceptance] = weakref.WeakKeyDictionary()
        self._refuse = refuse
        self._again = again
        self._retries = retries
        self._controller: Any = consumer.controller
        self._process = self._controller._process_task
        # Looked up at each call, also for a request that has waited for a process: an exception
        # there would end the worker.
        self._controller._process_task = self.process
        before = consumer.on_task_request
        self._takes_slot = getattr(before, '__name__', '') == '_process_task_sem'
        self._enter: Callable[[Any], object] = before if self._takes_slot else self.process

    def to_pool(self, request: Any) -> None:
        """Hand a request to the pool, or let it wait for a process of it."""
        self._waiting.add(request)
        self._enter(request)

    def has_begun(self, request: Any) -> bool:
        """Whether a request runs, or may run at any moment."""
        return request in self._begun

    def withdraw(self, request: Any) -> bool:
        """Take back a request that waits for a process or a thread; False where it has begun. In
        the event loop.
        """
        if request in self._begun:
            return False
        acceptance = self._acceptances.get(request)
        if acceptance is not None:
            return acceptance.take_back()
        if request not in self._waiting:
            return False
        self._waiting.discard(request)
        self._withdrawn[request] = self._withdrawn.get(request, 0) + 1
        return True

    def _begins(self, request: Any) -> bool:
        """First as running, then the look: who gives the token away meanwhile waits for it."""
        self._begun.add(request)
        if self._may_begin(request):
            return True
        self._begun.discard(request)
        return False

    def _release_slot(self) -> None:
        # Not here: it may take the next one, which may fail too, and so on.
        if self._takes_slot:
            self._consumer.call_soon(self._controller._quick_release)

    def process(self, request: Any) -> None:
        """In place of `_process_task`. Raises nothing but what ends a worker."""
        withdrawn = self._withdrawn.get(request, 0)
        if withdrawn:
            self._withdrawn[request] = withdrawn - 1
            self._release_slot()
            return
        self._waiting.discard(request)
        pool, acceptance = self._controller.pool, None
        if hasattr(pool, 'executor'):
            acceptance = _Acceptance(
                request,
                lambda: self._begins(request),
                lambda: self._consumer.call_soon(self._late, request),
            )
            self._acceptances[request] = acceptance
        elif not self._begins(request):
            self._release_slot()
            self._late(request)
            return
        try:
            self._process(request)
        except MemoryError:
            raise
        except Exception as error:
            if acceptance is None or acceptance.withdraw():
                self.failed(request, error)
                self._release_slot()

    def failed(self, request: Any, error: Exception) -> None:
        """A request did not get into the pool, or a pool that runs it at once has raised. Raises
        nothing. To be called on the exception.
        """
        state.task_ready(request)
        self._drop_job(request)
        if isinstance(error, Reject) and not error.requeue:
            try:
                request.on_failure(ExceptionInfo(), return_ok=True)  # as of a process of the pool
            except Exception as trouble:
                self._hold(request, trouble, None, stays=False)
        elif request.acknowledged:
            logger.error(
                'Task %s[%s] ended in a way that Celery does not handle: %s: %s',
                request.name,
                request.id,
                type(error).__name__,
                error,
                exc_info=error,
            )
        elif is_its_fault(error):
            self._set_aside(
                request, f'it cannot be handed to the pool: {type(error).__name__}: {error}'
            )
        else:
            message = request.message
            self._hold(request, error, lambda: self._again(message), stays=expires(message))

    def _drop_job(self, request: Any) -> None:
        """A pool of processes remembers a job that it could not write, and would wait for it when
        the worker ends.
        """
        jobs = getattr(getattr(self._controller.pool, '_pool', None), '_cache', None)
        if not isinstance(jobs, dict):
            return
        for number, job in list(jobs.items()):
            if getattr(job, '_callback', None) == request.on_success and not getattr(
                job, '_accepted', True
            ):
                jobs.pop(number, None)

    def _set_aside(self, request: Any, reason: str) -> None:
        self._refuse(request.message, reason, lambda: request.reject(requeue=False))

    def _hold(
        self, request: Any, error: BaseException, act: Callable[[], object] | None, stays: bool
    ) -> None:
        self._retries.keep(
            request.name, request.id, error, lambda: request.reject(requeue=True), act, stays
        )

    def guard_end(self, request: Any) -> None:
        """A message whose end cannot be told, to a chord that is none for example, would stay in
        hand for as long as the worker lives.
        """

        def guarded(end: Callable[..., object]) -> Callable[..., object]:
            def call(*args: Any, **kwargs: Any) -> object:
                try:
                    return end(*args, **kwargs)
                except MemoryError:
                    raise
                except Exception as error:
                    if request.acknowledged:
                        raise
                    if is_its_fault(error):
                        self._set_aside(
                            request, f'its end cannot be told: {type(error).__name__}: {error}'
                        )
                    else:
                        # Whoever is to be told is away. The task has run: its end is told again,
                        # and it does not run again.
                        self._hold(request, error, lambda: call(*args, **kwargs), stays=True)
                    return None

            return call

        fail = guarded(request.on_failure)

        def on_failure(exc_info: Any, *args: Any, **kwargs: Any) -> object:
            error = _raised(exc_info)
            if isinstance(error, RequeueLater):
                state.task_ready(request)
                self._hold(
                    request,
                    error,
                    lambda: self._again(request.message),
                    stays=expires(request.message),
                )
                return None
            if isinstance(error, DeadLetter):
                # Not by Celery, which from 5.7 on would tell of the rejection as of a failure, once
                # more.
                state.task_ready(request)
                request.send_event('task-failed', exception=repr(error.reason), traceback='')
                request.reject(requeue=False)
                return None
            if comes_back(request, exc_info):
                request.reject(requeue=True)  # Celery cannot acknowledge it any more
                return fail(_bearable(exc_info), *args, **kwargs)
            found = fail(_bearable(exc_info), *args, **kwargs)
            count_lost(request, exc_info)
            return found

        request.on_failure = on_failure
        request.on_success, request.on_timeout = (
            guarded(request.on_success),
            guarded(request.on_timeout),
        )
