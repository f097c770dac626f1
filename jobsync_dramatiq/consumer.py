"""The consumers that a worker gets in place of the broker's own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from dramatiq.broker import Consumer
from dramatiq.errors import ConnectionClosed, ConnectionFailed

from jobsync_core.logs import get_logger
from jobsync_core.worker.consuming import Consuming
from jobsync_core.worker.inbox import Action, Outcome
from jobsync_core.worker.when_to_consume import Consume

from .broker.interface import QueueConsumer
from .gate import WorkerGate
from .notes import Note, note_of
from .receiving import receive

__all__ = ['GatedConsumer', 'WatchedConsumer']

logger = get_logger(__name__)

#: Seconds between two looks at a lease that is away.
_LOOK_SEC = 0.05
#: Seconds until a message that could not be sent on is tried again.
_AGAIN_SEC = 1.0
#: Seconds until a consumer whose broker was lost asks for it again.
_OPEN_AGAIN_SEC = 1.0
#: What a broker raises that cannot be reached; their base has one name in Dramatiq 1, and another
#: in Dramatiq 2.
_LOST = (ConnectionClosed, ConnectionFailed)


class _LifeOver(ConnectionClosed):
    """The lease ran out, not the connection; to Dramatiq's consumer both are one."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)
        self.message = message


class GatedConsumer(Consumer):
    """A consumer that hands out what this node owns, and sends the rest on.

    A broker that cannot be reached is no error here: Dramatiq would log it every three seconds for
    each queue. The consumer requeues what it can, and begins to consume anew when the broker is
    back.

    Args:
        gate: Of the worker.
        queue: The queue.
        consume: Begins to consume the queue.
    """

    def __init__(self, gate: WorkerGate, queue: str, consume: Callable[[], QueueConsumer]) -> None:
        self._gate = gate
        self._queue = queue
        self._consume = consume
        self._opened: QueueConsumer | None = None
        self._open_at = 0.0
        self._incarnation = gate.job.incarnation
        self._delays = queue.endswith('.DQ')
        self._paused = self._handed_out = False
        #: What has requeued what had not begun, while nothing is taken.
        self._requeued_by: Callable[[QueueConsumer], object] | None = None
        self._waiting: list[Any] = []

    def __next__(self) -> Any:
        if self._opened is None and self._gate.now() < self._open_at:
            time.sleep(_LOOK_SEC)
            return None
        try:
            if self._opened is None:
                self._opened = self._consume()
            return self._next()
        except _LifeOver:
            raise
        except _LOST as error:
            self._lose(error)
            if self._delays and self._handed_out:
                raise  # the worker forgets what waits for its time; the broker puts it all back
            return None

    def _lose(self, error: Exception) -> None:
        self._gate.consuming.lost(self._queue, error)
        self._open_at = self._gate.now() + _OPEN_AGAIN_SEC
        with contextlib.suppress(*_LOST):
            self.close()

    @property
    def _source(self) -> QueueConsumer:
        assert self._opened is not None
        return self._opened

    def _next(self) -> Any:
        found = self._gate.look()
        if found is Consume.NO_LEASE:
            return self._rest(self._gate.requeue_unleased)
        # What is delayed does not begin: it goes to its queue when it is due.
        if found is Consume.PAUSED and not self._delays:
            return self._rest(self._gate.requeue_unbegun)
        if self._paused:
            self._source.resume()
            self._paused, self._requeued_by = False, None
        for position, message in enumerate(self._waiting):
            if self._place(message):
                del self._waiting[position]
                return self._handed(message)
        message = self._source.next(patient=not self._waiting)
        self._gate.consuming.looked(self._queue)
        if message is not None:
            self._receive(message)
        if self._delays:
            self._check_life(message)
        if message is None:
            return None
        if not self._place(message):
            self._waiting.append(message)
            return None
        return self._handed(message)

    def ack(self, message: Any) -> None:
        """Acknowledge a message on the queue that it came from; or requeue it there."""
        note = note_of(message)
        if self._ends(message):
            if note is not None and note.goes_back:
                note.source.requeue(message)
            else:
                self._source_of(message).ack(message)

    def nack(self, message: Any) -> None:
        """Refuse a message on the queue that it came from."""
        if self._ends(message):
            self._source_of(message).nack(message)

    def requeue(self, messages: Any) -> None:
        """Requeue messages, each where it came from."""
        for message in list(messages):
            if self._ends(message):
                self._source_of(message).requeue(message)

    def _source_of(self, message: Any) -> QueueConsumer:
        note = note_of(message)
        return note.source if note is not None else self._source

    def _ends(self, message: Any) -> bool:
        """The worker is done with the message; whether the broker is to hear of it."""
        self._gate.end(message)
        note = note_of(message)
        return note is None or not note.sent_on

    def close(self) -> None:
        """End; what waits goes back."""
        waiting, self._waiting = self._waiting, []
        source, self._opened = self._opened, None
        self._paused, self._requeued_by = False, None
        if source is not None:
            source.close(waiting)

    def _rest(self, requeue: Callable[[QueueConsumer], object]) -> None:
        """Without a lease, or a database that begins work: requeue what has not begun, and take
        nothing.

        Args:
            requeue: Requeues what the worker has of this queue.
        """
        if self._delays:
            self._check_life(None)
        if self._requeued_by != requeue:  # the lease may run out in a pause
            self._requeued_by = requeue
            waiting, self._waiting = self._waiting, []
            for message in waiting:
                self._source.requeue(message)
                self._gate.count('returned')
            requeue(self._source)
        if not self._paused:
            self._paused = True
            self._source.pause()
        self._gate.consuming.rests(self._queue)
        self._source.idle(_LOOK_SEC)

    def _check_life(self, message: Any) -> None:
        """What is delayed waits in the worker's memory, and between two calls the worker sends what
        is due. That must not be: others may have put the same messages back by now, or wait for
        them.

        Raises:
            ConnectionClosed: The worker forgets what is delayed, and begins anew in a moment; the
                broker puts all of it back.
        """
        job = self._gate.job
        if self._handed_out and not (job.am_i_healthy() and job.incarnation == self._incarnation):
            if message is not None:
                self._source.requeue(message)
            raise _LifeOver('JobSync: the lease ran out; what is delayed goes back')

    def _receive(self, message: Any) -> None:
        gate = self._gate
        until = gate.now() + gate.park_sec
        note = receive(message, self._source, gate.actors, gate.job.incarnation, until)
        if gate.is_coordinated(message, note):
            gate.count('received')

    def _handed(self, message: Any) -> Any:
        note = note_of(message)
        if note is not None and note.sent_on:
            return None
        if note is not None and not self._handed_out:
            self._handed_out, self._incarnation = True, note.received.incarnation
        if not self._delays:
            self._gate.hand_out(message)
        return message

    def _place(self, message: Any) -> bool:
        """True: it may run, or is sent on; False: it waits."""
        try:
            return self._try_to_place(message)
        except Exception:
            logger.exception('id=%s: the gate failed; the message waits', message.message_id)
            return False

    def _try_to_place(self, message: Any) -> bool:
        note, gate = note_of(message), self._gate
        if note is None or 'eta' in message.options:
            return True
        outcome = gate.place(note.received)
        match outcome.action:
            case Action.RUN:
                return gate.admits(message)
            case Action.DEAD_LETTER:
                return True  # it fails in the worker, where all middleware hear of it
            case Action.SEND:
                if outcome.event == 'unknown':
                    gate.tell_unknown(message)
                return self._send(message, note, outcome)
            case Action.REQUEUE:
                self._source.requeue(message)
            case Action.DROP:
                self._source.ack(message)
            case Action.WAIT:
                return False
        return self._gone(note, outcome.event)

    def _send(self, message: Any, note: Note, outcome: Outcome) -> bool:
        gate, queue, event = self._gate, outcome.queue, outcome.event
        if gate.now() < note.again:
            return False
        try:
            gate.broker.send(message, queue, note.received.route, outcome.hops, self._source)
        # the brokers' clients have no common ancestor; the message stays unacknowledged
        except Exception as error:
            logger.warning(
                'id=%s cannot be sent to %s now, and waits: %r', message.message_id, queue, error
            )
            note.again = gate.now() + _AGAIN_SEC
            return False
        self._gone(note, event)
        try:
            self._source.ack(message)
        except Exception as error:  # it comes again; exactly_once tells the two apart
            logger.warning('id=%s: %s, but not acknowledged: %r', message.message_id, event, error)
        if event == 'parked':
            gate.on_parked(note.received.home)
        return True

    def _gone(self, note: Note, event: str) -> bool:
        self._gate.count(event)
        note.sent_on = True
        return True


class WatchedConsumer(Consumer):
    """The broker's own consumer, of a worker without coordination, whose probes want to know
    whether it consumes.

    Args:
        consumer: Dramatiq's own.
        queue: Its queue.
        consuming: What is told of it.
    """

    def __init__(self, consumer: Any, queue: str, consuming: Consuming) -> None:
        self._consumer = consumer
        self._queue = queue
        self._consuming = consuming

    def ack(self, message: Any) -> None:
        """As the broker's own."""
        self._consumer.ack(message)

    def nack(self, message: Any) -> None:
        """As the broker's own."""
        self._consumer.nack(message)

    def requeue(self, messages: Any) -> None:
        """As the broker's own."""
        self._consumer.requeue(messages)

    def __next__(self) -> Any:
        try:
            message = next(self._consumer)
        except Exception as error:
            self._consuming.lost(self._queue, error)
            raise
        self._consuming.looked(self._queue)
        return message

    def close(self) -> None:
        """As the broker's own."""
        self._consumer.close()
