"""`jobsync evacuate`: what the plugin keeps in queues of its own goes home."""

from __future__ import annotations

import json

import click

from ..worker.evacuation import evacuate
from .application import app_option, plugin_of
from .context import Database, database_options, printable

__all__ = ['evacuate_command']


@click.command('evacuate')
@click.option('--json', 'as_json', is_flag=True, help='Only the counts, as JSON.')
@app_option
@database_options
@click.pass_obj
def evacuate_command(database: Database, place: str | None, as_json: bool) -> None:
    """Move all messages out of the plugin's queues to the queues that they were sent to.

    Queues of nodes that are gone, what these had taken and not acknowledged, and parked messages.
    Queues of live nodes are left alone, so stop the workers first to take the plugin out. It can be
    repeated at any time; the exit code is 2 while something was left behind.
    """
    plugin = plugin_of(database, place)
    broker = plugin.evacuable()
    try:
        done = evacuate(
            broker,
            plugin.settings.config,
            tell=lambda line: None if as_json else click.echo(printable(line)),
        )
    finally:
        broker.close()
    if as_json:
        click.echo(
            json.dumps(
                {
                    'restored': done.restored,
                    'moved': done.moved,
                    'deleted': done.deleted,
                    'busy': done.busy,
                    'failed': done.failed,
                    'complete': done.complete,
                },
                sort_keys=True,
            )
        )
    else:
        click.echo(
            f'{sum(done.moved.values())} messages moved home, {done.restored} of them had been '
            'taken by workers that are gone'
        )
        for queue, count in sorted(done.moved.items()):
            click.echo(f'  {count} to {printable(queue)}')
    if not done.complete:
        if not as_json:
            click.echo('not complete: see above; run it once more when that is over', err=True)
        raise SystemExit(2)
