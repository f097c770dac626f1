"""What an error of the server means for who asked: a pure function of its SQLSTATE."""

from __future__ import annotations

import psycopg2

from ..errors import DatabaseRefused
from .options import text_of

__all__ = [
    'CONNECTION_ERRORS',
    'LOST',
    'STANDBY',
    'TIMED_OUT',
    'is_passing',
    'refusal',
    'role_or_resources',
]

#: SQLSTATEs after which another connection, perhaps to another server, may do better.
LOST = frozenset({'57P01', '57P02', '57P03', '57P05', '25P03', '25006', '53300'})
#: What a standby answers to a transaction that asks to write; nothing else that JobSync does gives
#: this one.
STANDBY = '0A000'
CONNECTION_ERRORS = (psycopg2.OperationalError, psycopg2.InterfaceError)
TIMED_OUT = frozenset({'57014', '55P03'})

#: Another transaction was in the way: the same statement may succeed at once. Serialization
#: failure, dead-lock.
_PASSING = frozenset({'40001', '40P01'})
#: Classes of errors that meet every statement until somebody does something: insufficient
#: resources, system errors (I/O), corrupted data and indexes, invalid authorization, no such
#: database or schema.
_LASTING_CLASSES = ('53', '58', '28', '3D', '3F')
#: Data corrupted, index corrupted; insufficient privilege, undefined table, undefined function,
#: undefined column.
_LASTING = frozenset({'XX001', 'XX002', '42501', '42P01', '42883', '42703'})


def is_passing(error: psycopg2.Error) -> bool:
    """Whether the server rolled the statement back because of another transaction, so that it is
    worth to ask again at once.
    """
    return error.pgcode in _PASSING


def role_or_resources(sqlstate: str) -> bool:
    """Whether the cause lies in the server's resources or in what this role may do, and not in one
    statement's values.
    """
    return sqlstate in _LASTING or sqlstate.startswith(_LASTING_CLASSES)


def refusal(error: psycopg2.Error, doing: str) -> DatabaseRefused:
    """The error that callers get in place of psycopg2's.

    Args:
        error: An answer of the server's to a statement of our own.
        doing: What was asked for, in words.
    """
    sqlstate = error.pgcode or ''
    said = (
        f'PostgreSQL refused {doing} (SQLSTATE {sqlstate or "unknown"}): '
        f'{error.diag.message_primary or text_of(error)}'
    )
    return DatabaseRefused(said, sqlstate, role_or_resources(sqlstate))
