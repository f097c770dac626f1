"""The gate of a worker: what its consumers and threads share, and the last look before an actor
runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from jobsync_core import clock
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.logs import Repeats, get_logger
from jobsync_core.worker.consuming import Consuming
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.inbox import Action, Outcome, Received
from jobsync_core.worker.when_to_consume import Consume, WhenToConsume

from .actors import Actors
from .broker.interface import QueueConsumer, WorkerBroker
from .errors import Unroutable
from .notes import Note, note_of, requeue_instead

__all__ = ['WorkerGate']

logger = get_logger(__name__)


class WorkerGate:
    """What the consumers and threads of a worker share.

    Args:
        gate: The node's gate.
        broker: The broker.
        actors: Its coordinated actors.
        consuming: What is told of the consumers.
        on_parked: Called when a message of a home queue went into the parked one.
        now: The monotonic clock.
    """

    def __init__(
        self,
        gate: Gate,
        broker: WorkerBroker,
        actors: Actors,
        consuming: Consuming,
        on_parked: Callable[[str], object],
        now: Callable[[], float] = clock.now,
    ) -> None:
        self._gate = gate
        self.job = gate.job
        self.park_sec = gate.settings.park_sec
        self.broker = broker
        self.actors = actors
        self.consuming = consuming
        self.on_parked = on_parked
        self.now = now
        self._repeats = Repeats()
        #: What threads of this worker have, or will have; and what of it has begun.
        self._in_hand: dict[int, Any] = {}
        self._begun: set[int] = set()
        self._when = WhenToConsume()
        self._lock = threading.Lock()

    def place(self, received: Received) -> Outcome:
        """What becomes of a message."""
        return self._gate.place(received, self.now())

    def count(self, event: str, number: int = 1) -> None:
        """Count an event, for metrics and `local_status`."""
        self._gate.count(event, number)

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
        if note.sent_on or not self._gate.may_begin(note.received):
            self.end(message)
            self.count('returned')
            note.unseen = True
            raise requeue_instead(message, note)
        if self.is_coordinated(message, note):
            self.count('run')

    def is_coordinated(self, message: Any, note: Note) -> bool:
        """Whether a message has an owner, or completes once wherever it runs: those are counted."""
        received = note.received
        return received.route is not None or (
            not received.problem and self._completes_once(message)
        )

    def refuse(self, message: Any) -> None:
        """Have a message fail that nobody can tell where it may run; called when all middleware
        have seen it begin.

        Raises:
            Unroutable: It does, at once and for good.
        """
        note = note_of(message)
        if note is not None and note.received.problem:
            logger.error(
                'actor=%s id=%s cannot be routed, and goes to the dead letters: %s',
                message.actor_name,
                message.message_id,
                note.received.problem,
            )
            self.count('unroutable')
            message.fail()
            message.options['throws'] = (
                Unroutable  # that is an expected end: Dramatiq writes no traceback
            )
            raise Unroutable(note.received.problem)

    def end(self, message: Any) -> None:
        """The message does not run any more."""
        with self._lock:
            self._in_hand.pop(id(message), None)
            self._begun.discard(id(message))

    def busy(self, tokens: TokenSet) -> bool:
        """Whether an actor runs on one of these tokens."""
        with self._lock:
            running = [self._in_hand[number] for number in self._begun]
        found = [note.received for message in running if (note := note_of(message)) is not None]
        return any(
            self.job.token_of(each.route, self._gate.group_of(each.home)) in tokens
            for each in found
            if each.route is not None
        )

    def requeue_unleased(self, source: QueueConsumer) -> None:
        """Without a lease, requeue what came from a consumer: what has not begun, and what runs if
        its actor completes once.

        Others run it then, and the end of the attempt that runs here does not count. It may hang
        for long, for example in a transaction behind a network that is silent, and all threads may.
        """
        number = self._requeue(source, self._completes_once)
        if number:
            logger.warning('queue=%s: without a lease %d messages go back', source.queue, number)

    def requeue_unbegun(self, source: QueueConsumer) -> None:
        """Requeue what came from a consumer and has not begun."""
        self._requeue(source, lambda message: False)

    def _requeue(self, source: QueueConsumer, also: Callable[[Any], bool]) -> int:
        with self._lock:
            found = [
                (message, note, number in self._begun)
                for number, message in self._in_hand.items()
                if (note := note_of(message)) is not None
                and note.source is source
                and not note.sent_on
                and (number not in self._begun or also(message))
            ]
            for _, note, _ in found:
                note.sent_on = True
        for message, _, begun in found:
            source.requeue(message, begun)
        if found:
            self.count('returned', len(found))
        return len(found)

    def recall(self) -> None:
        """What waits for a thread, and belongs to others by now, goes on to them. On the node's own
        thread.
        """
        with self._lock:
            found = [
                (message, note)
                for number, message in self._in_hand.items()
                if number not in self._begun
                and (note := note_of(message)) is not None
                and not note.sent_on
                and note.received.route is not None
                and not self._gate.may_begin(note.received)
            ]
            for _, note in found:
                note.sent_on = True  # no thread begins it any more
        for message, note in found:
            try:
                self._pass_on(message, note)
            except Exception:  # it keeps none behind it in hand, which no thread would begin
                logger.exception(
                    'id=%s: the gate failed; the message goes back', message.message_id
                )
                with contextlib.suppress(Exception):  # then it goes back with its connection
                    note.source.requeue(message)

    def _pass_on(self, message: Any, note: Note) -> None:
        outcome = self.place(note.received)
        if outcome.action is not Action.SEND:
            note.source.requeue(message)  # its owner is not known yet: the consumer takes it again
            self.count('returned')
            return
        try:
            self.broker.send(message, outcome.queue, note.received.route, outcome.hops)
        # the brokers' clients have no common ancestor; the message is as it was
        except Exception as error:
            logger.warning(
                'id=%s cannot be sent to %s now, and goes back: %r',
                message.message_id,
                outcome.queue,
                error,
            )
            note.source.requeue(message)
            self.count('returned')
            return
        self.count(outcome.event)
        try:
            note.source.ack(message)
        except Exception as error:  # it comes again; exactly_once tells the two apart
            logger.warning(
                'id=%s: %s, but not acknowledged: %r', message.message_id, outcome.event, error
            )
        if outcome.event == 'parked':
            self.on_parked(note.received.home)

    def look(self) -> Consume:
        """Whether messages are taken now."""
        return self._when.look(self.job.am_i_healthy(), self.job.pausing, self.now())

    def admits(self, message: Any) -> bool:
        """Whether an actor may run, as far as the database is concerned."""
        return self._gate.admits(lambda: self._completes_once(message), self.now())

    def tell_unknown(self, message: Any) -> None:
        """Say, once in a while, that nobody here knows a message's actor. Dramatiq would put it
        among the dead letters; but another node may know the actor, or this one after an upgrade.
        """
        again = self._repeats.say(message.actor_name, self.now())
        if again is not None:
            logger.error(
                'actor=%s id=%s is not known here, and waits in %s until a node comes that knows '
                'it: nodes of one cluster must '
                'know the same actors%s',
                message.actor_name,
                message.message_id,
                self._gate.rules.unknown,
                again,
            )

    def _completes_once(self, message: Any) -> bool:
        found = self.actors.find(message.actor_name)
        return found is not None and found.once is not None

    def is_refused(self, signal: str, message: Any) -> bool:
        """Whether this is the end of a message that was refused, which no retry can help."""
        note = note_of(message) if signal == 'process_message' else None
        return (
            note is not None and message.failed and (note.exhausted or bool(note.received.problem))
        )

    def hides(self, signal: str, message: Any) -> bool:
        """Whether the other middleware must not hear of this.

        A message that came too late has begun for none of them, so that its end would be one too
        many; and one that goes back is not acknowledged.
        """
        note = note_of(message) if signal in ('skip_message', 'ack') else None
        return note is not None and note.goes_back and (note.unseen or signal == 'ack')
