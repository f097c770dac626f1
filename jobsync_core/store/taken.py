"""What a node asks before it claims tokens: which of their tasks are audited, or taken by others. A
bounded piece at a time.
"""

from __future__ import annotations

import datetime
import sys
from array import array

from ..assignment.hashing import task_to_token
from ..config import CoordinationConfig
from ..errors import InvalidTaskId
from ..protocol.messages import Lives, LivesReply, Take, TakeReply
from .connection import Connection
from .tables import Tables

__all__ = ['read_lives', 'read_taken']


def read_taken(
    connection: Connection,
    tables: Tables,
    config: CoordinationConfig,
    date: datetime.date,
    request: Take,
) -> TakeReply:
    """Answer the first part of the question, made of about `request.limit` rows.

    Rows are found by the indexes on (date, token), from the first token up to the one with which
    the limit is reached. A token that has more rows than that is read in parts, in the order of its
    tasks.
    """
    if request.after is not None:
        return _read_part(connection, tables, config, date, request)
    rows = connection.execute(
        f"""
        WITH bound AS MATERIALIZED (SELECT {_stop_sql(tables)} AS stop), found AS
            ({_found_sql(tables, '(SELECT stop FROM bound)')})
        SELECT bound.stop, EXISTS (SELECT FROM {tables.audit} WHERE date = %(date)s AND token IS
            NULL), told.*
        FROM bound, (
            SELECT coalesce(string_agg({_key_sql(config)}, '' ORDER BY {_key_sql(config)}), ''),
                   array_agg(DISTINCT life) FILTER (WHERE life IS NOT NULL), array_agg(DISTINCT
                       token) FILTER (WHERE promised)
            FROM found) AS told
        """,
        _params(date, request),
    )
    stop, incomplete, keys, holders, promised = rows[0]
    if incomplete:
        _fill_in(connection, tables, config, date, request.limit)
        return TakeReply()
    if stop <= request.ranges[0][0]:
        return _read_part(connection, tables, config, date, request)
    ranges = tuple((lo, min(hi, stop)) for lo, hi in request.ranges if lo < stop)
    return TakeReply(
        ranges, _numbers(keys), None, tuple(sorted(holders or ())), tuple(sorted(promised or ()))
    )


def read_lives(connection: Connection, tables: Tables, request: Lives) -> LivesReply:
    """Which of these incarnations are no longer in the node table."""
    rows = connection.execute(
        f"""
        SELECT life FROM unnest(%s::text[]) AS life WHERE NOT EXISTS (SELECT FROM {tables.node} AS n
            WHERE n.incarnation = life)
        """,
        (list(request.incarnations),),
    )
    return LivesReply(tuple(life for (life,) in rows))


def _stop_sql(tables: Tables) -> str:
    """The token before which there are not many more rows than the limit."""
    one = """(SELECT token FROM {table} WHERE date = %(date)s AND token >= %(first)s AND token <
        %(end)s
              ORDER BY token OFFSET %(limit)s LIMIT 1)"""
    return f'least(%(end)s, {one.format(table=tables.audit)}, {one.format(table=tables.claim)})'


def _found_sql(tables: Tables, stop: str) -> str:
    # Only audits of the present epoch count, and only claims of nodes that live: of others than
    # this one, as it knows its own.
    where = (
        f'date = %(date)s AND token >= %(first)s AND token < {stop} AND token <@ '
        '%(ranges)s::int4multirange'
    )
    return f"""
        SELECT token, task_id, NULL AS life, false AS promised FROM {tables.audit}
        WHERE {where} AND epoch >= (SELECT epoch FROM {tables.cluster})
        UNION ALL
        SELECT c.token, c.task_id, c.incarnation, c.promised
        FROM {tables.claim} AS c JOIN {tables.node} AS n ON n.name = c.node AND n.incarnation =
            c.incarnation
        WHERE {where} AND c.node <> %(name)s
        """


def _key_sql(config: CoordinationConfig) -> str:
    """What Exclusions computes: the token, and the first bits of the task's SHA-256 behind it, in 8
    bytes.
    """
    bits = (config.total_tokens - 1).bit_length()
    digest = "('x' || left(encode(sha256(convert_to(task_id, 'UTF8')), 'hex'), 16))::bit(64)"
    return f'int8send(((token::bigint::bit(64) << {64 - bits}) | ({digest} >> {bits}))::bigint)'


def _read_part(
    connection: Connection,
    tables: Tables,
    config: CoordinationConfig,
    date: datetime.date,
    request: Take,
) -> TakeReply:
    first = request.ranges[0][0]
    rows = connection.execute(
        f"""
        WITH found AS (
            SELECT * FROM ({_found_sql(tables, '%(first)s + 1')}) AS all_of_it WHERE %(after)s::text
                IS NULL OR task_id > %(after)s
            ORDER BY task_id LIMIT %(limit)s)
        SELECT coalesce(string_agg({_key_sql(config)}, '' ORDER BY {_key_sql(config)}), ''),
               array_agg(DISTINCT life) FILTER (WHERE life IS NOT NULL), bool_or(promised),
                   count(*), max(task_id)
        FROM found
        """,
        {**_params(date, request), 'after': request.after},
    )
    keys, holders, promised, number, last = rows[0]
    whole = number < request.limit
    return TakeReply(
        ((first, first + 1),) if whole else (),
        _numbers(keys),
        None if whole else last,
        tuple(sorted(holders or ())),
        (first,) if promised else (),
    )


def _fill_in(
    connection: Connection,
    tables: Tables,
    config: CoordinationConfig,
    date: datetime.date,
    limit: int,
) -> None:
    """Write the tokens of some rows whose writer did not know them."""
    texts = connection.execute(
        f'SELECT task_id FROM {tables.audit} WHERE date = %s AND token IS NULL LIMIT %s',
        (date, limit),
    )
    tokens = [_token_of(text, config) for (text,) in texts]
    connection.execute(
        f"""
        WITH mine AS (
            SELECT a.task_id, w.token FROM unnest(%(texts)s::text[], %(tokens)s::int[]) AS w
                (task_id, token)
                JOIN {tables.audit} AS a ON a.task_id = w.task_id AND a.date = %(date)s
            WHERE a.token IS NULL ORDER BY a.task_id FOR UPDATE OF a)
        UPDATE {tables.audit} AS a SET token = mine.token FROM mine WHERE a.task_id = mine.task_id
            AND a.date = %(date)s
        """,
        {'texts': [text for (text,) in texts], 'tokens': tokens, 'date': date},
    )


def _token_of(text: str, config: CoordinationConfig) -> int:
    """The token of a task; -1, which nobody asks for, where the text can be no task's id."""
    try:
        return task_to_token(text, config.total_tokens, config.hash_function)
    except InvalidTaskId:
        return -1


def _params(date: datetime.date, request: Take) -> dict[str, object]:
    spans = ','.join(f'[{lo},{hi})' for lo, hi in request.ranges)
    return {
        'date': date,
        'name': request.name,
        'first': request.ranges[0][0],
        'end': request.ranges[-1][1],
        'limit': request.limit,
        'ranges': f'{{{spans}}}',
    }


def _numbers(keys: memoryview | bytes) -> array[int]:
    """Eight bytes each, the first the most significant."""
    numbers = array('Q', bytes(keys))
    if sys.byteorder == 'little':
        numbers.byteswap()
    return numbers
