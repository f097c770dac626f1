"""How the tables come into being and are brought up to date, while others use them."""

from __future__ import annotations

import contextlib
import math
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

from ..config import CoordinationConfig
from ..errors import (
    JobSyncError,
    LockNotAvailable,
    MissingPrivilege,
    MissingSchema,
    MissingTable,
    StatementRefused,
    StoreTimeout,
    TransactionConflict,
)
from ..logs import get_logger
from .blockers import Blocker, BlockerStore, name_all
from .deadline import GuardedConnection
from .layout import MIGRATIONS, LayoutStore, Migration
from .rights import RightStore, describe
from .sessions import Sessions
from .tables import Tables

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

__all__ = ['create_schema']

logger = get_logger(__name__)

#: Seconds for which a migration is tried again while somebody's transaction is in its way; and what
#: its statements may take.
_PATIENCE_SEC = 60.0
#: Seconds that one try waits for the lock of a table: whatever nodes do with that table, heartbeats
#: too, queues behind it. The second is for now and then while a vacuum has the lock: an automatic
#: one gives way after a second, and not before.
_LOCK_SEC, _VACUUM_SEC = 0.1, 1.5
#: SQLSTATE of a table that is not there.
_NO_TABLE = '42P01'
#: Seconds for which the cluster's lock is tried before it is waited for, and that such a wait takes
#: at most.
_TRY_SEC, _WAIT_SEC = 3.0, 1.0
#: Seconds for which a process that has found the tables in place need not look again.
_FRESH_SEC = 2.0


@overload
def create_schema(session: CoordinationConfig) -> None: ...
@overload
def create_schema(
    session: PgConnection, config: CoordinationConfig, migrations: Sequence[Migration] = MIGRATIONS
) -> None: ...


def create_schema(
    session: PgConnection | CoordinationConfig,
    config: CoordinationConfig | None = None,
    migrations: Sequence[Migration] = MIGRATIONS,
) -> None:
    """Create the tables where they are missing, or bring them up to date. Many nodes may do so at
    once.

    Where they are in place already, no right to create anything is needed.

    Args:
        session: A connection out of Sessions, not in autocommit mode and in no transaction; or the
            config alone: then one is opened for this, and closed. Each version is committed by
            itself.
        config: Names the tables.
        migrations: What makes them, from the first version to the last.

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
        if not LayoutStore(session, tables).is_in_place(migrations[-1].number):
            session.rollback()
            _bring_up_to_date(session, tables, config, migrations)
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


def _bring_up_to_date(
    session: PgConnection,
    tables: Tables,
    config: CoordinationConfig,
    migrations: Sequence[Migration],
) -> None:
    """Run the migrations that are missing, each in a transaction of its own.

    So what one has locked is free before the next one waits for its locks, and where the process
    dies between two of them the tables are those of a version between, from which the next start
    goes on. A try that meets somebody's lock gives way at once and comes again, since all others
    would queue behind it.
    """
    newest = migrations[-1].number
    lock_sec, whole, tries = _LOCK_SEC, False, 0
    began = progress = time.monotonic()
    while True:
        now = time.monotonic()
        try:
            wait = now - began > _TRY_SEC
            version = _migrate(session, tables, config, migrations, lock_sec, whole, wait)
            if version == newest:
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
                raise StoreTimeout(_in_the_way(tables, newest, found)) from error
        except MissingTable as error:
            session.rollback()
            if whole or error.sqlstate != _NO_TABLE:
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


def _in_the_way(tables: Tables, newest: int, found: Sequence[Blocker]) -> str:
    return (
        f'the tables {tables.appname}* could not be brought up to version {newest} within '
        f'{_PATIENCE_SEC:g} s, as somebody '
        f'else has locked one of them: {name_all(found) or "it is gone by now"}; end '
        'that transaction and try again. '
        'Nodes that are running go on'
    )


def _migrate(
    session: PgConnection,
    tables: Tables,
    config: CoordinationConfig,
    migrations: Sequence[Migration],
    lock_sec: float,
    whole: bool,
    wait: bool,
) -> int | None:
    """One transaction: the next migration, or all where there are no tables yet or some are
    missing.

    Returns:
        The version of the tables now; None where others have the cluster's lock.
    """
    layout, newest = LayoutStore(session, tables), migrations[-1].number
    with _unhurried(session):
        if not layout.take_turn(wait, _WAIT_SEC if wait else lock_sec, _PATIENCE_SEC):
            there = layout.is_in_place(newest)
            session.rollback()
            return newest if there else None
        layout.limit_locks(lock_sec)
        if config.schema is not None:
            layout.create_place(config.schema)
        version, complete = layout.look(newest)
        if version == newest and complete:
            session.rollback()
            return version
        every = whole or version in (0, newest)
        missing = [each for each in migrations if every or each.number > version]
        if not every:
            del missing[1:]
        layout.migrate(missing)
        if version == 0:
            layout.settle(config)
        session.commit()
        return missing[-1].number


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
