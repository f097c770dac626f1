"""The agent's connection to PostgreSQL, which cannot hang."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import select
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2.extensions import POLL_OK, POLL_READ, POLL_WRITE, TRANSACTION_STATUS_IDLE

from ..config import CoordinationConfig
from ..errors import DatabaseUnavailable, StoreTimeout
from .deadline import BEGIN_TRIES, QUICK_SEC
from .inherited import leave_to_parent
from .location import locate, location_of
from .options import Limits, agent_limits, explain, keepalive, libpq_parameters, resolve, text_of
from .refusals import CONNECTION_ERRORS, LOST, STANDBY, refused
from .statements import catalog

__all__ = ['FIRST_TIMELINE', 'Connection']

#: How a history's name ends where the server was never promoted, so that no history came before it;
#: queries/node.sql has it as well.
FIRST_TIMELINE = ' 00000001'


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
            StatementRefused: The server refused the statement, in the class of the cause.
        """
        deadline = time.monotonic() + (self._limits.answer if timeout is None else timeout)
        try:
            return self._run(sql, params, deadline)
        except psycopg2.Error as error:
            raise refused(error) from error

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
                or error.pgcode in (*LOST, STANDBY)
                or (error.pgcode is None and isinstance(error, CONNECTION_ERRORS))
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
