"""Making the plugin's queues on RabbitMQ, also where they are there with other arguments than the
configuration gives now.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amqp.exceptions import NotFound, PreconditionFailed
from kombu.entity import Queue

from jobsync_core.errors import ConfigurationError

from ..logs import get_logger

__all__ = ['declare_exchange', 'declare_queue']

logger = get_logger(__name__)


def declare_exchange(connection: Any, exchange: Any) -> None:
    """Make an exchange.

    Raises:
        ConfigurationError: It is there with other arguments. It cannot be used as it is: messages
            for queues that are gone would be lost.
    """
    channel = connection.channel()
    try:
        exchange(channel).declare()
    except PreconditionFailed as error:
        raise ConfigurationError(
            f'RabbitMQ has the exchange {exchange.name!r} with other arguments: {error.message}. '
            'Stop all workers of this cluster, delete '
            f'the exchange (rabbitmqadmin delete exchange name={exchange.name}; its queues stay), '
            'and start them again'
        ) from error
    _close(channel)


def declare_queue(connection: Any, queue: Any, empty: Callable[[], object] | None = None) -> bool:
    """Make a queue and bind it. Where it is there with other arguments, it is made anew, if that is
    possible without losing a message.

    Args:
        connection: Each failure closes a channel of it.
        queue: The queue; its exchange is there.
        empty: Moves its messages elsewhere; None: it is never made anew.

    Returns:
        Whether it has the arguments that the configuration gives; if not, it is used as it is.
    """
    try:
        _declare(connection, queue)
        return True
    except PreconditionFailed as error:
        reason = error.message
    if empty is not None:
        try:
            empty()
            channel = connection.channel()
            channel.queue_delete(queue.name, if_unused=True, if_empty=True)
            _close(channel)
            _declare(connection, queue)
        except PreconditionFailed as error:
            reason = error.message
            _have(connection, queue)
        else:
            logger.warning(
                'JobSync: the queue %s had other arguments than the configuration gives now, and '
                'was made anew; '
                'what was in it is parked for a moment',
                queue.name,
            )
            return True
    logger.warning(
        'JobSync: the queue %s has other arguments than the configuration gives now, and is used '
        'as it is: %s -- to have it '
        'made anew, stop all workers, run `celery -A proj jobsync evacuate`, and delete the queue',
        queue.name,
        reason,
    )
    channel = connection.channel()
    channel.queue_bind(
        queue=queue.name, exchange=queue.exchange.name, routing_key=queue.routing_key
    )
    _close(channel)
    return False


def _have(connection: Any, queue: Any) -> None:
    """Make a queue without arguments if it is not there: RabbitMQ refuses those that it was to
    have, as a quorum queue has no priorities.
    """
    channel = connection.channel()
    try:
        channel.queue_declare(queue.name, passive=True)
    except NotFound:
        _declare(
            connection,
            Queue(queue.name, queue.exchange, routing_key=queue.routing_key, durable=True),
        )
    _close(channel)


def _declare(connection: Any, queue: Any) -> None:
    channel = connection.channel()
    queue(channel).declare()
    _close(channel)


def _close(channel: Any) -> None:
    if channel.is_open:
        channel.close()
