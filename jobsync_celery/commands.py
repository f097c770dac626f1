"""`celery -A proj jobsync …`: the commands of `jobsync`, on the database that the app's plugin
uses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import JobSyncError

from .application import read_config
from .plugin import JobSync

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['jobsync']

try:
    from jobsync_core.cli.context import Database, Group
    from jobsync_core.cli.main import jobsync as core
except ModuleNotFoundError as error:
    if error.name != 'rich':
        raise

    @click.command('jobsync', context_settings={'ignore_unknown_options': True})
    @click.argument('words', nargs=-1, metavar='COMMAND [ARGS]...')
    def jobsync(words: tuple[str, ...]) -> None:
        """Look at the JobSync cluster and steer it (needs the extra `cli`)."""
        raise click.ClickException(
            "rich is missing; install it with: pip install 'jobsync-workers[cli]'"
        )
else:

    class _AppDatabase(Database):
        """The database of an app's plugin, unless --url names another. The app is not asked before
        a command needs it.
        """

        has_plugin = True

        def __init__(self, app: Celery) -> None:
            super().__init__()
            self._app = app

        def plugin(self) -> Any:
            plugin = JobSync.of(self._app)
            if plugin is None:
                raise JobSyncError(
                    f'the app {self._app.main!r} has no plugin: keep JobSync(app) in it until its '
                    'queues are empty'
                )
            return plugin

        def config(self) -> CoordinationConfig:
            if self.url:
                return super().config()
            config = read_config(self._app)
            return replace(config, **self.named)

    class _AppGroup(Group):
        def invoke(self, ctx: click.Context) -> Any:
            ctx.obj = _AppDatabase(ctx.obj.app)
            try:
                return super().invoke(ctx)
            except click.NoSuchOption as error:
                # Celery has its own words for these, which it finds in its own context object.
                if error.option_name in ('-A', '--app'):
                    raise click.UsageError(
                        f'{error.option_name} goes before the command: celery {error.option_name} '
                        'proj jobsync …',
                        ctx,
                    ) from None
                raise

    # Without a callback: Celery would wrap it for its preload options, and look for its own context
    # object there.
    jobsync = _AppGroup(
        'jobsync', commands=core.commands, help='Look at the JobSync cluster and steer it.'
    )
