"""What a home queue promises, and what of it the queues of nodes keep that stand for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ['arguments_for', 'home_name', 'is_only_place', 'is_way_into']

#: What is kept as it is. The others are no matter of one message or one node:
#: a length is one of the whole home queue, and a node's share of it would lose messages that the
#: whole has room for; a queue of a node has one consumer anyway; and it must not vanish by itself.
_KEPT = (
    'x-queue-type',
    'x-queue-mode',
    'x-queue-version',
    'x-max-priority',
    'x-message-ttl',
    'x-dead-letter-exchange',
    'x-dead-letter-routing-key',
    'x-delivery-limit',
    'x-consumer-timeout',
    'x-max-in-memory-length',
    'x-max-in-memory-bytes',
    'x-quorum-initial-group-size',
    'x-queue-leader-locator',
    'x-queue-master-locator',
)
_DEAD, _DEAD_KEY = 'x-dead-letter-exchange', 'x-dead-letter-routing-key'
#: What native delayed delivery puts before a routing key.
_DELAY = re.compile(r'^(?:[01]\.){28}')


def home_name(queue: Any) -> str:
    """The name of a home queue. That of a broadcast is the one that all of its queues share: each
    worker has one of its own.
    """
    is_broadcast = queue.exchange is not None and queue.exchange.type == 'fanout'
    return str((is_broadcast and queue.alias) or queue.name)


def is_only_place(queue: Any, known: Iterable[Any], options: Mapping[str, Any]) -> bool:
    """Whether what Celery sends with these options goes to this queue and to no other one.

    Otherwise an exchange says which queues get it, each a copy, and those may be anybody's.

    Args:
        queue: Kombu's queue, or the name of one that is not known.
        known: All queues of the app.
        options: Of `apply_async`, with what the app's routes add: `exchange`, `routing_key`,
            `exchange_type`.
    """
    exchange: Any = getattr(queue, 'exchange', None)
    kind = options.get('exchange_type') or getattr(exchange, 'type', None) or 'direct'
    if kind == 'direct':
        return not (options.get('exchange') and options.get('routing_key'))
    if options.get('exchange') or options.get('routing_key'):
        return False
    if kind == 'fanout':
        return bool(queue.alias)  # a broadcast, whose queues are one group
    # As `task_default_exchange_type='topic'` makes them: an exchange, or a key, for this queue
    # alone. By other ones queues of other apps may get it as well, which nobody knows here.
    if kind != 'topic' or exchange is None or queue.name not in (exchange.name, queue.routing_key):
        return False
    others = (other for other in known if other.name != queue.name)
    return not any(
        getattr(each.exchange, 'name', None) == exchange.name
        for other in others
        for each in (other, *(other.bindings or ()))
    )


def arguments_for(home: Any) -> dict[str, Any]:
    """The arguments of a queue that stands for a home queue, on RabbitMQ.

    Args:
        home: Kombu's queue.
    """
    given: Mapping[str, Any] = home.queue_arguments or {}
    found = {name: given[name] for name in _KEPT if given.get(name) is not None}
    # As kombu does: what is said beside the arguments goes first.
    if home.max_priority is not None:
        found['x-max-priority'] = home.max_priority
    if home.message_ttl is not None:
        found['x-message-ttl'] = int(home.message_ttl * 1000)
    if given.get('x-dead-letter-strategy') == 'at-least-once':
        # RabbitMQ wants both.
        found.update({'x-dead-letter-strategy': 'at-least-once', 'x-overflow': 'reject-publish'})
    if _DEAD in found:
        # A dead letter goes by the key with which its message came into the queue: here that is
        # another one.
        found.setdefault(_DEAD_KEY, _key_into(home))
    return found


def _key_into(home: Any) -> str:
    """The routing key with which Celery sends to a queue."""
    exchange = home.exchange
    if exchange is None or exchange.type == 'direct':
        return str(home.name)
    return str(home.routing_key or home.name)


def is_way_into(queue: Any, exchange: str, key: str) -> bool:
    """Whether a message that was sent to an exchange may have come into a queue by it.

    Args:
        queue: Kombu's queue.
        exchange: The exchange; '' for the default one, where the key is a queue's name.
        key: The routing key.
    """
    if not exchange:
        return bool(queue.name == key)
    delayed = _DELAY.sub('', key, count=1)
    if queue.exchange is None or (queue.exchange.name != exchange and delayed == key):
        return False
    if queue.exchange.type == 'fanout':
        return True
    pattern = re.escape(queue.routing_key or '').replace(r'\#', '#').replace(r'\*', '[^.]+')
    # `#` stands for any number of words, none among them.
    pattern = pattern.replace(r'\.#', r'(?:\..*)?').replace(r'#\.', r'(?:.*\.)?').replace('#', '.*')
    return re.fullmatch(pattern, delayed) is not None
