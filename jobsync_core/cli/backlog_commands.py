"""`jobsync backlog` and `jobsync purge`: what waits for a queue, wherever the plugin put it."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from functools import partial
from typing import Any

import click
from rich.console import RenderableType

from ..config import CoordinationConfig
from ..errors import JobSyncError
from ..worker.backlog import Backlog, BacklogWatch, HomeBacklog, Purged, QueueCounter, read_backlog
from ..worker.backlog import purge as purge_queue
from ..worker.routing import unknown_queue
from .application import app_option, plugin_of
from .context import Database, console, database_options, printable
from .status_view import table

__all__ = ['backlog_command', 'purge_command']

_UNSORTED = (
    '{:,} messages are in queues of the cluster that belong to no queue in particular, and were '
    'left: workers that run, or `jobsync evacuate`, move them to where they belong'
)


@click.command('backlog')
@click.option('--queue', metavar='Q', help='Only this queue.')
@click.option('--json', 'as_json', is_flag=True, help='JSON.')
@click.option(
    '--http',
    metavar='ADDRESS',
    help="Serve it at ADDRESS, such as ':8080', until interrupted: /backlog?queue=Q for "
    'autoscalers, /metrics for Prometheus.',
)
@app_option
@database_options
@click.pass_obj
def backlog_command(
    database: Database, queue: str | None, as_json: bool, http: str | None, place: str | None
) -> None:
    """Show how many messages wait for each queue, wherever they are.

    READY are messages in the queue and in those that nodes have for it; PARKED those that no live
    node may take; TAKEN those that workers have taken, running ones among them; DELAYED those that
    wait for their time in a delay queue. `-`: the broker does not tell.
    """
    counter, config = _broker_of(database, place)
    if http is not None:
        _serve(BacklogWatch(partial(read_backlog, counter, config)), http)
        return
    found = _asked(lambda: read_backlog(counter, config, queue))
    if queue is not None:
        one = found.of(queue)
        if not one.known:
            click.echo(
                f'no application and no node names a queue {printable(queue)}, and nothing is '
                'in it',
                err=True,
            )
        if as_json:
            click.echo(json.dumps(one.shown(), sort_keys=True))
        else:
            console().print(_table([one]))
        return
    if as_json:
        click.echo(json.dumps(found.shown(), sort_keys=True))
        return
    console().print(_table(found.queues))
    for line in _others(found, config):
        click.echo(line)


def _table(queues: Any) -> RenderableType:
    columns = ('backlog', 'ready', 'parked', 'taken', 'delayed', 'oldest')
    result = table('queue', *columns, right=columns)
    each: HomeBacklog
    for each in queues:
        result.add_row(
            printable(each.queue),
            f'{each.backlog:,}',
            f'{each.ready:,}',
            f'{each.parked:,}',
            _number(each.unacknowledged),
            _number(each.delayed),
            '-' if each.oldest_sec is None else f'{each.oldest_sec:,.1f} s',
        )
    return result


def _number(value: int | None) -> str:
    return '-' if value is None else f'{value:,}'


def _others(found: Backlog, config: CoordinationConfig) -> list[str]:
    unknown = unknown_queue(config.appname)
    return [
        f'{count:,} in {printable(queue)}'
        + (': messages of tasks that no worker knows' if queue == unknown else '')
        for queue, count in found.others.items()
    ]


def _serve(watch: BacklogWatch, address: str) -> None:
    from ..web.health import HealthServer, backlog_metrics

    server = HealthServer(
        address,
        ready=lambda: {'consuming': True},
        metrics=backlog_metrics(watch.latest),
        backlog=watch.answer,
    )
    click.echo(f'serving /backlog and /metrics at port {server.port}')
    try:
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        server.close()


@click.command('purge')
@click.argument('queue')
@click.option('--yes', is_flag=True, help='Do not ask.')
@click.option('--json', 'as_json', is_flag=True, help='Only the counts, as JSON; needs --yes.')
@app_option
@database_options
@click.pass_obj
def purge_command(
    database: Database, queue: str, yes: bool, as_json: bool, place: str | None
) -> None:
    """Delete all messages that wait for QUEUE: in it, in those that nodes have for it, and parked.

    What workers have taken stays, running or not, and so do delayed messages and dead letters.
    """
    if as_json and not yes:
        raise click.UsageError('--json asks nothing: give --yes as well')
    counter, config = _broker_of(database, place)
    if not yes:
        waiting = _asked(lambda: read_backlog(counter, config, queue)).of(queue)
        if not waiting.backlog:
            click.echo(
                f'nothing waits for {printable(queue)}'
                + ('' if waiting.known else ', which no application and no node names')
            )
            return
        click.confirm(
            f'delete {waiting.backlog:,} messages of {printable(queue)} at the broker?', abort=True
        )
    done = _asked(lambda: purge_queue(counter, config, queue))
    if as_json:
        click.echo(
            json.dumps(
                {
                    'queue': queue,
                    'total': done.total,
                    'home': done.home,
                    'nodes': dict(done.nodes),
                    'parked': done.parked,
                    'unsorted': done.unsorted,
                },
                sort_keys=True,
            )
        )
        return
    for line in _told(queue, done):
        click.echo(line)


def _told(queue: str, done: Purged) -> list[str]:
    return [
        f'{done.total:,} messages of {printable(queue)} deleted',
        f'  {done.home:,} in the queue itself',
        *(
            f'  {count:,} in {printable(name)}'
            for name, count in sorted(done.nodes.items())
            if count
        ),
        f'  {done.parked:,} parked',
        *([_UNSORTED.format(done.unsorted)] if done.unsorted else []),
    ]


def _broker_of(database: Database, place: str | None) -> tuple[QueueCounter, CoordinationConfig]:
    plugin = plugin_of(database, place)
    counter: QueueCounter = plugin.countable()
    return counter, plugin.settings.config


def _asked(question: Any) -> Any:
    """What the broker answers; one line for an operator where it does not."""
    try:
        return question()
    except JobSyncError:
        raise
    # Whatever the broker's client raises, the library of which is the application's own choice.
    except Exception as error:
        raise JobSyncError(
            f'the broker does not answer: {type(error).__name__}: {" ".join(str(error).split())}'
        ) from error
