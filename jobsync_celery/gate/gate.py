"""The gate of a Celery worker: every coordinated message passes it on receipt and once more before
it goes to the pool.

Nothing here may raise into the consumer: an exception from a task's strategy ends the worker. What
no worker can take is set aside, once, by `Refusals`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any

from celery.worker import state

from jobsync_core import clock
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.errors import JobSyncError, Unroutable
from jobsync_core.logs import shown
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.incoming import Refused

from ..broker.deaths import show_deaths
from ..broker.forwarding import Forwarder
from ..broker.queues import Queues
from ..faults import is_its_fault
from ..logs import get_logger
from ..tasks.coordinated import Tasks, guard_traces, prepare_tasks
from .at_pool import AtPool
from .delivery import Delivery, Note, Strategies, note_of, settle_once
from .in_hand import InHand
from .placing import Placing
from .pool_entry import PoolEntry, expires
from .reading import Reader
from .refusal import Refusals, is_refused
from .requeueing import requeue
from .retries import Retries

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['ConsumerGate']

logger = get_logger(__name__)


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
        on_parked: Called with its home queue when a message went into a parked queue.
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
        on_parked: Callable[[str], object] = lambda home: None,
    ) -> None:
        self._app = app
        self._gate = gate
        self._consumer = consumer
        self._tasks = tasks
        self._queues, self._forwarder = queues, forwarder
        self._refusals = Refusals(app, consumer, gate.count, queues, forwarder)
        self._solo = solo
        self._is_node = is_node
        self._reader = Reader(gate.job, tasks, queues, pinned, gate.settings.park_sec)
        self._placing = Placing(
            consumer,
            gate,
            forwarder,
            refuse=self._refusals.refuse,
            failed=self._not_run,
            admits=self._admits,
            on_parked=on_parked,
        )
        self._in_hand = InHand(queues)
        self._retries = Retries(
            lambda seconds, call: consumer.timer.call_after(seconds, call), gate.count
        )
        self._receive: Callable[[Any], object] = lambda message: None  # nothing has come yet
        self._pool_entry = PoolEntry(
            consumer,
            lambda message, reason, reject: self._refusals.refuse(message, reason, reject=reject),
            lambda message: self._receive(message),
            self._retries,
            self._may_begin,
            self._come_late,
        )
        self._at_pool = AtPool(gate, tasks, queues, forwarder, self._pool_entry)
        consumer.strategies = Strategies(self._wrap)
        consumer.on_task_request = self.dispatch
        self._make_handler, self._update = consumer.create_task_handler, consumer.update_strategies
        consumer.create_task_handler = self.create_task_handler
        consumer.update_strategies = self.update_strategies
        self._discard, consumer.on_unknown_task = consumer.on_unknown_task, self.keep_unknown
        for name in ('on_decode_error', 'on_invalid_task', 'on_unknown_message'):
            setattr(consumer, name, self._refusals.in_place_of(name))

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], object]:
        """In place of the consumer's: what gets each message first, coordinated or not."""
        handle = self._make_handler(*args, **kwargs)

        def receive(message: Any) -> None:
            self._in_hand.add(message)
            if is_refused(message, self._queues.driver):
                self._refusals.reject_refused(message)
                return
            if self._refusals.is_worn_out(message):
                self._refusals.reject_worn_out(message)
                return
            show_deaths(message)
            found = self._reader.read(message)
            if isinstance(found, Refused):
                self._refusals.refuse(message, found.reason)
                return
            settle_once(message)
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
            self._refusals.refuse(
                message,
                f'this worker cannot take it: {type(error).__name__}: {error}',
                reject=refuse,
            )
        else:
            headers = message.headers if isinstance(message.headers, Mapping) else {}
            self._retries.keep(
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
            return lambda message, body, ack, reject, callbacks: self._refusals.refuse(
                message, reason, Unroutable
            )

        def receive(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:
            reject = self._refusals.rejecting(message, reject)
            note = self._reader.note(name, message)
            received = note.received
            if received.known and not received.problem:
                note.keep(message)
                self._gate.count('received')
                if self._gate.may_begin(received):  # as nearly every message: without the rest
                    strategy(message, body, ack, reject, callbacks)
                    return
            errors = self._consumer.connection_errors
            self._placing.place(
                Delivery(
                    note,
                    received,
                    message,
                    lambda: strategy(message, body, ack, reject, callbacks),
                    lambda: ack(logger, errors),
                    lambda: self._requeue(message, note, lambda: reject(logger, errors, True)),
                    lambda: reject(logger, errors, False),
                )
            )

        return receive

    def keep_unknown(self, body: Any, message: Any, error: Any) -> None:
        """In place of the consumer's on_unknown_task, which discards: another node may know the
        task, or this one after an upgrade.
        """
        if not self._is_node():
            self._discard(body, message, error)
            return
        found = self._reader.read(message)
        if isinstance(found, Refused):
            self._refusals.refuse(message, found.reason)
            return
        note = self._reader.unknown(found, message)
        errors = self._consumer.connection_errors
        self._placing.place(
            Delivery(
                note,
                note.received,
                message,
                lambda: None,
                lambda: message.ack_log_error(logger, errors),
                lambda: self._requeue(
                    message, note, lambda: message.reject_log_error(logger, errors, True)
                ),
                lambda: message.reject_log_error(logger, errors),
            )
        )

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
            self._pool_entry.failed(request, error)

    def _dispatch(self, request: Any) -> None:
        note = note_of(request.message)
        if note is None:
            self._pool_entry.to_pool(request)
            return

        def done(action: Callable[[], object]) -> Callable[[], None]:
            def end() -> None:
                action()
                state.task_ready(request)

            return end

        def run() -> None:
            self._at_pool.add(request, note)
            self._gate.count('run')
            self._pool_entry.guard_end(request)
            self._pool_entry.to_pool(request)

        mine = self._gate.may_begin(note.received)
        if mine and self._admits(note.name):
            run()
            return
        item = Delivery(
            note,
            self._reader.later(note.received),
            request.message,
            run,
            done(request.acknowledge),
            done(
                lambda: self._requeue(request.message, note, lambda: request.reject(requeue=True))
            ),
            done(lambda: request.reject(requeue=False)),
            late=True,
        )
        if mine:
            self._placing.wait(item)
        else:
            self._placing.place(item)

    def _requeue(self, message: Any, note: Note, plainly: Callable[[], object]) -> None:
        # A node that was taken for dead: others may have deleted its queue.
        evicted = note.received.incarnation != self._gate.job.incarnation
        deleted = evicted and self._queues.is_of_node(message)
        counts = self._queues.counts(note.home)
        requeue(message, note.home, self._forwarder, plainly, deleted, counts)

    def _may_begin(self, request: Any) -> bool:
        note = note_of(request.message)
        return note is None or self._gate.may_begin(note.received)

    def _come_late(self, request: Any) -> None:
        """A request that waited for a process or a thread may not run here any more."""
        if self._at_pool.discard(request):
            self._gate.count('run', -1)
        self.dispatch(request)

    def recall(self) -> None:
        """What waits for a process or a thread, and belongs to others by now, goes on to them. In
        the event loop.
        """
        for request in self._at_pool.withdraw():
            self._come_late(request)

    def _admits(self, name: str) -> bool:
        return self._gate.admits(lambda: self._tasks.completes_once(name), clock.now())

    def busy(self, tokens: TokenSet) -> bool:
        """Whether a task on one of these tokens runs, or may begin at any moment."""
        return self._at_pool.busy(tokens)

    def in_hand(self, home: str) -> bool:
        """Whether a message from this node's queue for a home queue would be lost with it."""
        return self._in_hand.holds(home)

    def _not_run(self, item: Delivery, error: Exception) -> None:
        self._not_taken(
            item.message, error, lambda: self._placing.place(item), item.refuse, item.requeue
        )

    def look(self) -> None:
        """Try the waiting messages again, and pass on what the pool has not begun."""
        self.recall()
        self._placing.look()
        self._retries.look()

    def declare_own(self, consumer: Any) -> None:
        """Make the queues of this node that a consumer of kombu's has."""
        for queue in consumer.queues:
            if self._queues.is_of_cluster(queue.name):
                queue.declare()

    def disconnected(self) -> None:
        """The connection is gone, and the broker delivers again what was not acknowledged."""
        self._in_hand.clear()
        self._placing.disconnected()
        self._retries.disconnected()

    def requeue_waiting(self) -> None:
        """Requeue what waits; without a lease also what waits for a process or a thread."""
        self.recall()
        self._placing.requeue_all()
        self._retries.requeue_all()

    def requeue_running(self) -> None:
        """Requeue what is executed here, if its task completes once."""
        self._at_pool.requeue_running()

    def close(self) -> None:
        """Close the forwarder."""
        self._forwarder.close()

    @property
    def waiting(self) -> int:
        """Messages that wait in memory."""
        return len(self._placing) + len(self._retries)
