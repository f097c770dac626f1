"""Connections to PostgreSQL that never hang: one for the agent, a pool for everybody else."""
from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import POLL_OK, POLL_READ, POLL_WRITE

from ..errors import DatabaseUnavailable, StoreTimeout

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..config import CoordinationConfig

__all__ = ['Connection', 'Sessions']

_APPLICATION_NAME_BYTES = 63
#: Connections of forked parents. A child must neither use nor close them: the server would end the parent's session.
_inherited: list[Any] = []


def _operation_sec(config: CoordinationConfig) -> float:
    """Seconds that one statement of the agent may take: short enough that a lost one does not cost the lease."""
    return max(0.5, min(config.heartbeat_interval_sec, config.heartbeat_timeout_sec / 5))


def _parameters(config: CoordinationConfig, host: str, port: int, name: str) -> dict[str, object]:
    timeout = config.heartbeat_timeout_sec
    own: dict[str, object] = {
        'host': host, 'port': port, 'dbname': config.dbname, 'user': config.user,
        'application_name': name.encode()[:_APPLICATION_NAME_BYTES].decode(errors='ignore'), 'client_encoding': 'utf8',
        'connect_timeout': max(2, round(config.connect_timeout_sec)),  # libpq takes whole seconds, two at least
        'tcp_user_timeout': round(timeout * 1000), 'keepalives': 1,
        'keepalives_idle': max(1, round(timeout / 3)), 'keepalives_interval': max(1, round(timeout / 6)), 'keepalives_count': 3,
    }
    if config.password is not None:
        own['password'] = config.password
    if len(config.hosts) > 1:
        own['target_session_attrs'] = 'read-write'
    return {**own, **config.connection_options}


def _settings(config: CoordinationConfig, statement_sec: float) -> str:
    # Set by a statement: a pooler in between refuses most settings at start-up.
    limit = max(1, round(statement_sec * 1000))
    idle = max(1, round(config.heartbeat_timeout_sec * 1000))
    return (f"SELECT set_config('statement_timeout', '{limit}', false), set_config('lock_timeout', '{limit}', false), "
            f"set_config('idle_in_transaction_session_timeout', '{idle}', false), set_config('synchronous_commit', 'on', false)")


def _clean(error: BaseException, config: CoordinationConfig) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text.replace(config.password, '***') if config.password else text


def _unreachable(config: CoordinationConfig, problems: Sequence[str]) -> DatabaseUnavailable:
    where = ', '.join(f'{host}:{port}' for host, port in config.hosts)
    detail = '; '.join(dict.fromkeys(problems))
    remedy = 'check host, port, network and that the server accepts connections'
    if 'does not exist' in detail and 'database' in detail:
        remedy = f'create it: createdb {config.dbname}'
    elif 'password' in detail or 'authentication' in detail:
        remedy = 'check user, password and pg_hba.conf'
    return DatabaseUnavailable(f'PostgreSQL at {where}, database {config.dbname!r}, user {config.user!r} cannot be used: {detail}: {remedy}')


class Connection:
    """The agent's connection: asynchronous in psycopg2's sense, driven here with deadlines. One thread uses it."""

    def __init__(self, raw: Any, config: CoordinationConfig) -> None:
        self.server = ''
        self._raw = raw
        self._config = config
        self._pid = os.getpid()
        self._limit = _operation_sec(config)

    @classmethod
    def open(cls, config: CoordinationConfig, name: str, timeout: float | None = None) -> Connection:
        """Connect to the first host that answers (of several: that can be written to).

        Args:
            config: Where to.
            name: For application_name.
            timeout: Seconds per host; connect_timeout_sec by default.

        Raises:
            DatabaseUnavailable: None answered in time.
        """
        problems: list[str] = []
        for host, port in config.hosts:
            deadline = time.monotonic() + (timeout or config.connect_timeout_sec)
            try:
                connection = cls._open_one(config, host, port, name, deadline)
            except (psycopg2.Error, DatabaseUnavailable, OSError) as error:
                problems.append(_clean(error, config))
            else:
                return connection
        raise _unreachable(config, problems)

    @classmethod
    def _open_one(cls, config: CoordinationConfig, host: str, port: int, name: str, deadline: float) -> Connection:
        raw = psycopg2.connect(async_=1, **_parameters(config, host, port, f'jobsync {name}'))  # type: ignore[call-overload]
        connection = cls(raw, config)
        try:
            connection._drive(deadline)
            connection._execute(_settings(config, connection._limit), (), deadline)
            connection.server = connection._identify(deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def _identify(self, deadline: float) -> str:
        """A name for the database's history: it changes when a standby has been promoted, not when the server restarts."""
        rows = self._execute(
            "SELECT has_function_privilege('pg_control_system()', 'execute'), has_function_privilege('pg_control_checkpoint()', 'execute'), "
            "CASE WHEN pg_is_in_recovery() THEN '' ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END", (), deadline)
        system, _, timeline = rows[0]
        identity = self._execute('SELECT system_identifier::text FROM pg_control_system()', (), deadline)[0][0] if system else ''
        return f'{identity}/{timeline}'

    def fileno(self) -> int:
        """The socket, to wait on for notifications."""
        return int(self._raw.fileno())

    def listen(self, channel: str) -> None:
        """Receive the notifications of a channel."""
        self.execute(f'LISTEN "{channel}"')

    def notifies(self) -> list[str]:
        """Payloads of the notifications that have arrived.

        Raises:
            DatabaseUnavailable: The connection is lost.
        """
        try:
            self._raw.poll()
        except psycopg2.Error as error:
            raise DatabaseUnavailable(f'lost the connection to PostgreSQL: {_clean(error, self._config)}') from error
        payloads = [notify.payload for notify in self._raw.notifies]
        self._raw.notifies.clear()
        return payloads

    def execute(self, sql: str, params: object = (), timeout: float | None = None) -> list[tuple[Any, ...]]:
        """Run one statement, or several separated by semicolons as one transaction; returns the rows of the last.

        Args:
            sql: With psycopg2's placeholders.
            params: For these.
            timeout: Seconds; by default what a heartbeat may take.

        Raises:
            StoreTimeout: No answer in time. The statement may still be carried out; close this connection.
            DatabaseUnavailable: The connection is lost.
            psycopg2.Error: The server refused the statement.
        """
        limit = timeout or self._limit
        try:
            return self._execute(sql, params, time.monotonic() + limit)
        except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
            if getattr(error, 'pgcode', None) and not self._raw.closed:
                raise
            raise DatabaseUnavailable(f'lost the connection to PostgreSQL: {_clean(error, self._config)}') from error

    def _execute(self, sql: str, params: object, deadline: float) -> list[tuple[Any, ...]]:
        cursor = self._raw.cursor()
        cursor.execute(sql, params or None)
        self._drive(deadline)
        return cursor.fetchall() if cursor.description is not None else []

    def _drive(self, deadline: float) -> None:
        poll = select.poll()  # select.select cannot watch descriptors from 1024 on
        while True:
            state = self._raw.poll()
            if state == POLL_OK:
                return
            events = {POLL_READ: select.POLLIN, POLL_WRITE: select.POLLOUT}[state]
            poll.register(self._raw.fileno(), events)
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000 + 1):
                raise StoreTimeout(f'PostgreSQL did not answer in time (database {self._config.dbname!r}): the network or the server is stuck')
            poll.unregister(self._raw.fileno())

    def close(self) -> None:
        """Close it; in a forked child only forget it."""
        if os.getpid() != self._pid:
            _inherited.append(self._raw)
            return
        try:
            self._raw.close()
        except psycopg2.Error:
            pass  # it was gone


class Sessions:
    """Ordinary connections for calls from any thread and any forked child, reused last in, first out.

    Args:
        config: Where to.
        application_name: What the server shows.
    """

    def __init__(self, config: CoordinationConfig, application_name: str) -> None:
        self._config = config
        self._name = application_name
        self._lock = threading.Lock()
        self._idle: list[PgConnection] = []
        self._pid = os.getpid()
        self._closed = False

    @contextmanager
    def session(self) -> Iterator[PgConnection]:
        """A connection in a transaction, committed at the end of the block and rolled back on an error.

        Raises:
            DatabaseUnavailable: The database cannot be reached, or the connection broke; of a commit it is then unknown
                whether it happened.
        """
        connection = self._take()
        try:
            yield connection
            if not connection.autocommit:
                connection.commit()
        except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
            broken = bool(connection.closed)
            self._drop(connection)
            if isinstance(error, (psycopg2.errors.QueryCanceled, psycopg2.errors.LockNotAvailable)):
                raise StoreTimeout(f'PostgreSQL did not answer in time: {_clean(error, self._config)}') from error
            if broken or error.pgcode is None or error.pgcode[:2] in ('08', '57'):
                raise DatabaseUnavailable(f'lost the connection to PostgreSQL: {_clean(error, self._config)}') from error
            raise
        except BaseException:
            self._drop(connection)
            raise
        else:
            self._give_back(connection)

    def close_all(self) -> None:
        """Close the idle connections. The pool can be used again."""
        self._forget_if_forked()
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            self._drop(connection)

    def _forget_if_forked(self) -> None:
        if os.getpid() != self._pid:
            _inherited.extend(self._idle)
            self._idle = []
            self._lock = threading.Lock()  # the parent may have held it at the fork
            self._pid = os.getpid()

    def _take(self) -> PgConnection:
        self._forget_if_forked()
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self._open()
            if not _stale(connection):
                return connection
            self._drop(connection)

    def _open(self) -> PgConnection:
        config = self._config
        problems: list[str] = []
        for host, port in config.hosts:
            try:
                return self._open_one(host, port)
            except (psycopg2.Error, OSError, UnicodeError) as error:
                problems.append(_clean(error, config))
        raise _unreachable(config, problems)

    def _open_one(self, host: str, port: int) -> PgConnection:
        connection: PgConnection = psycopg2.connect(**_parameters(self._config, host, port, self._name))  # type: ignore[call-overload]
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(_settings(self._config, self._config.heartbeat_timeout_sec))
            connection.autocommit = False
        except BaseException:
            connection.close()
            raise
        return connection

    def _give_back(self, connection: PgConnection) -> None:
        if connection.closed or os.getpid() != self._pid:
            return
        with self._lock:
            self._idle.append(connection)

    def _drop(self, connection: PgConnection) -> None:
        try:
            connection.close()
        except psycopg2.Error:
            pass  # it was gone


def _stale(connection: PgConnection) -> bool:
    """Whether the server has hung up: an idle connection has nothing to read unless that, or a notice, has come."""
    if connection.closed:
        return True
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))
