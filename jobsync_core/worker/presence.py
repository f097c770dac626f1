"""A node's presence at one of its queues on RabbitMQ.

RabbitMQ does not tell what is not acknowledged. The queue of a node that was cut off from the
database looks empty and unused once the node has stopped consuming it, while work that has begun
goes on there; deleted, it would take that message along when the node dies. So the channel that
takes messages from a node's queue also consumes a second one, on which nothing ever comes: for as
long as that has a consumer, the first one is in use, whatever else it looks like. The channel's end
gives back what it had taken and ends the presence.
"""

from __future__ import annotations

__all__ = ['ARGUMENTS', 'presence_queue']

#: Of the second queue: not to be replicated, and gone by itself where nobody deletes it. To be
#: declared durable, as RabbitMQ means to give up others.
ARGUMENTS = {'x-queue-type': 'classic', 'x-expires': 600_000}


def presence_queue(queue: str) -> str:
    """Name of the queue by which it shows whether somebody takes from a node's queue.

    Args:
        queue: The node's queue.
    """
    return f'{queue}.present'
