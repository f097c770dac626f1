"""What an error of the server means for who asked: a pure function of its SQLSTATE."""

from __future__ import annotations

import psycopg2

from ..errors import (
    BadData,
    DatabaseRefused,
    LockNotAvailable,
    MissingPrivilege,
    MissingSchema,
    MissingTable,
    StatementCanceled,
    StatementRefused,
    TransactionConflict,
)
from .options import text_of

__all__ = [
    'CONNECTION_ERRORS',
    'LOST',
    'STANDBY',
    'TIMED_OUT',
    'refusal',
    'refused',
    'role_or_resources',
]

#: SQLSTATEs after which another connection, perhaps to another server, may do better.
LOST = frozenset({'57P01', '57P02', '57P03', '57P05', '25P03', '25006', '53300'})
#: What a standby answers to a transaction that asks to write; nothing else that JobSync does gives
#: this one.
STANDBY = '0A000'
CONNECTION_ERRORS = (psycopg2.OperationalError, psycopg2.InterfaceError)
TIMED_OUT = frozenset({'57014', '55P03'})

#: The causes that somebody has to tell from others. Serialization failure and dead-lock are one:
#: the server rolled the statement back because of another transaction.
_CAUSES: dict[str, type[StatementRefused]] = {
    '40001': TransactionConflict,
    '40P01': TransactionConflict,
    '55P03': LockNotAvailable,
    '57014': StatementCanceled,
    '42501': MissingPrivilege,
    '42P01': MissingTable,
    '42703': MissingTable,
    '3F000': MissingSchema,
}
#: Classes of errors that meet every statement until somebody does something: insufficient
#: resources, system errors (I/O), corrupted data and indexes, invalid authorization, no such
#: database or schema.
_LASTING_CLASSES = ('53', '58', '28', '3D', '3F')
#: Data corrupted, index corrupted; insufficient privilege, undefined table, undefined function,
#: undefined column.
_LASTING = frozenset({'XX001', 'XX002', '42501', '42P01', '42883', '42703'})


def role_or_resources(sqlstate: str) -> bool:
    """Whether the cause lies in the server's resources or in what this role may do, and not in one
    statement's values.
    """
    return sqlstate in _LASTING or sqlstate.startswith(_LASTING_CLASSES)


def refused(error: psycopg2.Error) -> StatementRefused:
    """What the server answered to a statement of our own, in the class of its cause and with its
    own text.
    """
    sqlstate = error.pgcode or ''
    kind = _CAUSES.get(sqlstate) or (
        BadData if isinstance(error, psycopg2.DataError) else StatementRefused
    )
    text = str(error) or type(error).__name__
    said = error.diag.message_primary or text_of(error)
    return kind(text, sqlstate, role_or_resources(sqlstate), said)


def refusal(error: StatementRefused, doing: str) -> DatabaseRefused:
    """The same for callers that did not send the statement: it says what was asked for.

    Args:
        error: What the server answered.
        doing: What was asked for, in words.
    """
    return DatabaseRefused(
        f'PostgreSQL refused {doing} (SQLSTATE {error.sqlstate or "unknown"}): {error.said}',
        error.sqlstate,
        error.pause,
    )
