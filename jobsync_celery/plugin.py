"""JobSync(app): the one line that makes an app's workers nodes of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
from celery import Celery

from jobsync_core.errors import ConfigurationError
from jobsync_core.job import Job
from jobsync_core.logs import shown
from jobsync_core.worker.backlog import QueueCounter
from jobsync_core.worker.lookup import OwnerLookup

from .application import Application
from .broker.broker import CeleryBroker
from .hooks import WorkerHooks
from .producer import install_producer
from .settings import CelerySettings
from .steps import GateStep, NodeStep, ReadyStep
from .tasks.coordinated import Tasks, watch_tasks
from .tasks.dead_letters import resend

__all__ = ['JobSync']


class JobSync:
    """The plugin of one app: `JobSync(app, database_url='postgresql://…')`, before its tasks are
    used.

    Args:
        app: The Celery app.
        settings: Any setting of CelerySettings and CoordinationConfig. What is not given comes from
            `app.conf.jobsync_…`, `app.conf.jobsync`, and the environment (`JOBSYNC_…`). They are
            read when they are needed first.

    Raises:
        ConfigurationError: The app has the plugin already, or is none.
    """

    def __init__(self, app: Celery, **settings: Any) -> None:
        if not isinstance(app, Celery):
            raise ConfigurationError(
                f"JobSync({shown(app, 100)}): give the Celery app: app = Celery('proj'), then "
                'JobSync(app)'
            )
        if '_jobsync' in vars(app):
            raise ConfigurationError(
                f'JobSync(app) was called before for the app {app.main!r}: once is enough'
            )
        vars(app)['_jobsync'] = self
        self.app = app
        self._application = Application(app, settings)
        self._hooks = WorkerHooks(self._application)
        # Registers the inspect command: a worker without the plugin does not know it.
        from . import control  # noqa: F401

        watch_tasks(app)
        install_producer(
            self._application,
            OwnerLookup(lambda: self._application.settings, lambda: self.job, self._pin_of),
        )
        app.steps['worker'].add(NodeStep)
        app.steps['consumer'].update((GateStep, ReadyStep))
        app.user_options['worker'].add(
            click.Option(
                ('--jobsync-node',), help="Name of this node (default: the worker's node name)."
            )
        )
        app.user_options['worker'].add(
            click.Option(
                ('--jobsync-weight',), type=float, help='Share of this node relative to the others.'
            )
        )

    def _pin_of(self, name: str) -> Sequence[str] | None:
        found = self._application.tasks.find(name)
        return found.pin if found is not None else None

    def __repr__(self) -> str:
        return f'<JobSync of {self.app.main!r}: {self.job!r}>'

    @staticmethod
    def of(app: Celery) -> JobSync | None:
        """The plugin of an app; None where it has none."""
        found: JobSync | None = vars(
            app._get_current_object() if hasattr(app, '_get_current_object') else app
        ).get('_jobsync')
        return found

    @property
    def job(self) -> Job | None:
        """This worker's node; None where there is none. In tests the Job of `jobsync_core.testing`
        that stands in.
        """
        return self._hooks.job

    @property
    def settings(self) -> CelerySettings:
        """The settings; read at the first use.

        Raises:
            ConfigurationError: A setting cannot work.
        """
        return self._application.settings

    @property
    def tasks(self) -> Tasks:
        """The app's coordinated tasks."""
        return self._application.tasks

    def local_status(self) -> dict[str, Any]:
        """The node as it sees itself, as plain values."""
        return self._hooks.local_status()

    def evacuable(self) -> CeleryBroker:
        """The broker, for `jobsync evacuate`."""
        return self._application.broker()

    def resend(self, document: Mapping[str, Any]) -> None:
        """Send a message again that the ledger has kept with a dead key, for `jobsync executions
        retry`; returns when the broker has it.

        Raises:
            JobSyncError: It is no message of Celery.
        """
        resend(self.app, document)

    def countable(self) -> QueueCounter:
        """The broker, for `jobsync backlog` and `jobsync purge`."""
        return self._application.counter()
