"""Which tasks of an app are coordinated, and how their messages get their routes."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobsync_core.adapter import CoordinatedTasks, Declared, once_of

if TYPE_CHECKING:
    from celery import Celery

    from jobsync_core.plugin import PluginSettings

__all__ = ['Tasks', 'adjust_options']


def _run_of(task: Any) -> Any:
    """What a task runs; of a function that is to become a task, itself."""
    return getattr(task, '_orig_run', None) or getattr(task, 'run', task)


def adjust_options(app: Celery) -> None:
    """Let exactly-once tasks be acknowledged late and given back when their process is lost, unless the user said otherwise."""
    make = app._task_from_fun

    def task_from_fun(fun: Any, name: str | None = None, base: Any = None, bind: bool = False, **options: Any) -> Any:
        if once_of(_run_of(fun)) is not None:
            for option in ('acks_late', 'reject_on_worker_lost'):
                if getattr(base or app.Task, option, None) is None:
                    options.setdefault(option, True)
        return make(fun, name=name, base=base, bind=bind, **options)

    app._task_from_fun = task_from_fun


class Tasks(CoordinatedTasks):
    """The coordinated tasks of an app.

    Args:
        app: The app.
        settings: The plugin's.
    """

    def __init__(self, app: Celery, settings: PluginSettings) -> None:
        super().__init__(settings, self._declaration, lambda: app.tasks)
        self._app = app

    def route_of(self, name: str, args: Any, kwargs: Any, message_id: str) -> str | None:
        """The route of a message; None where its task is not coordinated.

        Raises:
            ConfigurationError, TypeError, InvalidTaskId: The arguments make no key.
        """
        found = self.find(name)
        if found is None:
            return None
        task = self._app.tasks[name]
        bound = hasattr(_run_of(task), '__self__')  # its function takes the task first
        return found.route_of((task, *args) if bound else args, kwargs, message_id)

    def _declaration(self, name: str) -> Declared | None:
        task = self._app.tasks.get(name)
        if task is None:
            return None
        run = _run_of(task)
        # A callable that was given as an option of the task has become a method of it.
        key = getattr(task, 'jobsync_key', None)
        return Declared(
            getattr(run, '__func__', run), once_of(run), getattr(key, '__func__', key), getattr(task, 'jobsync_pin', None),
            internal=name.startswith('celery.'))
