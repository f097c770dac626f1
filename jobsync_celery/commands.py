"""`celery -A proj jobsync …`: the commands of `jobsync`, on the database that the app's plugin uses."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from jobsync_core.config import CoordinationConfig

from .settings import read_config

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['jobsync']

try:
    from jobsync_core.cli.context import Database, Group
    from jobsync_core.cli.main import jobsync as core
except ImportError:  # rich is not installed
    @click.command('jobsync', context_settings={'ignore_unknown_options': True})
    @click.argument('words', nargs=-1)
    def jobsync(words: tuple[str, ...]) -> None:
        """Look at the JobSync cluster and steer it (needs the extra `cli`)."""
        raise click.ClickException("these commands need the extra: pip install 'jobsync-workers[cli]'")
else:
    class _AppDatabase(Database):
        """The database of an app's plugin, unless --url names another."""

        def __init__(self, app: Celery) -> None:
            super().__init__()
            self._app = app

        def config(self) -> CoordinationConfig:
            if self.url:
                return super().config()
            config = read_config(self._app)
            if not self.appname:
                return config
            return CoordinationConfig(**{**{name: getattr(config, name) for name in vars(config)}, 'appname': self.appname})

    class _AppGroup(Group):
        def invoke(self, ctx: click.Context) -> Any:
            ctx.obj = _AppDatabase(ctx.obj.app)
            return super().invoke(ctx)

    jobsync = _AppGroup('jobsync', commands=core.commands, help='Look at the JobSync cluster and steer it.')
