"""Names of keys at Redis: Dramatiq's own, and what the plugin keeps beside them.

A queue is a list of ids, beside it is a hash with each id's message. What a process has taken and
not acknowledged is a set of ids, one for each queue, under the process's broker id. The queues that
a node takes from are named in a set beside the node's own queue, so that survivors find all of it.
"""

from __future__ import annotations

import re
from typing import Any

from dramatiq.common import xq_name

from jobsync_core.worker.routing import is_of_cluster, mark_key, old_node_queue

__all__ = ['MESSAGES', 'REDIS_ID', 'RedisKeys', 'broker_id', 'redis_id', 'text_of']

#: Option with the id under which Redis keeps a message; Dramatiq's name for it.
REDIS_ID = 'redis_message_id'
#: What the hash with a queue's messages ends with, and the set of queues that a node takes from.
MESSAGES, _SOURCES = '.msgs', '.sources'
#: What the sets of what was taken begin with.
_TAKEN = '__acks__.'
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
        self._appname = appname

    def queue(self, queue: str) -> str:
        """The list of a queue."""
        return f'{self._space}:{queue}'

    def taken(self, owner: str, queue: str) -> str:
        """What a broker id has taken from a queue and not acknowledged."""
        return f'{self.taken_by(owner)}{queue}'

    def taken_by(self, owner: str) -> str:
        """What the names of all that a broker id has taken begin with; a queue's name ends them."""
        return f'{self._space}:{_TAKEN}{owner}.'

    def sources(self, node: str) -> str:
        """The names of the queues that a node takes from."""
        return f'{self._space}:{old_node_queue(self._appname, node)}{_SOURCES}'

    @property
    def pattern(self) -> str:
        """A pattern of all keys of this plugin's queues."""
        space, mark = (
            re.sub(r'([*?\[\]\\])', r'\\\1', part)
            for part in (f'{self._space}:', old_node_queue(self._appname, ''))
        )
        return f'{space}*{mark}*'

    def queue_of(self, key: str) -> str | None:
        """The queue that a key of such a pattern belongs to; None for one of dead letters, or of
        what was taken.
        """
        queue = _ENDINGS.sub('', key[len(self._space) + 1 :])
        if _DEAD in key or queue.startswith(_TAKEN) or not is_of_cluster(queue, self._appname):
            return None
        return queue
