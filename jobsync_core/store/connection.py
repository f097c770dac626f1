"""Connections to PostgreSQL that cannot hang: the agent's own one, and a small pool for calls of
the API.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import select
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import POLL_OK, POLL_READ, POLL_WRITE, TRANSACTION_STATUS_IDLE

from ..config import CoordinationConfig
from ..errors import DatabaseUnavailable, StoreTimeout
from .deadline import BEGIN_TRIES, QUICK_SEC, Deadlines, GuardedConnection
from .inherited import leave_to_parent
from .location import locate, location_of
from .options import (
    Limits,
    agent_limits,
    call_limits,
    check_options,
    explain,
    keepalive,
    libpq_parameters,
    resolve,
    text_of,
)
from .statements import catalog

__all__ = ['FIRST_TIMELINE', 'Connection', 'Sessions']

#: Idle connections that a process keeps; and for as long as others are in use all the time, as by
#: the threads of a worker.
_FEW_IDLE, _MOST_IDLE = 4, 16
_IDLE_SEC = 10.0
#: Seconds after which `trim` closes what a burst has left.
_REST_SEC = 30.0

#: How a history's name ends where the server was never promoted, so that no history came before it;
#: queries/node.sql has it as well.
FIRST_TIMELINE = ' 00000001'
#: SQLSTATEs after which another connection, perhaps to another server, may do better.
_LOST = frozenset({'57P01', '57P02', '57P03', '57P05', '25P03', '25006', '53300'})
#: What a standby answers to a transaction that asks to write; nothing else that JobSync does gives
#: this one.
_STANDBY = '0A000'
_CONNECTION_ERRORS = (psycopg2.OperationalError, psycopg2.InterfaceError)
_TIMED_OUT = frozenset({'57014', '55P03'})

Guarded = TypeVar('Guarded', bound=GuardedConnection)


class Connection:
    """The agent's connection: asynchronous underneath, so that every wait has a deadline. One
    thread uses it.

    Driving libpq by `poll()` and the descriptor is psycopg2's documented asynchronous mode. After a
    missed deadline the connection is closed, since nobody can tell any more what its next answer
    answers.

    Attributes:
        server: The database's history, or where the role may not ask for it, the server's address.
        history_sql: SQL for the database's history (system identifier and timeline), for use in
            statements; '' where the role may not ask.
    """

    def __init__(
        self, raw: psycopg2.extensions.connection, limits: Limits, where: str, pooled: bool = False
    ) -> None:
        self.server = ''
        self.history_sql = "''"
        self._raw = raw
        self._limits = limits
        self._where = where
        self._pooled = pooled
        self._pid = os.getpid()
        leave_to_parent(raw)

    @classmethod
    def open(
        cls, config: CoordinationConfig, name: str, timeout: float | None = None
    ) -> Connection:
        """Connect to the first host that answers; of several hosts, to the first that accepts
        writes.

        Args:
            config: Where the database is.
            name: Shown as `jobsync NAME` in pg_stat_activity.
            timeout: Seconds that each host may take; default connect_timeout_sec.

        Raises:
            DatabaseUnavailable: No host will do; the message tells why, for each. StoreTimeout, if
                none answered in time.
        """
        limit = config.connect_timeout_sec if timeout is None else timeout
        problems = []
        busy = True
        for host, port in config.hosts:
            try:
                return cls._open_host(config, name, host, port, time.monotonic() + limit)
            except (DatabaseUnavailable, psycopg2.Error) as error:
                problems.append(explain(config, f'{host}:{port}', error))
                busy = busy and isinstance(error, StoreTimeout)
        if busy:
            raise StoreTimeout('; '.join(problems))
        raise DatabaseUnavailable('; '.join(problems))

    @classmethod
    def _open_host(
        cls, config: CoordinationConfig, name: str, host: str, port: int, deadline: float
    ) -> Connection:
        # An address that was given is used; libpq finds it among its parameters.
        addresses = (
            [None] if 'hostaddr' in config.connection_options else resolve(host, port, deadline)
        )
        failure: Exception = DatabaseUnavailable('it has no address')
        for place, address in enumerate(addresses):
            # An address that does not answer must leave time for the next one.
            left = (deadline - time.monotonic()) / (len(addresses) - place)
            try:
                return cls._open_address(config, name, host, port, address, time.monotonic() + left)
            except (DatabaseUnavailable, psycopg2.Error) as error:
                failure = error
        raise failure

    @classmethod
    def _open_address(
        cls,
        config: CoordinationConfig,
        name: str,
        host: str,
        port: int,
        address: str | None,
        deadline: float,
    ) -> Connection:
        parameters = libpq_parameters(config, name)
        parameters.update(host=host, port=port, client_encoding='utf8')
        if address is not None:
            parameters['hostaddr'] = address
        connection = cls(
            psycopg2.connect(async_=1, **parameters),
            agent_limits(config),
            f'{host}:{port}',
            not config.listen,
        )
        try:
            connection._drive(deadline)
            connection._begin_session(config, deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def _begin_session(self, config: CoordinationConfig, deadline: float) -> None:
        if not self._pooled:
            settings = keepalive(config)
            try:
                self._send_first(
                    self._limits.begin_session(self._raw.server_version, settings), (), deadline
                )
            except (
                psycopg2.errors.InvalidParameterValue
            ):  # a system that cannot look whether a client is still there
                settings = dataclasses.replace(settings, checks=False)
                self._send_first(
                    self._limits.begin_session(self._raw.server_version, settings), (), deadline
                )
        try:
            rows = self._read(catalog().render('connection.history', {}, {}), deadline)
            self.history_sql = catalog().pieces['history'].text
        except DatabaseUnavailable:
            raise
        except psycopg2.Error:
            rows = self._read(catalog().render('connection.address', {}, {}), deadline)
        self.server = str(rows[0][0])
        location = location_of(config)
        if not location.found:
            locate(location, config, lambda sql, params: self._read(sql, deadline, params))

    def _read(
        self, sql: str, deadline: float, params: Sequence[object] = ()
    ) -> list[tuple[Any, ...]]:
        """Run what a standby can run too."""
        begin = (
            self._limits.begin_transaction(self._raw.server_version, writing=False) + '; '
            if self._pooled
            else ''
        )
        return self._send_first(begin + sql, params, deadline)

    def execute(
        self,
        sql: str,
        params: Sequence[object] | Mapping[str, object] = (),
        timeout: float | None = None,
    ) -> list[tuple[Any, ...]]:
        """Run one statement, or several that are separated by `;`; the rows of the last one.

        Args:
            sql: Several statements are one transaction, unless they begin one of their own.
            params: Values for the placeholders.
            timeout: Seconds until StoreTimeout; default: a part of the heartbeat timeout, a little
                after the server has given up.

        Raises:
            StoreTimeout: No answer in time. The connection is closed; the statement may have been
                carried out.
            DatabaseUnavailable: The connection is lost.
            psycopg2.Error: The server refused the statement.
        """
        return self._run(
            sql, params, time.monotonic() + (self._limits.answer if timeout is None else timeout)
        )

    @property
    def local_limits(self) -> str:
        """Statements that go first in a transaction: its settings, wherever a pooler may run it."""
        return self._limits.begin_transaction(self._raw.server_version)

    def limit_statements(self, seconds: float) -> str:
        """A statement that has the server end each further one of the transaction after so long."""
        return f"SET LOCAL statement_timeout TO '{max(1, math.ceil(seconds * 1000))}ms'"

    def listen(self, channel: str) -> None:
        """Have notifications of this channel sent here."""
        quoted = channel.replace('"', '""')
        self.execute(f'LISTEN "{quoted}"')

    def notifies(self) -> list[str]:
        """Payloads of the notifications that have arrived, without waiting.

        Raises:
            DatabaseUnavailable: The connection is lost.
        """
        self._check()
        try:
            self._raw.poll()
        except psycopg2.Error as error:
            raise self._lost(error) from error
        payloads = [str(notify.payload) for notify in self._raw.notifies]
        self._raw.notifies.clear()
        return payloads

    def fileno(self) -> int:
        """Descriptor that becomes readable when a notification, or the end of the connection, has
        arrived.

        Raises:
            DatabaseUnavailable: The connection is closed.
        """
        self._check()
        return int(self._raw.fileno())

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return bool(self._raw.closed)

    @property
    def idle(self) -> bool:
        """Whether it is open and in no transaction, so that the next statement finds it as after
        opening.
        """
        return not self._raw.closed and self._raw.info.transaction_status == TRANSACTION_STATUS_IDLE

    def close(self) -> None:
        """Close it. In a forked child the parent's connection stays as it is."""
        if os.getpid() == self._pid and not self._raw.closed:
            self._raw.close()

    def _run(
        self, sql: str, params: Sequence[object] | Mapping[str, object], deadline: float
    ) -> list[tuple[Any, ...]]:
        self._check()
        if (
            not self._pooled
            or self._raw.info.transaction_status != TRANSACTION_STATUS_IDLE
            or sql.startswith('BEGIN')
        ):
            return self._send(sql, params, deadline)
        # A transaction by itself, which begins with what a session would have had from its start.
        return self._send_first(f'{self.local_limits}; {sql}', params, deadline)

    def _send_first(
        self, sql: str, params: Sequence[object] | Mapping[str, object], deadline: float
    ) -> list[tuple[Any, ...]]:
        """Run the beginning of a session or transaction: again, where a limit of the role's that it
        lifts was quicker.
        """
        for tries in itertools.count(1):
            began = time.monotonic()
            try:
                return self._send(sql, params, deadline)
            except psycopg2.errors.QueryCanceled:
                if tries == BEGIN_TRIES or time.monotonic() - began > QUICK_SEC:
                    raise
        raise AssertionError

    def _send(
        self, sql: str, params: Sequence[object] | Mapping[str, object], deadline: float
    ) -> list[tuple[Any, ...]]:
        self._check()
        try:
            cursor = self._raw.cursor()
            cursor.execute(sql, params)
            self._drive(deadline)
            return cursor.fetchall() if cursor.description else []
        except psycopg2.Error as error:
            if (
                self._raw.closed
                or error.pgcode in (*_LOST, _STANDBY)
                or (error.pgcode is None and isinstance(error, _CONNECTION_ERRORS))
            ):
                raise self._lost(error) from error
            raise

    def _drive(self, deadline: float) -> None:
        while (state := self._raw.poll()) != POLL_OK:
            left = deadline - time.monotonic()
            if left > 0:
                waiting = select.poll()
                waiting.register(
                    self._raw.fileno(),
                    {POLL_READ: select.POLLIN, POLL_WRITE: select.POLLOUT}[state],
                )
                waiting.poll(math.ceil(left * 1000))
            else:
                self.close()
                raise StoreTimeout(
                    f'PostgreSQL at {self._where} did not answer in time: the network or the '
                    'server is stuck'
                )

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise DatabaseUnavailable(
                'this connection belongs to the parent process: a forked child needs its own'
            )
        if self._raw.closed:
            raise DatabaseUnavailable(f'the connection to PostgreSQL at {self._where} is closed')

    def _lost(self, error: psycopg2.Error) -> DatabaseUnavailable:
        self.close()
        return DatabaseUnavailable(
            f'lost the connection to PostgreSQL at {self._where}: {text_of(error)}'
        )


class Sessions:
    """Blocking connections for calls of the API, kept for the next call. Threads and forked
    children may share the object.

    A statement ends in time even if the network swallows everything: a watchdog then cuts the
    connection. With `listen=False` the server is not asked to end anything by itself: behind a
    transaction pooler such settings would reach other clients.

    Args:
        config: Where the database is.
        application_name: Shown in pg_stat_activity.

    Raises:
        ConfigurationError: libpq does not know one of the connection_options.
    """

    def __init__(self, config: CoordinationConfig, application_name: str) -> None:
        check_options(config)
        self._config = config
        self._name = application_name
        self._limits = call_limits(config)
        self._location = location_of(config)
        self._keepalive = keepalive(config)
        self._pools: dict[int, _Pool] = {}

    @contextlib.contextmanager
    def session(
        self, limited: bool = True, users: bool = False
    ) -> Iterator[psycopg2.extensions.connection]:
        """Lend a connection for one transaction: committed at the end, rolled back on an error.

        Args:
            limited: Whether each statement must end within the heartbeat timeout; False for
                statements of the user's own.
            users: Whether it is for statements of the user's own, which find his tables by the
                role's search_path.

        Raises:
            DatabaseUnavailable: There is no connection, or it was lost. If that happened while
                committing, the transaction may have been committed.
            StoreTimeout: A statement took too long.
        """
        pool = self._pool()
        connection = pool.take() or self._open(pool)
        connection.limit = self._limits.statement + 1.0 if limited else None
        try:
            if not self._location.found:
                self._locate(connection)
            connection.prologue = self._prologue(connection, users)
            yield connection
            connection.commit()
        except BaseException as error:
            ours = isinstance(error, psycopg2.Error) and self._translate(
                error, connection, limited, users
            )
            self._roll_back(connection)
            if ours:
                raise ours from error
            raise
        finally:
            pool.give_back(connection)

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
        return found if found is not None else self._pools.setdefault(pid, _Pool())

    def _open(self, pool: _Pool) -> GuardedConnection:
        connection = self._connect(pool, GuardedConnection)
        pool.lend(connection)
        return connection

    def _connect(self, pool: _Pool, factory: type[Guarded], limited: bool = True) -> Guarded:
        config = self._config
        parameters = libpq_parameters(config, self._name)
        parameters.update(host=config.host, port=str(config.port), client_encoding='utf8')
        parameters.setdefault('connect_timeout', max(1, math.ceil(config.connect_timeout_sec)))
        connection: Guarded | None = None
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
            return StoreTimeout(
                f'{where} did not answer in time: the network or the server is stuck'
            )
        if error.cursor is not None and error.cursor.connection is not connection:
            return None
        if limited and error.pgcode in _TIMED_OUT:
            return StoreTimeout(f'{where} took too long: {text_of(error)}')
        lost = error.pgcode in _LOST or (error.pgcode == _STANDBY and not users)
        if lost or (connection.closed and isinstance(error, _CONNECTION_ERRORS)):
            return DatabaseUnavailable(f'lost the connection to {where}: {text_of(error)}')
        return None

    def _roll_back(self, connection: GuardedConnection) -> None:
        try:
            if not connection.closed:
                connection.rollback()
        except psycopg2.Error:
            connection.close()


class _Pool:
    """One process's idle connections, last in, first out."""

    def __init__(self) -> None:
        self.deadlines = Deadlines()
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
