"""The commands of `jobsync`."""

from __future__ import annotations

import time
from contextlib import suppress

import click
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from .. import __version__
from ..errors import DatabaseRefused, DatabaseUnavailable
from ..store.layout import render_schema
from ..store.rights import RightStore, check_role, grants
from ..store.schema import create_schema
from ..store.sessions import Sessions
from ..store.status import StatusStore
from ..store.tables import Tables
from . import doctor, status_view
from .backlog_commands import backlog_command, purge_command
from .check import show
from .context import Database, Group, console, database_options, describe, printable
from .evacuate_command import evacuate_command
from .executions_commands import executions_group
from .locks_commands import locks_group
from .simulate_view import simulate_command
from .who_command import who_command

__all__ = ['jobsync']


@click.group(cls=Group, context_settings={'help_option_names': ['-h', '--help']})
@click.version_option(__version__, prog_name='jobsync')
@database_options
@click.pass_context
def jobsync(ctx: click.Context) -> None:
    """Look at a JobSync cluster and steer it."""
    ctx.ensure_object(Database)


@jobsync.command('status')
@click.option(
    '--watch',
    is_flag=False,
    flag_value=1.0,
    type=click.FloatRange(min=0.1),
    metavar='[SECONDS]',
    help='Repeat every so many seconds (1).',
)
@click.option('--json', 'as_json', is_flag=True, help='JSON; with --watch one line each time.')
@database_options
@click.pass_obj
def status_command(database: Database, watch: float | None, as_json: bool) -> None:
    """Show nodes, leader, tokens, leases, blocked tokens and the last rebalances."""
    with database.sessions() as (sessions, tables):
        if watch is None:
            with sessions.session() as connection:
                found = status_view.snapshot(connection, tables)
            if as_json:
                click.echo(status_view.as_json(found))
            else:
                console().print(status_view.render(found, tables.appname))
            return
        with suppress(KeyboardInterrupt):
            _watch(sessions, tables, watch, as_json)


def _watch(sessions: Sessions, tables: Tables, every: float, as_json: bool) -> None:
    out = console()
    if as_json or not out.is_terminal:
        while True:
            with sessions.session() as connection:
                found = status_view.snapshot(connection, tables)
            if as_json:
                click.echo(status_view.as_json(found, indent=None))
            else:
                out.print(status_view.render(found, tables.appname))
            time.sleep(every)
    with Live(console=out, auto_refresh=False, screen=True) as live:
        while True:
            live.update(_picture(sessions, tables), refresh=True)
            time.sleep(every)


def _picture(sessions: Sessions, tables: Tables) -> RenderableType:
    try:
        with sessions.session() as connection:
            return status_view.render(status_view.snapshot(connection, tables), tables.appname)
    except DatabaseRefused:
        raise
    except DatabaseUnavailable as error:
        return Text(describe(error), style='red')


@jobsync.command('drain')
@click.argument('node')
@click.option('--dry-run', is_flag=True, help='Only show what would move, and where.')
@database_options
@click.pass_obj
def drain_command(database: Database, node: str, dry_run: bool) -> None:
    """Make NODE give all its tokens away; it stays alive."""
    with database.session() as (connection, tables):
        if not dry_run:
            changed = StatusStore(connection, tables).set_drain(node, True)
            known = StatusStore(connection, tables).nodes()
            click.echo(
                f'{printable(node)} '
                f'{"gives its tokens away now" if changed else "was draining already"}'
            )
            if not status_view.takers(known, node):
                click.echo(
                    'no other node can take them: their tasks wait until one does; `jobsync '
                    'undrain` takes it back'
                )
            elif alone := status_view.left_to_nobody(known, node):
                click.echo(
                    f'no other node can take those of {", ".join(map(printable, alone))}: what is '
                    'sent there waits until one consumes it; `jobsync undrain` takes it back'
                )
            return
        moves = StatusStore(connection, tables).plan_without(node)
    if not moves:
        click.echo(f'{printable(node)} owns nothing: nothing would move')
        return
    result = status_view.table('from', 'to', 'tokens', right=('tokens',))
    for move in moves:
        result.add_row(
            printable(move.source or 'nobody'),
            printable(move.target or 'nobody: blocked'),
            f'{move.tokens:,}',
        )
    console().print(result)


@jobsync.command('undrain')
@click.argument('node')
@database_options
@click.pass_obj
def undrain_command(database: Database, node: str) -> None:
    """Let NODE take part again."""
    with database.session() as (connection, tables):
        changed = StatusStore(connection, tables).set_drain(node, False)
    click.echo(f'{printable(node)} {"takes part again" if changed else "was not draining"}')


@jobsync.command('rebalances')
@click.option(
    '--limit', default=20, show_default=True, type=click.IntRange(1, 100_000), help='How many.'
)
@database_options
@click.pass_obj
def rebalances_command(database: Database, limit: int) -> None:
    """List the last rebalances, newest first."""
    with database.session() as (connection, tables):
        found = StatusStore(connection, tables).rebalances(limit)
    if found:
        console().print(status_view.rebalance_table(found))
    else:
        click.echo('no rebalance yet')


@jobsync.command('init-db')
@click.option(
    '--role',
    metavar='NAME',
    help='Make this role too, unless it is there, and give it what a node needs and no more.',
)
@click.option('--sql', is_flag=True, help='Only print the statements; no database is needed.')
@database_options
@click.pass_obj
def init_db_command(database: Database, role: str | None, sql: bool) -> None:
    """Create the tables, or bring them up to date."""
    config = database.config()
    if role is not None:
        check_role(role)
    if sql:
        click.echo(render_schema(config.appname, config.schema))
        if role is not None:
            for statement in grants(
                Tables(config.appname, config.schema or 'public'), config.dbname, role
            ):
                click.echo(f'{statement};')
        return
    with database.session() as (connection, tables):
        create_schema(connection, config)
        if role is not None:
            RightStore(connection, tables).grant(role)
    click.echo(f'tables {tables.schema}.{tables.appname}* are in place')
    if role is not None:
        click.echo(
            f'role {printable(role)} has what a node needs; if it has no password yet, give it '
            'one with \\password in psql'
        )


@jobsync.command('schema')
@click.option(
    '--sql', is_flag=True, required=True, help='Print the statements that create the tables.'
)
@database_options
@click.pass_obj
def schema_command(database: Database, sql: bool) -> None:
    """Print the schema, for whoever creates tables by hand."""
    click.echo(render_schema(database.config().appname, database.config().schema))


@jobsync.command('doctor')
@database_options
@click.pass_context
def doctor_command(ctx: click.Context) -> None:
    """Try everything that a node needs of the database, and say what to mend."""
    checks = doctor.examine(ctx.ensure_object(Database).config())
    show(checks)
    if any(check.verdict == 'bad' for check in checks):
        ctx.exit(1)


jobsync.add_command(backlog_command)
jobsync.add_command(evacuate_command)
jobsync.add_command(executions_group)
jobsync.add_command(locks_group)
jobsync.add_command(purge_command)
jobsync.add_command(simulate_command)
jobsync.add_command(who_command)
