"""Connections to PostgreSQL that cannot hang: the agent's own one, and a small pool for calls of the API."""
from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import POLL_OK, POLL_READ, POLL_WRITE

from ..config import CoordinationConfig
from ..errors import DatabaseUnavailable, StoreTimeout
from .deadline import Deadlines, GuardedConnection

__all__ = ['Connection', 'Sessions', 'operation_timeout']

_APPLICATION_NAME_BYTES = 63
#: Idle connections that a process keeps.
_MOST_IDLE = 4

# pg_control_checkpoint() still shows the old timeline for a while after a promotion; the name of the present WAL file
# does not. Neither changes when the server restarts, nor when it recovers from a crash.
_SERVER = """
    SELECT (SELECT system_identifier::text FROM pg_control_system()) || ' ' ||
           CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END"""
#: Where the role may not ask that.
_SERVER_FALLBACK = "SELECT coalesce(host(inet_server_addr()), 'local') || ' ' || coalesce(inet_server_port(), 0)::text"

#: SQLSTATEs after which another connection, perhaps to another server, may do better.
_LOST = frozenset({'57P01', '57P02', '57P03', '57P05', '25P03', '25006', '53300'})
_TIMED_OUT = frozenset({'57014', '55P03'})


def operation_timeout(config: CoordinationConfig) -> float:
    """Seconds that one statement of the agent may take."""
    return max(0.5, min(config.heartbeat_interval_sec, config.heartbeat_timeout_sec / 5))


def call_timeout(config: CoordinationConfig) -> float:
    """Seconds that one statement of an API call may take."""
    return max(5.0, config.heartbeat_timeout_sec)


class Connection:
    """The agent's connection: asynchronous underneath, so that every wait has a deadline. One thread uses it.

    Driving libpq by `poll()` and the descriptor is psycopg2's documented asynchronous mode. After a missed deadline the
    connection is closed, since nobody can tell any more what its next answer answers.
    """

    def __init__(self, raw: psycopg2.extensions.connection, timeout: float, where: str) -> None:
        self.server = ''
        self._raw = raw
        self._timeout = timeout
        self._where = where
        self._pid = os.getpid()

    @classmethod
    def open(cls, config: CoordinationConfig, name: str, timeout: float | None = None) -> Connection:
        """Connect to the first host that answers; of several hosts, to the first that accepts writes.

        Args:
            config: Where the database is.
            name: Shown as `jobsync NAME` in pg_stat_activity.
            timeout: Seconds that each host may take; default connect_timeout_sec.

        Raises:
            DatabaseUnavailable: No host will do; the message tells why, for each.
        """
        limit = config.connect_timeout_sec if timeout is None else timeout
        problems = []
        for host, port in config.hosts:
            try:
                return cls._open_host(config, name, host, port, time.monotonic() + limit)
            except (DatabaseUnavailable, psycopg2.Error) as error:
                problems.append(_explain(config, f'{host}:{port}', error))
        raise DatabaseUnavailable('; '.join(problems))

    @classmethod
    def _open_host(cls, config: CoordinationConfig, name: str, host: str, port: int, deadline: float) -> Connection:
        addresses = _resolve(host, port, deadline)
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
    def _open_address(cls, config: CoordinationConfig, name: str, host: str, port: int, address: str | None, deadline: float) -> Connection:
        parameters = _parameters(config, name)
        parameters.update(host=host, port=port, client_encoding='utf8')
        if address is not None:
            parameters['hostaddr'] = address
        limit = operation_timeout(config)
        connection = cls(psycopg2.connect(async_=1, **parameters), limit, f'{host}:{port}')
        try:
            connection._drive(deadline)
            connection._begin_session(config, limit, deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def _begin_session(self, config: CoordinationConfig, limit: float, deadline: float) -> None:
        settings, values = _session_settings(limit, limit * 0.8, max(limit, min(1.0, config.heartbeat_timeout_sec)))
        # The first string is one implicit transaction: what fails in it, undoes the settings too.
        self._run(settings, values, deadline)
        try:
            rows = self._run(_SERVER, (), deadline)
        except DatabaseUnavailable:
            raise
        except psycopg2.Error:
            rows = self._run(_SERVER_FALLBACK, (), deadline)
        self.server = str(rows[0][0])

    def execute(self, sql: str, params: Sequence[object] | Mapping[str, object] = (), timeout: float | None = None) -> list[tuple[Any, ...]]:
        """Run one statement, or several that are separated by `;`; the rows of the last one.

        Args:
            sql: Several statements are one transaction, unless they begin one of their own.
            params: Values for the placeholders.
            timeout: Seconds until StoreTimeout; default `operation_timeout`.

        Raises:
            StoreTimeout: No answer in time. The connection is closed; the statement may have been carried out.
            DatabaseUnavailable: The connection is lost.
            psycopg2.Error: The server refused the statement.
        """
        return self._run(sql, params, time.monotonic() + (self._timeout if timeout is None else timeout))

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
        """Descriptor that becomes readable when a notification, or the end of the connection, has arrived.

        Raises:
            DatabaseUnavailable: The connection is closed.
        """
        self._check()
        return int(self._raw.fileno())

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return bool(self._raw.closed)

    def close(self) -> None:
        """Close it. In a forked child the parent's connection stays as it is."""
        if os.getpid() == self._pid and not self._raw.closed:
            self._raw.close()

    def _run(self, sql: str, params: Sequence[object] | Mapping[str, object], deadline: float) -> list[tuple[Any, ...]]:
        self._check()
        try:
            cursor = self._raw.cursor()
            cursor.execute(sql, params)
            self._drive(deadline)
            return cursor.fetchall() if cursor.description else []
        except psycopg2.Error as error:
            if self._raw.closed or error.pgcode in _LOST or (error.pgcode is None and isinstance(error, _CONNECTION_ERRORS)):
                raise self._lost(error) from error
            raise

    def _drive(self, deadline: float) -> None:
        while (state := self._raw.poll()) != POLL_OK:
            left = deadline - time.monotonic()
            if left > 0:
                waiting = select.poll()
                waiting.register(self._raw.fileno(), {POLL_READ: select.POLLIN, POLL_WRITE: select.POLLOUT}[state])
                waiting.poll(math.ceil(left * 1000))
            else:
                self.close()
                raise StoreTimeout(f'PostgreSQL at {self._where} did not answer in time: the network or the server is stuck')

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise DatabaseUnavailable("this connection belongs to the parent process: a forked child needs its own")
        if self._raw.closed:
            raise DatabaseUnavailable(f'the connection to PostgreSQL at {self._where} is closed')

    def _lost(self, error: psycopg2.Error) -> DatabaseUnavailable:
        self.close()
        return DatabaseUnavailable(f'lost the connection to PostgreSQL at {self._where}: {_text(error)}')


_CONNECTION_ERRORS = (psycopg2.OperationalError, psycopg2.InterfaceError)


class Sessions:
    """Blocking connections for calls of the API, kept for the next call. Threads and forked children may share the object.

    A statement ends in time even if the network swallows everything: a watchdog then cuts the connection.

    Args:
        config: Where the database is.
        application_name: Shown in pg_stat_activity.
    """

    def __init__(self, config: CoordinationConfig, application_name: str) -> None:
        self._config = config
        self._name = application_name
        self._pools: dict[int, _Pool] = {}

    @contextlib.contextmanager
    def session(self, limited: bool = True) -> Iterator[psycopg2.extensions.connection]:
        """Lend a connection for one transaction: committed at the end, rolled back on an error.

        Args:
            limited: Whether each statement must end within the heartbeat timeout; False for statements of the user's own.

        Raises:
            DatabaseUnavailable: There is no connection, or it was lost. If that happened while committing, the transaction
                may have been committed.
            StoreTimeout: A statement took too long.
        """
        pool = self._pool()
        connection = pool.take() or self._open(pool)
        connection.limit = call_timeout(self._config) + 1.0 if limited else None
        try:
            yield connection
            connection.commit()
        except BaseException as error:
            ours = isinstance(error, psycopg2.Error) and self._translate(error, connection, limited)
            self._roll_back(connection)
            if ours:
                raise ours from error
            raise
        finally:
            pool.give_back(connection)

    def close_all(self) -> None:
        """Close the connections of this process; those in use, when they come back."""
        self._pool().close()

    def _pool(self) -> _Pool:
        pid = os.getpid()
        found = self._pools.get(pid)
        # A forked child starts with an empty pool: the parent's connections, and locks, are not its own.
        return found if found is not None else self._pools.setdefault(pid, _Pool())

    def _open(self, pool: _Pool) -> GuardedConnection:
        config, limit = self._config, call_timeout(self._config)
        parameters = _parameters(config, self._name)
        parameters.update(host=config.host, port=str(config.port), client_encoding='utf8')
        parameters.setdefault('connect_timeout', max(1, math.ceil(config.connect_timeout_sec)))
        connection: GuardedConnection | None = None
        try:
            connection = psycopg2.connect(connection_factory=GuardedConnection, **parameters)
            connection.deadlines = pool.deadlines
            connection.limit = config.connect_timeout_sec
            connection.autocommit = True
            settings, values = _session_settings(limit, limit * 0.9, max(1.0, operation_timeout(config)))
            with connection.cursor() as cursor:
                cursor.execute(settings, values)
            connection.autocommit = False
        except psycopg2.Error as error:
            if connection is not None:
                connection.close()
            raise DatabaseUnavailable(_explain(config, f'{config.host}:{config.port}', error)) from error
        return connection

    def _translate(self, error: psycopg2.Error, connection: GuardedConnection, limited: bool) -> DatabaseUnavailable | None:
        where = f'PostgreSQL at {self._config.host}:{self._config.port}'
        if connection.cut:
            return StoreTimeout(f'{where} did not answer in time: the network or the server is stuck')
        if error.cursor is not None and error.cursor.connection is not connection:
            return None
        if limited and error.pgcode in _TIMED_OUT:
            return StoreTimeout(f'{where} took too long: {_text(error)}')
        if error.pgcode in _LOST or (connection.closed and isinstance(error, _CONNECTION_ERRORS)):
            return DatabaseUnavailable(f'lost the connection to {where}: {_text(error)}')
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
        self._idle: list[GuardedConnection] = []
        self._lock = threading.Lock()
        self._born = 0
        self._closed: set[int] = set()

    def take(self) -> GuardedConnection | None:
        """An idle connection that shows no sign of having been closed by the server."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if _is_quiet(connection):
                return connection
            connection.close()

    def give_back(self, connection: GuardedConnection) -> None:
        """Keep it for the next call, if it is good for one."""
        if connection.closed or connection.info.transaction_status != psycopg2.extensions.TRANSACTION_STATUS_IDLE:
            connection.close()
            return
        connection.autocommit = False
        with self._lock:
            if len(self._idle) < _MOST_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _is_quiet(connection: GuardedConnection) -> bool:
    """Whether nothing waits to be read: on an idle connection that would be its end."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return not waiting.poll(0)


def _parameters(config: CoordinationConfig, name: str) -> dict[str, Any]:
    """What every connection asks of libpq; connection_options win."""
    timeout = config.heartbeat_timeout_sec
    parameters: dict[str, Any] = {
        'application_name': name.encode()[:_APPLICATION_NAME_BYTES].decode(errors='ignore'),
        'keepalives': 1,
        'keepalives_idle': max(1, math.ceil(timeout / 3)),
        'keepalives_interval': max(1, math.ceil(timeout / 6)),
        'keepalives_count': 3,
        'tcp_user_timeout': max(1000, math.ceil(timeout * 1000)),
    }
    if len(config.hosts) > 1:
        parameters['target_session_attrs'] = 'read-write'
    parameters.update(config.connection_options)
    parameters.update(dbname=config.dbname, user=config.user)
    if config.password is not None:
        parameters['password'] = config.password
    return parameters


def _session_settings(statement: float, lock: float, idle: float) -> tuple[str, dict[str, str]]:
    """One statement, since a pooler refuses such settings at the start of a connection. Times in seconds."""
    settings = {
        'statement_timeout': f'{math.ceil(statement * 1000)}ms',
        'lock_timeout': f'{math.ceil(lock * 1000)}ms',
        'idle_in_transaction_session_timeout': f'{math.ceil(idle * 1000)}ms',
        'synchronous_commit': 'on',
        'default_transaction_isolation': 'read committed',
    }
    return 'SELECT ' + ', '.join(f"set_config('{name}', %({name})s, false)" for name in settings), settings


def _resolve(host: str, port: int, deadline: float) -> list[str | None]:
    """Addresses of a host. Looking them up cannot be interrupted, so that it is left to a thread that may outlast the wait."""
    if host.startswith(('/', '@')):
        return [None]
    found: list[str | None] = []
    problems: list[OSError | UnicodeError] = []

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(entry[4][0]) for entry in entries))
        except (OSError, UnicodeError) as error:
            problems.append(error)

    thread = threading.Thread(target=look_up, name='jobsync-lookup', daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if problems:
        raise DatabaseUnavailable(f'the host name cannot be resolved: {problems[0]}') from problems[0]
    if not found:
        raise StoreTimeout('the host name was not resolved in time')
    return found


def _explain(config: CoordinationConfig, where: str, error: Exception) -> str:
    text = _text(error)
    # Before a connection is there, libpq tells no SQLSTATE.
    if f'database "{config.dbname}" does not exist' in text:
        return f'PostgreSQL at {where} has no database {config.dbname!r}: create it with `createdb {config.dbname}`'
    return f'cannot connect to PostgreSQL at {where}, database {config.dbname!r}, user {config.user!r}: {text}'


def _text(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__
