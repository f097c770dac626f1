"""The leader's duty to delete what is past its time: in a thread and on a connection of its own, so
that nothing waits for it.

The thread lives only while this node leads under a valid lease. It goes from chore to chore, one
short statement at a time. A chore that fails is tried again on its own clock; the others go on.
Whether it runs at all matters to no promise: rows past their time are only in the way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import clock
from ..config import CoordinationConfig
from ..logs import get_logger
from ..store.connection import Connection
from ..store.housekeeping import CHORES, Chore, HousekeepingStore, Slice
from ..store.tables import Tables

__all__ = ['Housekeeper', 'Pace']

logger = get_logger(__name__)

#: Rows of a chore's first statement, and of any. A statement is to take about so many seconds.
_FIRST_ROWS, _FEWEST_ROWS, _MOST_ROWS = 1000, 1, 20_000
_AIM_SEC = 0.2
#: For each second of work, so many of rest: the leader's database has other things to do.
_REST = 0.25
#: Seconds until a chore that failed is tried again: more with each failure.
_RETRY_FIRST, _RETRY_MOST = 1.0, 60.0
#: A failure that goes on is said again after so many seconds.
_SAY_AGAIN_SEC = 60.0
#: Seconds between two looks whether this node still leads, while nothing is due; a connection is
#: kept for no longer.
_LOOK_SEC = 1.0
#: Seconds after which a thread that could not be started is tried again.
_START_AGAIN_SEC = 60.0


@dataclass
class Pace:
    """When a chore is due, how many rows it takes in hand, and what is said of its failures. Times
    are of one monotonic clock.
    """

    chore: Chore
    due: float
    rows: int = _FIRST_ROWS
    position: str | None = None
    _failures: int = 0
    _said_at: float = float('-inf')
    _unsaid: int = 0

    def done(self, found: Slice, took: float, now: float) -> None:
        """A statement has ended."""
        self._failures = 0
        if found.rows < self.rows:
            self.position, self.due = None, now + self.chore.every
        else:
            self.position, self.due = found.position, now + took * _REST
        if found.rows == self.rows and took < _AIM_SEC / 2:
            self.rows = min(_MOST_ROWS, self.rows * 2)
        elif took > _AIM_SEC * 2:
            self.rows = max(_FEWEST_ROWS, self.rows // 2)

    def failed(self, now: float) -> int | None:
        """A statement has failed; how many failures are to be told of now, None for silence."""
        # It may have been too much for its time: rows can carry results of any size.
        self.rows = max(_FEWEST_ROWS, self.rows // 4)
        self.position = None
        self.due = now + min(_RETRY_MOST, _RETRY_FIRST * 2 ** min(self._failures, 10))
        self._failures += 1
        self._unsaid += 1
        if now - self._said_at < _SAY_AGAIN_SEC:
            return None
        count, self._unsaid, self._said_at = self._unsaid, 0, now
        return count


class Housekeeper:
    """Tidies the tables while this node leads.

    Args:
        config: Where the database is.
        tables: Names of the tables.
        node: For logs, and the connection's name.
        leads: Whether this node is the leader and holds a valid lease, at this moment. Called by
            the housekeeper's thread too.
        chores: What to do.
    """

    def __init__(
        self,
        config: CoordinationConfig,
        tables: Tables,
        node: str,
        leads: Callable[[], bool],
        chores: Sequence[Chore] = CHORES,
    ) -> None:
        self._config = config
        self._tables = tables
        self._node = node
        self._leads = leads
        self._chores = chores
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._start_at = float('-inf')
        self._connection: Connection | None = None

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def look(self) -> None:
        """Start the thread if this node leads and it does not run. Cheap, never raises; one thread
        calls it, often.
        """
        if self.running or self._closing.is_set() or not self._leads():
            return
        now = clock.now()
        if now < self._start_at:
            return
        self._start_at = now + _START_AGAIN_SEC
        thread = threading.Thread(
            target=self._run, name=f'jobsync-housekeeping-{self._node}', daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            logger.warning(
                'node=%s housekeeping cannot start: %s; tried again in %.0f s',
                self._node,
                error,
                _START_AGAIN_SEC,
            )
            return
        self._thread, self._start_at = thread, now + _LOOK_SEC

    def stop(self, timeout: float) -> bool:
        """End the thread, after the statement that it is at; whether it ended within `timeout`
        seconds.
        """
        self._closing.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def _run(self) -> None:
        now = clock.now()
        paces = [Pace(chore, now) for chore in self._chores]
        try:
            while not self._closing.is_set() and self._leads():
                pace = min(paces, key=lambda pace: pace.due)
                wait = pace.due - clock.now()
                if wait <= 0:
                    self._do(pace)
                    continue
                if wait > _LOOK_SEC:
                    self._close()
                self._closing.wait(min(wait, _LOOK_SEC))
        except BaseException:
            logger.exception('node=%s housekeeping ended; it begins again', self._node)
        finally:
            self._close()

    def _do(self, pace: Pace) -> None:
        began = clock.now()
        try:
            if self._connection is None or self._connection.closed:
                self._connection = Connection.open(
                    self._config, f'jobsync housekeeping {self._node}'
                )
            store = HousekeepingStore(self._connection, self._tables)
            found = store.run(pace.chore, pace.rows, pace.position)
        except Exception as error:  # whatever it is, it concerns this chore alone
            self._failed(pace, error)
        else:
            now = clock.now()
            pace.done(found, now - began, now)

    def _failed(self, pace: Pace, error: Exception) -> None:
        now = clock.now()
        count = pace.failed(now)
        if count is not None:
            logger.warning(
                'node=%s housekeeping=%r failed%s: %s; tried again in %.0f s',
                self._node,
                pace.chore.name,
                f', {count} times since this was last said' if count > 1 else '',
                ' '.join(str(error).split()) or type(error).__name__,
                pace.due - now,
            )

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
