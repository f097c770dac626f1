"""The ledger's rows: one per key, with the fence that only its newest attempt holds.

`begin` is a compare-and-swap in one statement, within a function: it looks at the row in the
statement's snapshot, decides there whether the key is free, and takes it only if the row is still
the one that it looked at. So a decision never mixes an old view of the node table with a newer row,
and duplicates of a completed key cost a read and no lock.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..process import Process

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .tables import Tables

__all__ = [
    'Began',
    'Completion',
    'Holder',
    'Row',
    'Statement',
    'Steps',
    'add_result',
    'begin',
    'begin_many',
    'begin_transaction',
    'complete',
    'find',
    'finish',
    'finish_many',
    'has_prefix',
    'is_same',
    'release',
    'settle',
    'state_of',
    'steps',
    'stored',
    'take_over',
]


@dataclass(frozen=True)
class Holder:
    """Who executes: a node's incarnation, and the process that runs for it."""

    node: str
    incarnation: str
    process: Process


@dataclass(frozen=True)
class Completion:
    """A completion to record; `result` is JSON text."""

    key: str
    fence: int
    result: str | None
    retention_sec: float


@dataclass(frozen=True)
class Row:
    """What `begin` found.

    Args:
        began: The caller holds the key now, by `fence`.
        registered: The caller's incarnation is in the node table; without that nothing is begun.
        state: 'running', 'done' or 'failed'; None where there is no row.
        free: The row may be taken over, but another process has just done so: ask again.
        holder: Who holds or held the key.
    """

    began: bool
    registered: bool
    state: str | None
    free: bool
    fence: int
    attempts: int
    result: Any
    holder: Holder | None


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


@dataclass(frozen=True)
class Began:
    """By what a transaction of the user's is known.

    Args:
        stamp: When it began, in microseconds.
        backend: Process id of the server's process.
    """

    stamp: int
    backend: int


#: Seconds for which a transaction of the user's may be silent between two statements, and between
#: the completion and the commit.
USERS_IDLE_SEC, _COMMIT_SEC = 3600, 10

#: Seconds for which a key whose row is locked is waited for: whoever holds it is about to complete
#: it, or will not soon.
_BEGIN_WAIT_SEC = 1

# Both functions come with the schema (migration_3.sql), where what they do is written.
_BEGIN = (
    f"SELECT pg_catalog.set_config('lock_timeout', '{_BEGIN_WAIT_SEC}s', true);"
    """
SELECT * FROM {begin_execution}(
    %(key)s, %(node)s, %(incarnation)s, %(host)s, %(boot_id)s, %(pid_namespace)s, %(pid)s,
        %(started)s)"""
)

_CALL_FINISH = 'SELECT FROM {finish_execution}(%s, %s, %s, %s) AS finished WHERE finished'

# Several in one transaction. Each function call has a snapshot of its own, as if it came alone. In
# the order of the keys, so that two such transactions never wait for each other in a ring; and
# hardly waiting for any other, since all of the keys wait then.
_HARDLY_WAIT = "SELECT set_config('lock_timeout', '100ms', true);"
_BEGIN_MANY = (
    _HARDLY_WAIT
    + """
SELECT wanted.number, row.* FROM unnest(%(keys)s::text[]) WITH ORDINALITY AS wanted (key, number),
    {begin_execution}(
    wanted.key, %(node)s, %(incarnation)s, %(host)s, %(boot_id)s, %(pid_namespace)s, %(pid)s,
        %(started)s) AS row"""
)

_FINISH_MANY = (
    _HARDLY_WAIT
    + """
SELECT done.number, {finish_execution}(done.result::jsonb, done.retention, done.key, done.fence)
FROM unnest(%s::text[], %s::double precision[], %s::text[], %s::bigint[]) WITH ORDINALITY AS done
    (result, retention, key, fence, number)"""
)

_TAKE_OVER = """
UPDATE {execution} AS e
SET node = me.name, incarnation = me.incarnation, host = %(host)s, boot_id = %(boot_id)s,
    pid_namespace = %(pid_namespace)s,
    pid = %(pid)s, started = %(started)s, fence = greatest(e.fence + 1,
        pg_current_xact_id()::text::bigint),
    attempts = e.attempts + 1, started_at = now()
FROM {node} AS me
WHERE e.key = %(key)s AND e.fence = %(fence)s AND e.state = 'running' AND me.name = %(node)s AND
    me.incarnation = %(incarnation)s
RETURNING e.fence, e.attempts"""

# In a transaction of the user's only a running attempt becomes complete: with 'done' accepted, one
# that tries again after a commit whose answer was lost would write its effect twice. The setting
# tells that this very transaction has completed it before. clock_timestamp(), because the
# transaction may be older than the attempt. Every name and operator is qualified: the search_path
# is the user's here, and others may create things along it.
_COMPLETE = """
UPDATE {execution}
SET state = 'done', result = CAST(%s AS pg_catalog.jsonb), error = NULL, finished_at =
    pg_catalog.clock_timestamp(),
    expires_at = pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs
        => CAST(%s AS double precision))
WHERE key OPERATOR(pg_catalog.=) %s AND fence OPERATOR(pg_catalog.=) %s
  AND (state OPERATOR(pg_catalog.=) 'running'
       OR (state OPERATOR(pg_catalog.=) 'done'
           AND pg_catalog.current_setting('jobsync.completed', true) OPERATOR(pg_catalog.=) %s))"""

# A setting for the transaction: in autocommit mode it is gone when the next statement comes.
_MARK = "SELECT pg_catalog.set_config('jobsync.completing', %s, true)"
_LOOK = (
    "SELECT 1 WHERE pg_catalog.current_setting('jobsync.completing', true) "
    'OPERATOR(pg_catalog.=) %s'
)
_IF_MARKED = """
  AND pg_catalog.current_setting('jobsync.completing', true) OPERATOR(pg_catalog.=) %s
RETURNING pg_catalog.set_config('jobsync.completed', %s, true)"""

# A transaction is known by its beginning; another one has another, whatever was set or reset in it.
_STAMP = (
    "CAST(pg_catalog.date_part('epoch', pg_catalog.now()) OPERATOR(pg_catalog.*) 1000000 AS bigint)"
)

# First of all his time limit, which holds for the statement that lifts it only. Constraints that
# were deferred are checked, and triggers run, as the user has set things up; then whatever he has
# set is undone, for the completion and the commit, and for the next user of the connection, behind
# a pooler as well. From here on the key's row is locked: a process that is stopped before its
# commit must not keep it.
_RESET = """
SET LOCAL statement_timeout TO 0; SET CONSTRAINTS ALL IMMEDIATE; RESET SESSION AUTHORIZATION; RESET
    ROLE; RESET ALL;
SET LOCAL search_path TO pg_catalog, pg_temp; SET LOCAL synchronous_commit TO 'on'; SET LOCAL
    statement_timeout TO 0;
SET LOCAL lock_timeout TO {lock}; SET LOCAL idle_in_transaction_session_timeout TO {idle};"""
_IF_SAME = f"""
  AND {_STAMP} OPERATOR(pg_catalog.=) %s
  AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) %s"""

_STORED = 'SELECT state, result FROM {execution} WHERE key = %s AND fence = %s'

#: ';' comes after ':'.
_HAS_PREFIX = 'SELECT EXISTS (SELECT FROM {execution} WHERE key >= %s AND key < %s)'
_FIND = """
SELECT e.state, e.result FROM {execution} AS e
WHERE e.key = ANY(%(keys)s::text[])
    AND (e.key <> ALL(%(old)s::text[]) OR e.fence < (SELECT max(c.former_until) FROM {cluster} AS
        c))
    AND CASE e.state
    WHEN 'done' THEN e.expires_at IS NULL OR e.expires_at > now()
    WHEN 'running' THEN EXISTS (SELECT FROM {node} AS n WHERE n.name = e.node AND n.incarnation =
        e.incarnation)
    ELSE false END
ORDER BY e.state LIMIT 1"""  # 'done' before 'running'
_ADD_RESULT = """
UPDATE {execution} SET result = CAST(%s AS jsonb) WHERE key = %s AND fence = %s AND state = 'done'
    AND result IS NULL"""

# SKIP LOCKED: whoever holds the row's lock is a transaction that is about to complete the key, or
# to roll that back.
_SETTLE = """
WITH loose AS (
    SELECT key FROM {execution} WHERE key = %(key)s AND fence = %(fence)s AND state = 'running' FOR
        UPDATE SKIP LOCKED
), failed AS (
    UPDATE {execution} AS e
    SET state = 'failed', error = %(error)s, finished_at = now(), expires_at = now() +
        make_interval(secs => %(retention)s)
    FROM loose WHERE e.key = loose.key
    RETURNING e.key
)
SELECT CASE WHEN EXISTS (SELECT FROM failed) THEN 'failed' ELSE e.state END
FROM {execution} AS e WHERE e.key = %(key)s AND e.fence = %(fence)s"""

_RELEASE = """
UPDATE {execution}
SET state = 'failed', error = %(error)s, finished_at = now(), expires_at = now() +
    make_interval(secs => %(retention)s)
WHERE state = 'running' AND node = %(node)s AND incarnation = %(incarnation)s AND pid = %(pid)s
  AND (%(key)s::text IS NULL OR key = %(key)s)"""


def _sql(text: str, tables: Tables) -> str:
    return text.format(
        cluster=tables.cluster,
        execution=tables.execution,
        node=tables.node,
        begin_execution=tables.begin_execution,
        finish_execution=tables.finish_execution,
    )


def _parameters(key: str, holder: Holder) -> dict[str, object]:
    process = holder.process
    return {
        'key': key,
        'node': holder.node,
        'incarnation': holder.incarnation,
        'host': process.host,
        'boot_id': process.boot_id,
        'pid_namespace': process.pid_namespace,
        'pid': process.pid,
        'started': process.started,
    }


def _row(values: Sequence[Any]) -> Row:
    (
        began,
        registered,
        state,
        free,
        fence,
        attempts,
        result,
        node,
        incarnation,
        host,
        boot_id,
        pid_namespace,
        pid,
        started,
    ) = values
    holder = None
    if state is not None:
        process = Process(
            host=host or '',
            boot_id=boot_id or '',
            pid_namespace=pid_namespace or '',
            pid=pid or 0,
            started=started or '',
        )
        holder = Holder(node or '', str(incarnation or ''), process)
    return Row(began, registered, state, bool(free), fence or 0, attempts or 0, result, holder)


def begin(connection: PgConnection, tables: Tables, key: str, holder: Holder) -> Row:
    """Take the key if it is new, failed, expired, or running under an incarnation that is no longer
    in the node table.

    A row with `began` false and `free` true, or with no state, lost a race: ask again.
    """
    with connection.cursor() as cursor:
        cursor.execute(_sql(_BEGIN, tables), _parameters(key, holder))
        return _row(cursor.fetchall()[0])


def begin_many(
    connection: PgConnection, tables: Tables, keys: Sequence[str], holder: Holder
) -> list[Row]:
    """`begin` for several keys, each given once, in one transaction; their rows in the same order.

    Raises:
        psycopg2.Error: Nothing was begun; LockNotAvailable where one of the keys would have to wait
            for another transaction.
    """
    order = sorted(range(len(keys)), key=keys.__getitem__)
    with connection.cursor() as cursor:
        cursor.execute(
            _sql(_BEGIN_MANY, tables),
            {**_parameters('', holder), 'keys': [keys[place] for place in order]},
        )
        found = {order[number - 1]: _row(values) for number, *values in cursor.fetchall()}
    return [found[place] for place in range(len(keys))]


def take_over(
    connection: PgConnection, tables: Tables, key: str, holder: Holder, fence: int
) -> tuple[int, int] | None:
    """Take a running key whose holder is known to be dead, if its fence is still `fence`; returns
    the new fence and attempts.
    """
    with connection.cursor() as cursor:
        cursor.execute(_sql(_TAKE_OVER, tables), {**_parameters(key, holder), 'fence': fence})
        rows = cursor.fetchall()
    return (rows[0][0], rows[0][1]) if rows else None


def steps(tables: Tables, completion: Completion, place: str) -> Steps:
    """What completes a key in a transaction of the user's, on a connection of the user's to the
    database at a place.
    """
    token, done = secrets.token_hex(8), _done(completion)
    return Steps(
        mark=(_MARK, (token,)),
        complete=(
            _sql(_COMPLETE, tables) + _IF_MARKED,
            (*_completion(completion), done, token, done),
        ),
        look=(_LOOK, (token,)),
        place=place,
    )


def _completion(completion: Completion) -> tuple[object, ...]:
    return (completion.result, completion.retention_sec, completion.key, completion.fence)


def _done(completion: Completion) -> str:
    return f'{completion.fence} {completion.key}'


def begin_transaction(connection: PgConnection) -> Began:
    """Begin a transaction of the user's: without the limits of short calls, and known, so that its
    end is noticed.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_catalog.set_config('statement_timeout', '0', true), "
            "pg_catalog.set_config('lock_timeout', '0', true),"
            f" pg_catalog.set_config('idle_in_transaction_session_timeout', %s, true), {_STAMP}, "
            'pg_catalog.pg_backend_pid()',
            (f'{USERS_IDLE_SEC}s',),
        )
        *_, stamp, backend = cursor.fetchall()[0]
    return Began(stamp, backend)


def is_same(connection: PgConnection, began: Began) -> bool:
    """Whether the transaction that `begin_transaction` began is still open."""
    with connection.cursor() as cursor:
        cursor.execute(f'SELECT {_STAMP}, pg_catalog.pg_backend_pid()')
        return bool(cursor.fetchall() == [(began.stamp, began.backend)])


def complete(
    connection: PgConnection,
    tables: Tables,
    completion: Completion,
    began: Began,
    lock_timeout_ms: int,
) -> bool:
    """Complete a key at the end of a transaction of the user's on a connection of ours, if it is
    still the same one.

    Args:
        lock_timeout_ms: How long it may wait for an earlier transaction that may have completed the
            key as well.
    """
    reset = _RESET.format(lock=lock_timeout_ms, idle=_COMMIT_SEC * 1000)
    with connection.cursor() as cursor:
        cursor.execute(
            reset + _sql(_COMPLETE, tables) + _IF_SAME,
            (*_completion(completion), '', began.stamp, began.backend),
        )
        return cursor.rowcount == 1


def stored(
    connection: PgConnection, tables: Tables, key: str, fence: int
) -> tuple[str, Any] | None:
    """State and result of an attempt's row; None where another attempt holds the key."""
    with connection.cursor() as cursor:
        cursor.execute(_sql(_STORED, tables), (key, fence))
        rows = cursor.fetchall()
    return (rows[0][0], rows[0][1]) if rows else None


def state_of(connection: PgConnection, tables: Tables, key: str) -> str | None:
    """State of a key's row, without waiting for whoever has locked it."""
    with connection.cursor() as cursor:
        cursor.execute(f'SELECT state FROM {tables.execution} WHERE key = %s', (key,))
        row = cursor.fetchone()
        return str(row[0]) if row else None


def finish(connection: PgConnection, tables: Tables, completion: Completion) -> bool:
    """Record a completion, again if need be; False where another attempt holds the key."""
    with connection.cursor() as cursor:
        cursor.execute(_sql(_CALL_FINISH, tables), _completion(completion))
        return cursor.rowcount == 1


def finish_many(
    connection: PgConnection, tables: Tables, completions: Sequence[Completion]
) -> list[bool]:
    """`finish` for several keys, each given once, in one transaction; what became of them in the
    same order.

    Raises:
        psycopg2.Error: Nothing was recorded; LockNotAvailable where one of the keys would have to
            wait for another transaction.
    """
    order = sorted(range(len(completions)), key=lambda place: completions[place].key)
    ordered = [completions[place] for place in order]
    with connection.cursor() as cursor:
        cursor.execute(
            _sql(_FINISH_MANY, tables),
            (
                [each.result for each in ordered],
                [each.retention_sec for each in ordered],
                [each.key for each in ordered],
                [each.fence for each in ordered],
            ),
        )
        found = {order[number - 1]: bool(finished) for number, finished in cursor.fetchall()}
    return [found[place] for place in range(len(completions))]


def has_prefix(connection: PgConnection, tables: Tables, prefix: str) -> bool:
    """Whether there is any key that begins so; a prefix ends with ':'."""
    with connection.cursor() as cursor:
        cursor.execute(_sql(_HAS_PREFIX, tables), (prefix, prefix[:-1] + ';'))
        row = cursor.fetchone()
        return bool(row and row[0])


def find(
    connection: PgConnection, tables: Tables, keys: Sequence[str], old: Sequence[str]
) -> tuple[str, Any] | None:
    """State and result of the first of these keys that is complete, else 'running' where one is
    held by a live node.

    Those of them that are in `old` count only where an earlier version began them, before the
    tables were of this version.
    """
    with connection.cursor() as cursor:
        cursor.execute(_sql(_FIND, tables), {'keys': list(keys), 'old': list(old)})
        row = cursor.fetchone()
        return (str(row[0]), row[1]) if row else None


def add_result(connection: PgConnection, tables: Tables, key: str, fence: int, result: str) -> None:
    """Store the result of a completion that carried none."""
    with connection.cursor() as cursor:
        cursor.execute(_sql(_ADD_RESULT, tables), (result, key, fence))


def settle(
    connection: PgConnection, tables: Tables, key: str, fence: int, error: str, retention_sec: float
) -> str | None:
    """End an attempt that did not complete: it becomes 'failed', unless a transaction that
    completes it is under way.

    Returns the state that the attempt is in now: 'failed', 'done', 'running' (its row is locked:
    ask again later), or None where another attempt holds the key.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            _sql(_SETTLE, tables),
            {'key': key, 'fence': fence, 'error': error, 'retention': retention_sec},
        )
        rows = cursor.fetchall()
    return rows[0][0] if rows else None


def release(
    connection: PgConnection,
    tables: Tables,
    node: str,
    incarnation: str,
    pid: int,
    error: str,
    retention_sec: float,
    key: str | None = None,
) -> int:
    """Let others take over what a process of this incarnation was running (or its one `key`);
    returns how many keys.
    """
    parameters = {
        'node': node,
        'incarnation': incarnation,
        'pid': pid,
        'error': error,
        'retention': retention_sec,
        'key': key,
    }
    with connection.cursor() as cursor:
        cursor.execute(_sql(_RELEASE, tables), parameters)
        return cursor.rowcount
