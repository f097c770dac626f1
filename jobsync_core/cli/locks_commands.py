"""`jobsync locks list | add | clear`."""

from __future__ import annotations

import getpass
import socket

import click

from ..assignment.arguments import check_group, check_lock
from ..assignment.hashing import check_task_id
from ..assignment.patterns import eligible
from ..results import LockInfo
from ..store.locks import LockStore
from ..store.status import StatusStore
from .columns import columns, cut
from .context import Database, database_options, printable
from .status_view import as_json, patterns

__all__ = ['locks_group']


@click.group('locks')
@database_options
def locks_group() -> None:
    """Pin tasks to nodes."""


#: Locks that are listed unless more are asked for; characters of each cell.
_LISTED = 100
_WIDTHS = (60, 80, 40, 60, 40, 19, 19)
_ALL_QUEUES = '(all)'


@locks_group.command('list')
@click.option(
    '--limit',
    default=_LISTED,
    show_default=True,
    type=click.IntRange(1),
    help='How many, the oldest first.',
)
@click.option('--all', 'everything', is_flag=True, help='All of them.')
@click.option('--json', 'json_wanted', is_flag=True, help='All of them as JSON, with nothing cut.')
@database_options
@click.pass_obj
def list_command(database: Database, limit: int, everything: bool, json_wanted: bool) -> None:
    """List the locks in force. Long texts are cut."""
    if json_wanted:
        with database.session() as (connection, tables):
            locks = LockStore(connection, tables).list_locks()
        # Not in the transaction: whoever reads the output may take longer than it may rest.
        click.echo(as_json(locks))
        return
    with database.session() as (connection, tables):
        number, found = LockStore(connection, tables).show_locks(None if everything else limit)
    if not found:
        click.echo('no locks')
        return
    rows = [_cells(lock) for lock in found]
    names = ('task', 'patterns', 'queue', 'reason', 'created by', 'created', 'expires')
    click.echo(columns(names, rows))
    if number > len(found):
        click.echo(
            f'and {number - len(found):,} more of {number:,}: --all lists them, --json with '
            'nothing cut'
        )


def _cells(lock: LockInfo) -> tuple[str, ...]:
    shown = patterns(lock['node_patterns'])
    if not isinstance(lock['node_patterns'], list) and lock['size'] > len(shown):
        shown = f'{lock["size"]:,} bytes: {lock["node_patterns"]}'
    cells = (
        lock['task_id'],
        shown,
        _ALL_QUEUES if lock['queue'] is None else lock['queue'],
        lock['reason'] or '',
        lock['created_by'] or '',
        f'{lock["created_at"]:%Y-%m-%d %H:%M:%S}',
        f'{lock["expires_at"]:%Y-%m-%d %H:%M:%S}' if lock['expires_at'] else 'never',
    )
    return tuple(cut(printable(cell), width) for cell, width in zip(cells, _WIDTHS, strict=True))


@locks_group.command('add')
@click.argument('task_id')
@click.argument('patterns_given', metavar='PATTERN...', nargs=-1, required=True)
@click.option(
    '--queue',
    metavar='Q',
    help='Only for messages of this queue; where queue_groups gives the queue one: the name of its '
    'group. Without it the lock counts in all queues.',
)
@click.option('--reason', help='Why the task is pinned.')
@click.option(
    '--expires-in-days',
    type=click.FloatRange(min=0, min_open=True),
    help='Days until the lock goes; a fraction is fine.',
)
@database_options
@click.pass_obj
def add_command(
    database: Database,
    task_id: str,
    patterns_given: tuple[str, ...],
    queue: str | None,
    reason: str | None,
    expires_in_days: float | None,
) -> None:
    """Pin TASK_ID to nodes that match the first PATTERN with a live match (% any text, _ any
    character). It replaces the task's lock, that of another queue, too.
    """
    row = check_lock((task_id, list(patterns_given), reason, expires_in_days, queue))
    text, checked = row[:2]
    creator = f'{getpass.getuser()}@{socket.gethostname()}'
    with database.session() as (connection, tables):
        LockStore(connection, tables).register([row], creator)
        live = [
            node['name']
            for node in StatusStore(connection, tables).nodes()
            if node['alive']
            and node['state'] != 'draining'
            and (queue is None or queue in node['groups'])
        ]
    matching = sorted(eligible(checked, live))
    where = f' in the queue {printable(queue)}' if queue is not None else ''
    click.echo(f'locked {printable(text)} to {", ".join(map(printable, checked))}{where}')
    if queue is not None and not live:
        click.echo(f'no live node consumes the queue {printable(queue)}', err=True)
    elif matching:
        click.echo(f'matching now: {", ".join(map(printable, matching))}')
    else:
        click.echo('no live node matches: the task is blocked until one joins', err=True)


@locks_group.command('clear')
@click.option('--creator', help='Locks that this node or user registered.')
@click.option('--queue', metavar='Q', help='Locks that count in this queue, or group, alone.')
@click.option(
    '--all',
    'everything',
    is_flag=True,
    help='Every lock that somebody registered; pins of tasks stay.',
)
@click.option(
    '--pins',
    is_flag=True,
    help='The pins that workers made for their tasks; they make them again when they start.',
)
@click.option(
    '--task',
    'task_ids',
    multiple=True,
    metavar='TASK_ID',
    help='The lock on this task; may be repeated.',
)
@click.option('--yes', is_flag=True, help='Do not ask.')
@database_options
@click.pass_obj
def clear_command(
    database: Database,
    creator: str | None,
    queue: str | None,
    everything: bool,
    pins: bool,
    task_ids: tuple[str, ...],
    yes: bool,
) -> None:
    """Delete locks."""
    if sum((creator is not None, queue is not None, everything or pins, bool(task_ids))) != 1:
        raise click.UsageError(
            'give one of --creator, --queue, --all (with or without --pins), --pins and --task'
        )
    if everything:
        what = 'every lock' + (
            ', the pins of tasks included: their messages go to any node'
            if pins
            else ' but the pins of tasks'
        )
    elif pins:
        what = 'the pins of tasks: their messages go to any node'
    elif creator is not None:
        what = f'the locks of {creator}'
    elif queue is not None:
        what = f'the locks that count in the queue {queue} alone'
    else:
        what = f'the locks on {", ".join(task_ids)}'
    if not yes:
        click.confirm(f'Delete {printable(what)}?', abort=True)
    if creator is not None:
        try:
            creator.encode()
        except UnicodeEncodeError:
            raise click.UsageError('--creator is no UTF-8 text, as all names are') from None
    with database.session() as (connection, tables):
        if everything or pins:
            deleted = LockStore(connection, tables).clear_kind(locks=everything, pins=pins)
        elif creator is not None:
            deleted = LockStore(connection, tables).clear_by_creator(creator)
        elif queue is not None:
            deleted = LockStore(connection, tables).clear_queue(check_group(queue))
        else:
            deleted = LockStore(connection, tables).clear_tasks(
                [check_task_id(task_id) for task_id in task_ids]
            )
    click.echo(f'{deleted:,} lock{"" if deleted == 1 else "s"} deleted')
