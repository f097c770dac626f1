"""Which tasks of an app are coordinated, and how their messages get their routes."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo
from celery import Task, states
from celery.app.registry import TaskRegistry
from celery.app.task import Context
from celery.app.trace import TraceInfo, report_internal_error, trace_ok_t
from celery.exceptions import Reject, WorkerShutdown, WorkerTerminate

from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.worker.adapter import CoordinatedTasks, Declared, once_of
from jobsync_core.worker.affinity import check_affinity
from jobsync_core.worker.incoming import Refused, Stamps, find_route
from jobsync_core.worker.misspelt import misspelt

from ..faults import is_its_fault
from .once import made_here
from .resending import RequeueLater

if TYPE_CHECKING:
    from celery import Celery

    from jobsync_core.worker.settings import PluginSettings

__all__ = [
    'TaskExited',
    'Tasks',
    'guard_traces',
    'guarded_trace',
    'odd_names',
    'prepare_tasks',
    'watch_tasks',
]

NO_STAMPS = Stamps()
#: What `@app.task` understands of JobSync's; the last two are its own.
_OPTIONS = ('jobsync_key', 'jobsync_pin', 'jobsync_arguments', 'jobsync_dump')
#: Those that say where a task's messages run.
_PLACES = _OPTIONS[:2]
_STATES = (states.FAILURE, states.REJECTED)
_LATE = ('acks_late', 'reject_on_worker_lost')


def _run_of(task: Any) -> Any:
    """What a task runs; of a function that is to become a task, itself."""
    return getattr(task, '_orig_run', None) or getattr(task, 'run', task)


#: For each option, classes of which nobody said anything, so that Celery wrote the app's default on
#: them when it bound them.
_UNSAID: Mapping[str, weakref.WeakSet[type]] = {option: weakref.WeakSet() for option in _LATE}


def prepare_task(task: Any) -> None:
    """Let an exactly-once task be acknowledged late and requeued when its process is lost, unless
    the user said otherwise.

    Args:
        task: The task, before Celery binds it to its app: then what nobody said is None.

    Raises:
        ConfigurationError: It can never work.
    """
    _check(_run_of(task), task.name)
    once = once_of(_run_of(task))
    check_affinity(task.name, once, {option: getattr(task, option, None) for option in _PLACES})
    if once is not None:
        once.adopt(task.name)
    for option in _LATE:
        if getattr(type(task), option, None) is None:
            _UNSAID[option].add(type(task))
        if once is not None and not _says(task, option):
            setattr(task, option, True)


def prepare_tasks(app: Celery) -> None:
    """Prepare all tasks that an app has now, before messages of new ones can come."""
    for task in list(app.tasks.values()):
        prepare_task(task)


def _says(task: Any, option: str) -> bool:
    """Whether the user said something, in the task's class or in a base of it."""
    if option in vars(task):
        return True
    return any(
        vars(cls).get(option) is not None and cls not in _UNSAID[option]
        for cls in type(task).__mro__
    )


def odd_names(app: Celery, pins: Iterable[str]) -> list[str]:
    """Options of tasks and pins in the settings that mean nothing, a sentence each.

    Args:
        app: The app, with all of its tasks.
        pins: The names of the tasks that have a pin in the settings.
    """
    tasks = {name: task for name, task in app.tasks.items() if not name.startswith('celery.')}
    return misspelt(
        {name: _options_of(task) for name, task in tasks.items()}, _OPTIONS, pins, app.tasks
    )


def _options_of(task: Any) -> set[str]:
    """What the user's own classes, the decorator and the annotations say of a task."""
    own = [
        cls
        for cls in type(task).__mro__
        if not cls.__module__.startswith('celery.') and cls is not object
    ]
    return {name for each in (task, *own) for name in vars(each) if not name.startswith('_')}


class TaskExited(Exception):
    """A task raised SystemExit, KeyboardInterrupt or the like where that ends no process: its
    failure, by another name.
    """


def guarded_trace(task: Any, in_loop: bool = False) -> Callable[..., Any]:
    """The task's tracer, which raises nothing out of a thread of the pool: nobody would acknowledge
    the message then.

    Celery's own does, where the end of a task cannot be told to a chain that is none, or its
    on_success raises Reject, for example.

    Where the task has run and its end cannot be told for a reason that will pass (its result
    backend is away), a message that is acknowledged late comes again after a pause: a duplicate of
    a completed key then tells the result.

    Args:
        task: The task; Celery has built its tracer.
        in_loop: The pool runs it in the event loop, where such a reason may be raised: PoolEntry
            keeps the message.
    """
    trace = task.__trace__

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            try:
                return trace(*args, **kwargs)
            except (Exception, WorkerShutdown, WorkerTerminate):
                raise
            except BaseException as error:
                return _exited(task, error, *args, **kwargs)
        except (Reject, MemoryError) as error:
            # As a process of the pool would say it: the worker rejects the message, or has it fail.
            return trace_ok_t(
                ExceptionInfo(), TraceInfo(_STATES[isinstance(error, Reject)], error), 0.0, None
            )
        except Exception as error:
            if task.acks_late and not is_its_fault(error):
                if in_loop:
                    raise
                return _later(error)
            return trace_ok_t(
                report_internal_error(task, error), TraceInfo(states.FAILURE, error), 0.0, None
            )

    return guarded


def _later(error: Exception) -> Any:
    try:
        raise RequeueLater(f'its end cannot be told: {error!r}', requeue=True) from error
    except RequeueLater as later:
        return trace_ok_t(ExceptionInfo(), TraceInfo(states.REJECTED, later), 0.0, None)


def _exited(
    task: Any, error: BaseException, message_id: str, args: Any, kwargs: Any, request: Any = None
) -> Any:
    """Let a task fail whose exception Celery's tracer does not catch; what it would make of it the
    request cannot read.
    """
    try:
        text = str(error)
    except Exception:  # the user's own code
        text = '(its text cannot be shown)'
    try:
        raise TaskExited(f'{type(error).__name__}: {text}') from error
    except TaskExited as failure:
        info = TraceInfo(states.FAILURE, failure)
        context = Context(
            request or {}, id=message_id, args=args, kwargs=kwargs, called_directly=False
        )
        return trace_ok_t(info.handle_error_state(task, context), info, 0.0, None)


def _check(run: Any, name: str) -> None:
    options = once_of(run)
    if options is None:
        return
    if not made_here(options):
        raise ConfigurationError(
            f'task {name}: its @exactly_once is not that of jobsync_celery, so that duplicates '
            'and come-backs would fail: '
            'write `from jobsync_celery import exactly_once`'
        )
    if inspect.iscoroutinefunction(run):
        raise ConfigurationError(
            f'task {name} is an `async def`, which Celery does not wait for: write a `def` that '
            'calls asyncio.run(…), '
            'with @exactly_once on it'
        )


class _Registry(TaskRegistry):  # type: ignore[misc]  # celery has no types
    """An app's tasks. Each passes here before it is bound, however it was made: from a function, a
    class, an object, by any app.
    """

    def __setitem__(self, name: str, task: Any) -> None:
        prepare_task(task)
        super().__setitem__(name, task)


def watch_tasks(app: Celery) -> None:
    """Prepare all tasks of an app, those that it has and those that it gets."""
    for known in app._tasks.values():
        _prepare_bound(known)
    app._tasks = _Registry(app._tasks)
    make, declare = app._task_from_fun, app.task

    def task_from_fun(fun: Any, *args: Any, **options: Any) -> Any:
        if options.get('pydantic') is True:
            options['jobsync_arguments'] = staticmethod(_validator(app, fun, options))
            options['jobsync_dump'] = {
                'mode': 'json',
                **(options.get('pydantic_dump_kwargs') or {}),
            }
        return make(fun, *args, **options)

    def task(*args: Any, **options: Any) -> Any:
        if len(args) == 1:
            _check_declared(args[0], options)
            return declare(*args, **options)
        decorator = declare(*args, **options)

        def decorate(fun: Any) -> Any:
            _check_declared(fun, options)
            return decorator(fun)

        return decorate

    app._task_from_fun, app.task = task_from_fun, task


def _check_declared(fun: Any, given: Mapping[str, Any]) -> None:
    """What is wrong shows where it is written, not when the app is used first.

    Args:
        fun: What is to become a task.
        given: The options of `@app.task`.
    """
    if inspect.isclass(fun) and issubclass(fun, Task):
        if once_of(getattr(fun, 'run', None)) is not None:
            raise ConfigurationError(
                f'@app.task on the class {fun.__qualname__}: write '
                f'app.register_task({fun.__qualname__}()) below it'
            )
        return
    name = str(given.get('name') or getattr(fun, '__qualname__', repr(fun)))
    _check(fun, name)
    check_affinity(name, once_of(fun), {option: given.get(option) for option in _PLACES})


def _prepare_bound(task: Any) -> None:
    """A task that was bound before the plugin came: Celery has put the app's default where nobody
    said anything.
    """
    for option in _LATE:
        if not getattr(type(task), option, None):
            _UNSAID[option].add(type(task))
    prepare_task(task)


def _validator(app: Celery, fun: Any, options: Mapping[str, Any]) -> Any:
    """Makes of a message's arguments what a task with `pydantic=True` gets: models, where it says
    so.
    """

    @functools.wraps(fun)
    def arguments(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    from celery.app.base import pydantic_wrapper  # Celery 5.5

    return pydantic_wrapper(
        app,
        arguments,
        getattr(fun, '__name__', ''),
        options.get('pydantic_strict', False),
        options.get('pydantic_context'),
        options.get('pydantic_dump_kwargs'),
    )


class Tasks(CoordinatedTasks):
    """The coordinated tasks of an app.

    Args:
        app: The app.
        settings: The plugin's.
    """

    def __init__(self, app: Celery, settings: PluginSettings) -> None:
        super().__init__(settings, self._declaration, lambda: app.tasks)
        self._app = app

    def route_of(
        self,
        name: str,
        args: object,
        kwargs: object,
        message_id: object,
        stamps: Stamps = NO_STAMPS,
    ) -> str | Refused | None:
        """The route of a message: None where its task has no affinity or is not coordinated, a
        reason where it can have none. Raises nothing.

        Args:
            name: The task's name.
            args, kwargs, message_id, stamps: As the message has them.
        """
        try:
            found = self.find(name)
        except JobSyncError as error:
            return Refused(str(error))
        return find_route(found, args, kwargs, message_id, stamps) if found is not None else None

    def completes_once(self, name: str) -> bool:
        """Whether the ledger knows the task of that name."""
        found = self.find(name)
        return found is not None and found.once is not None

    def _declaration(self, name: str) -> Declared | None:
        task = self._app.tasks.get(name)
        if task is None:
            return None
        run = _run_of(task)
        # A callable that was given as an option of the task has become a method of it.
        key = getattr(task, 'jobsync_key', None)
        return Declared(
            getattr(run, '__func__', run),
            once_of(run),
            getattr(key, '__func__', key),
            getattr(task, 'jobsync_pin', None),
            internal=name.startswith('celery.'),
            prepare=_preparation(task, run),
        )


def _preparation(
    task: Any, run: Any
) -> Callable[[Sequence[Any], Mapping[str, Any]], tuple[Sequence[Any], Mapping[str, Any]]] | None:
    """What a key is made of, where that is not what the message brings."""
    bound = hasattr(run, '__self__')  # its function takes the task first
    validate = getattr(task, 'jobsync_arguments', None)
    if validate is not None:
        return lambda args, kwargs: validate(*((task, *args) if bound else args), **kwargs)
    return (lambda args, kwargs: ((task, *args), kwargs)) if bound else None


def guard_traces(app: Celery, tasks: Tasks, solo: bool) -> None:
    """Guard the tracers that Celery has built, which those pools use that have no processes.

    Args:
        app: The app.
        tasks: Its coordinated tasks.
        solo: The pool is the event loop, into which any task's tracer would raise.
    """
    for name, task in list(app.tasks.items()):
        try:
            coordinated = tasks.find(name) is not None
        except JobSyncError:
            continue  # it runs nowhere
        if (coordinated or solo) and task.__trace__ is not None:
            task.__trace__ = guarded_trace(task, solo)
