"""Deadlines for blocking connections: libpq waits for ever on a network that swallows
everything.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import psycopg2
import psycopg2.errors
import psycopg2.extensions
from psycopg2.extensions import STATUS_READY, TRANSACTION_STATUS_IDLE

from .hurry import Hurry

__all__ = ['BEGIN_TRIES', 'QUICK_SEC', 'Deadlines', 'GuardedConnection']

#: A statement_timeout of the role's that strikes within this time is not one of ours; how often a
#: transaction is begun in spite of it.
QUICK_SEC, BEGIN_TRIES = 0.2, 20
#: Seconds between two looks whether the process ends, while a call is watched.
_LOOK_SEC = 0.5


class Deadlines:
    """Cuts connections whose call is overdue. Its thread lives only while something is watched.

    Args:
        hurry: Whether the process ends.
    """

    def __init__(self, hurry: Hurry) -> None:
        self._hurry = hurry
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # Weak: an exception that strikes between the lines, such as a signal's, must leave no call
        # behind that is watched for ever.
        self._watched: weakref.WeakSet[_Watch] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._next = 0.0

    def watch(self, connection: GuardedConnection, seconds: float) -> _Watch:
        """Cut the connection if the block lasts longer than `seconds`."""
        return _Watch(self, connection, seconds)

    def begin(self, watch: _Watch) -> None:
        """Begin to watch."""
        with self._lock:
            self._watched.add(watch)
            self._have_watched(watch)

    def _have_watched(self, watch: _Watch) -> None:
        if self._thread is not None:
            if watch.due < self._next:
                self._changed.notify()
            return
        self._thread = threading.Thread(target=self._run, name='jobsync-deadlines', daemon=True)
        self._next = watch.due
        try:
            self._thread.start()
        except BaseException:  # no more threads now: the next call tries again
            self._thread = None
            self._watched.discard(watch)
            raise

    def end(self, watch: _Watch) -> None:
        """Watch it no longer."""
        with self._lock:
            self._watched.discard(watch)

    def _run(self) -> None:
        with self._changed:
            while self._watched:
                now = time.monotonic()
                self._cut_overdue(now)
                self._next = min(
                    (watch.due for watch in self._watched if not watch.connection.cut),
                    default=now + 1.0,
                )
                self._changed.wait(min(_LOOK_SEC, max(0.0, self._next - now)))
            self._thread = None

    def _cut_overdue(self, now: float) -> None:
        for watch in self._watched:
            due = self._hurry.due(watch.began, watch.due)
            if due <= now and not watch.connection.cut:
                watch.connection.cut_off()


class _Watch:
    """`Deadlines.watch`, around each call: a class, because generators cost twice as much."""

    __slots__ = ('__weakref__', '_deadlines', '_seconds', 'began', 'connection', 'due')

    def __init__(self, deadlines: Deadlines, connection: GuardedConnection, seconds: float) -> None:
        self._deadlines = deadlines
        self.connection = connection
        self._seconds = seconds

    def __enter__(self) -> None:
        self.began = time.monotonic()
        self.due = self.began + self._seconds
        self._deadlines.begin(self)

    def __exit__(self, *error: object) -> None:
        self._deadlines.end(self)


class GuardedConnection(psycopg2.extensions.connection):
    """A blocking connection each of whose calls has a deadline.

    Attributes:
        deadlines: Who watches.
        limit: Seconds that each call may take; None: no limit.
        cut: Whether a call took longer, so that the connection was cut.
        prologue: Statements that go before the first one of each transaction, in one string with it
            where that can be.
        translate: The door: gives the error that callers get in place of the driver's. None where
            the statements are the user's own, who gets the driver's.
    """

    prologue: str = ''
    translate: Callable[[psycopg2.Error, Any], Exception] | None = None
    deadlines: Deadlines | None = None
    limit: float | None = None
    cut = False

    def cut_off(self) -> None:
        """Make the call that waits on the socket fail at once. Called from another thread."""
        self.cut = True
        with (
            contextlib.suppress(OSError, psycopg2.Error),
            socket.socket(fileno=os.dup(self.fileno())) as duplicate,
        ):
            duplicate.shutdown(socket.SHUT_RDWR)

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        """The deadline of one call."""
        if self.deadlines is None or self.limit is None:
            return contextlib.nullcontext()
        return self.deadlines.watch(self, self.limit)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            kwargs.setdefault('cursor_factory', GuardedCursor)
        return super().cursor(*args, **kwargs)

    def commit(self) -> None:
        if self.status == STATUS_READY and not self.closed:
            return  # nothing was begun
        try:
            with self.guarded():
                super().commit()
        except psycopg2.Error as error:
            _raise_at_door(self, error)

    def rollback(self) -> None:
        with self.guarded():
            super().rollback()


class GuardedCursor(psycopg2.extensions.cursor):
    """A cursor of GuardedConnection."""

    def execute(self, query: Any, vars: Any = None) -> None:
        try:
            with self._guarded():
                prologue = self._prologue()
                if prologue and isinstance(query, str) and self.name is None:
                    self.execute_first(f'{prologue}; {query}', vars)
                    return
                self._begin(prologue)
                super().execute(query, vars)
        except psycopg2.Error as error:
            _raise_at_door(self.connection, error)

    def execute_first(self, query: str, vars: Any = None) -> None:
        """Run the beginning of a transaction: again, where a limit of the role's that it lifts was
        quicker.
        """
        for tries in itertools.count(1):
            began = time.monotonic()
            try:
                super().execute(query, vars)
                return
            except psycopg2.errors.QueryCanceled:
                if tries == BEGIN_TRIES or time.monotonic() - began > QUICK_SEC:
                    raise
                if not self.connection.autocommit:
                    self.connection.rollback()

    def executemany(self, query: Any, vars_list: Any) -> None:
        try:
            with self._guarded():
                self._begin(self._prologue())
                super().executemany(query, vars_list)
        except psycopg2.Error as error:
            _raise_at_door(self.connection, error)

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        try:
            with self._guarded():
                self._begin(self._prologue())
                super().copy_expert(sql, file, size)
        except psycopg2.Error as error:
            _raise_at_door(self.connection, error)

    def _prologue(self) -> str:
        connection = self.connection
        if (
            not isinstance(connection, GuardedConnection)
            or connection.get_transaction_status() != TRANSACTION_STATUS_IDLE
        ):
            return ''
        return connection.prologue

    def _begin(self, prologue: str) -> None:
        # In autocommit mode each statement is a transaction, and settings of one of its own would
        # be lost.
        if prologue and not self.connection.autocommit:
            with psycopg2.extensions.connection.cursor(self.connection) as cursor:
                cursor.execute(prologue)

    def _guarded(self) -> contextlib.AbstractContextManager[None]:
        connection = self.connection
        return (
            connection.guarded()
            if isinstance(connection, GuardedConnection)
            else contextlib.nullcontext()
        )


def _raise_at_door(connection: psycopg2.extensions.connection, error: psycopg2.Error) -> NoReturn:
    """Raise the error that the callers of this connection get."""
    if isinstance(connection, GuardedConnection) and connection.translate is not None:
        raise connection.translate(error, connection) from error
    raise error
