"""What the commands share: where the database is, how to say what went wrong, how to print."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from ..config import CoordinationConfig
from ..errors import JobSyncError, MissingPrivilege, MissingTable
from ..store.sessions import Sessions
from ..store.status import ClusterRow, StatusStore
from ..store.tables import Tables

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

__all__ = ['Database', 'Group', 'console', 'database_options', 'printable']

_Command = TypeVar('_Command', bound=Callable[..., Any])
_PLAIN_WIDTH = 200


@dataclass
class Database:
    """The database of this call; nothing is read or opened before it is needed."""

    url: str | None = None
    appname: str | None = None
    schema: str | None = None

    #: Whether it belongs to an application, whose plugin `plugin` gives.
    has_plugin = False

    def plugin(self) -> Any:
        """The application's plugin, for commands that need its broker.

        Raises:
            JobSyncError: This program knows none.
        """
        raise JobSyncError(
            'which broker? Use `celery -A proj jobsync …`, or name the JobSync object of the '
            'application: --app MODULE:NAME, or JOBSYNC_APP'
        )

    def config(self) -> CoordinationConfig:
        """The settings from the options and the environment.

        Raises:
            ConfigurationError: A setting cannot work.
        """
        environ = dict(os.environ)
        if self.url:
            environ['JOBSYNC_DATABASE_URL'] = self.url
        return CoordinationConfig.from_env(environ, **self.named)

    @property
    def named(self) -> dict[str, Any]:
        """What the options say of where the tables are."""
        return {
            name: value
            for name, value in (('appname', self.appname), ('schema', self.schema))
            if value
        }

    @contextmanager
    def sessions(self) -> Iterator[tuple[Sessions, Tables]]:
        """A pool of connections that is closed at the end, and the names of the tables."""
        config = self.config()
        sessions = Sessions(config, 'jobsync cli')
        try:
            yield sessions, Tables.of(config)
        finally:
            sessions.close_all()

    @contextmanager
    def session(self) -> Iterator[tuple[PgConnection, Tables]]:
        """One connection in one transaction, and the names of the tables."""
        with self.sessions() as (sessions, tables), sessions.session() as connection:
            yield connection, tables

    def cluster(self, connection: PgConnection, tables: Tables) -> ClusterRow:
        """The cluster's row.

        Raises:
            JobSyncError: No node has ever registered.
        """
        found = StatusStore(connection, tables).cluster()
        if found is None:
            raise JobSyncError('the cluster has no settings yet: its first node writes them')
        return found


class Group(click.Group):
    """Commands whose foreseeable failures are one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except JobSyncError as error:
            raise click.ClickException(describe(error)) from None


def describe(error: Exception) -> str:
    """One line for an operator."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, MissingTable):
        return f'{first}; start a node, run `jobsync init-db`, or give the right --appname'
    if isinstance(error, MissingPrivilege):
        return f'{first}; `jobsync doctor` tells which rights are missing'
    return first


def database_options(command: _Command) -> _Command:
    """Add --url, --appname and --schema, before the command's name and after it alike."""

    def remember(name: str) -> Callable[[click.Context, click.Parameter, str | None], None]:
        def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
            if value is not None:
                setattr(ctx.ensure_object(Database), name, value)

        return callback

    command = click.option(
        '--schema',
        expose_value=False,
        callback=remember('schema'),
        metavar='NAME',
        help='Schema of the tables [env JOBSYNC_SCHEMA; default: the first of the search_path].',
    )(command)
    command = click.option(
        '--appname',
        expose_value=False,
        callback=remember('appname'),
        metavar='PREFIX',
        help='Prefix of the tables [env JOBSYNC_APPNAME; default sync_].',
    )(command)
    return click.option(
        '--url',
        expose_value=False,
        callback=remember('url'),
        metavar='URL',
        help='postgresql://user@host:port/dbname [env JOBSYNC_DATABASE_URL]. Keep a password in '
        'the environment or ~/.pgpass.',
    )(command)


def console() -> Console:
    """A console on stdout: coloured on a terminal, plain and wide elsewhere."""
    terminal = sys.stdout.isatty()
    return Console(
        markup=False, emoji=False, highlight=False, width=None if terminal else _PLAIN_WIDTH
    )


def printable(value: object) -> str:
    """Text for a terminal: what would steer it is spelled out."""
    return ''.join(
        char if char.isprintable() else char.encode('unicode_escape').decode()
        for char in str(value)
    )
