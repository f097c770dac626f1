"""A RabbitMQ that lets nobody keep a message for longer than some seconds."""

from __future__ import annotations

import contextlib

import pika
from pika.exceptions import ChannelClosedByBroker

from .brokers import RabbitServer
from .newer_rabbitmq import newer_rabbitmq

__all__ = ['impatient_rabbitmq', 'outlast']


def impatient_rabbitmq() -> RabbitServer:
    """A server whose `consumer_timeout` is three seconds.

    Raises:
        BrokerUnavailable: There is none whose queues may have a limit of their own.
    """
    return RabbitServer(
        newer_rabbitmq(), {'consumer_timeout': 3000}, {'channel_tick_interval': 500}
    )


def outlast(url: str) -> None:
    """Until it has lost its patience with whoever keeps a message from now on."""
    # Twice, since it looks at each channel at times of its own.
    for queue in ('kept', 'kept too'):
        with (
            pika.BlockingConnection(pika.URLParameters(url)) as connection,
            contextlib.suppress(ChannelClosedByBroker),
        ):
            channel = connection.channel()
            channel.queue_declare(queue, auto_delete=True)
            channel.basic_publish('', queue, b'')
            for _ in channel.consume(queue, inactivity_timeout=0.2):
                pass
