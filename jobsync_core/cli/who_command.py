"""`jobsync who`: who owns a task, and why."""

from __future__ import annotations

import shlex
from contextlib import suppress

import click

from ..assignment.hashing import HASH_FUNCTIONS, check_task_id
from ..errors import JobSyncError
from ..results import Explanation
from ..store.status import StatusStore
from . import status_view
from .context import Database, database_options, printable

__all__ = ['who_command']

#: Queues of which the owner is shown unasked.
_GROUPS_SHOWN = 20


@click.command('who')
@click.argument('task_id')
@click.option(
    '--queue',
    metavar='Q',
    default='',
    help='Who owns it for messages of this queue; where queue_groups gives the queue one: the name '
    'of its group.',
)
@database_options
@click.pass_obj
def who_command(database: Database, task_id: str, queue: str) -> None:
    """Tell which node owns TASK_ID, and why."""
    text = check_task_id(task_id)
    with database.session() as (connection, tables):
        settings = database.cluster(connection, tables)
        token = HASH_FUNCTIONS[settings['hash_function']](text.encode()) % settings['total_tokens']
        store = StatusStore(connection, tables)
        found = store.explain(text, token, queue)
        groups = [] if queue else [row['queue_group'] for row in store.groups()]
        elsewhere = []
        for name in groups[:_GROUPS_SHOWN]:
            with suppress(JobSyncError):  # it has just gone
                elsewhere.append((name, store.explain(text, token, name)))
    lock = found['lock']
    owner = _owner(found)
    if found['owner_silent_sec'] is not None:
        owner += (
            f' (no heartbeat for {found["owner_silent_sec"]:.0f} s: it is dead, or cut off; '
            'others take over after its timeout)'
        )
    lines = [
        ('task', text),
        ('token', f'{token} of {settings["total_tokens"]:,}'),
        *([('queue', queue)] if queue else []),
        ('owner', owner),
    ]
    if found['since'] is not None:
        lines.append(('since', f'{found["since"]:%Y-%m-%d %H:%M:%S} (version {found["version"]})'))
    if found['moving_to']:
        lines.append(('moving to', found['moving_to']))
    lines.append(('lock', status_view.patterns(lock['node_patterns']) if lock else 'none'))
    if lock:
        lines.append(('matched', found['pattern'] or 'no live node'))
        lines += [
            (name, str(value))
            for name, value in (
                ('reason', lock['reason']),
                ('locked by', lock['created_by']),
                ('expires', lock['expires_at']),
            )
            if value is not None
        ]
    if found['others']:
        lines.append(
            (
                'same token',
                ', '.join(found['others'][:5])
                + (' …' if len(found['others']) > 5 else '')
                + ' (locked as well)',
            )
        )
    lines.append(('next', found['next'] or 'nobody'))
    claim, audit = found['claim'], found['audit']
    if claim:
        how = 'promised to' if claim['promised'] else 'taken by'
        lines.append(
            (
                'claim',
                (
                    f'{how} {claim["node"]} for {claim["date"]} at '
                    f'{claim["created_on"]:%Y-%m-%d %H:%M:%S}'
                ),
            )
        )
    if audit:
        again = 'that cluster has ended: it runs again'
        if audit['counts']:
            again = (
                'does not run again for that date while the cluster lives'
                if audit['lives']
                else 'the last node has left: it runs again, unless the next nodes start with '
                'resume=True'
            )
        lines.append(
            (
                'audited',
                (
                    f'by {audit["node"]} for {audit["date"]} at '
                    f'{audit["created_on"]:%Y-%m-%d %H:%M:%S}; {again}'
                ),
            )
        )
    entry = found['ledger']
    if entry:
        when = entry['finished_at'] or entry['started_at']
        tried = f'{entry["attempts"]} attempt' + ('' if entry['attempts'] == 1 else 's')
        lines.append(
            (
                'ledger',
                f'{entry["state"]} on {entry["node"]} at {when:%Y-%m-%d %H:%M:%S}, {tried}'
                + (f': {entry["error"]}' if entry['error'] else ''),
            )
        )
        scope, colon, route = text.partition(':')
        if colon and route:
            lines.append(
                (
                    'its message',
                    (
                        f'has the key {route!r}, if {scope!r} is the task: see `jobsync who '
                        f'{shlex.quote(route)}`'
                    ),
                )
            )
    for name, there in elsewhere:
        lines.append(('in queue', f'{name}: {_owner(there)}'))
    if groups:
        more = len(groups) - len(elsewhere)
        lines.append(
            (
                'of queues',
                'messages in a queue have owners of their own; more of one with --queue'
                + (f' ({more} further ones)' if more else ''),
            )
        )
    for name, value in lines:
        click.echo(f'{name:<11}{printable(value)}')


def _owner(found: Explanation) -> str:
    return found['owner'] or (
        'nobody: blocked, no live node may have it' if found['blocked'] else 'nobody at this moment'
    )
