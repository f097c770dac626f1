"""`jobsync doctor`: try what a node needs of the database, one thing at a time, and say what to
mend.
"""

from __future__ import annotations

import select
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..config import CoordinationConfig
from ..errors import JobSyncError, MissingPrivilege, StatementRefused
from ..protocol.pausing import remedy
from ..store.blockers import BlockerStore, name_all
from ..store.connection import Connection
from ..store.layout import SCHEMA_VERSION
from ..store.probe import ProbeStore, pooling
from ..store.queues import QueueStore
from ..store.rights import RightStore
from ..store.rights import describe as describe_rights
from ..store.sessions import Sessions
from ..store.tables import Tables
from ..worker.queue_groups import REMEDY, disagreements
from .check import Check
from .context import describe

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

__all__ = ['examine']

_OLDEST_SERVER = 140_000
_NOTIFY_WAIT = 3.0
#: Locks that cannot be read of which so many are named.
_NAMED = 5
#: Beyond this many seconds the dates of audits and the times in logs mislead. JobSync itself
#: compares no clocks.
_CLOCK_OFFSET = 5.0


def examine(config: CoordinationConfig) -> list[Check]:
    """Try everything; stops at a connection that cannot be had."""
    tables = Tables.of(config)
    sessions = Sessions(config, 'jobsync doctor')
    checks: list[Check] = []
    try:
        for check in _checks(config, tables, sessions):
            checks.append(check)
    except JobSyncError as error:
        checks.append(
            Check(
                'connection',
                'bad',
                describe(error),
                'mend the URL, the network or the server, then run the doctor again',
            )
        )
    finally:
        sessions.close_all()
    return checks


def _checks(config: CoordinationConfig, tables: Tables, sessions: Sessions) -> Iterator[Check]:
    begun = time.monotonic()
    with sessions.session():
        where = ', '.join(f'{host}:{port}' for host, port in config.hosts)
        yield Check(
            'connection',
            'ok',
            f'{config.user} to {config.dbname} on {where} in {time.monotonic() - begun:.2f} s',
        )
    pooler = pooling(sessions, tables)
    for examine_one in (
        _version,
        _writable,
        _clock,
        _schema,
        _blockers,
        _writes,
        _locks,
        _queue_groups,
        _rights,
        _neighbours,
        _durability,
        _history,
    ):
        yield _try(examine_one, sessions, tables)
    yield _pooler_check(config, pooler)
    yield _listen_check(config, tables, sessions)


def _try(
    examine_one: Callable[[PgConnection, Tables], Check], sessions: Sessions, tables: Tables
) -> Check:
    """A check that meets a missing right is bad; the check of the rights tells which it is."""
    try:
        with sessions.session() as connection:
            return examine_one(connection, tables)
    except MissingPrivilege as error:
        return Check(examine_one.__name__.strip('_'), 'bad', describe(error))


def _version(connection: PgConnection, tables: Tables) -> Check:
    version, text = ProbeStore(connection, tables).server_version()
    if version < _OLDEST_SERVER:
        return Check('server version', 'bad', text, 'upgrade to PostgreSQL 14 or newer')
    return Check('server version', 'ok', text)


def _writable(connection: PgConnection, tables: Tables) -> Check:
    reason = ProbeStore(connection, tables).read_only()
    if reason:
        return Check(
            'writable',
            'bad',
            reason,
            "connect to the primary; host='a,b' with all hosts finds it by itself",
        )
    return Check('writable', 'ok', 'yes')


def _clock(connection: PgConnection, tables: Tables) -> Check:
    offset = ProbeStore(connection, tables).clock_offset()
    found = f'the server is {abs(offset):.3f} s {"ahead" if offset >= 0 else "behind"}'
    if abs(offset) > _CLOCK_OFFSET:
        return Check(
            'clock',
            'warn',
            found,
            'run NTP on both machines; claims stay safe, but dates and displayed ages mislead',
        )
    return Check('clock', 'ok', found)


def _schema(connection: PgConnection, tables: Tables) -> Check:
    missing = ProbeStore(connection, tables).missing_tables()
    if not missing:
        version = ProbeStore(connection, tables).schema_version()
        if version is None:
            return Check(
                'schema', 'ok', f'tables {tables.appname}* exist; no node has registered yet'
            )
        if version == SCHEMA_VERSION:
            return Check('schema', 'ok', f'tables {tables.appname}* of version {version}')
        return Check(
            'schema',
            'bad',
            f'tables of version {version}, this program has {SCHEMA_VERSION}',
            'use one version of JobSync everywhere, then `jobsync init-db`',
        )
    if len(missing) < len(tables.all):
        return Check(
            'schema',
            'bad',
            f'not there: {", ".join(missing)}',
            'run `jobsync init-db` with a role that may create tables',
        )
    if ProbeStore(connection, tables).may_create():
        return Check(
            'schema',
            'ok',
            f'no tables {tables.appname}* yet; the first node, or `jobsync init-db`, creates them',
        )
    return Check(
        'schema',
        'bad',
        f'no tables {tables.appname}*, and no right to create them',
        'let a DBA run `jobsync init-db --role` or the output of `jobsync schema --sql`, or GRANT '
        'CREATE ON SCHEMA',
    )


def _blockers(connection: PgConnection, tables: Tables) -> Check:
    if ProbeStore(connection, tables).missing_tables():
        return Check('locked tables', 'ok', 'there are no tables yet')
    names = [quoted for name, quoted in tables.all.items() if name != 'token']
    store = BlockerStore(connection, tables)
    found = [*store.on_tables(names), *store.on_rows(names)]
    if not found:
        return Check('locked tables', 'ok', 'nobody keeps nodes out')
    return Check(
        'locked tables',
        'bad',
        name_all(found),
        'wait for that transaction, or end it: SELECT pg_terminate_backend(PID); a prepared one: '
        'ROLLBACK PREPARED',
    )


def _writes(connection: PgConnection, tables: Tables) -> Check:
    if ProbeStore(connection, tables).missing_tables():
        return Check('writes', 'ok', 'there are no tables yet')
    if ProbeStore(connection, tables).read_only():
        return Check('writes', 'bad', 'none is taken', 'see `writable`')
    try:
        ProbeStore(connection, tables).try_write()
    except MissingPrivilege:
        raise
    except StatementRefused as error:
        connection.rollback()
        return Check(
            'writes',
            'bad',
            f'{describe(error)} (SQLSTATE {error.sqlstate or "unknown"})',
            remedy(error.sqlstate),
        )
    return Check('writes', 'ok', 'a row was written, and taken back')


def _locks(connection: PgConnection, tables: Tables) -> Check:
    if ProbeStore(connection, tables).missing_tables():
        return Check('locks of tasks', 'ok', 'there are no tables yet')
    found = ProbeStore(connection, tables).bad_locks()
    if not found:
        return Check('locks of tasks', 'ok', 'all can be read')
    more = f' and {len(found) - _NAMED:,} more' if len(found) > _NAMED else ''
    return Check(
        'locks of tasks',
        'warn',
        'ignored, as their patterns are none: '
        f'{", ".join(task[:100] for task in found[:_NAMED])}{more}',
        'clear them (`jobsync locks clear --task TASK_ID`), or register them again',
    )


def _queue_groups(connection: PgConnection, tables: Tables) -> Check:
    if ProbeStore(connection, tables).missing_tables():
        return Check('queue groups', 'ok', 'there are no tables yet')
    found = disagreements(QueueStore(connection, tables).divided())
    if found:
        return Check('queue groups', 'warn', '; '.join(found), REMEDY)
    return Check('queue groups', 'ok', 'all nodes group their queues in one way')


def _rights(connection: PgConnection, tables: Tables) -> Check:
    if ProbeStore(connection, tables).missing_tables():
        return Check('rights', 'ok', 'whoever creates the tables owns them')
    left = RightStore(connection, tables).lacking()
    user = connection.info.user
    if left:
        return Check(
            'rights',
            'bad',
            f'lacking: {describe_rights(left)}',
            f'run `jobsync init-db --role {user}` as the owner of the tables; with --sql it '
            'prints the GRANTs',
        )
    hidden = RightStore(connection, tables).policies()
    if hidden:
        return Check(
            'rights',
            'bad',
            f'row-level security hides rows of {", ".join(hidden)}',
            'ALTER TABLE … DISABLE ROW LEVEL SECURITY, or give the role BYPASSRLS',
        )
    if ProbeStore(connection, tables).is_superuser():
        return Check(
            'rights',
            'warn',
            f'all that a node needs, and everything else: {user} is a superuser',
            'make a role for the nodes: `jobsync init-db --role NAME`',
        )
    return Check('rights', 'ok', 'all that a node needs')


def _neighbours(connection: PgConnection, tables: Tables) -> Check:
    if ProbeStore(connection, tables).everybody_creates():
        return Check(
            'schema rights',
            'warn',
            f'every role may create things in schema {tables.schema}',
            f'REVOKE CREATE ON SCHEMA {tables.schema} FROM PUBLIC, or give the tables a schema of '
            'their own (JOBSYNC_SCHEMA)',
        )
    return Check(
        'schema rights', 'ok', f'not everybody may create things in schema {tables.schema}'
    )


def _durability(connection: PgConnection, tables: Tables) -> Check:
    found = ProbeStore(connection, tables).replication()
    if not found.fsync:
        return Check(
            'durability',
            'warn',
            'fsync is off',
            'set fsync=on: a crash of the machine may otherwise corrupt the database',
        )
    if found.standbys and not found.synchronous:
        return Check(
            'durability',
            'warn',
            f'{found.standbys} asynchronous standby{"" if found.standbys == 1 else "s"}',
            'a failover may forget the last claims and completions: set synchronous_standby_names '
            '(see GUARANTEES)',
        )
    if found.synchronous and not found.standbys:
        return Check(
            'durability',
            'warn',
            f'synchronous_standby_names={found.synchronous!r}, and no standby is connected',
            'every commit will wait: start the standby',
        )
    if found.synchronous:
        return Check('durability', 'ok', f'synchronous standbys: {found.synchronous}')
    return Check('durability', 'ok', 'no standby: what is committed is on this server')


def _history(connection: PgConnection, tables: Tables) -> Check:
    left = ProbeStore(connection, tables).unasked_history()
    if left:
        return Check(
            'history',
            'warn',
            f'{connection.info.user} may not call {", ".join(left)}: behind a pooler a failover '
            'is not noticed',
            f'GRANT EXECUTE ON FUNCTION {", ".join(f"pg_catalog.{name}" for name in left)} TO '
            f'{connection.info.user}',
        )
    return Check('history', 'ok', 'each heartbeat tells it, so that a failover is noticed')


def _pooler_check(config: CoordinationConfig, pooler: str) -> Check:
    if pooler == 'transaction':
        if config.listen:
            return Check(
                'pooler',
                'bad',
                'transaction pooling',
                'set listen=False (JOBSYNC_LISTEN=false), or connect to PostgreSQL itself',
            )
        return Check('pooler', 'ok', 'transaction pooling, and listen=False')
    return Check('pooler', 'ok', 'session pooling' if pooler == 'session' else 'none')


def _listen_check(config: CoordinationConfig, tables: Tables, sessions: Sessions) -> Check:
    if not config.listen:
        return Check('notifications', 'ok', 'not used: listen=False')
    channel = f'jobsync_doctor_{uuid.uuid4().hex}'
    try:
        connection = Connection.open(config, 'jobsync doctor')
        try:
            connection.listen(channel)
            begun = time.monotonic()
            # Another session: a pooler may hand a client's own notifications back by chance.
            with sessions.session() as sender:
                ProbeStore(sender, tables).notify(channel, 'ping')
            arrived = _wait(
                lambda: 'ping' in connection.notifies(), connection.fileno(), begun + _NOTIFY_WAIT
            )
        finally:
            connection.close()
    except JobSyncError as error:
        return Check(
            'notifications', 'bad', describe(error), 'set listen=False where LISTEN cannot work'
        )
    if not arrived:
        return Check(
            'notifications',
            'bad',
            f'none arrived within {_NOTIFY_WAIT:g} s',
            'set listen=False, or connect past the pooler',
        )
    return Check('notifications', 'ok', f'arrived after {(time.monotonic() - begun) * 1000:.0f} ms')


def _wait(condition: Callable[[], bool], descriptor: int, deadline: float) -> bool:
    while not condition():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        select.select([descriptor], [], [], min(left, 0.1))
    return True
