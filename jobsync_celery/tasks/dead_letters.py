"""The end of a message whose key is dead: its task fails, and the message goes to the dead letters
of its queue. Where none are known, the ledger keeps it, so that an operator can have it sent again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from celery import states
from celery.app.trace import TraceInfo
from celery.canvas import maybe_signature
from celery.exceptions import Ignore, Reject
from kombu.utils import json as typed_json

from jobsync_core.errors import AttemptsExhausted, ExecutionRunning, JobSyncError
from jobsync_core.worker.incoming import read_stamps
from jobsync_core.worker.routing import HOME

from ..broker.queues import driver_of
from ..logs import get_logger
from .resending import send_again

__all__ = ['DeadLetter', 'fail_for_good', 'resend']

logger = get_logger(__name__)

#: Characters of a message that is kept.
_MOST = 1_000_000
_DEAD_LETTERS = 'x-dead-letter-exchange'


class DeadLetter(Reject, Ignore):  # type: ignore[misc]  # celery has no types
    """The message of the task goes where the dead letters of its queue go; whoever waits for its
    result has been told. An Ignore as well, which alone passes `autoretry_for=(Exception,)`.
    """


def fail_for_good(
    task: Any, request: Any, error: AttemptsExhausted, keep: Callable[[str, str], bool]
) -> NoReturn:
    """Have a task fail whose key is dead: its result is a failure, its errbacks and its chord are
    told. Not by raising the error, which `autoretry_for` would catch.

    Args:
        task: The task.
        request: Its request.
        error: Why.
        keep: Has the ledger keep a message, a JSON document, for a key; False where that is not
            dead any more.

    Raises:
        DeadLetter: What ends the task.
        Exception: What the result backend, or the database, raises that is away; or the key has
            been freed meanwhile.
    """
    home = _home_of(task.app, request)
    if not _has_dead_letters(task.app, home):
        _keep(task, request, home, error, keep)
    try:
        raise error
    except AttemptsExhausted as failure:
        TraceInfo(states.FAILURE, failure).handle_error_state(task, request)
    raise DeadLetter(str(error), requeue=False) from error


def resend(app: Any, document: Mapping[str, Any]) -> None:
    """Send a message again that the ledger has kept; returns when the broker has it.

    Args:
        app: The Celery app.
        document: What was kept.

    Raises:
        JobSyncError: It is no message of Celery.
        Exception: What keeps it from being sent.
    """
    if document.get('framework') != 'celery' or not isinstance(document.get('signature'), str):
        raise JobSyncError(
            f'the message that is kept is of {document.get("framework")!r}, and this is Celery: '
            'name the application that sent it'
        )
    signature = maybe_signature(typed_json.loads(document['signature']), app=app)
    send_again(app, signature)


def _keep(
    task: Any,
    request: Any,
    home: str | None,
    error: AttemptsExhausted,
    keep: Callable[[str, str], bool],
) -> None:
    again = task.signature_from_request(
        request,
        request.args,
        request.kwargs,
        queue=home,
        retries=request.retries,
        headers=dict(request.headers or {}),
    )
    try:
        text = typed_json.dumps(dict(again))
    except Exception as trouble:  # of arguments that are no JSON, whatever they raise
        _tell(task, request, f'it is no JSON: {trouble!r}')
        return
    if len(text) > _MOST:
        _tell(task, request, f'it has {len(text):,} characters, of {_MOST:,} that are kept')
        return
    if not keep(error.key, json.dumps({'framework': 'celery', 'signature': text})):
        raise ExecutionRunning(f'the key {error.key!r} has just been freed')


def _tell(task: Any, request: Any, why: str) -> None:
    logger.error(
        'Task %s[%s] is not kept with its dead key, and its queue is not known to have dead '
        'letters: %s',
        task.name,
        request.id,
        why,
    )


def _home_of(app: Any, request: Any) -> str | None:
    """The queue that a message was sent to; None where only its exchange is known."""
    home = read_stamps({HOME: getattr(request, HOME, None)}).home
    if home is not None:
        return home
    place = request.delivery_info or {}
    key = place.get('routing_key')
    return str(key) if key in app.amqp.queues and not place.get('exchange') else None


def _has_dead_letters(app: Any, home: str | None) -> bool:
    """Whether a queue is known to have dead letters: its arguments say so. Those that a policy of
    RabbitMQ gives it are not known here.
    """
    if home is None or driver_of(app) != 'amqp':
        return False
    queue = app.amqp.queues.aliases.get(home) or app.amqp.queues.get(home)
    return _DEAD_LETTERS in (getattr(queue, 'queue_arguments', None) or {})
