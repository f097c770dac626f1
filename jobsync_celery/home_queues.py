"""Which queues a worker consumes: its home queues, and one of its node for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobsync_core.assignment.arguments import check_group
from jobsync_core.errors import ConfigurationError
from jobsync_core.logs import shown
from jobsync_core.worker.node import WorkerNode

from .broker.homes import home_name
from .broker.presence import Presence
from .broker.queues import Queues
from .logs import get_logger

__all__ = ['HomeQueues']

logger = get_logger(__name__)


class HomeQueues:
    """What `control add_consumer` and `cancel_consumer` do to a node. In the event loop, but for
    what the duties call.

    A home queue that is added is consumed at once, and so is the queue of this node as soon as it
    is there. Of one that is cancelled nothing more is taken at once; the queue of this node is
    consumed until all of its keys are given away.

    Args:
        app: The app.
        consumer: Celery's consumer; two of its methods are replaced.
        queues: The cluster's.
        node: This worker's node; None where it has none any more.
        changed: Called when another queue is to be consumed.
        presence: The worker's at the queues of its node; None where that is not shown.
    """

    def __init__(
        self,
        app: Any,
        consumer: Any,
        queues: Queues,
        node: Callable[[], WorkerNode | None],
        changed: Callable[[], object],
        presence: Presence | None = None,
    ) -> None:
        self._app = app
        self._consumer = consumer
        self._queues = queues
        self._node = node
        self._changed = changed
        self._presence = presence
        #: Queues of this node: whether each is to be consumed. The event loop keeps no order among
        #: its calls.
        self._wanted: dict[str, bool] = {}
        self._add, self._cancel = consumer.add_task_queue, consumer.cancel_task_queue
        consumer.add_task_queue, consumer.cancel_task_queue = self.add, self.cancel

    def add(self, queue: str, *args: Any, **options: Any) -> None:
        """In place of the consumer's add_task_queue."""
        node = self._node()
        try:
            if node is not None:
                # Before anything is declared: the broker may take a name that the database does
                # not, or make one up for none.
                self._check(queue)
            self._add(queue, *args, **options)
            self._changed()  # Celery consumes all of them now, with a lease or without
            if node is not None:
                self._begin(node, queue)
        except ConfigurationError as error:
            logger.error('JobSync: the queue %s is not consumed: %s', shown(queue), error)

    def cancel(self, queue: str) -> None:
        """In place of the consumer's cancel_task_queue."""
        node = self._node()
        if node is None:
            self._cancel(queue)
            return
        try:
            # Its keys are this node's all the same: what is sent for them would wait for ever.
            self._check(queue)
        except ConfigurationError as error:
            logger.error('JobSync: the queue %s is not cancelled: %s', shown(queue), error)
            return
        home = self._home_of(queue)
        self._cancel(queue)
        node.drop_home(home, self._done)

    def _begin(self, node: WorkerNode, queue: str) -> None:
        try:
            node.add_home(self._home_of(queue), self._ready)
        except ConfigurationError:
            self._cancel(queue)
            raise

    def _check(self, queue: str) -> None:
        check_group(queue)
        if self._queues.is_of_cluster(queue):
            raise ConfigurationError(
                "it is one of JobSync's own, which are looked after by themselves; name the queue "
                'that it is for'
            )

    def _home_of(self, queue: str) -> str:
        """The home queue of that name or alias."""
        known = self._app.amqp.queues
        found = known.aliases.get(queue) or known.get(queue)
        return home_name(found) if found is not None else queue

    def _ready(self, queue: str) -> None:
        self._want(queue, True)

    def _done(self, queue: str) -> None:
        self._want(queue, False)

    def _want(self, queue: str, wanted: bool) -> None:
        """By the duties' thread."""
        self._wanted[queue] = wanted
        self._consumer.call_soon(self._follow, queue)

    def _follow(self, queue: str) -> None:
        wanted = self._wanted.get(queue)
        if wanted:
            queues, consumer = self._app.amqp.queues, self._consumer.task_consumer
            if queue not in queues.consume_from:
                queues.select_add(self._queues.make(queue))
            if consumer is not None and not consumer.consuming_from(queue):
                if self._presence is not None:
                    self._presence.announce()
                consumer.add_queue(queues[queue])
                self._changed()
        elif wanted is False:
            del self._wanted[queue]
            self._cancel(queue)
            if self._presence is not None:
                self._presence.withdraw(queue)
