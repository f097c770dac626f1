"""The gate between the broker and a Dramatiq worker: a consumer around the broker's, and the last
look before an actor runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from dramatiq.broker import Consumer
from dramatiq.errors import ConnectionClosed, ConnectionFailed

from jobsync_core import clock
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.logs import Repeats, get_logger
from jobsync_core.protocol.pausing import remedy
from jobsync_core.worker.consuming import Consuming
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.incoming import Refused
from jobsync_core.worker.routing import WAITS, Verdict, parked_queue, unknown_queue

from .actors import Actors
from .broker.interface import QueueConsumer, WorkerBroker
from .errors import Unroutable
from .incoming import unstamped
from .notes import Note, give_back, note_of

__all__ = ['GatedConsumer', 'WatchedConsumer', 'WorkerGate']

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


class WorkerGate:
    """What the consumers and threads of a worker share.

    Args:
        gate: The node's gate.
        broker: The broker.
        actors: Its coordinated actors.
        consuming: What is told of the consumers.
        on_parked: Called when a message went into the parked queue.
    """

    def __init__(
        self,
        gate: Gate,
        broker: WorkerBroker,
        actors: Actors,
        consuming: Consuming,
        on_parked: Callable[[], object],
    ) -> None:
        self.on_parked = on_parked
        self.gate = gate
        self.broker = broker
        self.actors = actors
        self.consuming = consuming
        self.parked, self.unknown = (
            parked_queue(gate.settings.config.appname),
            unknown_queue(gate.settings.config.appname),
        )
        self.repeats = Repeats()
        #: What threads of this worker have, or will have; and what of it has begun.
        self._in_hand: dict[int, Any] = {}
        self._begun: set[int] = set()
        self._refusing = False
        self._lock = threading.Lock()

    def hand_out(self, message: Any) -> None:
        """The worker gets the message."""
        with self._lock:
            self._in_hand[id(message)] = message

    def begin(self, message: Any) -> None:
        """The last look.

        Raises:
            SkipMessage: The message must not run here now; it goes back to where it came from.
        """
        note = note_of(message)
        if note is None:
            return
        # First as running, then the look: who gives the token away meanwhile waits for it.
        with self._lock:
            self._in_hand[id(message)] = message
            self._begun.add(id(message))
        job = self.gate.job
        # Of an earlier life, others have put the message back; without a lease, they may be about
        # to.
        may_run = job.owns(note.route) if note.route is not None else job.am_i_healthy()
        if note.incarnation != job.incarnation or not may_run or note.sent_on:
            self.end(message)
            self.gate.count('returned')
            note.unseen = True
            raise give_back(message, note)
        if note.route is not None:
            self.gate.count('run')

    def refuse(self, message: Any) -> None:
        """Have a message fail that nobody can tell where it may run; called when all middleware
        have seen it begin.

        Raises:
            Unroutable: It does, at once and for good.
        """
        note = note_of(message)
        if note is not None and note.problem:
            logger.error(
                'actor=%s id=%s cannot be routed, and goes to the dead letters: %s',
                message.actor_name,
                message.message_id,
                note.problem,
            )
            self.gate.count('unroutable')
            message.fail()
            message.options['throws'] = (
                Unroutable  # that is an expected end: Dramatiq writes no traceback
            )
            raise Unroutable(note.problem)

    def end(self, message: Any) -> None:
        """The message does not run any more."""
        with self._lock:
            self._in_hand.pop(id(message), None)
            self._begun.discard(id(message))

    def busy(self, tokens: TokenSet) -> bool:
        """Whether an actor runs on one of these tokens."""
        with self._lock:
            running = [self._in_hand[number] for number in self._begun]
        routes = [note.route for message in running if (note := note_of(message)) is not None]
        return any(
            self.gate.job.task_to_token(route) in tokens for route in routes if route is not None
        )

    def surrender(self, hold: QueueConsumer) -> None:
        """Give back what came from a consumer: what has not begun, and what runs if its actor
        completes once.

        Others run it then, and the end of the attempt that runs here does not count. It may hang
        for long, for example in a transaction behind a network that is silent, and all threads may.
        """
        number = self._give_back(hold, self._completes_once)
        if number:
            logger.warning('queue=%s: without a lease %d messages go back', hold.queue, number)

    def give_back(self, hold: QueueConsumer) -> None:
        """Give back what came from a consumer and has not begun."""
        self._give_back(hold, lambda message: False)

    def _give_back(self, hold: QueueConsumer, also: Callable[[Any], bool]) -> int:
        with self._lock:
            found = [
                (message, note)
                for number, message in self._in_hand.items()
                if (note := note_of(message)) is not None
                and note.source is hold
                and not note.sent_on
                and (number not in self._begun or also(message))
            ]
            for _, note in found:
                note.sent_on = True
        for message, _ in found:
            hold.requeue(message)
        if found:
            self.gate.count('returned', len(found))
        return len(found)

    # --- a database that refuses ---

    def is_paused(self) -> bool:
        """Whether the database refuses to begin anything, so that nothing is taken for a while.
        Says so once, and when it is over.
        """
        pausing, now = self.gate.job.pausing, clock.now()
        paused = pausing.is_paused(now)
        if paused and not self._refusing:
            self._refusing = True
            error, more = pausing.error, self.repeats.say('refused', now)
            if more is not None:
                logger.warning(
                    'JobSync: the database refuses to begin anything; consuming stops for %.0f s, '
                    'and one message tries then: '
                    '%s; %s%s',
                    pausing.length,
                    error,
                    remedy(error.sqlstate),
                    more,
                )
        elif self._refusing and not pausing.length:
            self._refusing = False
            logger.info('JobSync: the database begins work again; consuming goes on')
        return paused

    def admits(self, message: Any) -> bool:
        """Whether an actor may run, as far as the database is concerned."""
        pausing = self.gate.job.pausing
        if not pausing.length or not self._completes_once(message):
            return True
        with self._lock:
            return pausing.admits(clock.now())

    def _completes_once(self, message: Any) -> bool:
        found = self.actors.find(message.actor_name)
        return found is not None and found.once is not None

    def is_refused(self, signal: str, message: Any) -> bool:
        """Whether this is the end of a message that was refused, which no retry can help."""
        note = note_of(message) if signal == 'process_message' else None
        return note is not None and bool(note.problem) and message.failed

    def hides(self, signal: str, message: Any) -> bool:
        """Whether the other middleware must not hear of this.

        A message that came too late has begun for none of them, so that its end would be one too
        many; and one that goes back is not acknowledged.
        """
        note = note_of(message) if signal in ('skip_message', 'ack') else None
        return note is not None and note.give_back and (note.unseen or signal == 'ack')


class GatedConsumer(Consumer):
    """A consumer that hands out what this node owns, and sends the rest on.

    A broker that cannot be reached is no error here: Dramatiq would log it every three seconds for
    each queue. The consumer gives back what it can, and begins to consume anew when the broker is
    back.

    Args:
        worker_gate: Of the worker.
        queue: The queue.
        consume: Begins to consume the queue.
    """

    def __init__(
        self, worker_gate: WorkerGate, queue: str, consume: Callable[[], QueueConsumer]
    ) -> None:
        self._shared = worker_gate
        self._gate = worker_gate.gate
        self._queue = queue
        self._consume = consume
        self._opened: QueueConsumer | None = None
        self._open_at = 0.0
        self._incarnation = self._gate.job.incarnation
        self._delays = queue.endswith('.DQ')
        self._paused = self._gave = False
        #: What has given back what had not begun, while nothing is taken.
        self._given_back: Callable[[QueueConsumer], object] | None = None
        self._waiting: list[Any] = []

    def __next__(self) -> Any:
        if self._opened is None and clock.now() < self._open_at:
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
            if self._delays and self._gave:
                raise  # the worker forgets what waits for its time; the broker gives all of it back
            return None

    def _lose(self, error: Exception) -> None:
        self._shared.consuming.lost(self._queue, error)
        self._open_at = clock.now() + _OPEN_AGAIN_SEC
        with contextlib.suppress(*_LOST):
            self.close()

    @property
    def _hold(self) -> QueueConsumer:
        assert self._opened is not None
        return self._opened

    def _next(self) -> Any:
        if not self._gate.job.am_i_healthy():
            return self._rest(self._shared.surrender)
        if (
            not self._delays and self._shared.is_paused()
        ):  # what is delayed does not begin: it goes to its queue when it is due
            return self._rest(self._shared.give_back)
        if self._paused:
            self._hold.resume()
            self._paused, self._given_back = False, None
        for position, message in enumerate(self._waiting):
            if self._place(message):
                del self._waiting[position]
                return self._handed(message)
        message = self._hold.next(patient=not self._waiting)
        self._shared.consuming.looked(self._queue)
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
        """See Consumer: on the queue that the message came from."""
        note = note_of(message)
        if self._ends(message):
            if note is not None and note.give_back:
                note.source.requeue(message)
            else:
                self._source(message).ack(message)

    def nack(self, message: Any) -> None:
        """See Consumer: on the queue that the message came from."""
        if self._ends(message):
            self._source(message).nack(message)

    def requeue(self, messages: Any) -> None:
        """See Consumer."""
        for message in list(messages):
            if self._ends(message):
                self._source(message).requeue(message)

    def _ends(self, message: Any) -> bool:
        """The worker is done with the message; whether the broker is to hear of it."""
        self._shared.end(message)
        note = note_of(message)
        return note is None or not note.sent_on

    def close(self) -> None:
        """See Consumer: what waits goes back."""
        waiting, self._waiting = self._waiting, []
        hold, self._opened, self._paused, self._given_back = self._opened, None, False, None
        if hold is not None:
            hold.close(waiting)

    # --- without a lease, or a database that begins work ---

    def _rest(self, give_back: Callable[[QueueConsumer], object]) -> None:
        """Give back what has not begun, and take nothing."""
        if self._delays:
            self._check_life(None)
        if self._given_back != give_back:  # the lease may run out in a pause
            self._given_back = give_back
            waiting, self._waiting = self._waiting, []
            for message in waiting:
                self._hold.requeue(message)
                self._gate.count('returned')
            give_back(self._hold)
        if not self._paused:
            self._paused = True
            self._hold.pause()
        self._shared.consuming.rests(self._queue)
        self._hold.idle(_LOOK_SEC)

    def _check_life(self, message: Any) -> None:
        """What is delayed waits in the worker's memory, and between two calls the worker sends what
        is due. That must not be: others may have put the same messages back by now, or wait for
        them.

        Raises:
            ConnectionClosed: The worker forgets what is delayed, and begins anew in a moment; the
                broker gives all of it back.
        """
        job = self._gate.job
        if self._gave and not (job.am_i_healthy() and job.incarnation == self._incarnation):
            if message is not None:
                self._hold.requeue(message)
            raise _LifeOver('JobSync: the lease ran out; what is delayed goes back')

    # --- on receipt ---

    def _source(self, message: Any) -> QueueConsumer:
        note = note_of(message)
        return note.source if note is not None else self._hold

    def _handed(self, message: Any) -> Any:
        note = note_of(message)
        if note is not None and note.sent_on:
            return None
        if note is not None and not self._gave:
            self._gave, self._incarnation = True, note.incarnation
        if not self._delays:
            self._shared.hand_out(message)
        return message

    def _receive(self, message: Any) -> None:
        stamps = unstamped(message.options)
        if stamps.wrong:
            logger.warning(
                'actor=%s id=%s: what cannot be right is left out: %s',
                message.actor_name,
                message.message_id,
                stamps.wrong,
            )
        if stamps.waits:
            message.options[WAITS] = stamps.waits
        if self._queue.startswith('jobsync.'):
            # To all middleware, and to who asks for the result, it is in its actor's own queue.
            message._message = message.copy(
                queue_name=self._shared.actors.home_of(message, stamps.home)
            )
        elif not self._shared.actors.has_queue(message.queue_name):
            message._message = message.copy(
                queue_name=self._queue
            )  # a retry would go where nobody looks
        try:
            route = (
                stamps.key
                if 'eta' in message.options
                else self._shared.actors.read_route(message, stamps)
            )
        # an actor that was declared after the worker began, with a key that cannot work
        except Exception as error:
            route = Refused(f'its actor cannot be coordinated: {error}')
        note = Note(
            self._hold,
            None,
            stamps.hops,
            self._gate.job.incarnation,
            clock.now() + self._gate.settings.park_sec,
        )
        if isinstance(route, Refused):
            note.problem = route.reason
        else:
            note.route = route
        vars(message)['jobsync_note'] = note
        if note.route is not None:
            self._gate.count('received')

    def _place(self, message: Any) -> bool:
        """True: it may run, or is sent on; False: it waits."""
        try:
            return self._try_to_place(message)
        except Exception:
            logger.exception('id=%s: the gate failed; the message waits', message.message_id)
            return False

    def _try_to_place(self, message: Any) -> bool:
        note = note_of(message)
        if note is None or 'eta' in message.options or note.problem:
            return True
        if note.route is None:
            return self._shared.actors.is_known(message) or self._park_unknown(message, note)
        if note.incarnation != self._gate.job.incarnation:
            # This node was taken for dead meanwhile, and others have put its messages back.
            self._hold.requeue(message)
            return self._gone(note, 'returned')
        decision = self._gate.decide(note.route, note.hops)
        if decision.verdict is Verdict.RUN:
            if not self._shared.actors.is_known(message):
                return self._park_unknown(message, note)
            return self._shared.admits(message)
        if decision.verdict is Verdict.DROP:
            self._hold.ack(message)
            return self._gone(note, 'dropped')
        if decision.verdict is Verdict.FORWARD:
            return self._send(message, note, decision.queue, note.hops + 1, 'forwarded')
        if self._gate.job.am_i_healthy() and clock.now() >= note.until:
            return self._send(message, note, self._shared.parked, 0, 'parked')
        return False

    def _park_unknown(self, message: Any, note: Note) -> bool:
        """Dramatiq would put it among the dead letters; but another node may know the actor, or
        this one after an upgrade.
        """
        again = self._shared.repeats.say(message.actor_name, clock.now())
        if again is not None:
            logger.error(
                'actor=%s id=%s is not known here, and waits in %s until a node comes that knows '
                'it: nodes of one cluster must '
                'know the same actors%s',
                message.actor_name,
                message.message_id,
                self._shared.unknown,
                again,
            )
        return self._send(message, note, self._shared.unknown, 0, 'unknown')

    def _send(self, message: Any, note: Note, queue: str, hops: int, event: str) -> bool:
        if clock.now() < note.again:
            return False
        try:
            self._shared.broker.send(message, queue, note.route, hops, self._hold)
        # the brokers' clients have no common ancestor; the message stays unacknowledged
        except Exception as error:
            logger.warning(
                'id=%s cannot be sent to %s now, and waits: %r', message.message_id, queue, error
            )
            note.again = clock.now() + _AGAIN_SEC
            return False
        self._gone(note, event)
        try:
            self._hold.ack(message)
        except Exception as error:  # it comes again; exactly_once tells the two apart
            logger.warning('id=%s: %s, but not acknowledged: %r', message.message_id, event, error)
        if queue == self._shared.parked:
            self._shared.on_parked()
        return True

    def _gone(self, note: Note, event: str) -> bool:
        self._gate.count(event)
        note.sent_on = True
        return True


class WatchedConsumer(Consumer):
    """The broker's own consumer, of a worker without coordination, whose probes want to know
    whether it consumes.
    """

    def __init__(self, consumer: Any, queue: str, consuming: Consuming) -> None:
        self._consumer = consumer
        self._queue = queue
        self._consuming = consuming

    def ack(self, message: Any) -> None:
        """See Consumer."""
        self._consumer.ack(message)

    def nack(self, message: Any) -> None:
        """See Consumer."""
        self._consumer.nack(message)

    def requeue(self, messages: Any) -> None:
        """See Consumer."""
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
        """See Consumer."""
        self._consumer.close()
