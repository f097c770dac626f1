"""Connections for calls of the API: a small pool, and a deadline for each call."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import select
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from ..config import CoordinationConfig
from ..errors import DatabaseUnavailable, StatementRefused, StoreTimeout
from .deadline import Deadlines, GuardedConnection
from .hurry import HURRIED_SEC, Hurry
from .inherited import leave_to_parent
from .location import locate, location_of
from .options import (
    Limits,
    call_limits,
    check_options,
    explain,
    keepalive,
    libpq_parameters,
    text_of,
)
from .refusals import CONNECTION_ERRORS, LOST, STANDBY, TIMED_OUT, refused

__all__ = ['Sessions']

#: Idle connections that a process keeps; and for as long as others are in use all the time, as by
#: the threads of a worker.
_FEW_IDLE, _MOST_IDLE = 4, 16
_IDLE_SEC = 10.0
#: Seconds after which `trim` closes what a burst has left.
_REST_SEC = 30.0
#: Seconds from which on a connection that cannot be made is one that gets no answer.
_SILENT_SEC = 1.0

Guarded = TypeVar('Guarded', bound=GuardedConnection)


class Sessions:
    """Blocking connections for calls of the API, kept for the next call. Threads and forked
    children may share the object.

    A statement ends in time even if the network swallows everything: a watchdog then cuts the
    connection. With `listen=False` the server is not asked to end anything by itself: behind a
    transaction pooler such settings would reach other clients.

    Args:
        config: Where the database is.
        application_name: Shown in pg_stat_activity.
        limits: What the server is asked to end by itself; default: by the config's heartbeats.

    Raises:
        ConfigurationError: libpq does not know one of the connection_options.
    """

    def __init__(
        self, config: CoordinationConfig, application_name: str, limits: Limits | None = None
    ) -> None:
        check_options(config)
        self._config = config
        self._name = application_name
        self._limits = limits or call_limits(config)
        self._location = location_of(config)
        self._keepalive = keepalive(config)
        self._pools: dict[int, _Pool] = {}
        self._hurry = Hurry()

    @contextlib.contextmanager
    def session(
        self, limited: bool = True, users: bool = False
    ) -> Iterator[psycopg2.extensions.connection]:
        """Lend a connection for one transaction: committed at the end, rolled back on an error.

        Args:
            limited: Whether each statement must end within the heartbeat timeout; False for
                statements of the user's own.
            users: Whether it is for statements of the user's own, which find his tables by the
                role's search_path, and whose errors reach him as psycopg2 raises them.

        Raises:
            DatabaseUnavailable: There is no connection, or it was lost. If that happened while
                committing, the transaction may have been committed.
            StoreTimeout: A statement took too long.
            StatementRefused: The server refused a statement, in the class of the cause. Within the
                block it is raised even where the statement took too long.
        """
        if self._hurry.is_hopeless:
            raise StoreTimeout(
                f'PostgreSQL at {self._config.host}:{self._config.port} did not answer, and this '
                'process ends'
            )
        pool = self._pool()
        connection = pool.take() or self._open(pool)
        connection.limit = self._limits.statement + 1.0 if limited else None
        connection.translate = self._refused
        try:
            if not self._location.found:
                self._locate(connection)
            connection.prologue = self._prologue(connection, users)
            if users:
                connection.translate = None
            yield connection
            connection.commit()
            self._hurry.answered()
        except BaseException as error:
            ours = self._explain(error, connection, limited, users)
            self._roll_back(connection)
            if ours:
                raise ours from ours.__cause__
            raise
        finally:
            connection.translate = None
            pool.give_back(connection)

    def _explain(
        self, error: BaseException, connection: GuardedConnection, limited: bool, users: bool
    ) -> DatabaseUnavailable | None:
        """What an error out of a session means, with the driver's as its cause; None where it is to
        be raised as it is.
        """
        # Not in the frame of the session: an exception that a frame of its own traceback refers to
        # would live on, and with it the connection.
        cause = error.__cause__ if isinstance(error, StatementRefused) else error
        if not isinstance(cause, psycopg2.Error):
            return None
        ours = self._translate(cause, connection, limited, users)
        if ours is not None:
            ours.__cause__ = cause
        return ours

    def _prologue(self, connection: GuardedConnection, users: bool) -> str:
        """What goes before the first statement of each transaction."""
        if users:
            return self._limits.begin_users(connection.server_version, session=self._config.listen)
        return (
            '' if self._config.listen else self._limits.begin_transaction(connection.server_version)
        )

    def _locate(self, connection: GuardedConnection) -> None:
        def run(sql: str, params: Sequence[object]) -> Sequence[Sequence[Any]]:
            with connection.cursor() as cursor:
                cursor.execute(sql, params)
                return list(cursor.fetchall())

        connection.prologue = (
            ''
            if self._config.listen
            else self._limits.begin_transaction(connection.server_version, writing=False)
        )
        connection.autocommit = True
        locate(self._location, self._config, run)
        connection.autocommit = False

    @property
    def place(self) -> str:
        """Which database it is, for people."""
        return f'database {self._config.dbname!r} at {self._config.host}:{self._config.port}'

    @property
    def longest_call_sec(self) -> float:
        """Seconds within which a call of one limited statement has ended, connecting included."""
        return self._config.connect_timeout_sec + self._limits.statement + 2.0

    @property
    def statement_limit(self) -> float:
        """Seconds after which the call of one limited statement is cut."""
        return self._limits.statement + 1.0

    @property
    def keeps_sessions(self) -> bool:
        """Whether what is set on a connection stays on it; behind a transaction pooler it does
        not.
        """
        return self._config.listen

    def open_unlimited(self, factory: type[Guarded]) -> Guarded:
        """A connection of its own kind, for the caller alone, on which the server ends nothing by
        itself.

        Raises:
            DatabaseUnavailable: There is none.
        """
        return self._connect(self._pool(), factory, limited=False)

    def explain_unlimited(
        self, error: psycopg2.Error, connection: GuardedConnection
    ) -> DatabaseUnavailable | None:
        """What an error on such a connection means: that it was lost; None where the server refused
        a statement.
        """
        return self._translate(error, connection, limited=False, users=True)

    def users_prologue(self, connection: GuardedConnection) -> str:
        """What goes before the first statement of a transaction of the user's on such a
        connection.
        """
        return self._limits.begin_exclusive(self._keepalive)

    def forgo_checks(self) -> None:
        """Ask no more for what only some systems can: to look whether a client is still there while
        its statement runs.
        """
        self._keepalive = dataclasses.replace(self._keepalive, checks=False)

    @staticmethod
    def is_quiet(connection: GuardedConnection) -> bool:
        """Whether an idle connection shows no sign of having been closed by the server."""
        return _is_quiet(connection)

    def hurry(self, limit: float = HURRIED_SEC) -> None:
        """This process ends, and its forked children with it: from now on no call waits long for an
        answer, and where one got none, the others do not ask.

        Args:
            limit: Seconds that a call of this process may take.
        """
        self._hurry.begin(limit)

    @property
    def hurried(self) -> bool:
        """Whether this process ends."""
        return self._hurry.begun

    @property
    def given_up(self) -> bool:
        """Whether this process ends, and got no answer a moment ago."""
        return self._hurry.is_hopeless

    def trim(self) -> None:
        """Close connections of this process that nobody has used for half a minute, but one. Called
        now and then.
        """
        self._pool().trim(time.monotonic() - _REST_SEC)

    def close_all(self) -> None:
        """Close the connections of this process; those in use, when they come back."""
        self._pool().close()

    def _pool(self) -> _Pool:
        pid = os.getpid()
        found = self._pools.get(pid)
        # A forked child starts with an empty pool: the parent's connections, and locks, are not its
        # own.
        return found if found is not None else self._pools.setdefault(pid, _Pool(self._hurry))

    def _open(self, pool: _Pool) -> GuardedConnection:
        connection = self._connect(pool, GuardedConnection)
        pool.lend(connection)
        return connection

    def _connect(self, pool: _Pool, factory: type[Guarded], limited: bool = True) -> Guarded:
        config = self._config
        parameters = libpq_parameters(config, self._name)
        parameters.update(host=config.host, port=str(config.port), client_encoding='utf8')
        parameters.setdefault('connect_timeout', max(1, math.ceil(config.connect_timeout_sec)))
        if self._hurry.begun:
            parameters['connect_timeout'] = math.ceil(HURRIED_SEC)
        connection: Guarded | None = None
        began = time.monotonic()
        try:
            connection = psycopg2.connect(connection_factory=factory, **parameters)
            connection.deadlines = pool.deadlines
            connection.limit = config.connect_timeout_sec
            leave_to_parent(connection)
            if config.listen and limited:
                self._begin_session(connection)
        except psycopg2.Error as error:
            if connection is not None:
                connection.close()
            if time.monotonic() - began > _SILENT_SEC:
                self._hurry.unanswered()
            raise DatabaseUnavailable(
                explain(config, f'{config.host}:{config.port}', error)
            ) from error
        return connection

    def _begin_session(self, connection: GuardedConnection) -> None:
        connection.autocommit = True
        with connection.cursor() as cursor:
            try:
                cursor.execute_first(
                    self._limits.begin_session(connection.server_version, self._keepalive)
                )
            except psycopg2.errors.InvalidParameterValue:
                self.forgo_checks()
                cursor.execute_first(
                    self._limits.begin_session(connection.server_version, self._keepalive)
                )
        connection.autocommit = False

    def _translate(
        self, error: psycopg2.Error, connection: GuardedConnection, limited: bool, users: bool
    ) -> DatabaseUnavailable | None:
        where = f'PostgreSQL at {self._config.host}:{self._config.port}'
        if connection.cut:
            self._hurry.unanswered()
            return StoreTimeout(
                f'{where} did not answer in time: the network or the server is stuck'
            )
        if error.cursor is not None and error.cursor.connection is not connection:
            return None
        if limited and error.pgcode in TIMED_OUT:
            return StoreTimeout(f'{where} took too long: {text_of(error)}')
        lost = error.pgcode in LOST or (error.pgcode == STANDBY and not users)
        if lost or (connection.closed and isinstance(error, CONNECTION_ERRORS)):
            return DatabaseUnavailable(f'lost the connection to {where}: {text_of(error)}')
        return None

    def _refused(self, error: psycopg2.Error, connection: GuardedConnection) -> Exception:
        """What a statement of our own raises: without a time limit's own class, as who sent it may
        want to know of the lock.
        """
        return self._translate(error, connection, limited=False, users=False) or refused(error)

    def _roll_back(self, connection: GuardedConnection) -> None:
        try:
            if not connection.closed:
                connection.rollback()
        except psycopg2.Error:
            connection.close()


class _Pool:
    """One process's idle connections, last in, first out."""

    def __init__(self, hurry: Hurry) -> None:
        self.deadlines = Deadlines(hurry)
        self._idle: list[tuple[float, GuardedConnection]] = []
        self._lock = threading.Lock()
        # Weak: a connection whose borrower was struck between the lines is closed when nobody has
        # it any more.
        self._lent: weakref.WeakSet[GuardedConnection] = weakref.WeakSet()

    def take(self) -> GuardedConnection | None:
        """An idle connection that shows no sign of having been closed by the server."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()[1]
            if _is_quiet(connection):
                self.lend(connection)
                return connection
            connection.close()

    def lend(self, connection: GuardedConnection) -> None:
        """Take note of a connection that is in use."""
        with self._lock:
            self._lent.add(connection)

    def give_back(self, connection: GuardedConnection) -> None:
        """Keep it for the next call, if it is good for one."""
        good = (
            not connection.closed and connection.info.transaction_status == TRANSACTION_STATUS_IDLE
        )
        if good:
            connection.autocommit = False
        now, surplus = time.monotonic(), list[GuardedConnection]()
        with self._lock:
            if good and connection in self._lent and len(self._idle) < _MOST_IDLE:
                self._idle.append((now, connection))
            else:
                surplus.append(connection)
            self._lent.discard(connection)
            while len(self._idle) > _FEW_IDLE and now - self._idle[0][0] > _IDLE_SEC:
                surplus.append(self._idle.pop(0)[1])
        for each in surplus:
            each.close()

    def trim(self, since: float) -> None:
        """Close all idle ones but one that were given back before a moment."""
        old = list[GuardedConnection]()
        with self._lock:
            while len(self._idle) > 1 and self._idle[0][0] < since:
                old.append(self._idle.pop(0)[1])
        for each in old:
            each.close()

    def close(self) -> None:
        """Close the idle ones; those in use are closed when they come back."""
        with self._lock:
            self._lent.clear()
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()


def _is_quiet(connection: GuardedConnection) -> bool:
    """Whether nothing waits to be read: on an idle connection that would be its end."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return not waiting.poll(0)
