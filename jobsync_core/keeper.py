"""The keeper: a node's thread that follows lease and plans, and sweeps up what nodes that are gone left at the broker."""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import psycopg2

from . import clock
from .errors import JobSyncError
from .logs import get_logger
from .owners import Place
from .plugin import Gate
from .store import queues
from .store.connection import Sessions
from .store.schema import Tables

__all__ = ['Keeper', 'Letter', 'Mail']

logger = get_logger(__name__)

#: Seconds between two looks while something is left to sweep.
_BUSY_SEC = 0.5
#: Seconds for which an orphan is looked after closely: a message may be on its way to it.
_CLOSE_SEC = 15.0
#: Seconds after which an empty queue of a node that is gone is forgotten, where publishing to it would make it anew.
_KEEP_SEC = 3600.0
#: Seconds for which a new life of a node waits until its former one is swept, and between two looks.
_RECLAIM_SEC, _TRY_AGAIN_SEC = 60.0, 0.1
#: Parked messages that one pass takes in hand before it puts back those that still nobody owns.
_IN_HAND = 1000


class Letter(Protocol):
    """One message that was taken off a queue and is not acknowledged yet."""

    route: str | None
    home: str | None

    def forward(self, queue: str) -> None:
        """Publish it durably to a queue, then acknowledge it here."""

    def put_back(self) -> None:
        """Leave it in the queue that it came from."""


class Mail(Protocol):
    """The broker, as the keeper needs it. Any error is logged, and the work is tried again."""

    #: A message that is sent to a deleted queue is kept (in the parked queue), not lost and not stranded.
    catches_strays: bool

    def restore(self, node: str) -> int:
        """Put back what a node that is gone had taken and not acknowledged; returns how many messages."""

    def take(self, queue: str) -> Letter | None:
        """The next message of a queue; None where it is empty or there is no such queue."""

    def delete(self, queue: str) -> bool:
        """Delete a queue if it is empty and nobody consumes it; whether it is gone."""

    def reset(self) -> None:
        """Drop the connection after an error; the next call opens another."""


class Keeper:
    """One thread for a node.

    Args:
        gate: The node's gate.
        mail: The broker; used by this thread alone.
        kind: The plugin's name.
        queue: Name of the node's own queue.
        parked: Name of the parked queue.
        on_lease: Called with True when there is a lease again, and with False when it has run out; again, if it raises.
        on_change: Called after each change of plan, when the owner map is up to date.
        on_tick: Called at least once a second.
    """

    def __init__(
        self, gate: Gate, mail: Mail, kind: str, queue: str, parked: str, *, on_lease: Callable[[bool], object],
        on_change: Callable[[], object], on_tick: Callable[[], object] = lambda: None,
    ) -> None:
        self._gate = gate
        self._job = gate.job
        self._mail = mail
        self._kind = kind
        self._queue = queue
        self._parked = parked
        self._on_lease, self._on_change, self._on_tick = on_lease, on_change, on_tick
        config = gate.settings.config
        self._interval = config.rebalance_check_interval_sec
        self._tables = Tables.of(config)
        self._sessions = Sessions(config, f'jobsync keeper {gate.job.node_name}')
        self._closing = False
        self._leased, self._version = True, -1
        self._told = True
        self._released = -1
        self._sweep_at = 0.0
        self._stray = False
        self._thread = threading.Thread(target=self._run, name='jobsync-keeper', daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread."""
        self._closing = True
        self._job.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._sessions.close_all()

    def parked_something(self) -> None:
        """A message was put into the parked queue: a plan may have come meanwhile."""
        self._stray = True

    def reclaim(self) -> int:
        """Put back what an earlier life of this node left; before it consumes. Waits for others who are at it.

        Raises:
            JobSyncError: The database cannot be reached, or somebody else was at it for a minute.
        """
        node, give_up = self._job.node_name, clock.now() + _RECLAIM_SEC
        while True:
            with self._sessions.session() as connection:
                if queues.hold(connection, self._tables, node):
                    return self._mail.restore(node)
            if self._closing:
                return 0
            if clock.now() >= give_up:
                raise JobSyncError(
                    f'another node has been putting back what an earlier life of {node!r} left for more than {_RECLAIM_SEC:.0f} s: '
                    'see whether its connection to the broker is stuck, and end it')
            self._job.wait_until(lambda: self._closing, _TRY_AGAIN_SEC)

    def _run(self) -> None:
        while not self._closing:
            now = clock.now()
            if self._job.am_i_healthy() != self._leased:
                self._leased, self._told = not self._leased, False
            if not self._told:
                self._guarded(self._tell_lease)
            if self._leased and self._job.token_version != self._version:
                self._version = self._job.token_version
                self._guarded(self._gate.owners.reread)
                self._guarded(self._on_change)
                self._sweep_at = now
            if self._leased and now >= self._sweep_at:
                self._sweep_at = now + self._interval
                self._guarded(self._sweep)
            self._guarded(self._on_tick)
            self._job.wait_until(self._has_work, max(0.01, min(1.0, self._sweep_at - clock.now())))

    def _has_work(self) -> bool:
        if self._closing or self._job.am_i_healthy() != self._leased:
            return True
        return self._leased and self._job.token_version != self._version

    def _tell_lease(self) -> None:
        if self._leased:
            # While this node was taken for dead, its empty queue may have been deleted and forgotten.
            with self._sessions.session() as connection:
                queues.record(connection, self._tables, self._queue, self._job.node_name, self._kind)
        self._on_lease(self._leased)
        self._told = True

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (JobSyncError, psycopg2.Error) as error:
            logger.warning('node=%s keeper: %s', self._job.node_name, str(error).strip())
        except Exception:
            # Whatever the broker's client raises: its connection is of no use any more.
            logger.exception('node=%s keeper failed; it tries again', self._job.node_name)
            self._mail.reset()
            self._sweep_at = min(self._sweep_at, clock.now() + 1.0)

    def _sweep(self) -> None:
        with self._sessions.session() as connection:
            orphans = queues.orphans(connection, self._tables, self._kind)
        for queue, node, age in orphans:
            self._sweep_node(queue, node, age)
            if age < _CLOSE_SEC:
                self._sweep_at = min(self._sweep_at, clock.now() + _BUSY_SEC)
        self._release_parked()

    def _sweep_node(self, queue: str, node: str, age: float) -> None:
        with self._sessions.session() as connection:
            if not queues.hold(connection, self._tables, node) or not self._is_gone(node):
                return
            restored = self._mail.restore(node)
            moved = self._drain(queue)
            if restored or moved:
                self._gate.count('rescued', restored + moved)
                logger.info('node=%s gone=%s restored=%d moved=%d', self._job.node_name, node, restored, moved)
            elif age >= _CLOSE_SEC and (self._mail.catches_strays or age >= _KEEP_SEC) and self._mail.delete(queue):
                queues.forget(connection, self._tables, queue)

    def _is_gone(self, node: str) -> bool:
        # On another connection: read in the holding transaction, the table would be locked against a migration while the broker works.
        with self._sessions.session() as connection:
            return queues.is_gone(connection, self._tables, node)

    def _drain(self, queue: str) -> int:
        moved = 0
        while not self._closing and (letter := self._mail.take(queue)) is not None:
            target = self._target(letter)
            if target == queue:
                # The owner map is older than the end of this queue's node. Forwarded, the letter would come again for ever.
                letter.put_back()
                self._gate.owners.reread()
                break
            letter.forward(target or self._parked)
            moved += 1
        return moved

    def _target(self, letter: Letter) -> str | None:
        if letter.route is None:
            return letter.home
        place: Place | None = self._gate.owners.find(letter.route)
        if place is None:
            return None
        if place.queue is None:
            self._stray = True  # it may get one without another plan
        return place.queue

    def _release_parked(self) -> None:
        """Hand out parked messages that have an owner now: once for each plan, and each time something was parked meanwhile."""
        version = self._gate.owners.version
        # Where the broker itself parks what has lost its queue, nobody tells: each sweep looks.
        if version == self._released and not self._stray and not self._mail.catches_strays:
            return
        with self._sessions.session() as connection:
            if not queues.hold(connection, self._tables, ''):
                return
            self._stray = False
            self._gate.owners.refresh()
            version = self._gate.owners.version
            kept: list[Letter] = []
            try:
                while not self._closing and len(kept) < _IN_HAND and (letter := self._mail.take(self._parked)) is not None:
                    target = self._target(letter)
                    if target is None:
                        kept.append(letter)
                    else:
                        letter.forward(target)
                        self._gate.count('released')
            finally:
                for letter in reversed(kept):
                    letter.put_back()
            self._released = version
