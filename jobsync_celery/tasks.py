"""Which tasks of an app are coordinated, and how their messages get their routes."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobsync_core.once import ExactlyOnce
from jobsync_core.routing import Coordination

if TYPE_CHECKING:
    from celery import Celery

    from jobsync_core.plugin import PluginSettings

__all__ = ['Tasks', 'adjust_options', 'once_of']


def once_of(task: Any) -> ExactlyOnce | None:
    """The `exactly_once` options of a task, or of a function."""
    run = getattr(task, '_orig_run', None) or getattr(task, 'run', task)
    found = getattr(run, 'exactly_once', None)
    return found if isinstance(found, ExactlyOnce) else None


def adjust_options(app: Celery) -> None:
    """Let exactly-once tasks be acknowledged late and given back when their process is lost, unless the user said otherwise."""
    make = app._task_from_fun

    def task_from_fun(fun: Any, name: str | None = None, base: Any = None, bind: bool = False, **options: Any) -> Any:
        if once_of(fun) is not None:
            for option in ('acks_late', 'reject_on_worker_lost'):
                if getattr(base or app.Task, option, None) is None:
                    options.setdefault(option, True)
        return make(fun, name=name, base=base, bind=bind, **options)

    app._task_from_fun = task_from_fun


class Tasks:
    """The coordinated tasks of an app; looked up by name, built once each.

    Args:
        app: The app.
        settings: The plugin's.
    """

    def __init__(self, app: Celery, settings: PluginSettings) -> None:
        self._app = app
        self._settings = settings
        self._known: dict[str, tuple[Coordination, bool] | None] = {}

    def find(self, name: str) -> tuple[Coordination, bool] | None:
        """How a task is coordinated, and whether its function takes the task as its first argument; None: it is not."""
        if name not in self._known:
            task = self._app.tasks.get(name)
            if task is None:
                return None  # another process's task; it may be registered here later
            self._known[name] = self._build(name, task)
        return self._known[name]

    def route_of(self, name: str, args: Any, kwargs: Any, message_id: str) -> str | None:
        """The route of a message; None where its task is not coordinated.

        Raises:
            ConfigurationError, TypeError, InvalidTaskId: The arguments make no key.
        """
        found = self.find(name)
        if found is None:
            return None
        coordination, bound = found
        return coordination.route_of((self._app.tasks[name], *args) if bound else args, kwargs, message_id)

    def pins(self) -> dict[str, tuple[str, ...]]:
        """Pinned tasks and their patterns."""
        pins: dict[str, tuple[str, ...]] = {name: tuple(patterns) for name, patterns in self._settings.pins.items()}
        for name in list(self._app.tasks):
            found = self.find(name)
            if found is not None and found[0].pin is not None:
                pins[name] = found[0].pin
        return pins

    def _build(self, name: str, task: Any) -> tuple[Coordination, bool] | None:
        once = once_of(task)
        key = getattr(task, 'jobsync_key', None)
        pin = getattr(task, 'jobsync_pin', None) or self._settings.pins.get(name)
        everything = self._settings.coordinate == 'all' and not name.startswith('celery.')
        if once is None and key is None and pin is None and not everything:
            return None
        run = getattr(task, '_orig_run', None) or task.run
        bound = hasattr(run, '__self__')
        # A callable that was given as an option of the task has become a method of it.
        key = getattr(key, '__func__', key)
        return Coordination(name, getattr(run, '__func__', run), once, key, pin, self._settings.pin_slots), bound
