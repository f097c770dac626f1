"""The gate of a Celery worker: every coordinated message passes it on receipt and once more before
it goes to the pool.

Nothing here may raise into the consumer: an exception from a task's strategy ends the worker. What
no worker can take is set aside, once, in `_refuse`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery.worker import state

from jobsync_core import clock
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.errors import JobSyncError, MessageRefused, Unroutable
from jobsync_core.logs import Repeats, shown
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.incoming import Refused, Stamps, read_id, read_stamps
from jobsync_core.worker.routing import HOME, HOPS, KEY, Decision, Verdict

from ..broker.circuit import BrokerBusy
from ..broker.forwarding import Forwarder
from ..broker.queues import Queues
from ..faults import is_its_fault
from ..incoming import Incoming, read_delivery
from ..logs import get_logger
from ..tasks.coordinated import Tasks, guard_traces, prepare_tasks
from .handing import Handing, expires
from .holding import Holding
from .refusal import REFUSED, set_aside

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['ConsumerGate', 'Strategies']

logger = get_logger(__name__)

#: Seconds between two looks at messages that wait in memory.
_LOOK_SEC = 0.1
#: Seconds after which a look that is due is taken for lost.
_LOST_SEC = 2.0
#: Seconds until a message that could not be sent on is tried again.
_AGAIN_SEC = 1.0
#: What is remembered of a message, with it.
_NOTE, _INCOMING = 'jobsync_note', 'jobsync_incoming'


class Strategies(dict):  # type: ignore[type-arg]  # celery's mapping, task name -> strategy
    """The consumer's strategies; each that is put in is wrapped, also after a reconnect or a
    reload.
    """

    def __init__(self, wrap: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self._wrap = wrap

    def __setitem__(self, name: str, strategy: Any) -> None:
        super().__setitem__(name, self._wrap(name, strategy))


@dataclass(frozen=True)
class _Note:
    """What the gate knows of a message; kept with it."""

    name: str
    route: str
    hops: int
    home: str
    incarnation: str


@dataclass
class _Waiting:
    """A message that is held, unacknowledged, until it can go somewhere.

    Attributes:
        note: What the gate knows of it.
        message: Kombu's message.
        run, ack, requeue, refuse: What may become of it here; `refuse` is a rejection for good.
        until: When it is parked, on the monotonic clock.
        unknown: Nobody here knows its task.
        late: It has passed all that comes before the pool.
        failed: It could not be sent the last time, and not because the broker took nothing.
    """

    note: _Note
    message: Any
    run: Callable[[], object]
    ack: Callable[[], object]
    requeue: Callable[[], object]
    refuse: Callable[[], object]
    until: float
    unknown: bool = False
    late: bool = False
    failed: bool = False


def _settle_once(message: Any) -> None:
    """Let a message that was set aside be acknowledged once more without an error: in the event
    loop that would end the worker.
    """

    def quiet(action: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **kwargs: None if message.acknowledged else action(*args, **kwargs)

    vars(message).update(
        ack_log_error=quiet(message.ack_log_error), reject_log_error=quiet(message.reject_log_error)
    )


class ConsumerGate:
    """The gate between a consumer and its pool.

    Args:
        app: The app.
        consumer: Celery's consumer; its hooks are replaced.
        gate: The node's gate.
        tasks: The app's coordinated tasks.
        queues: The cluster's.
        forwarder: Passes messages on; it does not keep the event loop waiting.
        pinned: Names of the tasks whose pins the node registered when it entered.
        solo: Tasks run in the event loop.
        is_node: Whether the worker is a node; one that runs uncoordinated is none.
        on_parked: Called when a message went into the parked queue.
    """

    def __init__(
        self,
        app: Celery,
        consumer: Any,
        gate: Gate,
        tasks: Tasks,
        queues: Queues,
        forwarder: Forwarder,
        *,
        pinned: Container[str] = (),
        solo: bool = False,
        is_node: Callable[[], bool] = lambda: True,
        on_parked: Callable[[], object] = lambda: None,
    ) -> None:
        self._app = app
        self._gate = gate
        self._consumer = consumer
        self._tasks = tasks
        self._queues = queues
        self._forwarder = forwarder
        self._pinned = pinned
        self._solo = solo
        self._is_node = is_node
        self._on_parked = on_parked
        self._lock = threading.RLock()
        self._waiting: list[_Waiting] = []
        self._looks_at: float | None = None
        self._dispatched: weakref.WeakSet[Any] = weakref.WeakSet()
        self._repeats = Repeats()
        self._holding = Holding(
            lambda seconds, call: consumer.timer.call_after(seconds, call), gate.count
        )
        self._receive: Callable[[Any], object] = lambda message: None  # nothing has come yet
        self._handing = Handing(
            consumer,
            lambda message, reason, reject: self._refuse(message, reason, reject=reject),
            lambda message: self._receive(message),
            self._holding,
        )
        consumer.strategies = Strategies(self._wrap)
        consumer.on_task_request = self.dispatch
        self._make_handler, self._update = consumer.create_task_handler, consumer.update_strategies
        consumer.create_task_handler = self.create_task_handler
        consumer.update_strategies = self.update_strategies
        self._discard, consumer.on_unknown_task = consumer.on_unknown_task, self.keep_unknown
        for name in ('on_decode_error', 'on_invalid_task', 'on_unknown_message'):
            setattr(consumer, name, self._refuser(name))

    # --- on receipt ---

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], object]:
        """In place of the consumer's: what gets each message first, coordinated or not."""
        handle = self._make_handler(*args, **kwargs)

        def receive(message: Any) -> None:
            if (
                isinstance(message.headers, dict) and message.headers.get(REFUSED) is True
            ):  # it has come for its queue's dead letters
                message.reject_log_error(logger, self._consumer.connection_errors)
                return
            found = self._read(message)
            if isinstance(found, Refused):
                self._refuse(message, found.reason)
                return
            _settle_once(message)
            try:
                handle(message)
            except MemoryError:
                raise  # as in any worker, which ends
            except Exception as error:
                if (
                    isinstance(
                        error, (*self._consumer.connection_errors, *self._consumer.channel_errors)
                    )
                    and not self._is_connected()
                ):
                    raise  # the consumer connects again, and the broker delivers again
                self._not_taken(message, error, lambda: receive(message))

        self._receive = receive
        return receive

    def _is_connected(self) -> bool:
        """Whether the consumer's connection holds, as far as is known here: a result backend may
        raise what a broker does.
        """
        connection = self._consumer.connection
        return connection is not None and bool(connection.connected)

    def _not_taken(
        self,
        message: Any,
        error: Exception,
        again: Callable[[], object],
        refuse: Callable[[], object] | None = None,
        requeue: Callable[[], object] | None = None,
    ) -> None:
        """A message that failed on its way: set aside where it is to blame; otherwise tried again
        after a pause.
        """
        if message.acknowledged:
            logger.error(
                'A message that is acknowledged has failed: %s: %s',
                type(error).__name__,
                error,
                exc_info=error,
            )
        elif is_its_fault(error):
            self._refuse(
                message,
                f'this worker cannot take it: {type(error).__name__}: {error}',
                reject=refuse,
            )
        else:
            headers = message.headers if isinstance(message.headers, Mapping) else {}
            self._holding.keep(
                shown(headers.get('task'), 100),
                shown(headers.get('id'), 100),
                error,
                requeue
                or (
                    lambda: message.reject_log_error(logger, self._consumer.connection_errors, True)
                ),
                again,
                expires(message),
            )

    def update_strategies(self) -> None:
        """In place of the consumer's: tasks that were made after the worker began are prepared as
        well.
        """
        prepare_tasks(self._app)
        self._update()
        guard_traces(self._app, self._tasks, self._solo)

    def _refuser(self, name: str) -> Callable[..., object]:
        def refuse(*args: Any) -> None:
            # on_decode_error(message, error), on_invalid_task(body, message, error),
            # on_unknown_message(body, message)
            message = args[0] if name == 'on_decode_error' else args[1]
            error = args[-1] if isinstance(args[-1], BaseException) else None
            self._refuse(
                message,
                f'{type(error).__name__}: {error}' if error is not None else 'it is no task',
            )

        return refuse

    def _wrap(self, name: str, strategy: Any) -> Any:
        if not self._is_node():
            return strategy
        try:
            if self._tasks.find(name) is None:
                return strategy
        except JobSyncError as error:
            # It was made after the worker began, which would have refused to start with it. It runs
            # nowhere until that is mended.
            reason = str(error)
            return lambda message, body, ack, reject, callbacks: self._refuse(
                message, reason, Unroutable
            )

        def receive(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:
            note = self._note(name, message)
            if isinstance(note, Refused):
                self._refuse(message, note.reason, Unroutable)
                return
            errors = self._consumer.connection_errors
            waiting = _Waiting(
                note,
                message,
                lambda: strategy(message, body, ack, reject, callbacks),
                lambda: ack(logger, errors),
                lambda: reject(logger, errors, True),
                lambda: reject(logger, errors, False),
                clock.now() + self._gate.settings.park_sec,
            )
            if self._is_pinned_late(name):
                self._keep(
                    waiting, 'was pinned after this worker began, and its pin is not registered'
                )
                return
            message.__dict__[_NOTE] = note
            self._gate.count('received')
            if self._gate.job.owns(note.route):  # what nearly every message is, without the rest
                strategy(message, body, ack, reject, callbacks)
                return
            self._place(waiting)

        return receive

    def _is_pinned_late(self, name: str) -> bool:
        """Whether a task has a pin that this node did not register when it entered, so that nothing
        holds its messages to it.
        """
        found = self._tasks.find(name)
        return found is not None and found.pin is not None and name not in self._pinned

    def _read(self, message: Any) -> Incoming | Refused:
        known = vars(message)
        found = known.get(_INCOMING)
        if found is None:
            found = known[_INCOMING] = read_delivery(message)
        return found  # type: ignore[no-any-return]

    def _note(self, name: str, message: Any) -> _Note | Refused:
        found = self._read(message)
        if isinstance(found, Refused):
            return found
        message_id = read_id(found.id)
        if isinstance(message_id, Refused):
            return message_id
        stamps = self._stamps(found, message)
        route = self._tasks.route_of(name, found.args, found.kwargs, message_id, stamps)
        if route is None or isinstance(route, Refused):
            return route or Refused('its task is not coordinated any more')
        return _Note(
            name,
            route,
            stamps.hops,
            stamps.home or self._queues.home_of(message),
            self._gate.job.incarnation,
        )

    def _stamps(self, found: Incoming, message: Any) -> Stamps:
        stamps = read_stamps(message.headers)
        if stamps.wrong:
            more = self._repeats.say((found.task, 'stamps'), clock.now())
            if more is not None:
                logger.warning(
                    'Task %s[%s]: its %s cannot be right, and is left out%s',
                    found.task,
                    found.id,
                    stamps.wrong,
                    more,
                )
        return stamps

    def _refuse(
        self,
        message: Any,
        reason: str,
        cause: type[MessageRefused] = MessageRefused,
        reject: Callable[[], object] | None = None,
    ) -> None:
        """Set a message aside, where the dead letters of its queue go; whatever it is, and whatever
        fails, once.
        """
        self._gate.count('refused')
        if self._queues.is_of_node(message):
            plainly, reject = reject, lambda: self._reject_at_home(message, plainly)
        set_aside(self._app, self._consumer, message, cause, reason, reject)

    def _reject_at_home(self, message: Any, plainly: Callable[[], object] | None) -> None:
        """Send a message back to its own queue, to be rejected there: a node's queue has no dead
        letters.
        """
        headers = {
            name: value
            for name, value in (message.headers or {}).items()
            if name not in (KEY, HOPS, HOME)
        }
        try:
            self._forwarder.send(
                read_stamps(message.headers).home or self._queues.home_of(message),
                message,
                {**headers, REFUSED: True},
            )
            message.ack_log_error(logger, self._consumer.connection_errors)
        except (
            Exception
        ) as error:  # the broker takes nothing just now, or the message cannot be copied
            logger.debug('rejected in the queue of its node: %r', error)
        if plainly is not None:
            plainly()
        elif not message.acknowledged:
            message.reject_log_error(logger, self._consumer.connection_errors)

    # --- tasks that nobody here knows ---

    def keep_unknown(self, body: Any, message: Any, error: Any) -> None:
        """In place of the consumer's on_unknown_task, which discards: another node may know the
        task, or this one after an upgrade.
        """
        if not self._is_node():
            self._discard(body, message, error)
            return
        found = self._read(message)
        if isinstance(found, Refused):
            self._refuse(message, found.reason)
            return
        stamps = self._stamps(found, message)
        note = _Note(
            found.task,
            stamps.key or '',
            0,
            stamps.home or self._queues.home_of(message),
            self._gate.job.incarnation,
        )
        errors = self._consumer.connection_errors
        self._keep(
            _Waiting(
                note,
                message,
                lambda: None,
                lambda: message.ack_log_error(logger, errors),
                lambda: message.reject_log_error(logger, errors, True),
                lambda: message.reject_log_error(logger, errors),
                0.0,
            ),
            'is not registered here',
        )

    def _keep(self, waiting: _Waiting, why: str) -> None:
        name = waiting.note.name
        more = self._repeats.say((name, why), clock.now())
        if more is not None:
            logger.error(
                'Task %s[%s] %s: set apart until a node comes that knows it. Nodes of one cluster '
                'must know the same tasks%s',
                name,
                (waiting.message.headers or {}).get('id'),
                why,
                more,
            )
        waiting.unknown = True
        self._place(waiting)

    # --- before the pool ---

    def dispatch(self, request: Any) -> None:
        """In place of the consumer's on_task_request: an ETA, a rate limit or the prefetch may have
        taken minutes.
        """
        try:
            self._dispatch(request)
        except MemoryError:
            raise
        # in a timer's call, nobody would hear of it, and the message would stay in hand
        except Exception as error:
            self._handing.failed(request, error)

    def _dispatch(self, request: Any) -> None:
        note = getattr(request.message, _NOTE, None) or vars(request.message).get(_NOTE)
        if note is None:
            self._handing.to_pool(request)
            return

        def done(action: Callable[[], object]) -> Callable[[], None]:
            def end() -> None:
                action()
                state.task_ready(request)

            return end

        def run() -> None:
            self._dispatched.add(request)
            self._gate.count('run')
            self._handing.guard_end(request)
            self._handing.to_pool(request)

        mine = note.incarnation == self._gate.job.incarnation and self._gate.job.owns(note.route)
        if mine and self._admits(note.name):
            run()
            return
        waiting = _Waiting(
            note,
            request.message,
            run,
            done(request.acknowledge),
            done(lambda: request.reject(requeue=True)),
            done(lambda: request.reject(requeue=False)),
            clock.now() + self._gate.settings.park_sec,
            late=True,
        )
        if mine:
            self._wait(waiting)
        else:
            self._place(waiting)

    def _admits(self, name: str) -> bool:
        """Whether a task may go to the pool, as far as the database is concerned, which may refuse
        to begin anything.
        """
        pausing = self._gate.job.pausing
        if not pausing.length:
            return True
        found = self._tasks.find(name)
        return found is None or found.once is None or pausing.admits(clock.now())

    def busy(self, tokens: TokenSet) -> bool:
        """Whether a task on one of these tokens is at the pool."""
        token_of = self._gate.job.task_to_token
        reserved = state.reserved_requests
        return any(
            request in reserved and token_of(vars(request.message)[_NOTE].route) in tokens
            for request in list(self._dispatched)
        )

    # --- where to ---

    def _place(self, waiting: _Waiting) -> bool:
        """Send a message on its way; True when that is done, False when it waits. Raises
        nothing.
        """
        note = waiting.note
        if note.incarnation != self._gate.job.incarnation:
            # This node was taken for dead meanwhile, and others have put its messages back: this
            # one may be a copy.
            self._end(waiting, waiting.requeue, 'returned')
            return True
        if waiting.unknown:
            return self._send(
                waiting,
                self._queues.unknown,
                0,
                'unknown',
                Decision(Verdict.PARK, reason='unknown'),
            )
        try:
            decision = self._gate.decide(note.route, note.hops)
        except Exception:
            logger.exception('Task %s: the gate failed; the message waits', note.name)
            return self._wait(waiting)
        if decision.verdict is Verdict.RUN:
            if waiting.late and not self._admits(note.name):
                return self._wait(waiting)
            self._run(waiting)
            return True
        if decision.verdict is Verdict.DROP:
            self._end(waiting, waiting.ack, 'dropped')
            return True
        if decision.verdict is Verdict.FORWARD:
            return self._send(waiting, decision.queue, note.hops + 1, 'forwarded', decision)
        if not self._gate.job.am_i_healthy():
            return self._wait(waiting)  # the lease watch stops the consumer
        if clock.now() >= waiting.until:
            return self._send(waiting, self._queues.parked, 0, 'parked', decision)
        return self._wait(waiting)

    def _run(self, waiting: _Waiting) -> None:
        try:
            waiting.run()
        except MemoryError:
            raise
        except Exception as error:
            self._not_taken(
                waiting.message,
                error,
                lambda: self._place(waiting),
                waiting.refuse,
                waiting.requeue,
            )

    def _send(
        self, waiting: _Waiting, queue: str, hops: int, event: str, decision: Decision
    ) -> bool:
        note, message = waiting.note, waiting.message
        headers = {
            name: value
            for name, value in (message.headers or {}).items()
            if name not in (KEY, HOPS, HOME)
        }
        headers.update({HOPS: hops, HOME: note.home})
        if note.route:
            headers[KEY] = note.route
        try:
            self._forwarder.send(queue, message, headers)
        except BrokerBusy:
            waiting.until = clock.now() + _AGAIN_SEC
            return self._wait(waiting)
        # kombu, amqp and redis have no common ancestor; the message stays unacknowledged
        except Exception as error:
            # The first time it may be a connection that broke: what reads from a closed socket
            # raises ValueError, for one.
            if is_its_fault(error) and waiting.failed:
                self._refuse(
                    message,
                    f'it cannot be sent to {queue}: {type(error).__name__}: {error}',
                    reject=waiting.refuse,
                )
                return True
            waiting.failed = True
            more = self._repeats.say((note.name, 'send'), clock.now())
            if more is not None:
                logger.warning(
                    'Task %s cannot be sent to %s now, and waits: %r%s',
                    note.name,
                    queue,
                    error,
                    more,
                )
            waiting.until = clock.now() + _AGAIN_SEC
            return self._wait(waiting)
        logger.debug('Task %s: %s to %s: %s', note.name, event, queue, decision.reason)
        self._event(f'task-{event}', message, queue)
        self._end(waiting, waiting.ack, event)
        if queue == self._queues.parked:
            self._on_parked()
        return True

    def _end(self, waiting: _Waiting, action: Callable[[], object], event: str) -> None:
        self._gate.count(event)
        try:
            action()
        except Exception as error:  # the connection is lost: the broker delivers the message again
            logger.warning('Task %s: %s, but not acknowledged: %r', waiting.note.name, event, error)

    def _event(self, kind: str, message: Any, queue: str) -> None:
        dispatcher = self._consumer.event_dispatcher
        if dispatcher is not None and dispatcher.enabled:
            headers = message.headers or {}
            dispatcher.send(kind, uuid=headers.get('id'), name=headers.get('task'), queue=queue)

    # --- waiting in memory ---

    def _wait(self, waiting: _Waiting) -> bool:
        with self._lock:
            self._waiting.append(waiting)
            # One timer for all of them; should its entry have been lost, another one.
            if self._looks_at is None or clock.now() > self._looks_at + _LOST_SEC:
                self._looks_at = clock.now() + _LOOK_SEC
                self._consumer.timer.call_after(_LOOK_SEC, self._time_has_come)
        return False

    def _time_has_come(self) -> None:
        self._looks_at = None
        self.look()

    def look(self) -> None:
        """Try the waiting messages again."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for item in waiting:
            try:
                self._place(item)
            except Exception:  # each on its own: those behind it are looked at all the same
                logger.exception('Task %s: the gate failed; the message goes back', item.note.name)
                self._end(item, item.requeue, 'returned')
        self._holding.look()

    def disconnected(self) -> None:
        """The connection is gone, and the broker delivers again what was not acknowledged."""
        with self._lock:
            self._waiting.clear()
            self._looks_at = None  # the timer's entries go with the connection
        self._holding.disconnected()

    def return_waiting(self) -> None:
        """Return what waits to the broker."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for item in waiting:
            self._end(item, item.requeue, 'returned')
        self._holding.return_all()

    def return_running(self) -> None:
        """Return what is executed here, if its task completes once: others execute it, and this
        attempt's end does not count.
        """
        for request in list(self._dispatched):
            if request not in state.active_requests or request.acknowledged:
                continue
            try:
                coordination = self._tasks.find(vars(request.message)[_NOTE].name)
                if coordination is not None and coordination.once is not None:
                    logger.warning(
                        'Task %s[%s] is executed without a lease: its message goes back',
                        request.name,
                        request.id,
                    )
                    request.reject(requeue=True)
            except Exception as error:  # each on its own
                logger.warning('Task %s[%s] does not go back: %r', request.name, request.id, error)

    def close(self) -> None:
        """Close the publisher."""
        self._forwarder.close()

    @property
    def waiting(self) -> int:
        """Messages that wait in memory."""
        return len(self._waiting) + len(self._holding)
