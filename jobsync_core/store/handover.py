"""Tokens that change hands: their former owner gives them, and their new one asks which of their
tasks are audited, or taken by others. A bounded piece at a time.
"""

from __future__ import annotations

import datetime
import sys
from array import array

from ..assignment.hashing import task_to_token
from ..config import CoordinationConfig
from ..errors import InvalidTaskId
from ..protocol.messages.handover import Give, GiveReply, Lives, LivesReply, Take, TakeReply
from .cluster_transaction import lock_key
from .connection import Connection
from .tables import Tables

__all__ = ['HandOverStore']

#: A notification holds less than 8000 bytes.
_NOTIFY_BYTES = 7000


class HandOverStore:
    """Gives and takes.

    Args:
        config: The cluster's settings.
        tables: Names of the tables.
        date: The date whose audit and claims count; None: none do.
    """

    def __init__(
        self, config: CoordinationConfig, tables: Tables, date: datetime.date | None
    ) -> None:
        self._config = config
        self._tables = tables
        self._date = date
        bits = (config.total_tokens - 1).bit_length()
        self._key_bits = {'shift': 64 - bits, 'bits': bits}

    def give(self, connection: Connection, request: Give) -> GiveReply | None:
        """Give tokens to where the plan wants them, and record what was promised; None where this
        incarnation is not in the node table.
        """
        promises = request.promised and self._date is not None
        sql = self._tables.sql('handover.promise_and_give' if promises else 'handover.give')
        ((present, tokens, _),) = connection.execute(
            f'{connection.local_limits}; {sql}',
            {
                'name': request.name,
                'incarnation': request.incarnation,
                'version': request.version,
                'channel': self._tables.channel,
                'date': self._date,
                'texts': [text for text, _ in request.promised],
                'tokens': [token for _, token in request.promised],
                'los': [lo for lo, _ in request.ranges],
                'his': [hi for _, hi in request.ranges],
                'notify_bytes': _NOTIFY_BYTES,
                **lock_key(self._tables),
            },
        )
        return GiveReply(tokens) if present else None

    def take(self, connection: Connection, request: Take) -> TakeReply:
        """Answer the first part of the question, made of about `request.limit` rows.

        Rows are found by the indexes on (date, token), from the first token up to the one with
        which the limit is reached. A token that has more rows than that is read in parts, in the
        order of its tasks.
        """
        if self._date is None or not request.ranges:
            return TakeReply(request.ranges)
        params = self._params(self._date, request)
        if request.after is not None:
            return self._take_part(connection, request, params)
        ((stop, incomplete, keys, holders, promised),) = connection.execute(
            self._tables.sql('handover.take'), params
        )
        if incomplete:
            self._fill_in(connection, self._date, request.limit)
            return TakeReply()
        if stop <= request.ranges[0][0]:
            return self._take_part(connection, request, params)
        ranges = tuple((lo, min(hi, stop)) for lo, hi in request.ranges if lo < stop)
        return TakeReply(
            ranges,
            _numbers(keys),
            None,
            tuple(sorted(holders or ())),
            tuple(sorted(promised or ())),
        )

    def lives(self, connection: Connection, request: Lives) -> LivesReply:
        """Which of these incarnations are no longer in the node table."""
        rows = connection.execute(
            self._tables.sql('handover.lives_gone'), {'lives': list(request.incarnations)}
        )
        return LivesReply(tuple(life for (life,) in rows))

    def _take_part(
        self, connection: Connection, request: Take, params: dict[str, object]
    ) -> TakeReply:
        first = request.ranges[0][0]
        ((keys, holders, promised, number, last),) = connection.execute(
            self._tables.sql('handover.take_part', stop='%(first)s + 1'),
            {**params, 'after': request.after},
        )
        whole = number < request.limit
        return TakeReply(
            ((first, first + 1),) if whole else (),
            _numbers(keys),
            None if whole else last,
            tuple(sorted(holders or ())),
            (first,) if promised else (),
        )

    def _fill_in(self, connection: Connection, date: datetime.date, limit: int) -> None:
        """Write the tokens of some rows whose writer did not know them."""
        texts = [
            text
            for (text,) in connection.execute(
                self._tables.sql('handover.without_token'), {'date': date, 'limit': limit}
            )
        ]
        tokens = [_token_of(text, self._config) for text in texts]
        connection.execute(
            self._tables.sql('handover.fill_in'), {'texts': texts, 'tokens': tokens, 'date': date}
        )

    def _params(self, date: datetime.date, request: Take) -> dict[str, object]:
        spans = ','.join(f'[{lo},{hi})' for lo, hi in request.ranges)
        return {
            'date': date,
            'name': request.name,
            'first': request.ranges[0][0],
            'end': request.ranges[-1][1],
            'limit': request.limit,
            'ranges': f'{{{spans}}}',
            **self._key_bits,
        }


def _token_of(text: str, config: CoordinationConfig) -> int:
    """The token of a task; -1, which nobody asks for, where the text can be no task's id."""
    try:
        return task_to_token(text, config.total_tokens, config.hash_function)
    except InvalidTaskId:
        return -1


def _numbers(keys: memoryview | bytes) -> array[int]:
    """Eight bytes each, the first the most significant."""
    numbers = array('Q', bytes(keys))
    if sys.byteorder == 'little':
        numbers.byteswap()
    return numbers
