"""The Celery app of the suite: the same one in workers and in the test process, made from an
order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from celery import Celery, Task, chord, current_task, signals
from kombu.utils.imports import symbol_by_name

from . import work
from .work import Flaky, Order

__all__ = ['make_app', 'set_up_django']

#: Celery sends the next attempt and then stores RETRY as the result: an attempt that is faster than
#: that ends as RETRY for whoever asks.
_RETRY_SEC = 0.5

_CONF: dict[str, Any] = {
    'broker_connection_retry_on_startup': True,
    'broker_connection_timeout': 2,
    'task_publish_retry_policy': {
        'max_retries': 100,
        'interval_start': 0,
        'interval_step': 0.1,
        'interval_max': 0.5,
    },
    'worker_hijack_root_logger': True,
    'worker_send_task_events': False,
    'result_expires': 3600,
}


def make_app(order: Order) -> Celery:
    """An app with all tasks, with JobSync or without."""
    if order.results == 'django-db':
        set_up_django(order.database)
    app = Celery('conformance', broker=order.broker, backend=order.results, set_as_current=False)
    app.conf.update(_CONF)
    if order.broker.startswith('amqp'):
        app.conf.broker_transport_options = {'confirm_publish': True}
    app.conf.update(order.conf)
    decorate: Callable[..., Any] = _undecorated
    if order.jobsync:
        from jobsync_celery import JobSync, exactly_once

        JobSync(app, database_url=order.database, **order.settings)
        decorate = exactly_once
    _add_tasks(
        app,
        decorate,
        {*order.without, *({'pinned', 'preferred', 'homeless'} - set(order.pins))},
        'homeless' in order.loose,
    )
    return app


def use_in_worker(order: Order) -> None:
    """Tell the tasks' bodies what this process is."""
    work.now.order = order
    _die_before_counting(order)
    work.now.message_id = lambda: str(current_task.request.id)
    work.now.attempt = lambda: int(current_task.request.retries)
    if order.jobsync:
        from jobsync_celery import current_execution

        work.now.execution = current_execution


def _undecorated(**options: Any) -> Callable[[Any], Any]:
    return lambda function: function


def _retrying(n: int, times: int = 1) -> Any:
    try:
        return work.flaky(n, times)
    except Flaky as error:
        raise current_task.retry(exc=error, countdown=_RETRY_SEC, max_retries=5) from error


def _reveal(n: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """All that a message brings to its task."""
    request = current_task.request
    names = (
        'args',
        'kwargs',
        'reply_to',
        'correlation_id',
        'root_id',
        'parent_id',
        'expires',
        'eta',
        'shadow',
        'retries',
        'timelimit',
        'ignore_result',
        'argsrepr',
        'kwargsrepr',
        'group',
        'stamps',
        'stamped_headers',
        'origin',
        'replaced_task_nesting',
    )
    found = {name: getattr(request, name, None) for name in names}
    headers = dict(request.headers or {})
    return {
        **found,
        'priority': (request.delivery_info or {}).get('priority'),
        'headers': headers,
        'node': work.order().node,
        'links': [dict(link).get('task') for link in request.callbacks or ()],
        'hops': getattr(request, 'jobsync_hops', None),
    }


def _add_tasks(
    app: Celery, once: Callable[..., Any], without: set[str], free: bool = False
) -> None:
    retry = {
        'autoretry_for': (Flaky,),
        'max_retries': 5,
        'retry_backoff': False,
        'default_retry_delay': _RETRY_SEC,
    }

    def task(name: str, function: Callable[..., Any], **options: Any) -> None:
        if name not in without:
            # Not shared: the test process has several apps.
            app.task(name=name, shared=False, **options)(function)

    task('keyed', once(key='k:{n}', on_duplicate='result')(work.keyed))
    task('body', once(key='b:{n}', on_duplicate='result')(work.body))
    task('limited', once(key='b:{n}')(work.body), rate_limit='20/s')
    task('by_id', once()(work.by_id))
    task('plain', work.plain)
    task('routed', work.routed, jobsync_key='r:{n}')
    task('pinned', work.pinned, jobsync_pin=['gpu-%'])
    task('preferred', work.pinned, jobsync_pin=['best', 'gpu-%', '%'])
    if free:
        task('homeless', once(key='g:{n}', affinity=False)(work.pinned))
    else:
        task('homeless', once(key='g:{n}')(work.pinned), jobsync_pin=['missing-%'])
    task('late', once(key='t:{n}', on_duplicate='result')(work.late))
    task('loose', once(key='l:{n}', affinity=False)(work.loose))
    task('hasty', once(key='h:{n}', affinity=False, on_running='skip')(work.hasty))
    task('reveal', _reveal, jobsync_key='v:{n}')
    task('flaky', once(key='f:{n}')(work.flaky), **retry)
    task('retrying', once(key='f:{n}')(_retrying))
    task('sour', once(key='s:{n}')(work.sour))
    task(
        'poison',
        once(key='x:{n}', max_lost=3)(work.poison),
        **retry | {'autoretry_for': (Exception,)},
    )
    task('overdue', once(key='o:{n}')(work.overdue), time_limit=1)
    task('overdue_softly', once(key='o:{n}')(work.overdue), soft_time_limit=1)
    task('add', once(key='a:{tag}:{x}:{y}')(work.add))
    task('total', once(key='t:{tag}')(work.total))
    task('seal', once(key='c:{tag}')(work.seal))
    task('seal_error', _seal_error)
    app.task(_add_up, name='add_up', shared=False)
    if 'classy' not in without:
        app.register_task(
            type('Classy', (_Based,), {'name': 'classy', 'run': once(key='b:{n}')(_classy)})()
        )


def _add_up(tag: str, size: int) -> None:
    """Sends a chord from a worker, for result backends that the test process has not got."""
    tasks = current_task.app.tasks
    chord(
        [tasks['add'].s(1, number, tag=tag) for number in range(size)], tasks['total'].s(tag=tag)
    ).apply_async()


def set_up_django(database: str) -> None:
    """Results are in the test's database, by way of Django."""
    import django
    from django.conf import settings

    url = urlsplit(database)
    settings.configure(
        INSTALLED_APPS=['django_celery_results'],
        USE_TZ=True,
        DEFAULT_AUTO_FIELD='django.db.models.AutoField',
        DATABASES={
            'default': {
                'ENGINE': 'django.db.backends.postgresql',
                'NAME': url.path[1:],
                'USER': url.username,
                'PASSWORD': url.password,
                'HOST': url.hostname,
                'PORT': url.port,
            }
        },
    )
    django.setup()
    # Celery does this itself where DJANGO_SETTINGS_MODULE is set.
    signals.worker_process_init.connect(_forget_connections, weak=False)


def _forget_connections(**_: Any) -> None:
    """A forked process must not use its parent's connections."""
    from django.db import connections

    for connection in connections.all(initialized_only=True):
        connection.connection = None


class _Based(Task):  # type: ignore[misc]  # celery has no types
    abstract = True


def _classy(self: Any, n: int, sleep: float = 0.0) -> dict[str, Any]:
    return work.body(n, sleep)


def _die_before_counting(order: Order) -> None:
    """The first process that counts a member of a chord dies, after the member's result is stored;
    with the tag 'all' its worker, too.
    """
    django = order.results == 'django-db'
    backend: Any = symbol_by_name(
        'django_celery_results.backends:DatabaseBackend'
        if django
        else 'celery.backends.redis:RedisBackend'
    )
    count = backend.on_chord_part_return

    def dying(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        tag = (request.kwargs or {}).get('tag', '')
        if tag.startswith('dies'):
            try:
                os.close(os.open(f'{order.notes}.{tag}', os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                if tag.endswith('all'):
                    os.kill(os.getppid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
        return count(self, request, *args, **kwargs)

    backend.on_chord_part_return = dying


def _seal_error(request: Any, error: BaseException, traceback: Any) -> None:
    work.note('end', f'e:{request.id}', repr(error))
