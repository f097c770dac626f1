"""The names of Celery's keys on Redis: where kombu records what was taken and not acknowledged.

A node has a record of its own, so that the whole of it is its own, and others can restore it.
"""

from __future__ import annotations

import re
from typing import Any

from jobsync_core.worker.routing import old_node_queue

__all__ = ['SHARED', 'VISIBILITY_SEC', 'key_pattern', 'node_options', 'queue_of_key', 'record_keys']

#: Seconds after which kombu's Redis transport would deliver an unacknowledged message a second
#: time. The others restore what a dead node held, so that this only has to be longer than any
#: task.
VISIBILITY_SEC = 365 * 86_400
#: Where plain workers record what they have taken, and for how long: kombu's defaults.
SHARED: dict[str, Any] = {
    'unacked_key': 'unacked',
    'unacked_index_key': 'unacked_index',
    'unacked_mutex_key': 'unacked_mutex',
    'visibility_timeout': 3600,
}
_RECORD = '.unacked'
_SUFFIX = re.compile(r'\.unacked(_index|_mutex)?$')


def node_options(appname: str, node: str) -> dict[str, Any]:
    """Transport options that keep what a node has taken apart from what others have."""
    place = f'{old_node_queue(appname, node)}{_RECORD}'
    return {
        'unacked_key': place,
        'unacked_index_key': f'{place}_index',
        'unacked_mutex_key': f'{place}_mutex',
    }


def record_keys(channel: Any, *lists: str) -> list[str]:
    """The hash and the index of what a channel has not acknowledged, then lists; with the app's
    prefix.
    """
    return [
        f'{channel.global_keyprefix}{key}'
        for key in (channel.unacked_key, channel.unacked_index_key, *lists)
    ]


def key_pattern(prefix: str) -> str:
    """The pattern of all keys that begin with a prefix, as SCAN wants it."""
    return re.sub(r'([*?\[\]\\])', r'\\\1', prefix) + '*'


def queue_of_key(key: str, separator: str) -> str:
    """The queue that a list, or a record of what was taken, belongs to.

    Args:
        key: Name of the key, without the app's prefix.
        separator: Stands between a queue's name and a priority.
    """
    return _SUFFIX.sub('', key.split(separator)[0])
