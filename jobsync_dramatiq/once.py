"""`@exactly_once` on an actor's function: the core's, with answers that Dramatiq understands.

A message that cannot run now comes back: a copy with the same id is published with a delay before
this one is acknowledged. A duplicate returns the stored result, so that groups and pipelines go on.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any, NoReturn

from dramatiq import GenericActor

from jobsync_core import clock
from jobsync_core.errors import AttemptsExhausted, DuplicateExecution, JobSyncError, NotEntered
from jobsync_core.ledger.current import message_ledger
from jobsync_core.ledger.interface import Ledger
from jobsync_core.ledger.once import ExactlyOnce
from jobsync_core.logs import get_logger
from jobsync_core.worker.adapter import MessageOnce, once_of
from jobsync_core.worker.come_back import ComeBacks
from jobsync_core.worker.incoming import read_stamps
from jobsync_core.worker.routing import WAITS

from .broker.in_memory import ledger_in_memory
from .groups import forget_group, was_counted
from .notes import be_quiet, note_of, requeue_instead, skip

__all__ = ['exactly_once', 'function_of', 'is_ours', 'processing']

logger = get_logger(__name__)

_come_backs = ComeBacks()

#: The broker and the message that this thread, or task, works on.
processing: contextvars.ContextVar[tuple[Any, Any] | None] = contextvars.ContextVar(
    'jobsync_processing', default=None
)


class _DramatiqOnce(MessageOnce):
    """`@exactly_once` for the messages of Dramatiq."""

    def message_id(self) -> str | None:
        found = processing.get()
        return found[1].message_id if found is not None else None

    def came_before(self) -> bool:
        _, message = _current()
        redelivered = getattr(message, 'redelivered', False) is True
        return redelivered or read_stamps(message.options).waits > 0

    def is_task_of_message(self, options: ExactlyOnce) -> bool:
        found = processing.get()
        actor = found[0].actors.get(found[1].actor_name) if found is not None else None
        return actor is not None and once_of(function_of(actor)) is options

    def ledger(self) -> Ledger:
        found = processing.get()
        in_memory = ledger_in_memory(found[0]) if found is not None else None
        if in_memory is not None:
            return in_memory
        try:
            return message_ledger()
        except NotEntered as error:
            raise NotEntered(
                'this process is no worker with JobSync and has entered no Job, so that it cannot '
                'tell what was executed before: send the message with .send(), or call the actor '
                "inside `with Job(...)`; in a worker add JobSync() to its broker's middleware"
            ) from error

    def duplicate(self, error: DuplicateExecution) -> None:
        _, message = _current()
        logger.info(
            'actor=%s id=%s is a duplicate of the completed key %r',
            message.actor_name,
            message.message_id,
            error.key,
        )

    def replay(self, error: DuplicateExecution) -> None:
        # What the end of a message sends on (the next step of a pipeline, on_success) is sent
        # again, as nobody can tell whether it was; but a group that has counted it counts it no
        # more.
        broker, message = _current()
        if was_counted(broker, message):
            forget_group(message)

    def exhausted(self, error: AttemptsExhausted) -> NoReturn:
        _, message = _current()
        _fail_for_good(message)
        be_quiet(message)
        logger.error(
            'actor=%s id=%s goes to the dead letters: %s',
            message.actor_name,
            message.message_id,
            error,
        )
        raise error

    def result_lost(self) -> None:
        _fail_for_good(_current()[1])

    def come_back(self, error: JobSyncError) -> NoReturn:
        broker, message = _current()
        note = note_of(message)
        if note is None or not note.sent_on:  # else it is back already
            waits = read_stamps(message.options).waits
            back = _come_backs.next(message.actor_name, error, waits, clock.now())
            delay = round(back.delay_sec * 1000)
            if back.more is not None:
                logger.info(
                    'actor=%s id=%s comes back in %d ms: %s%s',
                    message.actor_name,
                    message.message_id,
                    delay,
                    error,
                    back.more,
                )
            try:
                broker.enqueue(message.copy(options={WAITS: waits + 1}), delay=delay)
            except Exception as trouble:
                if note is None:
                    raise
                logger.warning(
                    'id=%s cannot be sent now, and goes back: %r', message.message_id, trouble
                )
                raise requeue_instead(message, note) from error
        raise skip(message, 'jobsync: the message comes back later') from error


def _current() -> tuple[Any, Any]:
    found = processing.get()
    assert found is not None
    return found


def _fail_for_good(message: Any) -> None:
    message.fail()  # so that it is a dead letter
    note = note_of(message)
    if note is not None:
        note.exhausted = True


def function_of(actor: Any) -> Callable[..., Any]:
    """What an actor runs: of a class, its method."""
    function: Callable[..., Any] = (
        actor.fn.perform if isinstance(actor.fn, GenericActor) else actor.fn
    )
    return function


_once = _DramatiqOnce()
exactly_once = _once.exactly_once
#: Whether `exactly_once` options were made here, so that Dramatiq understands their answers.
is_ours = _once.made
