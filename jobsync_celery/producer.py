"""Producers: messages of coordinated tasks go straight to the queue of the node that owns them.

All of it happens in the app's own `amqp`, where each message of this app passes, and no other
app's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import current_task
from celery.utils.imports import symbol_by_name
from kombu.entity import Queue

from jobsync_core import clock
from jobsync_core.errors import JobSyncError
from jobsync_core.logs import Repeats
from jobsync_core.worker.incoming import Refused, read_stamps
from jobsync_core.worker.lookup import OwnerLookup
from jobsync_core.worker.node_of_tests import node_of_tests
from jobsync_core.worker.routing import HOME, HOPS, KEY, REDELIVERED, REFUSED, RETURNS

from .application import Application
from .broker.homes import home_name, is_only_place
from .logs import get_logger
from .redis.client import keep_client

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['install_producer']

logger = get_logger(__name__)

_PLACE = ('queue', 'exchange', 'routing_key', 'exchange_type')
_STAMPS = (KEY, HOPS, HOME, REDELIVERED, REFUSED, RETURNS)


def install_producer(application: Application, owners: OwnerLookup) -> None:
    """Have the app's messages addressed, whatever `task_routes` is or becomes, and give it
    connections that do not waste time.

    Args:
        application: The app.
        owners: Knows where messages of coordinated tasks go.
    """
    app: Any = application.app
    base = symbol_by_name(app.amqp_cls)
    address = _Addresser(application, owners)

    def create_task_sender(self: Any) -> Any:
        send = base._create_task_sender(self)

        def send_task_message(
            producer: Any, name: str, message: Any, *args: Any, **options: Any
        ) -> Any:
            if node_of_tests() is None and not args:  # Celery itself gives names
                address(message, options)
            return send(producer, name, message, *args, **options)

        return send_task_message

    app.amqp_cls = type(
        'AMQP',
        (base,),
        {
            '_create_task_sender': create_task_sender,
            'Connection': staticmethod(
                lambda *args, **options: keep_client(base.Connection(*args, **options))
            ),
        },
    )
    vars(app).pop('amqp', None)


class _Addresser:
    """Writes a message's key and its home queue on it, and sends it to its owner.

    Args:
        application: The app.
        owners: Knows where messages go.
    """

    def __init__(self, application: Application, owners: OwnerLookup) -> None:
        self._application = application
        self._app: Celery = application.app
        self._owners = owners
        #: Queues of nodes by name, as they are made when they are needed first.
        self._node_queues: dict[str, Queue] = {}
        self._repeats = Repeats()

    def __call__(self, message: Any, options: dict[str, Any]) -> None:
        """Address a message.

        Args:
            message: As `app.amqp.create_task_message` made it; its headers are changed.
            options: Where it goes, as the app's routes and the caller said; changed where it has an
                owner with a queue.
        """
        headers, _, body, _ = message
        # A retry brings those of the message that it repeats.
        for stamp in _STAMPS:
            headers.pop(stamp, None)
        if options.get('headers'):
            options['headers'] = {
                name: value for name, value in options['headers'].items() if name not in _STAMPS
            }
        name = headers.get('task')
        try:
            if isinstance(name, str) and isinstance(body, tuple) and name in self._app.tasks:
                self._address(name, headers, body, options)
        # settings that cannot work, for example; whoever receives the message finds its owner
        except Exception as error:
            more = self._repeats.say(repr(error), clock.now())
            if more is not None:
                logger.warning(
                    'Task %s[%s] goes to its home queue: %s%s', name, headers.get('id'), error, more
                )

    def _address(
        self, name: str, headers: dict[str, Any], body: Any, options: dict[str, Any]
    ) -> None:
        self._leave_node_queue(options)
        route = self._route_of(name, body, headers.get('id'))
        if route is None:
            return
        headers[KEY] = route
        home = self._home_of(options)
        if home is None:
            # an exchange decides, for any number of queues: that of native delayed delivery, or one
            # that the caller or the settings chose
            return
        headers[HOME] = home
        queue = self._queue_of(route, home)
        if queue is None:
            return
        declared = self._node_queues.get(queue) or self._node_queues.setdefault(
            queue, self._application.queues.make(queue, declare=False)
        )
        for place in _PLACE:
            options.pop(place, None)
        exchange, key = self._application.queues.way_to(queue)
        options.update(queue=declared, routing_key=key)
        options.setdefault('declare', ())  # its node has declared it
        if exchange:
            options['exchange'] = exchange

    def _home_of(self, options: dict[str, Any]) -> str | None:
        queue, queues = options.get('queue'), self._app.amqp.queues
        if not queue:
            if options.get('exchange'):
                return None
            queue = str(self._app.conf.task_default_queue)
        if isinstance(queue, str):
            queue = queues.aliases.get(queue) or queues.get(queue) or queue
        if not is_only_place(queue, queues.values(), options):
            return None
        return queue if isinstance(queue, str) else home_name(queue)

    def _queue_of(self, route: str, home: str) -> str | None:
        try:
            return self._owners.queue_of(route, home)
        except JobSyncError as error:
            logger.debug('a message goes to its home queue: %s', error)
            return None

    def _route_of(self, name: str, body: Any, message_id: Any) -> str | None:
        route = self._application.tasks.route_of(name, body[0], body[1], message_id)
        if isinstance(route, Refused):
            more = self._repeats.say((name, 'refused'), clock.now())
            if more is not None:
                logger.warning(
                    'Task %s[%s] goes to its home queue, where it will be refused: %s%s',
                    name,
                    message_id,
                    route.reason,
                    more,
                )
            return None
        return route

    def _leave_node_queue(self, options: dict[str, Any]) -> None:
        """A task that sends itself again gives the place where its message came from: the queue of
        a node. It goes home instead.
        """
        queues, exchange = self._application.queues, options.get('exchange')
        places = (_name_of(options.get('queue')) or '', _name_of(exchange) or '')
        if not queues.is_of_cluster(places[0]) and not queues.is_node_exchange(places[1]):
            return
        request = current_task.request if current_task else None
        home = read_stamps({HOME: getattr(request, HOME, None)}).home
        if not home or queues.is_of_cluster(home):
            home = self._app.conf.task_default_queue
        for place in _PLACE:
            options.pop(place, None)
        options['queue'] = self._app.amqp.queues[home]


def _name_of(queue: Any) -> str | None:
    return queue if isinstance(queue, str) else getattr(queue, 'name', None)
