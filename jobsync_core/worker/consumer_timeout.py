"""RabbitMQ's `consumer_timeout`: how long whoever takes a message may keep it without acknowledging
it, which a task that is acknowledged late does while it runs.

From 3.12 on RabbitMQ takes another limit with each queue, as an argument; older ones keep the
argument and do not look at it, and from 4.3 on classic queues have no limit and refuse it. So a
node's own queue is given one that no task outlasts, where it is taken. A queue of the user's own
is left as it is: who declares it with other arguments than its maker would be refused.
"""

from __future__ import annotations

__all__ = ['ARGUMENT', 'LONGEST_MS', 'REMEDY', 'is_heeded', 'is_timeout']

ARGUMENT = 'x-consumer-timeout'
#: A year.
LONGEST_MS = 365 * 24 * 60 * 60 * 1000
REMEDY = (
    'let RabbitMQ wait for longer than your longest task and ETA: in rabbitmq.conf with '
    'consumer_timeout = MILLISECONDS, or from 3.12 on by a policy, rabbitmqctl set_policy '
    'jobsync ".*" \'{"consumer-timeout": MILLISECONDS}\' --apply-to queues'
)
_FIRST = (3, 12)
_PRECONDITION_FAILED = 406


def is_heeded(version: object) -> bool:
    """Whether a RabbitMQ looks at the argument, by its version as it tells it; an odd version is
    taken for a new one.
    """
    parts = str(version).split('.')
    if len(parts) < len(_FIRST) or not all(part.isdigit() for part in parts[: len(_FIRST)]):
        return True
    return tuple(int(part) for part in parts[: len(_FIRST)]) >= _FIRST


def is_timeout(code: object, text: object) -> bool:
    """Whether RabbitMQ has closed a channel since a message on it was not acknowledged for too
    long, by its answer.
    """
    # 'delivery acknowledgement on channel 1 timed out'; 'consumer ack timed out on channel 1'
    # before 3.9
    return code == _PRECONDITION_FAILED and 'timed out' in str(text)
