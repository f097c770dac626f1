"""The gate of a Celery worker: every coordinated message passes it on receipt and once more before it goes to the pool.

Nothing here may raise into the consumer: an exception from a task's strategy ends the worker.
"""
from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery.worker import state

from jobsync_core import clock
from jobsync_core.errors import JobSyncError
from jobsync_core.plugin import Gate
from jobsync_core.routing import HOPS, KEY, Decision, Verdict, parked_queue
from jobsync_core.tokens import TokenSet

from .circuit import BrokerBusy
from .logs import get_logger
from .mail import Publisher

if TYPE_CHECKING:
    from .plugin import JobSync

__all__ = ['ConsumerGate', 'Strategies']

logger = get_logger(__name__)

#: Seconds between two looks at messages that wait in memory.
_LOOK_SEC = 0.1
_NOTE = 'jobsync_note'


class Strategies(dict):  # type: ignore[type-arg]  # celery's mapping, task name -> strategy
    """The consumer's strategies; each that is put in is wrapped, also after a reconnect or a reload."""

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
    incarnation: str


@dataclass
class _Waiting:
    """A message that is held, unacknowledged, until it can go somewhere."""

    note: _Note
    message: Any
    run: Callable[[], object]
    ack: Callable[[], object]
    requeue: Callable[[], object]
    until: float


class ConsumerGate:
    """The gate between a consumer and its pool.

    Args:
        plugin: The plugin.
        gate: The node's gate.
        consumer: Celery's consumer.
    """

    def __init__(self, plugin: JobSync, gate: Gate, consumer: Any) -> None:
        self._plugin = plugin
        self._gate = gate
        self._consumer = consumer
        self._publisher = Publisher(plugin, patient=False)
        self._parked_queue = parked_queue(gate.settings.config.appname)
        self._lock = threading.RLock()
        self._waiting: list[_Waiting] = []
        self._looking = False
        self._dispatched: weakref.WeakSet[Any] = weakref.WeakSet()
        self._to_pool = consumer.on_task_request
        consumer.strategies = Strategies(self._wrap)
        consumer.on_task_request = self.dispatch
        self._discard = consumer.on_unknown_task
        consumer.on_unknown_task = self.keep_unknown

    # --- on receipt ---

    def _wrap(self, name: str, strategy: Any) -> Any:
        try:
            if self._plugin.job is None or self._plugin.tasks.find(name) is None:
                return strategy
        except JobSyncError as error:
            logger.error('Task %s is not coordinated: %s', name, error)
            return strategy

        def receive(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:
            try:
                note = self._note(name, message, body)
            except Exception as error:  # whatever a key function or a decoder raises: the task itself will fail on it
                logger.warning('Task %s: a message without a key runs here: %r', name, error)
                note = None
            if note is None:
                strategy(message, body, ack, reject, callbacks)
                return
            message.__dict__[_NOTE] = note
            self._gate.count('received')
            if self._gate.job.owns(note.route):  # what nearly every message is, without the rest
                strategy(message, body, ack, reject, callbacks)
                return
            errors = self._consumer.connection_errors
            self._place(_Waiting(
                note, message, lambda: strategy(message, body, ack, reject, callbacks), lambda: ack(logger, errors),
                lambda: reject(logger, errors, True), clock.now() + self._gate.settings.park_sec))
        return receive

    def _note(self, name: str, message: Any, body: Any) -> _Note | None:
        headers = message.headers or {}
        route = headers.get(KEY)
        if route is None:
            if body is not None and 'args' in body:  # protocol 1
                args, kwargs, task_id = body.get('args') or (), body.get('kwargs') or {}, body['id']
            else:
                args, kwargs, _ = message.payload
                task_id = headers['id']
            route = self._plugin.tasks.route_of(name, args, kwargs, task_id)
        return _Note(name, route, int(headers.get(HOPS) or 0), self._gate.job.incarnation) if route is not None else None

    def keep_unknown(self, body: Any, message: Any, error: Any) -> None:
        """In place of the consumer's on_unknown_task, which discards: another node may know the task, or this one after an upgrade."""
        if self._plugin.job is None:
            self._discard(body, message, error)
            return
        headers = message.headers or {}
        logger.error('Task %s[%s] is not registered here: parked. Nodes of one cluster must know the same tasks',
                     headers.get('task'), headers.get('id'))
        try:
            self._publisher.send(self._parked_queue, message, {**headers, HOPS: 0})
            message.ack()
            self._gate.count('unknown')
            self._plugin.parked_something()
        except Exception as trouble:  # it stays unacknowledged, and the broker delivers it again
            logger.warning('Task %s[%s] cannot be parked: %r', headers.get('task'), headers.get('id'), trouble)

    # --- before the pool ---

    def dispatch(self, request: Any) -> None:
        """In place of the consumer's on_task_request: an ETA, a rate limit or the prefetch may have taken minutes."""
        note = getattr(request.message, _NOTE, None) or vars(request.message).get(_NOTE)
        if note is None:
            self._to_pool(request)
            return

        def done(action: Callable[[], object]) -> Callable[[], None]:
            def end() -> None:
                action()
                state.task_ready(request)
            return end

        def run() -> None:
            self._dispatched.add(request)
            self._gate.count('run')
            self._to_pool(request)

        if note.incarnation == self._gate.job.incarnation and self._gate.job.owns(note.route):
            run()
            return
        self._place(_Waiting(
            note, request.message, run, done(request.acknowledge), done(lambda: request.reject(requeue=True)),
            clock.now() + self._gate.settings.park_sec))

    def busy(self, tokens: TokenSet) -> bool:
        """Whether a task on one of these tokens is at the pool."""
        token_of = self._gate.job.task_to_token
        reserved = state.reserved_requests
        return any(
            request in reserved and token_of(vars(request.message)[_NOTE].route) in tokens for request in list(self._dispatched))

    # --- where to ---

    def _place(self, waiting: _Waiting) -> bool:
        """Send a message on its way; True when that is done, False when it waits."""
        note = waiting.note
        if note.incarnation != self._gate.job.incarnation:
            # This node was taken for dead meanwhile, and others have put its messages back: this one may be a copy.
            self._end(waiting, waiting.requeue, 'returned')
            return True
        try:
            decision = self._gate.decide(note.route, note.hops)
        except Exception:
            logger.exception('Task %s: the gate failed; the message waits', note.name)
            return self._wait(waiting)
        if decision.verdict is Verdict.RUN:
            waiting.run()
            return True
        if decision.verdict is Verdict.DROP:
            self._end(waiting, waiting.ack, 'dropped')
            return True
        if decision.verdict is Verdict.FORWARD:
            return self._send(waiting, decision.queue, note.hops + 1, 'forwarded', decision)
        if not self._gate.job.am_i_healthy():
            return self._wait(waiting)  # the keeper stops the consumer, and what waits goes back
        if clock.now() >= waiting.until:
            return self._send(waiting, self._parked_queue, 0, 'parked', decision)
        return self._wait(waiting)

    def _send(self, waiting: _Waiting, queue: str, hops: int, event: str, decision: Decision) -> bool:
        note, message = waiting.note, waiting.message
        try:
            self._publisher.send(queue, message, {**(message.headers or {}), KEY: note.route, HOPS: hops})
        except BrokerBusy:
            waiting.until = clock.now() + 1.0
            return self._wait(waiting)
        except Exception as error:  # kombu, amqp and redis have no common ancestor; the message stays unacknowledged
            logger.warning('Task %s cannot be sent to %s now, and waits: %r', note.name, queue, error)
            waiting.until = clock.now() + 1.0
            return self._wait(waiting)
        logger.debug('Task %s: %s to %s: %s', note.name, event, queue, decision.reason)
        self._event(f'task-{event}', message, queue)
        self._end(waiting, waiting.ack, event)
        if event == 'parked':
            self._plugin.parked_something()
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
            if not self._looking:
                self._looking = True
                self._consumer.timer.call_after(_LOOK_SEC, self.look)
        return False

    def look(self) -> None:
        """Try the waiting messages again."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._looking = False
        for item in waiting:
            self._place(item)

    def forget(self) -> None:
        """The connection is gone, and the broker delivers again what was not acknowledged."""
        with self._lock:
            self._waiting.clear()
            self._looking = False  # the timer's entries go with the connection

    def give_back(self) -> None:
        """Return what waits to the broker."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for item in waiting:
            self._end(item, item.requeue, 'returned')

    def surrender(self) -> None:
        """Return what is executed here, if its task completes once: others execute it, and this attempt's end does not count."""
        for request in list(self._dispatched):
            if request not in state.active_requests or request.acknowledged:
                continue
            coordination = self._plugin.tasks.find(vars(request.message)[_NOTE].name)
            if coordination is not None and coordination.once is not None:
                logger.warning('Task %s[%s] is executed without a lease: its message goes back', request.name, request.id)
                request.reject(requeue=True)

    def close(self) -> None:
        """Close the publisher."""
        self._publisher.close()

    @property
    def waiting(self) -> int:
        """Messages that wait in memory."""
        return len(self._waiting)
