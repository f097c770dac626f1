"""The gate between the broker and a Dramatiq worker: a consumer around the broker's, and the last look before an actor runs."""
from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dramatiq.broker import Consumer
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import SkipMessage

from jobsync_core import clock
from jobsync_core.plugin import Gate
from jobsync_core.routing import HOPS, KEY, Verdict, parked_queue
from jobsync_core.tokens import TokenSet

from .actors import HOME, Actors
from .mail import BrokerMail, Hold, wrapped

if TYPE_CHECKING:
    from .middleware import JobSync

__all__ = ['GatedConsumer', 'Note', 'WorkerGate', 'give_back', 'note_of']

logger = logging.getLogger(__name__)

#: Seconds between two looks at a lease that is away.
_LOOK_SEC = 0.05
#: Seconds until a message that could not be sent on is tried again.
_AGAIN_SEC = 1.0


@dataclass
class Note:
    """What the gate knows of a message in hand.

    Attributes:
        source: Where it came from, and is acknowledged.
        route: None: its actor is not coordinated.
        hops: How often it was handed on.
        incarnation: The node's life that took it.
        until: When it is parked, on the monotonic clock.
        again: When it may be sent, after that has failed.
        give_back: It goes back to its queue instead of being acknowledged.
        unseen: No middleware but this one has seen it.
        sent_on: It is gone; nobody may run it.
    """

    source: Hold
    route: str | None
    hops: int
    incarnation: str
    until: float
    again: float = 0.0
    give_back: bool = False
    unseen: bool = False
    sent_on: bool = False


def note_of(message: Any) -> Note | None:
    """The note of a message that came through the gate."""
    found = vars(message).get('jobsync_note')
    return found if isinstance(found, Note) else None


def give_back(message: Any, note: Note) -> SkipMessage:
    """Have the message go back to its queue instead of being acknowledged; raise what this returns."""
    note.give_back = True
    # A skipped message would get the result None, for which a group may wait.
    message.options['store_results'] = False
    return SkipMessage('jobsync: the message goes back')


class WorkerGate:
    """What the consumers and threads of a worker share.

    Args:
        plugin: The plugin.
        gate: The node's gate.
        mail: The broker.
        actors: Its coordinated actors.
    """

    def __init__(self, plugin: JobSync, gate: Gate, mail: BrokerMail, actors: Actors) -> None:
        self.plugin = plugin
        self.gate = gate
        self.mail = mail
        self.actors = actors
        self.parked = parked_queue(gate.settings.config.appname)
        self._running: dict[int, str] = {}
        self._lock = threading.Lock()

    def begin(self, message: Any) -> None:
        """The last look.

        Raises:
            SkipMessage: The message must not run here now; it goes back to where it came from.
        """
        note = note_of(message)
        if note is None:
            return
        job = self.gate.job
        if note.route is not None:
            # First as running, then the look: who gives the token away meanwhile waits for it.
            with self._lock:
                self._running[id(message)] = note.route
        # Of an earlier life, others have put the message back; without a lease, they may be about to.
        may_run = job.owns(note.route) if note.route is not None else job.am_i_healthy()
        if note.incarnation != job.incarnation or not may_run:
            self.end(message)
            self.gate.count('returned')
            note.unseen = True
            raise give_back(message, note)
        if note.route is not None:
            self.gate.count('run')

    def end(self, message: Any) -> None:
        """The message does not run any more."""
        with self._lock:
            self._running.pop(id(message), None)

    def busy(self, tokens: TokenSet) -> bool:
        """Whether an actor runs on one of these tokens."""
        with self._lock:
            routes = list(self._running.values())
        return any(self.gate.job.task_to_token(route) in tokens for route in routes)

    def hides(self, signal: str, message: Any) -> bool:
        """Whether the other middleware must not hear of this.

        A message that came too late has begun for none of them, so that its end would be one too many; and one that goes
        back is not acknowledged.
        """
        note = note_of(message) if signal in ('skip_message', 'ack') else None
        return note is not None and note.give_back and (note.unseen or signal == 'ack')


class GatedConsumer(Consumer):
    """A consumer that hands out what this node owns, and sends the rest on.

    Args:
        worker_gate: Of the worker.
        hold: The broker's consumer.
    """

    def __init__(self, worker_gate: WorkerGate, hold: Hold) -> None:
        self._shared = worker_gate
        self._gate = worker_gate.gate
        self._hold = hold
        self._incarnation = self._gate.job.incarnation
        self._delays = hold.queue.endswith('.DQ')
        self._paused = False
        self._waiting: list[Any] = []

    def __next__(self) -> Any:
        if not self._gate.job.am_i_healthy():
            return self._without_lease()
        if self._paused:
            self._resume()
        for position, message in enumerate(self._waiting):
            if self._place(message):
                del self._waiting[position]
                return self._handed(message)
        message = self._hold.next(patient=not self._waiting)
        if message is not None:
            self._receive(message)
        if self._delays and not self._gate.job.am_i_healthy():
            # This process may have been stopped for long: what is due in its memory may be due elsewhere.
            if message is not None:
                self._hold.requeue(message)
            return self._without_lease()
        if message is None:
            return None
        if not self._place(message):
            self._waiting.append(message)
            return None
        return self._handed(message)

    def ack(self, message: Any) -> None:
        """See Consumer: on the queue that the message came from."""
        note = note_of(message)
        if note is not None and note.give_back:
            note.source.requeue(message)
        else:
            self._source(message).ack(message)

    def nack(self, message: Any) -> None:
        """See Consumer: on the queue that the message came from."""
        self._source(message).nack(message)

    def requeue(self, messages: Any) -> None:
        """See Consumer."""
        for message in list(messages):
            self._source(message).requeue(message)

    def close(self) -> None:
        """See Consumer: what waits goes back."""
        waiting, self._waiting = self._waiting, []
        self._hold.close(waiting)

    # --- the lease ---

    def _without_lease(self) -> None:
        """Give back what has not been handed out, and take nothing."""
        if not self._paused:
            self._paused = True
            waiting, self._waiting = self._waiting, []
            for message in waiting:
                self._hold.requeue(message)
                self._gate.count('returned')
            self._hold.pause()
        self._hold.idle(_LOOK_SEC)
        while self._delays and not self._gate.job.am_i_healthy() and not self._shared.plugin.leaving:
            # Between two calls the worker sends on what is due.
            self._hold.idle(_LOOK_SEC)

    def _resume(self) -> None:
        if self._delays and self._incarnation != self._gate.job.incarnation:
            # Others have put back what this node held. After this error the worker forgets it, and begins anew.
            raise ConnectionClosed(RuntimeError('this node was taken for dead'))
        self._hold.resume()
        self._incarnation, self._paused = self._gate.job.incarnation, False

    # --- on receipt ---

    def _source(self, message: Any) -> Hold:
        note = note_of(message)
        return note.source if note is not None else self._hold

    def _handed(self, message: Any) -> Any:
        note = note_of(message)
        return message if note is None or not note.sent_on else None

    def _receive(self, message: Any) -> None:
        options = message.options
        hops = int(options.get(HOPS) or 0)
        home = options.get(HOME)
        if home is not None:
            message._message = wrapped(message, home, options.get(KEY))
        route = None
        if 'eta' not in options:
            try:
                route = options.get(KEY) or self._shared.actors.route_of(message)
            except Exception as error:  # whatever a key function raises
                # The actor itself will say what is wrong with its arguments.
                logger.warning('actor=%s id=%s has no key: %s', message.actor_name, message.message_id, error)
        note = Note(self._hold, route, hops, self._gate.job.incarnation, clock.now() + self._gate.settings.park_sec)
        vars(message)['jobsync_note'] = note
        if route is not None:
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
        if note is None or 'eta' in message.options:
            return True
        if note.route is None:
            return self._shared.actors.is_known(message) or self._park_unknown(message, note)
        if note.incarnation != self._gate.job.incarnation:
            # This node was taken for dead meanwhile, and others have put its messages back.
            self._hold.requeue(message)
            return self._gone(note, 'returned')
        decision = self._gate.decide(note.route, note.hops)
        if decision.verdict is Verdict.RUN:
            return self._shared.actors.is_known(message) or self._park_unknown(message, note)
        if decision.verdict is Verdict.DROP:
            self._hold.ack(message)
            return self._gone(note, 'dropped')
        if decision.verdict is Verdict.FORWARD:
            return self._send(message, note, decision.queue, note.hops + 1, 'forwarded')
        if self._gate.job.am_i_healthy() and clock.now() >= note.until:
            return self._send(message, note, self._shared.parked, 0, 'parked')
        return False

    def _park_unknown(self, message: Any, note: Note) -> bool:
        """Dramatiq would put it among the dead letters; but another node may know the actor, or this one after an upgrade."""
        logger.error('actor=%s id=%s is not known here: parked. Nodes of one cluster must know the same actors',
                     message.actor_name, message.message_id)
        return self._send(message, note, self._shared.parked, 0, 'unknown')

    def _send(self, message: Any, note: Note, queue: str, hops: int, event: str) -> bool:
        if clock.now() < note.again:
            return False
        try:
            self._shared.mail.send(message, queue, note.route, hops)
        except Exception as error:  # the brokers' clients have no common ancestor; the message stays unacknowledged
            logger.warning('id=%s cannot be sent to %s now, and waits: %r', message.message_id, queue, error)
            note.again = clock.now() + _AGAIN_SEC
            return False
        self._gone(note, event)
        try:
            self._hold.ack(message)
        except Exception as error:  # it comes again; exactly_once tells the two apart
            logger.warning('id=%s: %s, but not acknowledged: %r', message.message_id, event, error)
        if queue == self._shared.parked:
            self._shared.plugin.parked_something()
        return True

    def _gone(self, note: Note, event: str) -> bool:
        self._gate.count(event)
        note.sent_on = True
        return True
