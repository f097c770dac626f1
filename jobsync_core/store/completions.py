"""Completions: what is recorded of a key that is complete, and the statements that record it in a
transaction of the user's.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TypeAlias

from .tables import Tables

__all__ = ['LOST', 'PENDING', 'Completion', 'Statement', 'Steps', 'in_order', 'steps']

#: What stands in the place of a result that is still to come, as PostgreSQL writes it: the key is
#: complete by a transaction of the user's, and its attempt has not ended. Processes of an earlier
#: version take it for None.
PENDING = '{"$jobsync": null}'
#: What somebody has put there who knows that the attempt's process is dead. They, too, take it for
#: None.
LOST = '{"$jobsync": {"$text": "null"}}'


@dataclass(frozen=True)
class Completion:
    """A completion to record; `result` is JSON text."""

    key: str
    fence: int
    result: str | None
    retention_sec: float


#: A statement with its parameters.
Statement: TypeAlias = 'tuple[str, tuple[object, ...]]'


@dataclass(frozen=True)
class Steps:
    """What completes a key in a transaction of the user's.

    Args:
        mark: Runs first.
        complete: Completes it: one row, or none.
        look: Where there was none: one row if both ran in one transaction, none in autocommit mode.
        place: Which database they are for, for people.
    """

    mark: Statement
    complete: Statement
    look: Statement
    place: str


def steps(tables: Tables, completion: Completion, place: str) -> Steps:
    """What completes a key in a transaction of the user's, on a connection of the user's to the
    database at a place.
    """
    token, done = secrets.token_hex(8), f'{completion.fence} {completion.key}'
    return Steps(
        mark=(tables.sql('execution.mark'), (token,)),
        complete=(
            tables.sql('execution.complete_if_marked'),
            (*in_order(completion), done, token, done),
        ),
        look=(tables.sql('execution.is_marked'), (token,)),
        place=place,
    )


def in_order(completion: Completion) -> tuple[object, ...]:
    """Its values in the order of the statements that complete a key."""
    return (completion.result, completion.retention_sec, completion.key, completion.fence)
