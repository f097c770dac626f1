"""Setting a message aside that no worker can take: where its queue's dead letters go, with a result
that says why, and one line.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import signals, states

from jobsync_core.errors import MessageRefused
from jobsync_core.logs import one_line, shown
from jobsync_core.worker.incoming import read_stamps
from jobsync_core.worker.returns import earlier_returns, has_returned_too_often
from jobsync_core.worker.routing import REFUSED

from ..broker.deaths import DEATHS, of_copy
from ..broker.forwarding import Forwarder
from ..broker.queues import Queues
from ..incoming import context_of
from ..logs import get_logger
from ..tasks.chords import close_connections
from .delivery import unstamped

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['Refusals', 'as_refused', 'is_refused']

logger = get_logger(__name__)

_ID_LENGTH = 200


def is_refused(message: Any, driver: str) -> bool:
    """Whether a message was set aside in a node's queue, and has come for the dead letters of its
    own one. One that comes from there, as somebody has sent it again, is a message like any other.

    Args:
        message: Kombu's message.
        driver: The broker's. Redis has no dead letters: whatever a message says, it comes for none.
    """
    headers = message.headers
    return (
        driver != 'redis'
        and isinstance(headers, dict)
        and headers.get(REFUSED) is True
        and DEATHS not in headers
    )


def as_refused(message: Any) -> dict[str, Any]:
    """The headers with which a message goes home to be rejected there."""
    return {**of_copy(unstamped(message)), REFUSED: True}


class Refusals:
    """Sets messages aside, where the dead letters of their queues go.

    Args:
        app: The app.
        consumer: Celery's consumer.
        count: Counts an event.
        queues: The cluster's.
        forwarder: Passes messages on.
    """

    def __init__(
        self,
        app: Celery,
        consumer: Any,
        count: Callable[[str], object],
        queues: Queues,
        forwarder: Forwarder,
    ) -> None:
        self._app = app
        self._consumer = consumer
        self._count = count
        self._queues = queues
        self._forwarder = forwarder

    def refuse(
        self,
        message: Any,
        reason: str,
        cause: type[MessageRefused] = MessageRefused,
        reject: Callable[[], object] | None = None,
    ) -> None:
        """Set a message aside; whatever it is, and whatever fails, once.

        Args:
            message: Kombu's message.
            reason: Why, for people.
            cause: Class of the error that its sender gets.
            reject: Rejects it where a request was made of it already.
        """
        self._count('refused')
        if self._queues.is_of_node(message):
            plainly, reject = reject, lambda: self._reject_at_home(message, plainly)
        _set_aside(self._app, self._consumer, message, cause, reason, reject)

    def rejecting(self, message: Any, reject: Callable[..., object]) -> Callable[..., object]:
        """What rejects a message when its task does, so that its dead letter is one of its own
        queue.

        Args:
            message: Kombu's message.
            reject: What Celery gives: called with a logger, the connection's errors, and whether
                it is to be requeued.
        """
        if not self._queues.is_of_node(message):
            return reject

        def at_home(log: Any, errors: Any, requeue: bool = False) -> None:
            if requeue:
                reject(log, errors, requeue)
            else:
                # Where threads run tasks, this is one of them: a connection is the event loop's.
                self._consumer.call_soon(
                    self._reject_at_home, message, lambda: reject(log, errors, requeue)
                )

        return at_home

    def in_place_of(self, name: str) -> Callable[..., object]:
        """What sets messages aside in place of one of the consumer's methods.

        Args:
            name: 'on_decode_error', 'on_invalid_task' or 'on_unknown_message'.
        """

        def refuse(*args: Any) -> None:
            # on_decode_error(message, error), on_invalid_task(body, message, error),
            # on_unknown_message(body, message)
            message = args[0] if name == 'on_decode_error' else args[1]
            error = args[-1] if isinstance(args[-1], BaseException) else None
            self.refuse(
                message,
                f'{type(error).__name__}: {error}' if error is not None else 'it is no task',
            )

        return refuse

    def reject_refused(self, message: Any) -> None:
        """Reject a message that was set aside in a node's queue: its sender was told then."""
        logger.warning(
            'Task %s[%s] was set aside in the queue of a node, and is rejected in its own',
            shown(message.headers.get('task'), 100),
            shown(message.headers.get('id'), 100),
        )
        message.reject_log_error(logger, self._consumer.connection_errors)

    def is_worn_out(self, message: Any) -> bool:
        """Whether a message has come back to queues more often than its own one allows; of another
        broker than RabbitMQ none has, whatever it says.
        """
        if self._queues.driver != 'amqp' or not earlier_returns(message.headers):
            return False
        connection = self._consumer.connection
        if not connection.connected:
            return False  # it comes again; asked for, kombu's would be opened anew here
        version = getattr(connection.connection, 'server_properties', {}).get('version')
        home = self._queues.own_home(read_stamps(message.headers), message)
        return has_returned_too_often(message.headers, self._queues.limit_of(home, version))

    def reject_worn_out(self, message: Any) -> None:
        """Make a dead letter of such a message, as its queue would have. It has no result then,
        neither.
        """
        self._count('refused')
        logger.warning(
            'Task %s[%s] has come back too often for its queue, and is rejected there',
            shown(message.headers.get('task'), 100),
            shown(message.headers.get('id'), 100),
        )
        if self._queues.is_of_node(message):
            self._reject_at_home(message, None)
        else:
            message.reject_log_error(logger, self._consumer.connection_errors)

    def _reject_at_home(self, message: Any, plainly: Callable[[], object] | None) -> None:
        """Send a message back to its own queue, to be rejected there: so its dead letter is as any
        other of that queue, whether its arguments or a policy say where those go. Where that cannot
        be done it is rejected in the queue of its node, which knows what the arguments say.
        """
        try:
            self._forwarder.send(
                self._queues.own_home(read_stamps(message.headers), message),
                message,
                as_refused(message),
            )
            message.ack_log_error(logger, self._consumer.connection_errors)
        # the broker takes nothing just now, or the message cannot be copied
        except Exception as error:
            logger.debug('rejected in the queue of its node: %r', error)
        if plainly is not None:
            plainly()
        elif not message.acknowledged:
            message.reject_log_error(logger, self._consumer.connection_errors)


def _set_aside(
    app: Celery,
    consumer: Any,
    message: Any,
    cause: type[MessageRefused],
    reason: str,
    reject: Callable[[], object] | None = None,
) -> None:
    """Set a message aside, once, and raise nothing.

    It is rejected without being requeued: RabbitMQ moves it to the dead-letter exchange of its
    queue, if there is one. Its sender finds FAILURE with the reason; its errbacks and its chord are
    told. Redis has no dead letters: there the result is what is left.

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
    logger.error(
        'Task %s[%s] is set aside: %s',
        shown(name, 100),
        shown(message_id, 100),
        one_line(reason[:1000]),
    )
    error = cause(f'{shown(name, 100)}[{shown(message_id, 100)}]: {one_line(reason[:1000])}')
    if isinstance(message_id, str) and 0 < len(message_id) <= _ID_LENGTH:
        _record(app, consumer, message_id, context, error)
    try:
        if reject is not None:
            reject()
        elif not message.acknowledged:
            message.reject_log_error(logger, consumer.connection_errors)
    except Exception as trouble:  # the connection is lost: it comes again, and is set aside again
        logger.warning(
            'Task %s[%s] is not rejected: %r', shown(name, 100), shown(message_id, 100), trouble
        )
    signals.task_rejected.send(sender=consumer, message=message, exc=error)


class _Teller:
    """Tells the results' back end, and whoever waits for it, what became of a message: on a thread
    of its own, in order.

    Errbacks are the user's own code, and a back end that is away is asked for many seconds: the
    event loop waits for neither.

    Args:
        patience_sec: Seconds that one who has something to tell waits until it is told, where
            nothing else is being told.
        most: Things to tell at once; of more, nobody hears.
    """

    def __init__(self, patience_sec: float = 0.5, most: int = 1000) -> None:
        self._patience = patience_sec
        self._to_tell: queue.Queue[tuple[Callable[[], object], threading.Event]] = queue.Queue(most)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def tell(self, action: Callable[[], object]) -> bool:
        """Do something on the thread, and wait for it for a moment; False where there is too much
        to do already.
        """
        told = threading.Event()
        with self._lock:
            busy = self._to_tell.unfinished_tasks > 0
            try:
                self._to_tell.put_nowait((action, told))
            except queue.Full:
                return False
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, name='jobsync-refusals', daemon=True
                )
                try:
                    self._thread.start()
                except (
                    RuntimeError
                ) as error:  # this process can start no more threads; the next one tries again
                    logger.warning(
                        'JobSync: nobody is told of messages that are set aside: %r', error
                    )
                    return False
        if not busy:
            told.wait(self._patience)
        return True

    def _run(self) -> None:
        while True:
            action, told = self._to_tell.get()
            try:
                action()
            except BaseException as trouble:  # of an errback, which may raise anything
                logger.warning(
                    'JobSync: telling of a message that is set aside has failed: %r', trouble
                )
            finally:
                told.set()
                self._to_tell.task_done()


_teller = _Teller()


def _record(
    app: Celery, consumer: Any, message_id: str, context: Any, error: MessageRefused
) -> None:
    ignored = bool(getattr(context, 'ignore_result', False))

    def record() -> None:
        try:
            try:
                app.backend.mark_as_failure(
                    message_id, error, request=context, store_result=not ignored
                )
            except (
                Exception,
                SystemExit,
                # what it says of its workflow is odd as well, or the result backend is away
            ) as trouble:
                logger.debug('Task [%s]: nobody was told of its failure: %r', message_id, trouble)
                try:
                    app.backend.store_result(message_id, error, states.FAILURE)
                except Exception as again:
                    logger.warning('Task [%s]: its failure is not stored: %r', message_id, again)
        finally:
            close_connections(app.backend)

    if not _teller.tell(record):
        logger.warning(
            'Task [%s]: its failure is not stored, as too many are waiting for that', message_id
        )
    dispatcher = consumer.event_dispatcher
    if dispatcher is not None and dispatcher.enabled:
        try:
            dispatcher.send('task-failed', uuid=message_id, exception=repr(error))
        except Exception as trouble:  # of no consequence for the message
            logger.debug('Task [%s]: no event: %r', message_id, trouble)
