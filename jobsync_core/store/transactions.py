"""Connections for transactions of the user's that carry a completion: what the user sets on one
reaches neither the completion nor the next user, and nothing but the end of the block ends the
transaction.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import psycopg2
import psycopg2.errors
import psycopg2.extensions
from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from ..errors import (
    ConfigurationError,
    DatabaseUnavailable,
    JobSyncError,
    NotCommitted,
    StoreTimeout,
)
from .completions import Completion
from .deadline import GuardedConnection, GuardedCursor
from .executions import Began, ExecutionStore
from .options import text_of
from .refusals import refusal, refused
from .sessions import Sessions
from .tables import Tables

__all__ = ['TransactionConnection', 'Transactions']

_MOST_IDLE = 8
# What ends a transaction, at the beginning of a statement; ROLLBACK TO goes back to a savepoint
# only.
_ENDING = re.compile(
    r'(?:\s|;|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)*(?:COMMIT|END|ABORT|PREPARE\s+TRANSACTION|ROLLBACK(?!\s+(?:(?:WORK|TRANSACTION)\s+)?TO\b))\b',
    re.IGNORECASE | re.DOTALL,
)
_BASE = psycopg2.extensions.connection


class TransactionConnection(GuardedConnection):
    """What the block of a transaction gets: a connection of psycopg2's whose transaction ends with
    the block.

    Attributes:
        in_block: Whether the block is running.
        block: Number of the block that it serves.
    """

    in_block = False
    block = 0

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            kwargs.setdefault('cursor_factory', TransactionCursor)
        made = super().cursor(*args, **kwargs)
        if isinstance(made, TransactionCursor):
            made.block = self.block
        return made

    def __enter__(self) -> Any:
        self._refuse('`with connection:`')
        return super().__enter__()

    def commit(self) -> None:
        self._refuse('commit()')
        super().commit()

    def rollback(self) -> None:
        self._refuse('rollback()')
        super().rollback()

    def close(self) -> None:
        self._refuse('close()')
        super().close()

    def reset(self) -> None:
        self._refuse('reset()')
        super().reset()

    def set_session(self, *args: Any, **kwargs: Any) -> None:
        self._refuse('set_session()')
        super().set_session(*args, **kwargs)

    def set_isolation_level(self, level: Any) -> None:
        self._refuse('set_isolation_level()')
        super().set_isolation_level(level)

    def set_client_encoding(self, encoding: str) -> None:
        self._refuse('set_client_encoding()')
        super().set_client_encoding(encoding)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ('autocommit', 'isolation_level', 'readonly', 'deferrable'):
            self._refuse(f'setting {name}')
        super().__setattr__(name, value)

    def tpc_begin(self, xid: Any) -> None:
        self._refuse('tpc_begin()')
        super().tpc_begin(xid)

    def end_block(self) -> None:
        """From now on it may be committed, rolled back and closed."""
        self.in_block = False
        self.block += 1

    def _refuse(self, what: str) -> None:
        if self.in_block:
            refuse_ending(what)

    @property
    def is_pristine(self) -> bool:
        """Whether nothing was changed on psycopg2's side of it."""
        return (
            self.cursor_factory is None
            and not self.string_types
            and not self.binary_types
            and not self.closed
        )


class TransactionCursor(GuardedCursor):
    """A cursor of TransactionConnection."""

    block = 0

    def execute(self, query: Any, vars: Any = None) -> None:
        connection = self.connection
        if isinstance(connection, TransactionConnection) and (
            connection.in_block or self.block != connection.block
        ):
            if self.block != connection.block:
                raise ConfigurationError(
                    'this cursor belongs to a transaction() that is over: use it inside of its '
                    'block'
                )
            text = query.decode('utf8', 'replace') if isinstance(query, bytes) else query
            if isinstance(text, str) and (found := _ENDING.match(text)):
                refuse_ending(' '.join(found.group().split())[-40:])
        super().execute(query, vars)


def refuse_ending(what: str) -> NoReturn:
    """Tell that the end of the block is the end of the transaction."""
    raise ConfigurationError(
        f'{what} inside of execution.transaction(): its transaction is committed, together with '
        'the completion, at the end of the block, '
        'and rolled back where an exception leaves it; for less than that use savepoints'
    )


class Transactions:
    """Connections of one node for transactions of its users. Threads and forked children may share
    the object.

    Args:
        sessions: Opens them.
        tables: Names of the tables.
    """

    def __init__(self, sessions: Sessions, tables: Tables) -> None:
        self._sessions = sessions
        self._tables = tables
        # By process; appending and popping are one step each, so that there is no lock.
        self._idle: dict[int, deque[TransactionConnection]] = {}
        self._closed = False

    def take(self) -> TransactionConnection:
        """A connection as fresh from the server.

        Raises:
            DatabaseUnavailable: There is none.
        """
        idle = self._idle.setdefault(os.getpid(), deque())
        while True:
            try:
                connection = idle.pop()
            except IndexError:
                return self._sessions.open_unlimited(TransactionConnection)
            if self._sessions.is_quiet(connection):
                return connection
            connection.close()

    def begin(self, connection: TransactionConnection) -> Began:
        """Begin a transaction of the user's.

        Raises:
            DatabaseUnavailable: It did not begin.
        """
        connection.limit = self._sessions.statement_limit
        connection.prologue = self._sessions.users_prologue(connection)
        try:
            try:
                began = ExecutionStore(connection, self._tables).begin_transaction()
            except psycopg2.errors.InvalidParameterValue:
                connection.rollback()
                self._sessions.forgo_checks()
                connection.prologue = self._sessions.users_prologue(connection)
                began = ExecutionStore(connection, self._tables).begin_transaction()
        except psycopg2.Error as error:
            if error.pgcode in ('57014', '55P03'):
                raise StoreTimeout(
                    f'a transaction could not be begun in time: {text_of(error)}'
                ) from error
            raise self._sessions.explain_unlimited(error, connection) or refusal(
                refused(error), 'to begin a transaction'
            ) from error
        connection.limit = None  # what the block runs takes as long as it takes
        return began

    def complete(
        self, connection: TransactionConnection, completion: Completion, began: Began | None
    ) -> bool:
        """Complete a key at the end of a block; False: the transaction is another by now, or
        another attempt holds the key.
        """
        if began is None:
            return False
        limit = self._sessions.statement_limit
        store = ExecutionStore(connection, self._tables)
        return store.complete(completion, began, max(1, int(limit * 900)))

    def is_same(self, connection: TransactionConnection, began: Began | None) -> bool:
        """Whether the transaction that `begin` began is still open."""
        return began is not None and ExecutionStore(connection, self._tables).is_same(began)

    def give_back(self, connection: TransactionConnection) -> None:
        """Make it fresh again for the next one, or close it."""
        idle = self._idle.setdefault(os.getpid(), deque())
        try:
            usable = (
                not self._closed
                and len(idle) < _MOST_IDLE
                and connection.is_pristine
                and connection.info.transaction_status == TRANSACTION_STATUS_IDLE
            )
            if usable and self._sessions.keeps_sessions:
                connection.limit, connection.prologue = self._sessions.statement_limit, ''
                connection.autocommit = True
                with _BASE.cursor(connection, cursor_factory=GuardedCursor) as cursor:
                    cursor.execute('DISCARD ALL')
                connection.autocommit = False
        except psycopg2.Error:
            usable = False
        if usable:
            idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close the idle ones of this process; those in use when they come back."""
        self._closed = True
        idle = self._idle.get(os.getpid())
        while idle:
            idle.pop().close()

    def roll_back(
        self, connection: TransactionConnection, error: BaseException | None
    ) -> DatabaseUnavailable | None:
        """Roll back what a block did that an error has left.

        Returns:
            What the error means where it is not the user's own: that the connection was lost.
        """
        lost = None
        if isinstance(error, psycopg2.Error) and error.pgcode != '25006':
            lost = self._sessions.explain_unlimited(error, connection)
        try:
            if not connection.closed:
                connection.rollback()
        except psycopg2.Error:
            connection.close()
        return lost

    def end(
        self, connection: TransactionConnection, key: str, complete: Callable[[], None]
    ) -> None:
        """Run the statement that completes a key, and the commit. Not as a context manager made of
        a generator: what strikes there can keep the connection open.

        Args:
            connection: The connection.
            key: The key.
            complete: Runs them.

        Raises:
            DatabaseUnavailable: The connection was lost, or the server refused.
            NotCommitted: A statement of the block had failed.
            ConfigurationError: The block made its transaction read only.
            psycopg2.Error: It is the user's own: of a constraint or trigger that was deferred.
        """
        try:
            complete()
        except psycopg2.Error as error:
            said = self._explain_end(error, connection, key)
            if said is None:
                raise
            raise said from error

    def _explain_end(
        self, error: psycopg2.Error, connection: TransactionConnection, key: str
    ) -> JobSyncError | None:
        code = error.pgcode or ''
        if code == '25P02':
            return NotCommitted(
                f'{key!r}: a statement in the block of execution.transaction() failed and the '
                'block went on, so that everything is rolled '
                'back: put what may fail into a savepoint'
            )
        if code == '25006':
            return ConfigurationError(
                f'{key!r}: the block of execution.transaction() made its transaction read only, '
                'so that nothing can be completed in it: '
                'leave SET TRANSACTION READ ONLY away'
            )
        if code.startswith(('23', 'P0')):
            return None  # of a constraint or trigger of the user's that was deferred to the end
        return self._sessions.explain_unlimited(error, connection) or refusal(
            refused(error), f'the completion of {key!r}'
        )
