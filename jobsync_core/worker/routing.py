"""Which way a message goes: its route, made of a key or a pin, and the names of queues.

A coordinated message has a *route*: the task id that is hashed to a token, locked and owned. What
becomes of it on the node that receives it is decided by its route, in `inbox`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..assignment.hashing import check_task_id, task_key
from ..assignment.patterns import check_patterns
from ..errors import ConfigurationError
from ..ledger.keys import key_maker
from ..ledger.limits import check_key
from ..ledger.once import ExactlyOnce
from ..logs import shown

__all__ = [
    'HOME',
    'HOPS',
    'REDELIVERED',
    'REFUSED',
    'KEY',
    'QUEUE_BYTES',
    'RETURNS',
    'WAITS',
    'Coordination',
    'check_pins',
    'home_of_queue',
    'is_of_cluster',
    'mark_key',
    'node_queue',
    'old_node_queue',
    'old_parked_queue',
    'parked_queue',
    'pin_locks',
    'pin_route',
    'pinned_task',
    'unknown_queue',
]

#: Names of the header, or option, that carries a message's route, and of the one that counts how
#: often it was handed on.
KEY, HOPS = 'jobsync_key', 'jobsync_hops'
#: Of the one that carries the queue which the message was sent to, and of the one that counts how
#: often it waited for its running key.
HOME, WAITS = 'jobsync_home', 'jobsync_waits'
#: Of the one that says that a message had been delivered to somebody before it was passed on: what
#: is published anew is no redelivery to its broker.
REDELIVERED = 'jobsync_redelivered'
#: Of the one of a message that was set aside in a node's queue, and comes back to its own one to be
#: rejected there.
REFUSED = 'jobsync_refused'
#: Of the one that carries how often a message came back to queues before the one that it is in.
RETURNS = 'jobsync_returns'


#: Parts of names at the broker that no node can have: the queues of a cluster, and what is kept
#: beside each queue.
_RESERVED = frozenset({'broker', 'nodes', 'parked', 'unknown', 'unrouted'})
_RESERVED_ENDINGS = (
    '.unacked',
    '.unacked_index',
    '.unacked_mutex',
    '.sources',
    '.DQ',
    '.XQ',
    '.msgs',
    '.present',
)
#: RabbitMQ takes names of up to 255 bytes; some are left for endings.
QUEUE_BYTES = 240


def node_queue(home: str, appname: str, node: str) -> str:
    """Name of a node's queue for the messages of one home queue. Policies of a broker that match
    the home queue by the beginning of its name match this one.

    Args:
        home: The queue that its messages are sent to; '': as `old_node_queue`.
        appname: The cluster's.
        node: The node's name.

    Raises:
        ConfigurationError: A queue of that name has another meaning, or the name is too long for a
            broker.
    """
    queue = f'{home}.{old_node_queue(appname, node)}' if home else old_node_queue(appname, node)
    size = len(queue.encode())
    if size > QUEUE_BYTES:
        raise ConfigurationError(
            f'queue {shown(home, 60)}, node_name={node!r}: the name of the queue of this node for '
            f'it has {size} bytes, and brokers take {QUEUE_BYTES}; shorten one of the two names'
        )
    return queue


def old_node_queue(appname: str, node: str) -> str:
    """Name of a node's one queue in the layout of versions that knew no queue groups. It stands
    for the node as well, where something is kept for all of its queues.

    Raises:
        ConfigurationError: As for `node_queue`.
    """
    queue = f'jobsync.{appname}.{node}'
    if node in _RESERVED or node.endswith(_RESERVED_ENDINGS):
        raise ConfigurationError(
            f'node_name={node!r}: {queue!r} is the name of something else at the broker; give the '
            'node another name'
        )
    if len(queue.encode()) > QUEUE_BYTES:
        raise ConfigurationError(
            f'node_name={node!r}: the name of its queue has {len(queue.encode())} bytes, and '
            f'brokers take {QUEUE_BYTES}; shorten it'
        )
    return queue


def parked_queue(home: str, appname: str) -> str:
    """Name of the queue of those messages of a home queue that nobody takes now; of '': as
    `old_parked_queue`.
    """
    return f'{home}.{old_parked_queue(appname)}' if home else old_parked_queue(appname)


def old_parked_queue(appname: str) -> str:
    """Name of the queue of parked messages in the layout of versions that knew no queue groups."""
    return f'jobsync.{appname}.parked'


@lru_cache(maxsize=4096)  # asked several times for each message, of the same few queues
def home_of_queue(queue: str, appname: str) -> str | None:
    """The home queue that a queue of a cluster belongs to, by its name: '' for one of the old
    layout and for that of unknown tasks; None where it is no queue of the cluster.
    """
    mark = f'jobsync.{appname}.'
    if queue.startswith(mark):
        return ''
    home, found, _ = queue.partition(f'.{mark}')
    return home if found and home else None


def is_of_cluster(queue: str, appname: str) -> bool:
    """Whether a queue is one of a cluster's own, by its name."""
    return home_of_queue(queue, appname) is not None


def mark_key(appname: str) -> str:
    """Name of what Redis keeps so that the nodes of a cluster know that they use one server."""
    return f'jobsync.{appname}.broker'


def unknown_queue(appname: str) -> str:
    """Name of the queue of messages whose task the node that got them does not know."""
    return f'jobsync.{appname}.unknown'


def pin_route(name: str, key: str, slots: int) -> str:
    """The route of a message of a pinned task: one of the task's virtual keys."""
    return f'{name}#{task_key(key) % slots}'


def pinned_task(route: str, slots: int) -> str | None:
    """The name of the pinned task that a route may be a virtual key of; None where it is a key."""
    name, _, slot = route.rpartition('#')
    if not name or not slot.isascii() or not slot.isdecimal() or slot != str(int(slot[:9])):
        return None
    return name if int(slot) < slots else None


def pin_locks(
    pins: Mapping[str, Sequence[str]], slots: int
) -> list[tuple[str, tuple[str, ...], str]]:
    """Locks on the virtual keys of pinned tasks, for `register_locks_bulk`."""
    return [
        (f'{name}#{slot}', tuple(patterns), 'pin')
        for name, patterns in sorted(pins.items())
        for slot in range(slots)
    ]


class Coordination:
    """How the messages of one task get their routes.

    Args:
        name: The task's name.
        function: What the task runs, for a key over its arguments.
        once: Its `exactly_once` options, if it has them.
        key: A format string over the arguments or a callable; None: that of `once`, else the
            message's id.
        pin: Ordered patterns of the nodes that may run the task.
        slots: Virtual keys of a pinned task.
        prepare: Makes of a message's arguments those that the key is made of, where they differ.
        affinity: False: its messages have no route, and run where they are taken.

    Raises:
        ConfigurationError: The key or the pin cannot work.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        once: ExactlyOnce | None,
        key: str | Callable[..., str] | None,
        pin: Sequence[str] | str | None,
        slots: int,
        prepare: Callable[
            [Sequence[Any], Mapping[str, Any]], tuple[Sequence[Any], Mapping[str, Any]]
        ]
        | None = None,
        affinity: bool = True,
    ) -> None:
        self.name = name
        self.affinity = affinity
        self._prepare = prepare
        self.once = once
        self.pin = check_patterns(pin) if pin is not None else None
        self._slots = slots
        if key is not None:
            make = key_maker(key, function, name)
            self._make: Callable[[Sequence[Any], Mapping[str, Any]], object] | None = (
                lambda args, kwargs: make(args, kwargs).key
            )
        else:
            self._make = once.key_of if once is not None and once.has_key else None

    def is_route(self, text: str) -> bool:
        """Whether a text may be the route of a message of this task, as far as that shows."""
        if self.pin is None:
            return True
        return pinned_task(text, self._slots) == self.name

    def route_of(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], message_id: object
    ) -> str | None:
        """The route of a message; None where it runs wherever it is taken. Its key is made all the
        same: without one it could run nowhere.

        Raises:
            ConfigurationError: The arguments make no key.
            TypeError: The function does not take these arguments.
            InvalidTaskId: The key cannot be a task id.
        """
        if self._make is None:
            key = check_task_id(message_id)
        else:
            key = check_key(
                self._make(
                    *(self._prepare(args, kwargs) if self._prepare is not None else (args, kwargs))
                )
            )
        if not self.affinity:
            return None
        return pin_route(self.name, key, self._slots) if self.pin is not None else key


def check_pins(pins: object) -> dict[str, tuple[str, ...]]:
    """The setting `pins`: task name -> ordered patterns."""
    if not isinstance(pins, Mapping):
        raise ConfigurationError(
            f"pins={pins!r}: give a mapping such as {{'proj.render': ['gpu-primary-01', '%-gpu']}}"
        )
    return {str(name): check_patterns(patterns) for name, patterns in pins.items()}
