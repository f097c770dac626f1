"""`jobsync executions list | show | retry | forget | purge`: the ledger, and how it is mended."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import click
from rich.table import Table

from ..errors import DuplicateExecution, ExecutionRunning, NoSuchExecution, NotSent
from ..executions import ExecutionFilter, Executions
from ..results import ExecutionDetails, FormerAttempt, RecordedExecution
from ..store.completions import LOST, PENDING
from .application import app_option, plugin_of
from .columns import columns, cut
from .context import Database, console, database_options, printable
from .executions_options import filter_options
from .status_view import as_json, table

__all__ = ['executions_group']

_Found = TypeVar('_Found', bound=RecordedExecution)

#: Rows that are listed unless more are asked for; rows of one table, and characters of a cell.
_LISTED, _TOGETHER = 100, 1000
#: States of what can be retried, and of what can be deleted.
_RETRIED, _PURGED = ('failed', 'lost', 'dead'), ('done', 'failed', 'lost', 'dead')
_KEY_WIDTH, _NODE_WIDTH, _ERROR_WIDTH, _RESULT_WIDTH = 80, 40, 60, 4000


@click.group('executions')
@database_options
def executions_group() -> None:
    """Look at the ledger of what runs exactly once, and mend it.

    An execution is running, done, failed, lost, or dead. What is lost ran on a node that is gone,
    and whoever gets its message takes it over; what is dead was lost too often, and is not begun
    any more.
    """


@executions_group.command('list')
@filter_options
@click.option(
    '--limit',
    type=click.IntRange(1),
    help=f'How many, in the order of their keys.  [default: {_LISTED}; with --json all]',
)
@click.option('--all', 'everything', is_flag=True, help='All of them.')
@click.option('--after', metavar='KEY', default='', help='Only those whose key comes behind KEY.')
@click.option('--json', 'json_wanted', is_flag=True, help='JSON, with nothing cut.')
@database_options
@click.pass_obj
def list_command(
    database: Database,
    which: ExecutionFilter,
    limit: int | None,
    everything: bool,
    after: str,
    json_wanted: bool,
) -> None:
    """List executions in the order of their keys. Long texts are cut."""
    if limit is not None and everything:
        raise click.UsageError('give --limit or --all')
    with _opened(database) as executions:
        if json_wanted:
            _write_json(executions.find(which, limit=limit, after=after))
            return
        wanted = None if everything else limit or _LISTED
        # one more tells whether there are more
        found = executions.find(which, limit=None if wanted is None else wanted + 1, after=after)
        shown, last = 0, ''
        for rows in _batches(itertools.islice(found, wanted)):
            _print_rows(rows)
            shown, last = shown + len(rows), rows[-1]['key']
        if not shown:
            click.echo('no executions')
        elif next(found, None) is not None:
            click.echo(
                f'and more: --after {_quoted(last)} goes on, --all lists all, --json with nothing '
                'cut'
            )


@executions_group.command('show')
@click.argument('key')
@click.option('--json', 'json_wanted', is_flag=True, help='JSON, with nothing cut.')
@database_options
@click.pass_obj
def show_command(database: Database, key: str, json_wanted: bool) -> None:
    """Show all that is known of KEY."""
    with _opened(database) as executions:
        found = executions.show(key)
    if json_wanted:
        click.echo(as_json(found))
        return
    for name, value in _lines(found):
        click.echo(f'{name:<11}{printable(value)}')
    if found['history']:
        click.echo('\nattempts that failed or were lost')
        console().print(_history_table(found['history']))


@executions_group.command('retry')
@click.argument('keys', metavar='[KEY]...', nargs=-1)
@filter_options
@click.option('--yes', is_flag=True, help='Do not ask, where a filter says which.')
@click.option('--json', 'json_wanted', is_flag=True, help='JSON; with a filter it needs --yes.')
@app_option
@database_options
@click.pass_obj
def retry_command(
    database: Database,
    keys: tuple[str, ...],
    which: ExecutionFilter,
    yes: bool,
    json_wanted: bool,
    place: str | None,
) -> None:
    """Have KEYs that failed, were lost or are dead free for their next attempt, or all that a
    filter selects.

    A message that the ledger has kept with a dead key is sent again, where the application is
    named: by `celery -A proj jobsync`, or by --app. No other is: what the broker still has is taken
    by the workers, anything else has to be sent again. The exit code is 1 where a key is not free.
    """
    _check_named(keys, which)
    with _sending(database, place) as executions:
        chosen: Iterable[str] = keys
        if not keys:
            wanted = _in_states(which, _RETRIED)
            _ask(
                yes,
                json_wanted,
                lambda: executions.count(wanted),
                'Have {:,} executions free for their next attempt?',
            )
            chosen = (each['key'] for each in executions.find(wanted))
        _each(chosen, executions.retry, lambda found: _freed(executions, found), json_wanted)


@executions_group.command('forget')
@click.argument('keys', metavar='KEY...', nargs=-1, required=True)
@click.option('--yes', is_flag=True, help='Do not ask.')
@click.option('--json', 'json_wanted', is_flag=True, help='JSON; needs --yes.')
@database_options
@click.pass_obj
def forget_command(database: Database, keys: tuple[str, ...], yes: bool, json_wanted: bool) -> None:
    """Delete what the ledger knows of KEYs: when their messages come again, they run again.

    The exit code is 1 where a key is not deleted, as a live node is at it, or is not there.
    """
    _ask(
        yes,
        json_wanted,
        lambda: len(keys),
        'Forget {:,} executions? When their messages come again, they run again.',
    )
    with _opened(database) as executions:
        _each(keys, executions.forget, lambda found: 'is forgotten', json_wanted)


@executions_group.command('purge')
@filter_options
@click.option('--all', 'everything', is_flag=True, help='Whatever does not run.')
@click.option('--yes', is_flag=True, help='Do not ask.')
@click.option('--json', 'json_wanted', is_flag=True, help='Only the count, as JSON; needs --yes.')
@database_options
@click.pass_obj
def purge_command(
    database: Database, which: ExecutionFilter, everything: bool, yes: bool, json_wanted: bool
) -> None:
    """Delete all executions that a filter selects, but none that a live node is at.

    When messages of deleted keys come again, they run again.
    """
    if everything is not which.selects_all:
        raise click.UsageError('give a filter, or --all')
    wanted = _in_states(which, _PURGED)
    with _opened(database) as executions:
        _ask(
            yes,
            json_wanted,
            lambda: executions.count(wanted),
            'Delete {:,} executions? When their messages come again, they run again.',
        )
        deleted = executions.purge(wanted)
    if json_wanted:
        click.echo(json.dumps({'deleted': deleted}))
    else:
        click.echo(f'{deleted:,} execution{"" if deleted == 1 else "s"} deleted')


@contextmanager
def _opened(database: Database) -> Iterator[Executions]:
    executions = Executions(database.config())
    try:
        yield executions
    finally:
        executions.close()


@contextmanager
def _sending(database: Database, place: str | None) -> Iterator[Executions]:
    """The same, with the application's plugin, if one is known, to send what is kept."""
    if database.has_plugin:
        plugin = database.plugin() if not database.url and not database.named else None
        config = database.config()
    else:
        plugin = plugin_of(database, place) if place is not None else None
        config = plugin.settings.config if plugin is not None else database.config()
    executions = Executions(config, getattr(plugin, 'resend', None))
    try:
        yield executions
    finally:
        executions.close()


def _freed(executions: Executions, found: ExecutionDetails) -> str:
    if found['message'] is None:
        return 'is free: its next message begins an attempt at once; none is sent by this'
    if executions.sends:
        return 'is free, and its message is sent'
    return (
        'is free, but its message is only kept: name the application, by `celery -A proj jobsync` '
        'or --app, to have it sent'
    )


def _in_states(which: ExecutionFilter, allowed: tuple[str, ...]) -> ExecutionFilter:
    """The filter for the states that a command is for."""
    if which.state is None:
        return dataclasses.replace(which, state=allowed)
    for state in which.states:
        if state not in allowed:
            raise click.UsageError(f'--state {state}: this command is for {" and ".join(allowed)}')
    return which


def _check_named(keys: tuple[str, ...], which: ExecutionFilter) -> None:
    if bool(keys) is not which.selects_all:
        raise click.UsageError('give KEYs, or a filter')


def _ask(yes: bool, json_wanted: bool, count: Callable[[], int], question: str) -> None:
    """Ask before something is changed."""
    if yes:
        return
    if json_wanted:
        raise click.UsageError('--json asks nothing: give --yes as well')
    click.confirm(question.format(count()), abort=True)


def _each(
    keys: Iterable[str],
    action: Callable[[str], _Found],
    done: Callable[[_Found], str],
    json_wanted: bool,
) -> None:
    """Do it for each key by itself: what one is refused for does not concern the others."""
    changed, refused = 0, dict[str, str]()
    for key in keys:
        try:
            found = action(key)
        except (NoSuchExecution, ExecutionRunning, DuplicateExecution, NotSent) as error:
            refused[key] = str(error)
            if not json_wanted:
                click.echo(printable(error), err=True)
        else:
            changed += 1
            if not json_wanted:
                click.echo(f'{printable(key)} {done(found)}')
    if json_wanted:
        click.echo(json.dumps({'changed': changed, 'refused': refused}))
    if refused:
        raise SystemExit(1)


def _batches(rows: Iterator[RecordedExecution]) -> Iterator[list[RecordedExecution]]:
    while batch := list(itertools.islice(rows, _TOGETHER)):
        yield batch


def _print_rows(rows: list[RecordedExecution]) -> None:
    cells = [
        (
            cut(printable(row['key']), _KEY_WIDTH),
            row['state'],
            f'{row["attempts"]:,}',
            cut(printable(row['node'] or ''), _NODE_WIDTH),
            _time(row['started_at']),
            _time(row['finished_at']),
            cut(printable(row['error'] or ''), _ERROR_WIDTH),
        )
        for row in rows
    ]
    click.echo(columns(('key', 'state', 'attempts', 'node', 'began', 'ended', 'error'), cells))


def _history_table(history: list[FormerAttempt]) -> Table:
    result = table(
        'number', 'outcome', 'node', 'process', 'began', 'ended', 'error', right=('number',)
    )
    for each in history:
        result.add_row(
            f'{each["number"]:,}',
            each['outcome'],
            cut(printable(each['node'] or ''), _NODE_WIDTH),
            cut(printable(f'{each["pid"]} on {each["host"]}'), _NODE_WIDTH),
            _time(each['started_at']),
            _time(each['ended_at']),
            cut(printable(each['error'] or ''), _ERROR_WIDTH),
        )
    return result


def _lines(found: ExecutionDetails) -> list[tuple[str, str]]:
    state = found['state']
    if state == 'dead':
        state = f'dead: {found["lost"]:,} attempts were lost, and nothing begins it any more'
    elif state == 'lost':
        state = 'lost: its node is gone, and whoever gets its message takes it over'
    elif found['silent_sec'] is not None:
        state = f'running (last heartbeat of its node {found["silent_sec"]:.0f} s ago)'
    lines = [
        ('key', found['key']),
        ('state', state),
        ('attempts', f'{found["attempts"]:,} (the last one has the fence {found["fence"]})'),
        ('node', found['node'] or 'unknown'),
        ('process', f'{found["pid"]} on {found["host"] or "an unknown host"}'),
        ('began', _time(found['started_at'])),
    ]
    if found['finished_at'] is not None:
        lines.append(('ended', _time(found['finished_at'])))
    if found['expires_at'] is not None:
        lines.append(('kept until', _time(found['expires_at'])))
    if found['error'] is not None:
        lines.append(('error', found['error']))
    if found['message'] is not None:
        lines.append(('message', 'kept: `retry` sends it again'))
    if found['result'] is not None:
        untold = {PENDING: 'not told yet by its attempt', LOST: 'lost with its process'}
        shown = cut(found['result'], _RESULT_WIDTH)
        lines.append(('result', untold.get(found['result'], shown)))
    return lines


def _write_json(rows: Iterator[RecordedExecution]) -> None:
    """A JSON array, written as it is read: it may be longer than memory."""
    first = next(rows, None)
    if first is None:
        click.echo('[]')
        return
    click.echo(f'[{as_json(first, indent=None)}', nl=False)
    for row in rows:
        click.echo(f',\n {as_json(row, indent=None)}', nl=False)
    click.echo(']')


def _time(moment: datetime.datetime | None) -> str:
    return f'{moment:%Y-%m-%d %H:%M:%S}' if moment is not None else ''


def _quoted(text: str) -> str:
    return f'{printable(text)!r}'
