"""The Celery app of the parity suite: `celery -A tests.parity.celery_app:worker_app worker`, and
the sender's.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.exceptions import Ignore, Reject

from .harness import LAST, Order

__all__ = ['OTHER_QUEUE', 'make_app']

OTHER_QUEUE = 'other'
_CONF: dict[str, Any] = {
    'broker_connection_retry_on_startup': True,
    'accept_content': ['json', 'pickle', 'yaml', 'msgpack'],
    'result_accept_content': ['json', 'pickle'],
    'worker_hijack_root_logger': True,
    'result_expires': 3600,
    'task_routes': {'routed': {'queue': OTHER_QUEUE}},
    'worker_proc_alive_timeout': 20,
}


class Odd(Exception):
    """What tasks raise."""


class Unpicklable(Exception):
    """It cannot be made again from its arguments."""

    def __init__(self, first: str, second: Callable[[], None]) -> None:
        super().__init__(first)
        self.second = second


def make_app(order: Order, conf: dict[str, Any], plugin: bool) -> Celery:
    """An app with all tasks.

    Args:
        order: The side's.
        conf: Settings of the configuration.
        plugin: Whether JobSync is installed: not in senders.
    """
    app = Celery('parity', broker=order.broker, backend=order.results or None, set_as_current=False)
    app.conf.update({**_CONF, **conf})
    once: Callable[[Any], Any] = _same
    if plugin:
        from jobsync_celery import JobSync, exactly_once

        JobSync(
            app,
            database_url=order.database,
            coordinate='keyed' if order.mode in ('idle', 'free') else 'all',
            **order.settings,
        )
        if order.mode in ('once', 'free'):
            once = exactly_once(affinity=False if order.mode == 'free' else None)
    _add_tasks(app, order, once)
    return app


def _same(function: Any) -> Any:
    return function


def _add_tasks(app: Celery, order: Order, once: Callable[[Any], Any]) -> None:
    def task(name: str, **options: Any) -> Callable[[Any], Any]:
        def add(function: Any) -> Any:
            return app.task(name=name, shared=False, **options)(once(function))

        return add

    @task('last')
    def last() -> None:
        order.note(LAST)

    @task('echo')
    def echo(label: str, *args: Any, **kwargs: Any) -> Any:
        order.note(label)
        return args[0] if args else kwargs.get('value')

    @task('routed')
    def routed(label: str) -> str:
        order.note(label)
        return label

    @task('add')
    def add(x: int, y: int, label: str) -> int:
        order.note(label)
        return x + y

    @task('total')
    def total(values: list[int], label: str) -> int:
        order.note(label)
        return sum(values)

    @task('bound', bind=True)
    def bound(self: Any, label: str) -> list[Any]:
        order.note(label)
        request = self.request
        return [request.id is not None, request.retries, request.is_eager, self.name]

    @task('seen', bind=True)
    def seen(self: Any, label: str) -> Any:
        """What came with the message."""
        order.note(label)
        request = self.request
        info = request.delivery_info or {}
        return [
            request.shadow,
            request.timelimit,
            request.ignore_result,
            (request.headers or {}).get('colour'),
            info.get('priority'),
            request.correlation_id == request.id,
            request.expires is not None,
            request.eta is not None,
        ]

    @task('limited', rate_limit='20/s')
    def limited(label: str) -> None:
        order.note(label)

    @task('silent', ignore_result=True)
    def silent(label: str) -> str:
        order.note(label)
        return 'nobody asks'

    @task('early', acks_late=False)
    def early(label: str) -> str:
        order.note(label)
        return 'early'

    @task('late', acks_late=True)
    def late(label: str, fails: bool = False) -> str:
        order.note(label)
        if fails:
            raise Odd('late')
        return 'late'

    @task('sour')
    def sour(label: str) -> None:
        order.note(label)
        raise Odd('sour')

    @task('unpicklable')
    def unpicklable(label: str) -> None:
        order.note(label)
        raise Unpicklable('odd', lambda: None)

    @task('unencodable')
    def unencodable(label: str) -> Any:
        order.note(label)
        return object

    @task('retrying', bind=True, max_retries=3)
    def retrying(self: Any, label: str, times: int) -> int:
        order.note(f'{label}.{self.request.retries}')
        if self.request.retries < times:
            raise self.retry(exc=Odd(f'attempt {self.request.retries}'), countdown=0.3)
        return int(self.request.retries)

    @task(
        'autoretry',
        bind=True,
        autoretry_for=(Odd,),
        default_retry_delay=0.3,
        max_retries=2,
        retry_backoff=False,
    )
    def autoretry(self: Any, label: str, times: int) -> int:
        order.note(f'{label}.{self.request.retries}')
        if self.request.retries < times:
            raise Odd(f'attempt {self.request.retries}')
        return int(self.request.retries)

    @task('softly', soft_time_limit=1)
    def softly(label: str) -> None:
        order.note(label)
        _until(30)

    @task('hard', time_limit=1)
    def hard(label: str) -> None:
        order.note(label)
        _until(30)

    @task('sleepy')
    def sleepy(label: str, seconds: float) -> str:
        order.note(label)
        time.sleep(seconds)
        return 'slept'

    @task('replacing', bind=True)
    def replacing(self: Any, label: str) -> None:
        order.note(label)
        raise self.replace(app.tasks['echo'].s(f'{label}.instead', 'instead'))

    @task('ignoring')
    def ignoring(label: str) -> None:
        order.note(label)
        raise Ignore

    @task('rejecting', acks_late=True)
    def rejecting(label: str) -> None:
        order.note(label)
        raise Reject('no', requeue=False)

    @task('poisonous', acks_late=True)
    def poisonous(label: str) -> None:
        # How often it runs is not compared: what a quorum queue counts begins anew where a message
        # is sent on to another.
        if label not in Path(order.notes).read_text().splitlines():
            order.note(label)
        raise Reject('once more', requeue=True)

    @task('rejecting_once', bind=True, acks_late=True)
    def rejecting_once(self: Any, label: str) -> str:
        order.note(label)
        if not (self.request.delivery_info or {}).get('redelivered'):
            raise Reject('once more', requeue=True)
        return 'the second time'

    @task('sending')
    def sending(label: str) -> str:
        order.note(label)
        app.tasks['echo'].delay(f'{label}.inner', 1)
        return 'sent'

    @task('stateful', bind=True)
    def stateful(self: Any, label: str) -> str:
        order.note(label)
        self.update_state(state='PROGRESS', meta={'done': 1})
        return 'done'

    # Celery calls these two as functions, without a message.
    def failed(request: Any, error: Any, traceback: Any) -> None:
        order.note('link_error.handler')

    def failed_chord(request: Any, error: Any, traceback: Any) -> None:
        order.note('chord_error.handler')

    for handler in (failed, failed_chord):
        app.task(name=handler.__name__, shared=False)(handler)

    class Classy(Task):  # type: ignore[misc]
        name = 'classy'

        def run(self, label: str) -> str:
            order.note(label)
            return 'classy'

    app.register_task(Classy())

    if importlib.util.find_spec('pydantic') is not None and _takes_pydantic():
        pydantic: Any = importlib.import_module('pydantic')

        class Item(pydantic.BaseModel):  # type: ignore[misc]
            number: int

        def priced(label: str, item: Item) -> Item:
            order.note(label)
            return Item(number=item.number + 1)

        priced.__annotations__.update(item=Item, **{'return': Item})
        app.task(name='priced', shared=False, pydantic=True)(once(priced))


def _takes_pydantic() -> bool:
    from celery import VERSION

    return tuple(VERSION[:2]) >= (5, 5)


def _until(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)
