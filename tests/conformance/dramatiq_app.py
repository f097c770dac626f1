"""The Dramatiq broker of the suite with its actors: the same in workers and in the test process,
made from an order.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.errors import Retry
from dramatiq.middleware import AsyncIO, CurrentMessage, GroupCallbacks, default_middleware
from dramatiq.rate_limits.backends import RedisBackend as Barriers
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from redis.cluster import RedisCluster
from redis.sentinel import Sentinel

from . import work
from .work import Flaky, Order

__all__ = ['App', 'make_app', 'use_in_worker']


@dataclass
class App:
    """A broker with the suite's actors.

    Attributes:
        broker: The broker.
        results: Its result backend.
        plugin: Its JobSync, if it has one.
        actors: By name.
    """

    broker: Any
    results: Any
    plugin: Any = None
    actors: dict[str, Any] = field(default_factory=dict)

    def close(self) -> None:
        """Give back its connections."""
        if isinstance(self.broker, RedisBroker):
            self.broker.client.close()
        self.broker.close()
        self.results.client.connection_pool.disconnect()


def make_app(order: Order) -> App:
    """An app with all actors, with JobSync or without."""
    # Dramatiq 1 would have each worker serve metrics on one and the same port, by a process of its
    # own.
    usual: Any = [kind() for kind in default_middleware if kind.__name__ != 'Prometheus']
    broker: Any = (
        RabbitmqBroker(url=order.broker, confirm_delivery=True, middleware=usual)
        if order.broker.startswith('amqp')
        else _redis_broker(order, middleware=usual)
    )
    app = App(broker, RedisBackend(url=order.results))
    decorate: Callable[..., Any] = _undecorated
    if order.jobsync:
        from jobsync_dramatiq import JobSync, exactly_once

        app.plugin = JobSync(database_url=order.database, node_name=order.node, **order.settings)
        broker.add_middleware(app.plugin)
        decorate = exactly_once
    loop = [AsyncIO()] if order.conf.get('asyncio', True) else []
    for middleware in (
        *loop,
        CurrentMessage(),
        Results(backend=app.results, store_results=True),
        GroupCallbacks(Barriers(url=order.results)),
    ):
        broker.add_middleware(middleware)
    _add_actors(
        app,
        decorate,
        {*order.without, *({'pinned', 'preferred', 'homeless'} - set(order.pins))},
        'homeless' in order.loose,
    )
    return app


def _redis_broker(order: Order, **more: Any) -> RedisBroker:
    """By Sentinel where the broker's URL says so, as with Celery."""
    sentinel: Any = Sentinel  # it has no types
    if 'namespace' in order.conf:
        more['namespace'] = order.conf['namespace']
    if order.conf.get('cluster'):
        more['client'] = RedisCluster.from_url(order.broker)
    elif order.broker.startswith('sentinel:'):
        url = urlsplit(order.broker)
        found: Any = sentinel([(url.hostname, url.port)], **order.conf['sentinel'])
        more['client'] = found.master_for(
            order.conf['master_name'], password=url.password, db=int(url.path[1:])
        )
    else:
        more['url'] = order.broker
    return RedisBroker(**more)


def use_in_worker(order: Order, app: App) -> None:
    """Tell the actors' bodies what this process is."""
    plugin = app.plugin
    work.now.order = order
    work.now.message_id = lambda: str(_message().message_id)
    work.now.attempt = lambda: int(_message().options.get('retries', 0))
    work.now.node = lambda: (
        str(plugin.job.node_name) if plugin is not None and plugin.job is not None else order.node
    )
    if plugin is not None:
        from jobsync_dramatiq import current_execution

        work.now.execution = current_execution


def _undecorated(**options: Any) -> Callable[[Any], Any]:
    return lambda function: function


def _message() -> Any:
    return CurrentMessage.get_current_message()


def _retrying(n: int, times: int = 1) -> Any:
    try:
        return work.flaky(n, times)
    except Flaky as error:
        raise Retry(str(error), delay=50) from error


async def _awaited(n: int, sleep: float = 0.0) -> dict[str, Any]:
    """A coroutine."""
    work.note('start', f'w:{n}', work.now.attempt())
    await asyncio.sleep(sleep)
    work.note('end', f'w:{n}')
    return {'n': n, 'message': work.now.message_id()}


def _told(message: dict[str, Any], outcome: dict[str, Any] | Any) -> None:
    """A callback of a message that has succeeded or failed."""
    key = f'd:{message["actor_name"]} {message["args"][0]}'
    work.note('start', key)
    work.note('end', key)


def _reveal(n: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """All that a message brings to its actor."""
    message = _message()
    found = {
        name: getattr(message, name) for name in ('queue_name', 'actor_name', 'message_timestamp')
    }
    return {
        **found,
        'args': [n, *args],
        'kwargs': kwargs,
        'options': dict(message.options),
        'node': work.node(),
        'pid': os.getpid(),
    }


def _add_actors(app: App, once: Callable[..., Any], without: set[str], free: bool = False) -> None:
    quick = {'min_backoff': 50, 'max_backoff': 200, 'max_retries': 5}

    def actor(name: str, function: Callable[..., Any], **options: Any) -> None:
        if name in without:
            return
        if app.plugin is None:
            options = {
                option: value
                for option, value in options.items()
                if not option.startswith('jobsync_')
            }
        # An error that Dramatiq retried would hide what the plugin should have seen to.
        declare: Any = dramatiq.actor  # its types do not know options
        app.actors[name] = declare(
            function, actor_name=name, broker=app.broker, **{'max_retries': 0, **options}
        )

    actor('keyed', once(key='k:{n}')(work.keyed))
    actor('body', once(key='b:{n}')(work.body), queue_name='second')
    actor('patient', once(key='b:{n}')(work.body), queue_name='second', priority=100)
    actor('by_id', once()(work.by_id))
    actor('plain', work.plain)
    actor('routed', work.routed, jobsync_key='r:{n}')
    actor('pinned', work.pinned, jobsync_pin=['gpu-%'])
    actor('preferred', work.pinned, jobsync_pin=['best', 'gpu-%', '%'])
    if free:
        actor('homeless', once(key='g:{n}', affinity=False)(work.pinned))
    else:
        actor('homeless', once(key='g:{n}')(work.pinned), jobsync_pin=['missing-%'])
    actor('late', once(key='t:{n}')(work.late))
    actor('loose', once(key='l:{n}', affinity=False)(work.loose))
    actor('hasty', once(key='h:{n}', affinity=False, on_running='skip')(work.hasty))
    actor('reveal', _reveal, jobsync_key='v:{n}', queue_name='second')
    actor('flaky', once(key='f:{n}')(work.flaky), queue_name='second', **quick)
    actor('retrying', once(key='f:{n}')(_retrying), **quick)
    actor('sour', once(key='s:{n}')(work.sour))
    actor(
        'poison',
        once(key='x:{n}', max_lost=2)(work.poison),
        queue_name='second',
        on_failure='told',
        **quick,
    )
    actor('overdue', once(key='o:{n}')(work.overdue), time_limit=1000)
    actor('awaited', once(key='w:{n}')(_awaited))
    actor('told', _told)
    actor('add', once(key='a:{tag}:{x}:{y}')(work.add), queue_name='second')
    actor('seal', once(key='c:{tag}')(work.seal))
