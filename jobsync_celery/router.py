"""Producers: messages of coordinated tasks go straight to the queue of the node that owns them."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.app.routes import Router
from celery.utils.imports import symbol_by_name
from kombu.entity import Queue

from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.routing import HOPS, KEY

from .logs import get_logger
from .mail import node_queue_of
from .redis_client import keep_client

if TYPE_CHECKING:
    from celery import Celery

    from .plugin import JobSync

__all__ = ['install_router', 'mark_message']

logger = get_logger(__name__)


class OwnerRouter(Router):  # type: ignore[misc]  # celery has no types
    """The app's router, followed by a look at the owner map."""

    plugin: JobSync
    #: Queues of nodes by name, as they are made when they are needed first.
    node_queues: dict[str, Queue]

    def route(self, options: Any, name: str, args: Any = (), kwargs: Any = None, task_type: Any = None) -> Any:
        """Where a message goes: by task_routes and options; and where it has an owner with a queue, there."""
        options = super().route(options, name, args, kwargs, task_type)
        queue = self.plugin.owner_queue(name, args or (), kwargs or {}, options.get('task_id') or '')
        if queue is not None:
            for place in ('queue', 'exchange', 'routing_key', 'exchange_type'):
                options.pop(place, None)
            declared = self.node_queues.get(queue) or self.node_queues.setdefault(queue, node_queue_of(self.plugin, queue, declare=False))
            options.update(queue=declared, routing_key=queue)
            options.setdefault('declare', ())  # its node has declared it
            if declared.exchange.name:
                options['exchange'] = declared.exchange.name
        return options


def install_router(app: Celery, plugin: JobSync) -> None:
    """Give the app a router that knows owners, whatever `task_routes` is or becomes, and connections that do not waste time."""
    base = symbol_by_name(app.amqp_cls)
    router = type('OwnerRouter', (OwnerRouter,), {'plugin': plugin, 'node_queues': {}})

    def make(self: Any, queues: Any = None, create_missing: Any = None) -> Any:
        return router(self.routes, queues or self.queues, app.either('task_create_missing_queues', create_missing), app=app)

    app.amqp_cls = type('AMQP', (base,), {
        'Router': make, 'Connection': staticmethod(lambda *args, **options: keep_client(base.Connection(*args, **options)))})
    vars(app).pop('amqp', None)


def mark_message(plugin: JobSync, headers: dict[str, Any], body: Any) -> None:
    """Write a message's route into its headers, so that it is computed once."""
    headers.pop(HOPS, None)
    headers.pop(KEY, None)
    try:
        route = plugin.tasks.route_of(headers['task'], body[0], body[1], headers['id'])
    except (JobSyncError, TypeError) as error:
        # The task itself will say what is wrong with its arguments.
        level = logger.warning if isinstance(error, ConfigurationError) else logger.debug
        level('Task %s[%s] has no key: %s', headers['task'], headers['id'], error)
        return
    if route is not None:
        headers[KEY] = route
