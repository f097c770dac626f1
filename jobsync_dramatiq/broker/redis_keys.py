"""Names of keys at Redis: Dramatiq's own, and what the plugin keeps beside them.

A queue is a list of ids, beside it is a hash with each id's message. What a process has taken and
not acknowledged is a set of ids, one for each queue, under the process's broker id. The queues that
a node takes from are named in a set beside the node's own queue, so that survivors find all of it.
"""

from __future__ import annotations

import re
from typing import Any

from dramatiq.common import xq_name

from jobsync_core.worker.routing import mark_key, old_node_queue

__all__ = ['MESSAGES', 'REDIS_ID', 'RedisKeys', 'broker_id', 'redis_id', 'text_of']

#: Option with the id under which Redis keeps a message; Dramatiq's name for it.
REDIS_ID = 'redis_message_id'
#: What the hash with a queue's messages ends with, and the set of queues that a node takes from.
MESSAGES, _SOURCES = '.msgs', '.sources'
_ENDINGS = re.compile(f'({re.escape(MESSAGES)}|{re.escape(_SOURCES)})$')
#: What the names of queues with dead letters contain.
_DEAD = xq_name('')


def broker_id(appname: str, node: str) -> str:
    """The id under which Redis keeps what a node has taken and not acknowledged; '|' ends it, so
    that none begins another.
    """
    return f'{old_node_queue(appname, node)}|'


def redis_id(message: Any) -> str:
    """The id under which Redis keeps a message."""
    return str(message.options[REDIS_ID])


def text_of(raw: Any) -> str:
    """What Redis answered, as a text; the user's client may decode answers or not."""
    return raw.decode() if isinstance(raw, bytes) else str(raw)


class RedisKeys:
    """Names of keys.

    Args:
        space: Dramatiq's namespace: what all its keys begin with.
        appname: The cluster.
    """

    def __init__(self, space: str, appname: str) -> None:
        self._space = space
        #: Signs of life of all broker ids.
        self.signs = f'{space}:__heartbeats__'
        #: The cluster's mark.
        self.mark = f'{space}:{mark_key(appname)}'
        self._nodes = f'{space}:{old_node_queue(appname, "")}'

    def queue(self, queue: str) -> str:
        """The list of a queue."""
        return f'{self._space}:{queue}'

    def taken(self, owner: str, queue: str) -> str:
        """What a broker id has taken from a queue and not acknowledged."""
        return f'{self._space}:__acks__.{owner}.{queue}'

    def sources(self, queue: str) -> str:
        """The names of the queues that the owner of a node's queue takes from."""
        return f'{self._space}:{queue}{_SOURCES}'

    @property
    def pattern(self) -> str:
        """A pattern of all keys of this plugin's queues."""
        return re.sub(r'([*?\[\]\\])', r'\\\1', self._nodes) + '*'

    def queue_of(self, key: str) -> str | None:
        """The queue that a key of such a pattern belongs to; None for one of dead letters."""
        return None if _DEAD in key else _ENDINGS.sub('', key[len(self._space) + 1 :])
