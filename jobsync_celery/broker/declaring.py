"""Making the plugin's queues on RabbitMQ, also where they are there with other arguments than the
configuration gives now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from amqp.exceptions import NotFound, PreconditionFailed
from kombu.entity import Queue

from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.consumer_timeout import ARGUMENT

from ..logs import get_logger

__all__ = ['declare_exchange', 'declare_queue', 'delete_empty', 'is_no_queue']

logger = get_logger(__name__)

#: Arguments that RabbitMQ refuses for one type of queues, and what they are for.
_NOT_ALL_TAKE = {'x-max-priority': 'priorities', ARGUMENT: 'limit for acknowledgements'}


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


def declare_queue(
    connection: Any,
    queue: Any,
    empty: Callable[[], bool] | None = None,
    bindings: Sequence[tuple[str, str]] = (),
) -> bool:
    """Make a queue and bind it. Where it is there with other arguments, it is made anew, if that is
    possible without losing a message.

    Args:
        connection: Each failure closes a channel of it.
        queue: The queue; its exchange is there.
        empty: Moves its messages elsewhere, and tells whether it may be deleted then; None: it is
            never made anew.
        bindings: The ways into it: exchange and routing key.

    Returns:
        Whether it has the arguments that the configuration gives; if not, it is used as it is.
        What its type does not take is left out of its arguments here.
    """
    try:
        _declare(connection, queue)
        return True
    except PreconditionFailed as error:
        reason = error.message
    arguments = dict(queue.queue_arguments or {})
    for name, meaning in _NOT_ALL_TAKE.items():
        if f"invalid arg '{name}'" in reason and name in arguments:
            del arguments[name]
            queue.queue_arguments = arguments
            logger.info('JobSync: the queue %s has no %s, by its type', queue.name, meaning)
            return declare_queue(connection, queue, empty, bindings)
    if empty is not None:
        try:
            gone = empty()
            if gone:
                channel = connection.channel()
                gone = delete_empty(channel, queue.name, bindings)
                _close(channel)
            if gone:
                _declare(connection, queue)
        except PreconditionFailed as error:
            gone, reason = False, error.message
            _have(connection, queue)
        if gone:
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


def delete_empty(channel: Any, name: str, bindings: Sequence[tuple[str, str]]) -> bool:
    """Delete a queue if nothing is in it and nobody consumes it; whether it is gone.

    Not with the flags `if_unused` and `if_empty`: of a quorum queue RabbitMQ refuses them, with an
    error that closes the connection. So the ways into it are cut first, and what would come in
    between is parked. It is for the caller to see to it that nobody begins to consume it meanwhile.

    Args:
        channel: An open channel; of no use any more where there is no such queue.
        name: The queue's name.
        bindings: The ways into it: exchange and routing key.
    """
    try:
        if not _is_idle(channel, name):
            return False
        for exchange, key in bindings:
            channel.queue_unbind(name, exchange, key)
        if not _is_idle(channel, name) or not _gives_none(channel, name):
            # a message, or a consumer, has come
            for exchange, key in bindings:
                channel.queue_bind(name, exchange, key)
            return False
        channel.queue_delete(name)
    except NotFound as error:
        if not is_no_queue(error):
            raise  # its server is down
    return True


def _gives_none(channel: Any, name: str) -> bool:
    """Whether nothing is in a queue, by itself. Of a quorum queue whose leader is away RabbitMQ
    says that it has no messages, and deletes it with all that it has.
    """
    message = channel.basic_get(name)
    if message is None:
        return True
    channel.basic_reject(message.delivery_tag, requeue=True)
    return False


def is_no_queue(error: NotFound) -> bool:
    """Whether RabbitMQ says that there is no such queue, and not that its server is down."""
    return 'no queue' in str(error)


def _is_idle(channel: Any, name: str) -> bool:
    found = channel.queue_declare(name, passive=True)
    return not found.message_count and not found.consumer_count


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
