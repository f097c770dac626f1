"""The tables: their names, and how they come into being and are brought up to date."""
from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from importlib.resources import files
from typing import TYPE_CHECKING, Any, overload

import psycopg2

from ..config import CoordinationConfig
from ..errors import JobSyncError, SchemaConflict
from ..logs import get_logger
from . import rights
from .connection import Sessions
from .location import PINNED_PATH, Location, default_scope, locate, location_of

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

__all__ = ['FUNCTIONS', 'MIGRATIONS', 'RELATIONS', 'SCHEMA_VERSION', 'Tables', 'create_schema', 'render_schema']

logger = get_logger(__name__)

#: Number of a schema version, and the file that leads to it from the one before. A file, once released, never changes.
MIGRATIONS: tuple[tuple[int, str], ...] = (
    (1, 'schema.sql'), (2, 'migration_2.sql'), (3, 'migration_3.sql'), (4, 'migration_4.sql'), (5, 'migration_5.sql'),
    (6, 'migration_6.sql'), (7, 'migration_7.sql'), (8, 'migration_8.sql'))
SCHEMA_VERSION = MIGRATIONS[-1][0]

#: Creating and migrating wait longer than what nodes do all the time: another node may be at it.
_PATIENCE = '60s'
#: Seconds for which the lock for it is tried before it is waited for.
_TRY_SEC = 3.0
#: Seconds for which a process that has found the tables in place need not look again.
_FRESH_SEC = 2.0

#: Tables and views, with the columns that this version uses.
RELATIONS: Mapping[str, str] = {
    'cluster': 'total_tokens hash_function version lock_version schema_version planned scope epoch history',
    'node': 'name created_on last_heartbeat beat incarnation state weight lease_sec host pid boot_id pid_namespace started',
    'assignment': 'tokens node moving moving_to blocked version assigned_at',
    'token': 'token_id node assigned_at version',
    'lock': 'task_id node_patterns reason created_at created_by expires_at pin',
    'rebalance': 'id triggered_at trigger_reason leader_node nodes_before nodes_after tokens_moved duration_ms',
    'claim': 'node task_id created_on date token incarnation child',
    'audit': 'created_on node task_id date token epoch',
    'execution':
        'key state node incarnation host boot_id pid_namespace pid started fence attempts started_at finished_at result error expires_at',
    'queue': 'name node created_at kind gone_at broker place application',
    'schedule': 'name slot total_run_count entry updated_at',
}
#: Functions, with the types of their arguments. Each pins its search_path, and names tables with their schema.
FUNCTIONS: Mapping[str, str] = {
    'begin_execution': 'text, text, text, text, text, text, integer, text',
    'finish_execution': 'jsonb, double precision, text, bigint',
}
#: Not qualified, as in CREATE INDEX; elsewhere write {schema}.{name of the index}.
_INDEXES = (
    'node_age', 'lock_expiry', 'claim_token', 'claim_life', 'claim_promised', 'audit_token', 'execution_running', 'execution_expiry')


class Tables:
    """Names of one cluster's tables and functions, qualified and quoted for SQL.

    Attributes:
        appname: Their prefix.
    """

    appname: str
    node: str
    assignment: str
    token: str
    lock: str
    rebalance: str
    claim: str
    audit: str
    execution: str
    cluster: str
    queue: str
    schedule: str
    begin_execution: str
    finish_execution: str

    def __init__(self, appname: str, schema: str = 'public', scope: str = '') -> None:
        self._location = Location(appname.lower(), schema, scope, found=True)
        self.appname = self._location.appname

    @classmethod
    def of(cls, config: CoordinationConfig) -> Tables:
        """Those of a config's cluster. Where no setting names their schema, they have no names before a first connection is opened."""
        tables = cls.__new__(cls)
        tables._location = location_of(config)
        tables.appname = config.appname
        return tables

    def __repr__(self) -> str:
        return f'<Tables {self.label}*>'

    def __getattr__(self, name: str) -> str:
        if name not in RELATIONS and name not in FUNCTIONS:
            raise AttributeError(name)
        quoted = f'{_quoted(self.schema)}.{_quoted(self.appname + name)}'
        if self._location.found:
            self.__dict__[name] = quoted
        return quoted

    @property
    def schema(self) -> str:
        """The schema, not quoted.

        Raises:
            JobSyncError: There is none.
        """
        if self._location.schema is None:
            raise JobSyncError("the role's search_path names no schema that it may use, so the tables have no place: set schema=…")
        return self._location.schema

    @property
    def label(self) -> str:
        """Distinguishes the cluster from all others of the database, in the names of locks."""
        return f'{self._location.scope}.{self.appname}' if self._location.scope else self.appname

    @property
    def scope(self) -> str:
        """See Location."""
        return self._location.scope

    @property
    def channel(self) -> str:
        """Name of the NOTIFY channel, not quoted."""
        scope = self._location.scope
        return f'{self.appname}events' + (f'_{blake2b(scope.encode(), digest_size=6).hexdigest()}' if scope else '')

    @property
    def advisory(self) -> tuple[int, int]:
        """Key of the cluster's advisory lock."""
        digest = blake2b(f'jobsync {self.label}'.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], 'big', signed=True), int.from_bytes(digest[4:], 'big', signed=True)

    @property
    def all(self) -> Mapping[str, str]:
        """Each table or view, and its name for SQL."""
        return {name: getattr(self, name) for name in RELATIONS}

    @property
    def functions(self) -> Mapping[str, str]:
        """Each function, and the types of its arguments."""
        return FUNCTIONS

    def refresh(self, config: CoordinationConfig, cursor: Any) -> None:
        """Look again where the tables are, after they have been created."""
        def run(sql: str, params: Sequence[object]) -> Sequence[Sequence[Any]]:
            cursor.execute(sql, params)
            return list(cursor.fetchall())

        locate(self._location, config, run)


def render_schema(appname: str, schema: str | None = None) -> str:
    """The statements that create the tables, for whoever does so by hand.

    Args:
        appname: Their prefix.
        schema: Where they go; default `public`.
    """
    tables = Tables(appname, schema or 'public', default_scope(schema))
    parts = ['-- Names are qualified; what stands without a schema is of PostgreSQL itself.', f'SET search_path = {PINNED_PATH};\n']
    if schema is not None:
        parts.append(f'CREATE SCHEMA IF NOT EXISTS {_quoted(schema)};\n')
    parts += [_render(tables, name) for _, name in MIGRATIONS]
    if tables.scope:
        parts.append(
            f"UPDATE {tables.cluster} SET scope = '{tables.scope}'\n"
            f'WHERE version = 0 AND planned IS NULL AND NOT EXISTS (SELECT FROM {tables.node});\n')
    return '\n'.join([*parts, 'RESET search_path;'])


@overload
def create_schema(session: CoordinationConfig) -> None: ...
@overload
def create_schema(session: PgConnection, config: CoordinationConfig) -> None: ...


def create_schema(session: PgConnection | CoordinationConfig, config: CoordinationConfig | None = None) -> None:
    """Create the tables where they are missing, or bring them up to date. Many nodes may do so at once.

    Where they are in place already, no right to create anything is needed.

    Args:
        session: A connection out of Sessions, not in autocommit mode; or the config alone: then one is opened for this, and closed.
        config: Names the tables.

    Raises:
        SchemaConflict: There are tables of another layout, or of a newer version.
        JobSyncError: The role lacks a right; the message says which.
        DatabaseUnavailable: PostgreSQL cannot be reached.
    """
    if isinstance(session, CoordinationConfig):
        _create_once(session)
        return
    assert config is not None
    tables = Tables.of(config)
    try:
        with session.cursor() as cursor:
            if not _in_place(cursor, tables):
                _migrate(cursor, tables, config)
                tables.refresh(config, cursor)
    except (psycopg2.errors.InsufficientPrivilege, psycopg2.errors.InvalidSchemaName) as error:
        session.rollback()
        raise JobSyncError(_lacking(session, tables, config, error)) from error
    left = rights.lacking(session, tables)
    if left:
        logger.warning('user=%s lacks %s: %s', config.user, rights.describe(left), _remedy(config))


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


def _lacking(session: PgConnection, tables: Tables, config: CoordinationConfig, error: psycopg2.Error) -> str:
    left = rights.lacking(session, tables)
    session.rollback()
    named = rights.describe(left) or 'the ownership of the tables, which have to be changed'
    return (f'{error.diag.message_primary}: user {config.user!r} lacks {named}; what does not exist yet takes CREATE on its schema; '
            f'{_remedy(config)}')


def _remedy(config: CoordinationConfig) -> str:
    return (f'`jobsync init-db --role {config.user}`, run by an administrator, makes the tables and grants what a node needs '
            '(with --sql it prints the statements)')


def _in_place(cursor: Any, tables: Tables) -> bool:
    try:
        return _look(cursor, tables) == (SCHEMA_VERSION, True)
    except SchemaConflict:
        return False  # somebody may be migrating right now: judged again under the lock


def _migrate(cursor: Any, tables: Tables, config: CoordinationConfig) -> None:
    cursor.execute("SELECT set_config('lock_timeout', %s, true), set_config('statement_timeout', %s, true)", (_PATIENCE, _PATIENCE))
    if config.schema is not None:
        # Only where it is missing: even IF NOT EXISTS asks for the right to create one.
        cursor.execute('SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = %s)', (config.schema,))
        if not cursor.fetchall()[0][0]:
            cursor.execute(f'CREATE SCHEMA IF NOT EXISTS {_quoted(config.schema)}')
    # No leader plans while tables change. At first the lock is tried, not waited for: hundreds of nodes that start and find no tables
    # would stand in line for it, each for nothing, and all that has begun behind them.
    deadline = time.monotonic() + _TRY_SEC
    cursor.execute('SELECT pg_try_advisory_xact_lock(%s, %s)', tables.advisory)
    while not cursor.fetchall()[0][0]:
        if _in_place(cursor, tables):
            return
        last = time.monotonic() > deadline
        if not last:
            time.sleep(random.uniform(0.05, 0.2))
        cursor.execute(f'SELECT {"true FROM pg_advisory_xact_lock" if last else "pg_try_advisory_xact_lock"}(%s, %s)', tables.advisory)
    version, complete = _look(cursor, tables)
    for number, name in MIGRATIONS:
        if number > version or not complete:
            cursor.execute(_render(tables, name))
            cursor.execute(f'UPDATE {tables.cluster} SET schema_version = %s WHERE schema_version < %s', (number, number))
    if version == 0:
        cursor.execute(
            f'UPDATE {tables.cluster} SET total_tokens = %s, hash_function = %s, scope = %s',
            (config.total_tokens, config.hash_function, tables.scope))


def _look(cursor: Any, tables: Tables) -> tuple[int, bool]:
    """The schema version of the tables, 0 where there are none; and whether all are there, and the functions.

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
            f'the tables {tables.appname}* have schema version {version}, and this program knows {SCHEMA_VERSION}: upgrade JobSync here, '
            'or choose another appname')
    for name, quoted in tables.all.items():
        kind, found = columns[quoted]
        expected = version > 0 and kind in (('v',) if name == 'token' else ('r', 'p'))
        if kind and not (expected and (version < SCHEMA_VERSION or found >= set(RELATIONS[name].split()))):
            raise SchemaConflict(
                f'{_KINDS.get(kind, "relation")} {quoted} exists already and is not of the layout that this version of JobSync makes: '
                f'choose another appname than {tables.appname!r}, or rename or drop {quoted} if nothing needs it')
    return version, all(kind for kind, _ in columns.values()) and _has_functions(cursor, tables)


_KINDS = {'r': 'table', 'v': 'view', 'm': 'materialized view', 'p': 'partitioned table', 'f': 'foreign table', 'i': 'index'}


def _columns(cursor: Any, relations: Iterable[str]) -> dict[str, tuple[str, set[str]]]:
    """Kind and columns of each relation; '' and none where it does not exist."""
    names: Sequence[str] = list(relations)
    cursor.execute(
        '''
        SELECT wanted.name, coalesce(c.relkind::text, ''), coalesce(string_agg(a.attname, ' '), '')
        FROM unnest(%s::text[]) AS wanted (name)
        LEFT JOIN pg_class AS c ON c.oid = to_regclass(wanted.name)
        LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        GROUP BY wanted.name, c.relkind
        ''', (names,))
    return {name: (kind, set(columns.split())) for name, kind, columns in cursor.fetchall()}


def _has_functions(cursor: Any, tables: Tables) -> bool:
    cursor.execute(
        """
        SELECT bool_and(coalesce(has_function_privilege(to_regprocedure(wanted.name), 'EXECUTE'), false)) FROM unnest(%s) AS wanted (name)
        """, ([f'{getattr(tables, name)}({arguments})' for name, arguments in tables.functions.items()],))
    return bool(cursor.fetchall()[0][0])


def _render(tables: Tables, name: str) -> str:
    text = files(__package__).joinpath(name).read_text(encoding='utf-8')
    functions = {function: getattr(tables, function) for function in FUNCTIONS}
    indexes = {index: _quoted(f'{tables.appname}{index}') for index in _INDEXES}
    return text.format(**tables.all, **functions, **indexes, schema=_quoted(tables.schema))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
