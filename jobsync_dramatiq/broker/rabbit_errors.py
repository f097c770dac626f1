"""What pika raises, as Dramatiq knows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dramatiq.errors import ConnectionClosed
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPChannelError, AMQPConnectionError, ChannelClosedByBroker

__all__ = ['BROKEN', 'is_absent', 'translated']

#: What pika raises where a connection or a channel is of no use any more. The last comes from a
#: broker that accepts a connection and then says nothing; it is no AMQPConnectionError.
BROKEN = (AMQPConnectionError, AMQPChannelError, OSError, AMQPConnectorException)


_NOT_FOUND = 404


def is_absent(error: ChannelClosedByBroker) -> bool:
    """Whether RabbitMQ says that there is no such queue. It says "not found" as well of one whose
    server is down, or that has no leader.
    """
    return error.reply_code == _NOT_FOUND and 'no queue' in error.reply_text


@contextmanager
def translated() -> Iterator[None]:
    """Have what pika raises be what Dramatiq's consumers raise."""
    try:
        yield
    except (*BROKEN, AssertionError) as error:
        raise ConnectionClosed(error) from error
