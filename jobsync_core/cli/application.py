"""Finding the application's plugin, for the commands that need its broker."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..errors import JobSyncError
from .context import Database

__all__ = ['APP_VARIABLE', 'app_option', 'plugin_at', 'plugin_of']

_Command = TypeVar('_Command', bound=Callable[..., Any])
APP_VARIABLE = 'JOBSYNC_APP'


def app_option(command: _Command) -> _Command:
    """Add --app to a command."""
    return click.option(
        '--app',
        'place',
        metavar='MODULE:NAME',
        envvar=APP_VARIABLE,
        help='Where the JobSync object of the application is, its Celery app or its Dramatiq '
        f'broker [env {APP_VARIABLE}] (not with `celery -A proj`).',
    )(command)


def plugin_of(database: Database, place: str | None) -> Any:
    """The application's plugin: that of `celery -A`, else the one that --app names.

    Raises:
        JobSyncError: There is none.
        click.UsageError: An option says where the tables are: the plugin says so itself.
    """
    plugin = database.plugin() if place is None or database.has_plugin else plugin_at(place)
    for name in ('url', 'appname', 'schema'):
        if getattr(database, name):
            raise click.UsageError(
                f'--{name}: this command asks the application, whose settings say where its '
                'cluster is; leave the option out'
            )
    return plugin


def plugin_at(place: str) -> Any:
    """The plugin that MODULE:NAME leads to.

    Raises:
        click.UsageError: The text is no such name.
        JobSyncError: There is nothing of the kind.
    """
    module, _, name = place.partition(':')
    if not module or not name or module.startswith('.'):
        raise click.UsageError(f'--app {place!r}: give MODULE:NAME, such as proj:jobsync')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split('.'):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise JobSyncError(f'--app {place!r}: {error}') from None
    plugin = _plugin_in(found)
    if plugin is None:
        raise JobSyncError(
            f'--app {place!r} is a {type(found).__name__}: name the JobSync object of the '
            'application, its Celery app or its Dramatiq broker'
        )
    return plugin


def _plugin_in(found: Any) -> Any:
    """The plugin itself, that of a Celery app, or that among a Dramatiq broker's middleware."""
    middleware = getattr(found, 'middleware', None)
    candidates = [
        found,
        getattr(found, '__dict__', {}).get('_jobsync'),
        *(middleware if isinstance(middleware, list) else []),
    ]
    return next((each for each in candidates if hasattr(each, 'evacuable')), None)
