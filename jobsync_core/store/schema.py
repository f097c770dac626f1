"""The tables: their names, and how they come into being and are brought up to date."""

from __future__ import annotations

import contextlib
import math
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from ..config import CoordinationConfig
from ..errors import (
    JobSyncError,
    LockNotAvailable,
    MissingPrivilege,
    MissingSchema,
    MissingTable,
    SchemaConflict,
    StatementRefused,
    StoreTimeout,
    TransactionConflict,
)
from ..logs import get_logger
from .blockers import Blocker, BlockerStore, name_all
from .deadline import GuardedConnection
from .location import PINNED_PATH, default_scope
from .rights import RightStore, describe
from .sessions import Sessions
from .statements import read_migration
from .tables import RELATIONS, Tables, quote_name

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

__all__ = ['MIGRATIONS', 'SCHEMA_VERSION', 'create_schema', 'render_schema']

logger = get_logger(__name__)

#: Number of a schema version, and the file of `migrations/` that leads to it from the one before. A
#: file, once released, never changes; nor does a file of `functions/`, whose name has a version.
MIGRATIONS: tuple[tuple[int, str], ...] = (
    (1, '01_tables'),
    (2, '02_schedules'),
    (3, '03_execution_functions'),
    (4, '04_node_age'),
    (5, '05_housekeeping_indexes'),
    (6, '06_qualified_names'),
    (7, '07_epochs'),
    (8, '08_queue_belonging'),
    (9, '09_former_keys'),
)
SCHEMA_VERSION = MIGRATIONS[-1][0]

#: Seconds for which a migration is tried again while somebody's transaction is in its way; and what
#: its statements may take.
_PATIENCE_SEC = 60.0
#: Seconds that one try waits for the lock of a table: whatever nodes do with that table, heartbeats
#: too, queues behind it. The second is for now and then while a vacuum has the lock: an automatic
#: one gives way after a second, and not before.
_LOCK_SEC, _VACUUM_SEC = 0.1, 1.5
#: Seconds for which the cluster's lock is tried before it is waited for, and that such a wait takes
#: at most.
_TRY_SEC, _WAIT_SEC = 3.0, 1.0
#: Seconds for which a process that has found the tables in place need not look again.
_FRESH_SEC = 2.0


def render_schema(appname: str, schema: str | None = None) -> str:
    """The statements that create the tables, for whoever does so by hand.

    Args:
        appname: Their prefix.
        schema: Where they go; default `public`.
    """
    tables = Tables(appname, schema or 'public', default_scope(schema))
    parts = [
        '-- Names are qualified; what stands without a schema is of PostgreSQL itself.',
        f'SET search_path = {PINNED_PATH};\n',
    ]
    if schema is not None:
        parts.append(f'CREATE SCHEMA IF NOT EXISTS {quote_name(schema)};\n')
    parts.append(
        '-- Each version is a transaction of its own. It gives up soon where somebody has locked '
        'a table, since nodes queue up\n'
        '-- behind it: then run all of this again, which changes nothing that is there.\n'
    )
    parts += [
        f"BEGIN;\nSET LOCAL lock_timeout = '2s';\n{_render(tables, name)}COMMIT;\n"
        for _, name in MIGRATIONS
    ]
    if tables.scope:
        parts.append(
            f"UPDATE {tables.cluster} SET scope = '{tables.scope}'\n"
            f'WHERE version = 0 AND planned IS NULL AND NOT EXISTS (SELECT FROM {tables.node});\n'
        )
    return '\n'.join([*parts, 'RESET search_path;'])


@overload
def create_schema(session: CoordinationConfig) -> None: ...
@overload
def create_schema(session: PgConnection, config: CoordinationConfig) -> None: ...


def create_schema(
    session: PgConnection | CoordinationConfig, config: CoordinationConfig | None = None
) -> None:
    """Create the tables where they are missing, or bring them up to date. Many nodes may do so at
    once.

    Where they are in place already, no right to create anything is needed.

    Args:
        session: A connection out of Sessions, not in autocommit mode and in no transaction; or the
            config alone: then one is opened for this, and closed. Each version is committed by
            itself.
        config: Names the tables.

    Raises:
        SchemaConflict: There are tables of another layout, or of a newer version.
        JobSyncError: The role lacks a right; the message says which.
        DatabaseUnavailable: PostgreSQL cannot be reached.
        StoreTimeout: Somebody's transaction was in the way for a minute; the message names it.
    """
    if isinstance(session, CoordinationConfig):
        _create_once(session)
        return
    assert config is not None
    tables = Tables.of(config)
    try:
        with session.cursor() as cursor:
            there = _in_place(cursor, tables)
        if not there:
            session.rollback()
            _bring_up_to_date(session, tables, config)
            with session.cursor() as cursor:
                tables.refresh(config, cursor)
    except (MissingPrivilege, MissingSchema) as error:
        session.rollback()
        raise JobSyncError(_lacking(session, tables, config, error)) from error
    left = RightStore(session, tables).lacking()
    if left:
        logger.warning('user=%s lacks %s: %s', config.user, describe(left), _remedy(config))


def _create_once(config: CoordinationConfig) -> None:
    """For the Jobs of one process, one after the other: those that start together look once."""
    where = (config.host, config.port, config.dbname, config.user, config.appname, config.schema)
    with _creating:
        if time.monotonic() - _created.get(where, -math.inf) < _FRESH_SEC:
            return
        sessions = Sessions(config, 'jobsync schema')
        try:
            with sessions.session() as connection:
                create_schema(connection, config)
        finally:
            sessions.close_all()
        _created.clear()
        _created[where] = time.monotonic()


_creating = threading.Lock()
_created: dict[tuple[object, ...], float] = {}
if hasattr(os, 'register_at_fork'):  # a thread of the parent may hold it
    os.register_at_fork(after_in_child=lambda: globals().update(_creating=threading.Lock()))


def _lacking(
    session: PgConnection, tables: Tables, config: CoordinationConfig, error: StatementRefused
) -> str:
    left = RightStore(session, tables).lacking()
    session.rollback()
    named = describe(left) or 'the ownership of the tables, which have to be changed'
    return (
        f'{error.said}: user {config.user!r} lacks {named}; what does not exist '
        'yet takes CREATE on its schema; '
        f'{_remedy(config)}'
    )


def _remedy(config: CoordinationConfig) -> str:
    return (
        f'`jobsync init-db --role {config.user}`, run by an administrator, makes the tables and '
        'grants what a node needs '
        '(with --sql it prints the statements)'
    )


def _in_place(cursor: Any, tables: Tables) -> bool:
    try:
        return _look(cursor, tables) == (SCHEMA_VERSION, True)
    except SchemaConflict:
        return False  # somebody may be migrating right now: judged again under the lock


def _bring_up_to_date(session: PgConnection, tables: Tables, config: CoordinationConfig) -> None:
    """Run the migrations that are missing, each in a transaction of its own.

    So what one has locked is free before the next one waits for its locks, and where the process
    dies between two of them the tables are those of a version between, from which the next start
    goes on. A try that meets somebody's lock gives way at once and comes again, since all others
    would queue behind it.
    """
    lock_sec, whole, tries = _LOCK_SEC, False, 0
    began = progress = time.monotonic()
    while True:
        now = time.monotonic()
        try:
            version = _migrate(
                session, tables, config, lock_sec, whole, wait=now - began > _TRY_SEC
            )
            if version == SCHEMA_VERSION:
                return
            if version is not None:
                lock_sec, tries, progress = _LOCK_SEC, 0, time.monotonic()
                continue
        except (LockNotAvailable, TransactionConflict) as error:
            session.rollback()
            tries += 1
            blockers = BlockerStore(session, tables)
            found = blockers.on_tables(list(tables.all.values()), all_modes=True)
            lock_sec = _VACUUM_SEC if tries % 3 == 0 and blockers.vacuuming() else _LOCK_SEC
            session.rollback()
            if now - progress > _PATIENCE_SEC:
                raise StoreTimeout(_in_the_way(tables, found)) from error
        except MissingTable:
            session.rollback()
            if whole:
                raise
            # somebody has dropped one: from the beginning, at once, as what is made over meanwhile
            # must not be seen
            whole = True
            continue
        if now - progress > _PATIENCE_SEC:
            raise StoreTimeout(
                f'others have held the lock of the cluster {tables.appname} for {_PATIENCE_SEC:g} '
                's: try again'
            )
        # At first the lock is tried, not waited for: hundreds of nodes that start and find no
        # tables would stand in line for it, each for nothing, and all that has begun behind them.
        time.sleep(random.uniform(0.05, 0.2) if tries == 0 else random.uniform(0.2, 0.4))


def _in_the_way(tables: Tables, found: Sequence[Blocker]) -> str:
    return (
        f'the tables {tables.appname}* could not be brought up to version {SCHEMA_VERSION} within '
        f'{_PATIENCE_SEC:g} s, as somebody '
        f'else has locked one of them: {name_all(found) or "it is gone by now"}; end '
        'that transaction and try again. '
        'Nodes that are running go on'
    )


def _migrate(
    session: PgConnection,
    tables: Tables,
    config: CoordinationConfig,
    lock_sec: float,
    whole: bool,
    wait: bool,
) -> int | None:
    """One transaction: the next migration, or all where there are no tables yet or some are
    missing.

    Returns:
        The version of the tables now; None where others have the cluster's lock.
    """
    with _unhurried(session), session.cursor() as cursor:
        cursor.execute(
            "SELECT set_config('lock_timeout', %s, true), set_config('statement_timeout', %s, "
            'true)',
            (f'{(_WAIT_SEC if wait else lock_sec) * 1000:.0f}ms', f'{_PATIENCE_SEC * 1000:.0f}ms'),
        )
        # No leader plans while tables change.
        cursor.execute(
            f'SELECT {"true FROM pg_advisory_xact_lock" if wait else "pg_try_advisory_xact_lock"}'
            '(%s, %s)',
            tables.advisory,
        )
        if not cursor.fetchall()[0][0]:
            there = _in_place(cursor, tables)
            session.rollback()
            return SCHEMA_VERSION if there else None
        cursor.execute("SELECT set_config('lock_timeout', %s, true)", (f'{lock_sec * 1000:.0f}ms',))
        _create_place(cursor, config)
        version, complete = _look(cursor, tables)
        if version == SCHEMA_VERSION and complete:
            session.rollback()
            return version
        every = whole or version in (0, SCHEMA_VERSION)
        missing = [(number, name) for number, name in MIGRATIONS if every or number > version]
        for number, name in missing if every else missing[:1]:
            cursor.execute(_render(tables, name))
            cursor.execute(
                f'UPDATE {tables.cluster} SET schema_version = %s WHERE schema_version < %s',
                (number, number),
            )
        if version == 0:
            cursor.execute(
                f'UPDATE {tables.cluster} SET total_tokens = %s, hash_function = %s, scope = %s',
                (config.total_tokens, config.hash_function, tables.scope),
            )
        session.commit()
        return number


@contextlib.contextmanager
def _unhurried(session: PgConnection) -> Iterator[None]:
    """An index of a large table takes longer than the calls of nodes may."""
    if not isinstance(session, GuardedConnection):
        yield
        return
    limit, session.limit = session.limit, _PATIENCE_SEC + 1.0
    try:
        yield
    finally:
        session.limit = limit


def _create_place(cursor: Any, config: CoordinationConfig) -> None:
    if config.schema is not None:
        # Only where it is missing: even IF NOT EXISTS asks for the right to create one.
        cursor.execute(
            'SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = %s)', (config.schema,)
        )
        if not cursor.fetchall()[0][0]:
            cursor.execute(f'CREATE SCHEMA IF NOT EXISTS {quote_name(config.schema)}')


def _look(cursor: Any, tables: Tables) -> tuple[int, bool]:
    """The schema version of the tables, 0 where there are none; and whether all are there, and the
    functions.

    Raises:
        SchemaConflict: They are not JobSync's, or newer than this program.
    """
    columns = _columns(cursor, tables.all.values())
    version = 0
    if 'schema_version' in columns[tables.cluster][1]:
        cursor.execute(f'SELECT max(schema_version) FROM {tables.cluster}')
        version = cursor.fetchall()[0][0] or SCHEMA_VERSION
    if version > SCHEMA_VERSION:
        raise SchemaConflict(
            f'the tables {tables.appname}* have schema version {version}, and this program knows '
            f'{SCHEMA_VERSION}: upgrade JobSync here, '
            'or choose another appname'
        )
    for name, quoted in tables.all.items():
        kind, found = columns[quoted]
        expected = version > 0 and kind in (('v',) if name == 'token' else ('r', 'p'))
        if kind and not (
            expected and (version < SCHEMA_VERSION or found >= set(RELATIONS[name].split()))
        ):
            raise SchemaConflict(
                f'{_KINDS.get(kind, "relation")} {quoted} exists already and is not of the layout '
                'that this version of JobSync makes: '
                f'choose another appname than {tables.appname!r}, or rename or drop {quoted} if '
                'nothing needs it'
            )
    return version, all(kind for kind, _ in columns.values()) and _has_functions(cursor, tables)


_KINDS = {
    'r': 'table',
    'v': 'view',
    'm': 'materialized view',
    'p': 'partitioned table',
    'f': 'foreign table',
    'i': 'index',
}


def _columns(cursor: Any, relations: Iterable[str]) -> dict[str, tuple[str, set[str]]]:
    """Kind and columns of each relation; '' and none where it does not exist."""
    names: Sequence[str] = list(relations)
    cursor.execute(
        """
        SELECT wanted.name, coalesce(c.relkind::text, ''), coalesce(string_agg(a.attname, ' '), '')
        FROM unnest(%s::text[]) AS wanted (name)
        LEFT JOIN pg_class AS c ON c.oid = to_regclass(wanted.name)
        LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        GROUP BY wanted.name, c.relkind
        """,
        (names,),
    )
    return {name: (kind, set(columns.split())) for name, kind, columns in cursor.fetchall()}


def _has_functions(cursor: Any, tables: Tables) -> bool:
    cursor.execute(
        """
        SELECT bool_and(coalesce(has_function_privilege(to_regprocedure(wanted.name), 'EXECUTE'),
            false)) FROM unnest(%s) AS wanted (name)
        """,
        (
            [
                f'{getattr(tables, name)}({arguments})'
                for name, arguments in tables.functions.items()
            ],
        ),
    )
    return bool(cursor.fetchall()[0][0])


def _render(tables: Tables, name: str) -> str:
    return tables.migration(read_migration(name))
