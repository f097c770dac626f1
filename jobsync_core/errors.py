"""Every error that JobSync raises, as one small tree by cause.

An error's docstring says what happened and what to do about it; it is the
default message. Built-in bases stand where callers expect them.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    'AttemptsExhausted',
    'BadData',
    'ClaimLost',
    'ClusterNotFormed',
    'CompletedAlready',
    'ConfigMismatch',
    'ConfigurationError',
    'DatabaseRefused',
    'DatabaseUnavailable',
    'DuplicateExecution',
    'DuplicateNodeName',
    'ExecutionRunning',
    'Fenced',
    'InvalidTaskId',
    'JobSyncError',
    'LockNotAvailable',
    'MessageRefused',
    'MissingPrivilege',
    'MissingSchema',
    'MissingTable',
    'NoSuchExecution',
    'NotCommitted',
    'NotEntered',
    'NotSent',
    'ResultLost',
    'SchemaConflict',
    'StatementCanceled',
    'StatementRefused',
    'StoreTimeout',
    'TransactionConflict',
    'Unroutable',
]


class JobSyncError(Exception):
    """Something in JobSync failed."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message or ' '.join((self.__doc__ or '').partition('Attributes:')[0].split())
        )


class ConfigurationError(JobSyncError, ValueError):
    """A setting has a value that cannot work; the message names both and the remedy."""


class InvalidTaskId(JobSyncError, ValueError, TypeError):
    """This cannot be a task id. Use a hashable value whose text is the same in every process, such
    as a string, a number or a tuple of those: at most 2000 bytes of UTF-8, no NUL.
    """


class ConfigMismatch(ConfigurationError):
    """This node's total_tokens or hash_function differ from those of the live cluster. Start it
    with the cluster's values, or stop every node first: the first node of an empty cluster sets
    them.
    """


class SchemaConflict(JobSyncError):
    """The tables under this appname were not made by this version. Choose another appname, or
    follow the upgrade steps.
    """


class NotEntered(JobSyncError, RuntimeError):
    """The Job is not running. Use it inside its `with` block, once."""


class MessageRefused(JobSyncError, ValueError):
    """This message cannot be processed, and was set aside. Mend what its sender writes, and send it
    again.
    """


class Unroutable(MessageRefused):
    """No key can be made for this message, so that no node may run it. Mend its arguments, or the
    key of its task, and send it again.
    """


class ClusterNotFormed(JobSyncError, TimeoutError):
    """Fewer than minimum_nodes had registered when wait_on_enter ended. Start the missing nodes,
    raise wait_on_enter, or lower minimum_nodes.
    """


class DuplicateNodeName(JobSyncError):
    """Another live process uses this node name. Give every process its own name."""


class ClaimLost(JobSyncError):
    """This node no longer owns the task. Do not process it: another node does."""


class DatabaseUnavailable(JobSyncError, ConnectionError):
    """PostgreSQL could not be reached. Check host, port, network and that the server accepts
    connections.

    Attributes:
        sent: Whether a statement may have reached the server, so that nobody knows what became of
            it.
    """

    sent: bool = True


class StoreTimeout(DatabaseUnavailable, TimeoutError):
    """PostgreSQL did not answer in time. The network or the server is stuck; the statement was
    abandoned.
    """


class DatabaseRefused(DatabaseUnavailable):
    """PostgreSQL answered a statement of JobSync's with an error, and nothing was changed. Remove
    the cause that the message names.

    Attributes:
        sqlstate: PostgreSQL's code of the error.
        pause: Whether the next statement will most likely be refused as well (the server is out of
            resources, or this role lacks a right), so that a worker does well to stop consuming for
            a while.
    """

    def __init__(self, message: str | None = None, sqlstate: str = '', pause: bool = False) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.pause = pause
        self.sent = False


class StatementRefused(DatabaseRefused):
    """PostgreSQL refused one statement. The text is the server's; a subclass names the cause where
    somebody has to know it.

    Attributes:
        said: The server's text without its details.
    """

    def __init__(
        self,
        message: str | None = None,
        sqlstate: str = '',
        pause: bool = False,
        said: str | None = None,
    ) -> None:
        super().__init__(message, sqlstate, pause)
        self.said = said or ' '.join(str(self).split())


class LockNotAvailable(StatementRefused):
    """Another transaction holds a lock that the statement would have had to wait for too long."""


class StatementCanceled(StatementRefused):
    """The statement took longer than it may, or somebody canceled it."""


class TransactionConflict(StatementRefused):
    """Another transaction was in the way, as in a dead-lock. The same statement may succeed at
    once.
    """


class BadData(StatementRefused):
    """The database cannot store one of the statement's values."""


class MissingPrivilege(StatementRefused):
    """The role lacks a right. `jobsync doctor` tells which."""


class MissingTable(StatementRefused):
    """A table, or a column of one, is not there. Start a node or run `jobsync init-db`."""


class MissingSchema(StatementRefused):
    """The schema is not there, or the role may use none. Create it, or name another one."""


class DuplicateExecution(JobSyncError):
    """The key was already completed, and on_duplicate is 'raise'.

    Attributes:
        key: The key.
        result: What its completion stored.
    """

    key: str = ''
    result: Any = None


class ResultLost(DuplicateExecution):
    """The key was already completed, and its result is not known: the attempt died, or raised,
    between the commit of its transaction and its end. Set `execution.result` within the
    transaction, and its commit carries the result.
    """


class ExecutionRunning(JobSyncError):
    """The key is being executed elsewhere right now. Try again later.

    Attributes:
        key: The key.
        requeue: Whether a queue should deliver the message again.
    """

    key: str = ''
    requeue: bool = False


class AttemptsExhausted(JobSyncError):
    """Too many attempts at this key were lost: their processes died, or were taken for dead.
    Nothing begins it any more. Find out what ends its processes; `jobsync executions retry` frees
    it.

    Attributes:
        key: The key.
        lost: How many attempts were lost.
    """

    key: str = ''
    lost: int = 0


class NoSuchExecution(JobSyncError, LookupError):
    """The ledger does not have this key. It was never begun, or its retention is over."""


class NotSent(JobSyncError):
    """The key is free, but the message that was kept with it could not be sent, and is still kept.
    Retry it once more.
    """


class Fenced(JobSyncError):
    """Another attempt has taken this key over; nothing was recorded. Roll your own writes back: the
    newer attempt makes them.
    """


class CompletedAlready(JobSyncError):
    """This attempt has completed its key before: the commit whose answer was lost went through.
    Roll back what you have written since; there is nothing more to do.

    Attributes:
        key: The key.
        result: What its completion stored.
    """

    key: str = ''
    result: Any = None


class NotCommitted(JobSyncError):
    """The transaction that was to carry the completion is not committed, so the attempt does not
    count. The key may run again.
    """
