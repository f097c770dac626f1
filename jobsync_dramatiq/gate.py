"""The gate between Redis and a Dramatiq worker: a consumer around the broker's, and the last look before an actor runs."""
from __future__ import annotations

import logging
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.broker import Consumer
from dramatiq.middleware import SkipMessage

from jobsync_core import clock
from jobsync_core.plugin import Gate
from jobsync_core.routing import HOPS, KEY, Verdict, parked_queue
from jobsync_core.tokens import TokenSet

from .actors import HOME, Actors

if TYPE_CHECKING:
    from .middleware import JobSync

__all__ = ['GatedConsumer', 'Note', 'WorkerGate', 'give_back', 'note_of', 'publish']

logger = logging.getLogger(__name__)

#: Seconds between two looks at messages that wait, and at a lease that is away.
_LOOK_SEC = 0.05


@dataclass
class Note:
    """What the gate knows of a message in hand."""

    source: Any
    route: str | None
    hops: int
    incarnation: Any
    until: float
    give_back: bool = False


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


def publish(broker: Any, message: Any, queue: str, home: str, route: str | None, hops: int) -> None:
    """Send a copy of a message, with the same id, time and arguments, to a queue; no middleware sees it."""
    options = {name: value for name, value in message.options.items() if name not in (KEY, HOPS, HOME)}
    options['redis_message_id'] = str(uuid.uuid4())
    if route is not None:
        options[KEY] = route
    if queue != home:
        options.update({HOME: home, HOPS: hops})
    broker.do_enqueue(queue, options['redis_message_id'], _rebuilt(message, queue, options).encode())


def _rebuilt(message: Any, queue: str, options: dict[str, Any]) -> Any:
    return Message(
        queue_name=queue, actor_name=message.actor_name, args=message.args, kwargs=message.kwargs, options=options,
        message_id=message.message_id, message_timestamp=message.message_timestamp)


class WorkerGate:
    """What the consumers and threads of a worker share.

    Args:
        plugin: The plugin.
        gate: The node's gate.
        broker: The broker.
        actors: Its coordinated actors.
    """

    def __init__(self, plugin: JobSync, gate: Gate, broker: Any, actors: Actors) -> None:
        self.plugin = plugin
        self.gate = gate
        self.broker = broker
        self.actors = actors
        self.parked = parked_queue(gate.settings.config.appname)
        #: Queues and Redis ids of what consumers that were closed had in hand.
        self.left: list[tuple[str, str]] = []
        self._running: dict[int, str] = {}
        self._lock = threading.Lock()

    def begin(self, message: Any) -> None:
        """The last look.

        Raises:
            SkipMessage: The message must not run here now; it goes back to where it came from.
        """
        note = note_of(message)
        if note is None or note.route is None:
            return
        job = self.gate.job
        # First as running, then the look: who gives the token away meanwhile waits for it.
        with self._lock:
            self._running[id(message)] = note.route
        if note.incarnation != job.incarnation or not job.owns(note.route):
            self.end(message)
            self.gate.count('returned')
            raise give_back(message, note)
        self.gate.count('run')

    def end(self, message: Any) -> None:
        """The message does not run any more."""
        with self._lock:
            self._running.pop(id(message), None)

    def give_back_left(self) -> None:
        """Give back what closed consumers had in hand; what fails is tried again at the keeper's next round."""
        while self.left:
            queue, number = item = self.left.pop()
            try:
                self.broker.do_requeue(queue, number)
            except Exception as error:  # Dramatiq would end the consumer's thread for what redis-py raises
                self.left.append(item)
                logger.warning('messages=%d cannot go back now: %r', len(self.left), error)
                return

    def busy(self, tokens: TokenSet) -> bool:
        """Whether an actor runs on one of these tokens."""
        with self._lock:
            routes = list(self._running.values())
        return any(self.gate.job.task_to_token(route) in tokens for route in routes)


class GatedConsumer(Consumer):
    """A consumer that hands out what this node owns, and sends the rest on.

    Args:
        worker_gate: Of the worker.
        raw: The broker's consumer.
    """

    def __init__(self, worker_gate: WorkerGate, raw: Any) -> None:
        self._shared = worker_gate
        self._gate = worker_gate.gate
        self._raw = raw
        self._waiting: list[Any] = []

    def __next__(self) -> Any:
        if not self._gate.job.am_i_healthy():
            time.sleep(_LOOK_SEC)
            return None
        for position, message in enumerate(self._waiting):
            if self._place(message):
                del self._waiting[position]
                return message if not vars(message).pop('jobsync_gone', False) else None
        if self._waiting:
            self._raw.misses = 0  # the pause stays short
        message = next(self._raw)
        if message is None:
            return None
        self._receive(message)
        if not self._place(message):
            self._waiting.append(message)
            return None
        return message if not vars(message).pop('jobsync_gone', False) else None

    def ack(self, message: Any) -> None:
        """See Consumer: on the queue that the message came from."""
        self._settle(message, 'ack')

    def nack(self, message: Any) -> None:
        """See Consumer: on the queue that the message came from."""
        self._settle(message, 'nack')

    def requeue(self, messages: Any) -> None:
        """See Consumer."""
        for message in list(messages):
            note = note_of(message)
            source = note.source if note is not None else self._raw
            source.requeue([message])
            source.queued_message_ids.discard(message.message_id)

    def close(self) -> None:
        """See Consumer: what waits goes back."""
        waiting, self._waiting = self._waiting, []
        # What was fetched, and not handed out yet, would stay in hand until this node is gone.
        cache, self._raw.message_cache = self._raw.message_cache, []
        waiting += [Message.decode(data) for data in cache if data is not None]
        self._shared.left.extend((self._raw.queue_name, message.options['redis_message_id']) for message in waiting)
        self._shared.give_back_left()
        self._raw.close()

    def _settle(self, message: Any, how: str) -> None:
        note = note_of(message)
        if note is not None and note.give_back:
            self.requeue([message])
            return
        getattr(note.source if note is not None else self._raw, how)(message)

    def _receive(self, message: Any) -> None:
        options = message.options
        home, hops = options.pop(HOME, None), int(options.pop(HOPS, 0) or 0)
        if home is not None:
            message._message = _rebuilt(message, home, options)
        route = None
        if 'eta' not in options:
            try:
                route = options.get(KEY) or self._shared.actors.route_of(message)
            except Exception as error:  # whatever a key function raises
                # The actor itself will say what is wrong with its arguments.
                logger.warning('actor=%s id=%s has no key: %s', message.actor_name, message.message_id, error)
        note = Note(self._raw, route, hops, self._gate.job.incarnation, clock.now() + self._gate.settings.park_sec)
        vars(message)['jobsync_note'] = note
        if route is not None:
            self._gate.count('received')

    def _place(self, message: Any) -> bool:
        """True: it may run, or is gone ('jobsync_gone'); False: it waits."""
        try:
            return self._try_to_place(message)
        except Exception:
            logger.exception('id=%s: the gate failed; the message waits', message.message_id)
            return False

    def _try_to_place(self, message: Any) -> bool:
        note = note_of(message)
        if note is None or note.route is None:
            return True
        if note.incarnation != self._gate.job.incarnation:
            # This node was taken for dead meanwhile, and others have put its messages back.
            self.requeue([message])
            return self._gone(message, 'returned')
        decision = self._gate.decide(note.route, note.hops)
        if decision.verdict is Verdict.RUN:
            return True
        if decision.verdict is Verdict.DROP:
            self._raw.ack(message)
            return self._gone(message, 'dropped')
        if decision.verdict is Verdict.FORWARD:
            return self._send(message, note, decision.queue, note.hops + 1, 'forwarded')
        if self._gate.job.am_i_healthy() and clock.now() >= note.until:
            return self._send(message, note, self._shared.parked, 0, 'parked')
        return False

    def _send(self, message: Any, note: Note, queue: str, hops: int, event: str) -> bool:
        try:
            publish(self._shared.broker, message, queue, message.queue_name, note.route, hops)
        except Exception as error:  # redis and its sockets have no common ancestor; the message stays unacknowledged
            logger.warning('id=%s cannot be sent to %s now, and waits: %r', message.message_id, queue, error)
            note.until = clock.now() + 1.0
            return False
        self._gone(message, event)
        try:
            self._raw.ack(message)
        except Exception as error:  # it comes again; exactly_once tells the two apart
            logger.warning('id=%s: %s, but not acknowledged: %r', message.message_id, event, error)
        if event == 'parked':
            self._shared.plugin.parked_something()
        return True

    def _gone(self, message: Any, event: str) -> bool:
        self._gate.count(event)
        vars(message)['jobsync_gone'] = True
        return True
