"""How often a message came back to quorum queues of RabbitMQ, over all that it has lain in.

Such a queue counts what comes back to it, because a worker died or gave it back, and makes a dead
letter of what has done so more often than its limit says. It begins anew with what is published to
it, and the plugin publishes a message anew wherever it passes it on: from its home queue to a
node's, and from there to another node's. So the count goes along in a header, and who takes a
message looks at the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .incoming import MAX_COUNT
from .routing import RETURNS

__all__ = ['COUNT', 'earlier_returns', 'has_returned_too_often', 'limit_of', 'returns_of']

#: Header in which a quorum queue tells how often a message came back to it: earlier versions of
#: RabbitMQ say 0 as well.
COUNT = 'x-delivery-count'
#: Header of a dead letter. Whoever sends one again means it to run.
_DEATHS = 'x-death'
#: What holds from RabbitMQ 4 on where nobody says otherwise.
_DEFAULT_LIMIT, _DEFAULT_SINCE = 20, 4


def _count(value: object) -> int:
    return min(int(value), MAX_COUNT) if isinstance(value, int) and value > 0 else 0


def earlier_returns(headers: object) -> int:
    """How often a message came back to queues before the one that it was taken from.

    Args:
        headers: The message's headers, as they came.
    """
    if not isinstance(headers, Mapping) or headers.get(_DEATHS):
        return 0
    return _count(headers.get(RETURNS))


def returns_of(headers: object) -> int:
    """How often a message came back to queues: 0 where none of them counts that.

    Args:
        headers: The message's headers, as they came.
    """
    here = headers.get(COUNT) if isinstance(headers, Mapping) else None
    return earlier_returns(headers) + _count(here)


def limit_of(arguments: Mapping[str, Any], version: object) -> int | None:
    """How often a message may come back to a queue; None where there is no limit, or none that its
    arguments tell: a policy's, or that of a queue whose type the virtual host chooses.

    Args:
        arguments: The queue's.
        version: RabbitMQ's, as it says.
    """
    if arguments.get('x-queue-type') != 'quorum':
        return None
    limit = arguments.get('x-delivery-limit')
    if isinstance(limit, int):
        return limit if limit >= 0 else None
    major = str(version).partition('.')[0]
    return _DEFAULT_LIMIT if major.isdecimal() and int(major) >= _DEFAULT_SINCE else None


def has_returned_too_often(headers: object, limit: int | None) -> bool:
    """Whether a message is one that its queue would have made a dead letter of, had it never been
    passed on. What was not is left to its queue.

    Args:
        headers: The message's headers, as they came.
        limit: Of its home queue.
    """
    return limit is not None and earlier_returns(headers) > 0 and returns_of(headers) > limit
