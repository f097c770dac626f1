"""The app of the suite, plain or with JobSync; `celery -A tests.hostile.celery_worker worker` runs
it.
"""

from __future__ import annotations

from typing import Any, cast

from celery import Celery, bootsteps
from kombu.entity import Exchange, Queue
from kombu.message import Message

from ..parity.harness import Order

__all__ = ['make_app']


def make_app(order: Order) -> Celery:
    """An app whose queue has a dead-letter exchange where the broker knows one."""
    app = Celery('hostile', broker=order.broker, backend=order.results, set_as_current=False)
    dead = Exchange('dead', type='fanout', durable=True)
    arguments = {'x-dead-letter-exchange': 'dead'} if order.broker.startswith('amqp') else None
    app.conf.update(
        broker_connection_retry_on_startup=True,
        result_expires=3600,
        task_publish_retry=True,
        task_queues=[
            Queue(
                'celery',
                Exchange('celery', type='direct'),
                routing_key='celery',
                queue_arguments=arguments,
            )
        ],
        task_default_queue='celery',
    )
    app.extra = (dead, Queue('dead', dead, routing_key=''))
    once: Any = lambda **options: lambda function: function  # noqa: E731
    if order.mode == 'plain':
        app.steps['consumer'].add(_catcher(order))
    else:
        from jobsync_celery import JobSync, exactly_once

        JobSync(app, database_url=order.database, **order.settings)
        once = exactly_once

    def note(n: Any) -> Any:
        order.note(f'ran {n}' if isinstance(n, int) else 'ran odd')
        return n

    def fails(*args: Any, **kwargs: Any) -> str:
        raise LookupError('no tenant here')

    def keyed(n: Any) -> Any:
        return note(n)

    def task(name: str, key: Any = None, **options: Any) -> None:
        app.task(name=name, shared=False, **(options if order.mode != 'plain' else {}))(
            once(key=key)(keyed) if key else keyed
        )

    task('keyed', 'k:{n}')
    task('good', 'g:{n}')
    task('plain')
    task('pinned', jobsync_key='p:{n}', jobsync_pin=['%'])
    task('homeless', jobsync_key='h:{n}', jobsync_pin=['missing-%'])
    task('keyless', fails)
    task('empty', lambda n: '')
    return app


def _catcher(order: Order) -> type:
    """A plain worker that says which message would have ended it, and goes on."""

    class Catcher(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
        requires = ('celery.worker.consumer.connection:Connection',)

        def __init__(self, parent: Any, **options: Any) -> None:
            super().__init__(parent, **options)
            make, kind = parent.create_task_handler, cast(Any, Message)
            ack = kind.ack
            # In a solo pool the task has run in the callback, and its acknowledgement is under way
            # when that raises.
            kind.ack = lambda message, multiple=False: (
                None if message.acknowledged else ack(message, multiple)
            )

            def create_task_handler() -> Any:
                handle = make()

                def receive(message: Any) -> None:
                    try:
                        handle(message)
                    except Exception:
                        order.note(f'ended {message.headers.get("hostile")}')
                        message.reject()

                return receive

            parent.create_task_handler = create_task_handler

    return Catcher
