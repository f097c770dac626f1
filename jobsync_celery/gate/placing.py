"""Carrying out what becomes of a delivery; what cannot go anywhere yet waits in memory.

The decision itself is pure: `jobsync_core.worker.inbox`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jobsync_core import clock
from jobsync_core.errors import MessageRefused, Unroutable
from jobsync_core.logs import Repeats
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.inbox import Action, Outcome
from jobsync_core.worker.routing import HOME, HOPS, KEY

from ..broker.circuit import BrokerBusy
from ..broker.forwarding import Forwarder
from ..faults import is_its_fault
from ..logs import get_logger
from .delivery import Delivery, unstamped
from .timer import LookTimer

__all__ = ['Placing']

logger = get_logger(__name__)

#: Seconds until a message that could not be sent on is tried again.
_AGAIN_SEC = 1.0


class Placing:
    """Sends each message on its way. Nothing here raises into the consumer.

    Args:
        consumer: Celery's consumer.
        gate: Decides.
        forwarder: Passes messages on; it does not keep the event loop waiting.
        refuse: Sets a message aside: the message, why, the class of the error, what rejects it.
        failed: Takes a message that could not be run: the message in hand and the error.
        admits: Whether a task may go to the pool, as far as the database is concerned.
        on_parked: Called with its home queue when a message went into a parked queue.
    """

    def __init__(
        self,
        consumer: Any,
        gate: Gate,
        forwarder: Forwarder,
        *,
        refuse: Callable[[Any, str, type[MessageRefused], Callable[[], object] | None], object],
        failed: Callable[[Delivery, Exception], object],
        admits: Callable[[str], bool],
        on_parked: Callable[[str], object],
    ) -> None:
        self._consumer = consumer
        self._gate = gate
        self._forwarder = forwarder
        self._refuse = refuse
        self._failed = failed
        self._admits = admits
        self._on_parked = on_parked
        self._lock = threading.RLock()
        self._waiting: list[Delivery] = []
        self._timer = LookTimer(
            lambda seconds, call: consumer.timer.call_after(seconds, call), self.look
        )
        self._repeats = Repeats()

    def __len__(self) -> int:
        return len(self._waiting)

    def place(self, item: Delivery) -> bool:
        """Send a message on its way; True when that is done, False when it waits. Raises
        nothing.
        """
        try:
            outcome = self._gate.place(item.received, clock.now())
        except Exception:
            logger.exception('Task %s: the gate failed; the message waits', item.note.name)
            return self.wait(item)
        return self._carry_out(item, outcome)

    def _carry_out(self, item: Delivery, outcome: Outcome) -> bool:
        if outcome.action is Action.RUN:
            if item.late and not self._admits(item.note.name):
                return self.wait(item)
            self._run(item)
        elif outcome.action is Action.SEND:
            return self._send(item, outcome)
        elif outcome.action is Action.WAIT:
            return self.wait(item)
        elif outcome.action is Action.DEAD_LETTER:
            self._refuse(item.message, outcome.reason, Unroutable, None)
        else:
            action = item.ack if outcome.action is Action.DROP else item.requeue
            self._end(item, action, outcome.event)
        return True

    def _run(self, item: Delivery) -> None:
        try:
            item.run()
        except MemoryError:
            raise
        except Exception as error:
            self._failed(item, error)

    def _send(self, item: Delivery, outcome: Outcome) -> bool:
        note, message, queue = item.note, item.message, outcome.queue
        headers = {**unstamped(message), HOPS: outcome.hops, HOME: note.home}
        if note.key:
            headers[KEY] = note.key
        try:
            self._forwarder.send(queue, message, headers)
        except BrokerBusy:
            return self._wait_again(item)
        # kombu, amqp and redis have no common ancestor; the message stays unacknowledged
        except Exception as error:
            # The first time it may be a connection that broke: what reads from a closed socket
            # raises ValueError, for one.
            if is_its_fault(error) and item.failed:
                self._refuse(
                    message,
                    f'it cannot be sent to {queue}: {type(error).__name__}: {error}',
                    MessageRefused,
                    item.refuse,
                )
                return True
            item.failed = True
            more = self._repeats.say((note.name, 'send'), clock.now())
            if more is not None:
                logger.warning(
                    'Task %s cannot be sent to %s now, and waits: %r%s',
                    note.name,
                    queue,
                    error,
                    more,
                )
            return self._wait_again(item)
        logger.debug('Task %s: %s to %s: %s', note.name, outcome.event, queue, outcome.reason)
        self._tell(f'task-{outcome.event}', message, queue)
        self._end(item, item.ack, outcome.event)
        if queue == self._gate.rules.parked(item.received.home):
            self._on_parked(item.received.home)
        return True

    def _end(self, item: Delivery, action: Callable[[], object], event: str) -> None:
        self._gate.count(event)
        try:
            action()
        except Exception as error:  # the connection is lost: the broker delivers the message again
            logger.warning('Task %s: %s, but not acknowledged: %r', item.note.name, event, error)

    def _tell(self, kind: str, message: Any, queue: str) -> None:
        """Send one of Celery's events."""
        dispatcher = self._consumer.event_dispatcher
        if dispatcher is not None and dispatcher.enabled:
            headers = message.headers or {}
            dispatcher.send(kind, uuid=headers.get('id'), name=headers.get('task'), queue=queue)

    def _wait_again(self, item: Delivery) -> bool:
        item.received = replace(item.received, until=clock.now() + _AGAIN_SEC)
        return self.wait(item)

    def wait(self, item: Delivery) -> bool:
        """Hold a message, and ask again in a moment; False."""
        with self._lock:
            self._waiting.append(item)
            self._timer.set()
        return False

    def look(self) -> None:
        """Try the waiting messages again."""
        for item in self._take_all():
            try:
                self.place(item)
            except Exception:  # each on its own: those behind it are looked at all the same
                logger.exception('Task %s: the gate failed; the message goes back', item.note.name)
                self._end(item, item.requeue, 'returned')

    def disconnected(self) -> None:
        """The connection is gone, and the broker delivers again what was not acknowledged."""
        with self._lock:
            self._waiting.clear()
            self._timer.forget()

    def requeue_all(self) -> None:
        """Requeue what waits."""
        for item in self._take_all():
            self._end(item, item.requeue, 'returned')

    def _take_all(self) -> list[Delivery]:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        return waiting
