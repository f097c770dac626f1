"""Setting a message aside that no worker can take: where its queue's dead letters go, with a result that says why, and one line."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import signals, states

from jobsync_core.errors import MessageRefused
from jobsync_core.logs import one_line, shown

from .incoming import context_of
from .logs import get_logger

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['set_aside']

logger = get_logger(__name__)

_ID_LENGTH = 200


def set_aside(
    app: Celery, consumer: Any, message: Any, cause: type[MessageRefused], reason: str, reject: Callable[[], object] | None = None,
) -> None:
    """Set a message aside, once, and raise nothing.

    It is rejected without being requeued: RabbitMQ moves it to the dead-letter exchange of its queue, if there is one. Its sender
    finds FAILURE with the reason; its errbacks and its chord are told. Redis has no dead letters: there the result is what is left.

    Args:
        app: The app.
        consumer: Celery's consumer.
        message: Kombu's message.
        cause: Class of the error that its sender gets.
        reason: Why, for people.
        reject: Rejects it where a request was made of it already.
    """
    headers = message.headers if isinstance(message.headers, dict) else {}
    context = context_of(message)
    name, message_id = headers.get('task'), headers.get('id')
    if not headers and context is not None:
        name, message_id = getattr(context, 'task', None), context.id
    logger.error('Task %s[%s] is set aside: %s', shown(name, 100), shown(message_id, 100), one_line(reason[:1000]))
    error = cause(f'{shown(name, 100)}[{shown(message_id, 100)}]: {one_line(reason[:1000])}')
    if isinstance(message_id, str) and 0 < len(message_id) <= _ID_LENGTH:
        _record(app, consumer, message_id, context, error)
    try:
        if reject is not None:
            reject()
        elif not message.acknowledged:
            message.reject_log_error(logger, consumer.connection_errors)
    except Exception as trouble:  # the connection is lost: it comes again, and is set aside again
        logger.warning('Task %s[%s] is not rejected: %r', shown(name, 100), shown(message_id, 100), trouble)
    signals.task_rejected.send(sender=consumer, message=message, exc=error)


def _record(app: Celery, consumer: Any, message_id: str, context: Any, error: MessageRefused) -> None:
    ignored = bool(getattr(context, 'ignore_result', False))
    try:
        app.backend.mark_as_failure(message_id, error, request=context, store_result=not ignored)
    except (Exception, SystemExit) as trouble:  # what it says of its workflow is odd as well, or the result backend is away
        logger.debug('Task [%s]: nobody was told of its failure: %r', message_id, trouble)
        try:
            app.backend.store_result(message_id, error, states.FAILURE)
        except Exception as again:
            logger.warning('Task [%s]: its failure is not stored: %r', message_id, again)
    dispatcher = consumer.event_dispatcher
    if dispatcher is not None and dispatcher.enabled:
        try:
            dispatcher.send('task-failed', uuid=message_id, exception=repr(error))
        except Exception as trouble:  # of no consequence for the message
            logger.debug('Task [%s]: no event: %r', message_id, trouble)
