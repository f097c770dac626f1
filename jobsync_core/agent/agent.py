"""The agent thread: drives the protocol against PostgreSQL over one connection."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import select
import socket
import threading
from collections import deque
from collections.abc import Callable

from .. import clock
from ..assignment.tokens import TokenSet
from ..config import CoordinationConfig
from ..errors import (
    DatabaseRefused,
    DatabaseUnavailable,
    LockNotAvailable,
    StatementCanceled,
    StoreTimeout,
    TransactionConflict,
)
from ..logs import get_logger
from ..protocol.effects import Entered, Failed, Left, Note, RebalanceEvent, Release
from ..protocol.messages import Reply, Request
from ..protocol.messages.connection import Connect, ConnectReply
from ..protocol.messages.membership import HeartbeatReply, Join
from ..protocol.node import BESIDE, Phase, Protocol
from ..results import NodeEvent
from ..store.cluster import ClusterStore
from ..store.connection import Connection
from .callbacks import Callbacks

__all__ = ['Agent']

logger = get_logger(__name__)

_LONGEST_WAIT = 60.0
#: Seconds between two looks whether the database answers, while somebody waits for the end.
_LOOK_SEC = 0.1
#: Seconds between two tries after something unforeseen, and between two reports of the same.
_REST, _SAID_AGAIN = 1.0, 60.0
#: What the server refuses and will not refuse for long. A server that starts or stops is away
#: instead.
_PASSING = (LockNotAvailable, StatementCanceled, TransactionConflict)


class Agent:
    """Thin driver: performs the protocol's requests, waits where it has none, runs its effects.

    The protocol is touched by this thread alone; others post commands.

    Args:
        protocol: The node's state machine.
        control: Answers requests on a connection.
        config: For opening the connection.
        callbacks: Where user callbacks run.
        on_step: Called after each step, to look whether there is something for others to do: quick,
            and it never raises.
    """

    def __init__(
        self,
        protocol: Protocol,
        control: ClusterStore,
        config: CoordinationConfig,
        callbacks: Callbacks,
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.protocol = protocol
        self.failure: Exception | None = None
        self.last_beat: datetime.datetime | None = None
        self.events: deque[NodeEvent] = deque(maxlen=20)
        self._control = control
        self._config = config
        self._callbacks = callbacks
        self._on_step = on_step
        self._connection: Connection | None = None
        self._commands: deque[Callable[[], object]] = deque()
        self._wake_receiver: socket.socket | None = None
        self._wake_sender: socket.socket | None = None
        self._entered = threading.Event()
        self._wake_up = threading.Event()
        self._changed = threading.Condition()
        self._abandoned = False
        self._failing_since: float | None = None
        #: Since when the database owes an answer, to this request or to those that failed before;
        #: None: it owes none.
        self._asked_at: float | None = None
        self._said: dict[str, tuple[float, int]] = {}
        self._thread = threading.Thread(
            target=self._run, name=f'jobsync-{protocol.name}', daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._thread.start()

    def post(self, command: Callable[[], object]) -> None:
        """Have `command` called on the agent thread soon."""
        self._commands.append(command)
        self._wake_up.set()
        if self._wake_sender is not None:
            with contextlib.suppress(OSError):  # full: it will wake anyway; closed: it has ended
                self._wake_sender.send(b'.')

    def wake(self) -> None:
        """Have those who `wait_for` something look at it: also while the agent waits for the
        database.
        """
        self.post(lambda: None)
        with self._changed:
            self._changed.notify_all()

    def wait_entered(self) -> None:
        """Wait until the node has entered.

        Raises:
            JobSyncError: It cannot enter; the error tells why.
        """
        self._entered.wait()
        if self.failure is not None:
            raise self.failure

    def wait_for(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until `condition()` holds, looking whenever the agent has done something; whether it
        does.
        """
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    @property
    def running(self) -> bool:
        """Whether the node is, or is about to become, a member: nothing failed and the thread has
        not ended.
        """
        return (
            self.failure is None
            and self._thread.is_alive()
            and self.protocol.phase not in (Phase.LEFT, Phase.FAILED)
        )

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def unanswered_sec(self) -> float:
        """Seconds for which the database has not answered; 0 where nothing is asked."""
        since = self._asked_at
        return clock.now() - since if since is not None else 0.0

    def stop(self, timeout: float, patience: float = math.inf) -> bool:
        """Leave the cluster and end the thread; whether it ended in time.

        Args:
            timeout: Seconds that this may take.
            patience: Seconds for which a database is waited for that does not answer. One that was
                silent before is waited for no longer.
        """
        self.post(lambda: self.protocol.leave(clock.now()))
        if self._thread.ident is None:
            return True
        until = clock.now() + timeout
        while self._thread.is_alive() and (left := until - clock.now()) > 0:
            if self.unanswered_sec > patience:
                break
            self._thread.join(min(left, _LOOK_SEC))
        if self._thread.is_alive():
            self._abandoned = True
            self.post(lambda: None)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self.protocol.phase not in (Phase.LEFT, Phase.FAILED) and not self._abandoned:
                try:
                    self._step()
                    self._on_step()
                except Exception as error:
                    self._recover(error)
            self._run_effects()
        except BaseException as error:
            # Nothing may claim on without somebody who renews the lease and follows the hand-overs.
            self.protocol.ownership.suspend()
            self.failure = self.failure or (error if isinstance(error, Exception) else None)
            logger.exception('agent of node %s ended', self.protocol.name)
        finally:
            self.protocol.ownership.suspend()
            self._close_connection()
            self._entered.set()
            with self._changed:
                self._changed.notify_all()
            for end in (self._wake_receiver, self._wake_sender):
                if end is not None:
                    end.close()

    def _step(self) -> None:
        self._run_commands()
        now = clock.now()
        request = self.protocol.next(now)
        self._run_effects()
        if request is None:
            self._wait(min(max(self.protocol.wake_at - now, 0.0), _LONGEST_WAIT))
            return
        self._asked_at = now if self._asked_at is None else self._asked_at
        try:
            reply = self._perform(request)
        except DatabaseUnavailable as error:
            self._request_failed(request, error)
        except Exception as error:
            self._asked_at = None
            if not self._goes_on_without(request, error):
                raise
            self._report(error, f'{type(request).__name__} is tried again')
            self.protocol.refused(request, clock.now())
        else:
            self._failing_since = self._asked_at = None
            if isinstance(reply, HeartbeatReply):
                self.last_beat = _wall_clock()
            self._run_commands()
            if self._said:  # should it fail again, that is news
                self._said = {
                    text: said
                    for text, said in self._said.items()
                    if not text.startswith(_failed(request))
                }
            self.protocol.reply(request, reply, clock.now())
        self._run_effects()

    def _perform(self, request: Request) -> Reply:
        if isinstance(request, Connect):
            self._close_connection()
            self._connection = Connection.open(self._config, self.protocol.name)
            if self._config.listen:
                self._connection.listen(self._control.tables.channel)
            told = (
                self._connection.history_sql != "''"
            )  # then each answer that matters tells it again
            return ConnectReply('' if told else self._connection.server)
        assert self._connection is not None
        return self._control.handle(self._connection, request)

    def _goes_on_without(self, request: Request, error: Exception) -> bool:
        """Whether nothing else has to suffer from a request that failed: it is none that a node
        lives by, and the connection is good.
        """
        beside = isinstance(request, BESIDE) or (
            isinstance(request, Join) and isinstance(error, _PASSING)
        )
        return beside and self._connection is not None and self._connection.idle

    def _recover(self, error: Exception) -> None:
        """Something unforeseen: nothing is claimed until all has been read anew over a new
        connection. Others may find this node dead.
        """
        self.protocol.ownership.suspend()
        if not self.protocol.entered or self.protocol.phase is Phase.LEAVING:
            raise error  # whoever waits for it is told
        try:
            self._report(error, 'claiming stops until all has been read anew')
            self._close_connection()
            self.protocol.recover(clock.now())
            self._run_effects()
        except Exception:  # as little as there is left: the next step tries again
            self.protocol.ownership.suspend()
        self._wake_up.wait(_REST)
        self._wake_up.clear()

    def _report(self, error: Exception, consequence: str) -> None:
        """Log with its traceback what nobody foresaw."""
        self._say(
            logging.ERROR,
            f'unforeseen error, {consequence}: {type(error).__name__}: {error}',
            error,
        )

    def _say(self, level: int, text: str, error: Exception | None = None) -> None:
        """Log once; the same again only once a minute, with its number."""
        now = clock.now()
        said_at, count = self._said.get(text, (-math.inf, 0))
        if now - said_at < _SAID_AGAIN:
            self._said[text] = said_at, count + 1
            return
        self._said = {
            other: said for other, said in self._said.items() if now - said[0] < _SAID_AGAIN
        }
        self._said[text] = now, 0
        again = f' ({count} times more in the last minute)' if count else ''
        logger.log(level, 'node=%s %s%s', self.protocol.name, text, again, exc_info=error)

    def _request_failed(self, request: Request, error: Exception) -> None:
        now = clock.now()
        if isinstance(error, DatabaseRefused):
            self._asked_at = None  # that is an answer
        if self._goes_on_without(request, error):
            self._asked_at = None
            self._say(
                logging.WARNING, f'{_failed(request)}, heartbeats go on: {str(error).strip()}'
            )
            self.protocol.refused(request, now)
            return
        self._close_connection()
        self.protocol.failed(request, now)
        if self._failing_since is None:
            self._failing_since = now
        passing = not isinstance(error, DatabaseRefused) or isinstance(error, _PASSING)
        self._say(
            logging.WARNING if passing else logging.ERROR,
            f'{_failed(request)}: {str(error).strip()}',
        )
        if self.protocol.phase is Phase.LEAVING:
            # Others will see this node dead after one timeout; waiting for the database helps
            # nobody.
            self._abandoned = True
        elif not self.protocol.entered and self._hopeless(request, error, passing, now):
            self.failure = (
                DatabaseUnavailable(f'{type(request).__name__} failed: {str(error).strip()}')
                if isinstance(error, DatabaseRefused)
                else error
            )
            self._abandoned = True

    def _hopeless(self, request: Request, error: Exception, passing: bool, now: float) -> bool:
        """Whether a node that has not entered yet should give up.

        At once where it never joined, unless the database is only slow, as where hundreds of nodes
        start; then after `wait_on_enter`. Where it had joined, once the outage lasts longer than
        entering may take.
        """
        if self.protocol.phase is Phase.JOINING:
            if not passing or (
                isinstance(request, Connect) and not isinstance(error, StoreTimeout)
            ):
                return True
            return now - (self._failing_since or now) >= self.protocol.settings.wait_on_enter
        patience = max(self._config.heartbeat_timeout_sec, self.protocol.settings.wait_on_enter)
        return now - (self._failing_since or now) > patience

    def _wait(self, seconds: float) -> None:
        assert self._wake_receiver is not None
        connection = self._connection if self.protocol.connected else None
        if connection is not None and self._read_notifications(connection):
            return  # they had come with the answer to a statement
        poll = select.poll()  # select.select cannot watch descriptors from 1024 on
        poll.register(self._wake_receiver, select.POLLIN)
        if connection is not None:
            poll.register(connection.fileno(), select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(math.ceil(seconds * 1000))}
        if self._wake_receiver.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_receiver.recv(4096)
        if connection is not None and connection.fileno() in ready:
            self._read_notifications(connection)

    def _read_notifications(self, connection: Connection) -> bool:
        """Pass on what has arrived; whether there was anything, the loss of the connection
        included.
        """
        try:
            payloads = connection.notifies()
        except DatabaseUnavailable as error:
            # Somebody may end sessions again and again.
            self._say(logging.WARNING, f'lost its connection: {str(error).strip()}')
            self._close_connection()
            self.protocol.disconnected(clock.now())
            return True
        for payload in payloads:
            self.protocol.notified(payload, clock.now())
        return bool(payloads)

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _run_effects(self) -> None:
        for effect in self.protocol.take_effects():
            if isinstance(effect, RebalanceEvent):
                self._callbacks.rebalanced(effect)
            elif isinstance(effect, Release):
                self._run_release(effect)
            elif isinstance(effect, Entered):
                self._entered.set()
            elif isinstance(effect, Failed):
                self.failure = effect.error
                logger.error('node=%s cannot go on: %s', self.protocol.name, effect.error)
            elif isinstance(effect, Note):
                self.events.append(
                    {'type': effect.event, 'timestamp': _wall_clock(), 'data': dict(effect.fields)}
                )
                logger.log(
                    getattr(logging, effect.level.upper()),
                    '%s %s',
                    effect.event,
                    ' '.join(f'{name}={value}' for name, value in effect.fields.items()),
                )
            else:
                assert isinstance(effect, Left)
        self._callbacks.retry()
        with self._changed:
            self._changed.notify_all()

    def _run_release(self, effect: Release) -> None:
        def done() -> None:
            self.post(lambda: self.protocol.released(effect.number, clock.now()))

        def went_on(used: TokenSet) -> None:
            self.post(lambda: self.protocol.release_went_on(effect.number, used, clock.now()))

        self._callbacks.release(effect.tokens, done, went_on)

    def _close_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _wall_clock() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _failed(request: Request) -> str:
    return f'request={type(request).__name__} failed'
