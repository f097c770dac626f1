"""`jobsync locks list | add | clear`."""
from __future__ import annotations

import getpass
import socket

import click

from ..arguments import check_lock
from ..hashing import check_task_id
from ..patterns import eligible
from ..store import locks, status
from .context import Database, console, database_options, printable
from .status_view import patterns, table

__all__ = ['locks_group']


@click.group('locks')
@database_options
def locks_group() -> None:
    """Pin tasks to nodes."""


@locks_group.command('list')
@database_options
@click.pass_obj
def list_command(database: Database) -> None:
    """List the locks in force."""
    with database.session() as (connection, tables):
        found = locks.list_locks(connection, tables)
    if not found:
        click.echo('no locks')
        return
    result = table('task', 'patterns', 'reason', 'created by', 'created', 'expires')
    for lock in found:
        result.add_row(
            printable(lock['task_id']), printable(patterns(lock['node_patterns'])), printable(lock['reason'] or ''),
            printable(lock['created_by'] or ''), f'{lock["created_at"]:%Y-%m-%d %H:%M:%S}',
            f'{lock["expires_at"]:%Y-%m-%d %H:%M:%S}' if lock['expires_at'] else 'never')
    console().print(result)


@locks_group.command('add')
@click.argument('task_id')
@click.argument('patterns_given', metavar='PATTERN...', nargs=-1, required=True)
@click.option('--reason', help='Why the task is pinned.')
@click.option('--expires-in-days', type=click.FloatRange(min=0, min_open=True), help='Days until the lock goes; a fraction is fine.')
@database_options
@click.pass_obj
def add_command(
    database: Database, task_id: str, patterns_given: tuple[str, ...], reason: str | None, expires_in_days: float | None,
) -> None:
    """Pin TASK_ID to nodes that match the first PATTERN with a live match (% any text, _ any character)."""
    row = check_lock((task_id, list(patterns_given), reason, expires_in_days))
    text, checked = row[:2]
    creator = f'{getpass.getuser()}@{socket.gethostname()}'
    with database.session() as (connection, tables):
        locks.register(connection, tables, [row], creator)
        live = [node['name'] for node in status.nodes(connection, tables) if node['alive'] and node['state'] != 'draining']
    matching = sorted(eligible(checked, live))
    click.echo(f'locked {printable(text)} to {", ".join(map(printable, checked))}')
    if matching:
        click.echo(f'matching now: {", ".join(map(printable, matching))}')
    else:
        click.echo('no live node matches: the task is blocked until one joins', err=True)


@locks_group.command('clear')
@click.option('--creator', help='Locks that this node or user registered.')
@click.option('--all', 'everything', is_flag=True, help='Every lock that somebody registered; pins of tasks stay.')
@click.option('--pins', is_flag=True, help='The pins that workers made for their tasks; they make them again when they start.')
@click.option('--task', 'task_ids', multiple=True, metavar='TASK_ID', help='The lock on this task; may be repeated.')
@click.option('--yes', is_flag=True, help='Do not ask.')
@database_options
@click.pass_obj
def clear_command(
    database: Database, creator: str | None, everything: bool, pins: bool, task_ids: tuple[str, ...], yes: bool,
) -> None:
    """Delete locks."""
    if sum((creator is not None, everything or pins, bool(task_ids))) != 1:
        raise click.UsageError('give one of --creator, --all (with or without --pins), --pins and --task')
    if everything:
        what = 'every lock' + (', the pins of tasks included: their messages go to any node' if pins else ' but the pins of tasks')
    elif pins:
        what = 'the pins of tasks: their messages go to any node'
    else:
        what = f'the locks of {creator}' if creator is not None else f'the locks on {", ".join(task_ids)}'
    if not yes:
        click.confirm(f'Delete {printable(what)}?', abort=True)
    with database.session() as (connection, tables):
        if everything or pins:
            deleted = locks.clear_kind(connection, tables, locks=everything, pins=pins)
        elif creator is not None:
            deleted = locks.clear_by_creator(connection, tables, creator)
        else:
            deleted = locks.clear_tasks(connection, tables, [check_task_id(task_id) for task_id in task_ids])
    click.echo(f'{deleted:,} lock{"" if deleted == 1 else "s"} deleted')
