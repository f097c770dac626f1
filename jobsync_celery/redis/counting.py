"""What waits in queues at Redis, and what workers have taken from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ResponseError

from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.backlog import QueueCount

from ..broker.counting import CeleryCounter
from .keys import SHARED, node_options

__all__ = ['RedisCounter']

_execute: Any = Redis.execute_command
_add: Any = Pipeline.execute_command
#: Taken messages of one worker that are looked at: of more, these tell how many are from which
#: queue.
_LOOKED_AT = 1000


class RedisCounter(CeleryCounter):
    """Counts lists, and what the records of workers have of each: those of nodes, and the one that
    all plain workers share.
    """

    def count(self, queues: Sequence[str], nodes: Mapping[str, str]) -> Mapping[str, QueueCount]:
        """What is ready in queues, and what was taken from them."""
        with self._connect() as connection:
            channel = connection.default_channel
            ready = _lengths(channel, queues)
            taken = self._taken(channel, set(nodes.values()))
        return {
            queue: QueueCount(ready[queue], taken[queue])
            for queue in queues
            if ready[queue] or taken[queue]
        }

    def purge(self, queue: str) -> int:
        """As of every broker. Kombu deletes what has the name, be it a record of taken messages.

        Raises:
            ConfigurationError: It is no queue.
        """
        with self._connect() as connection:
            _lengths(connection.default_channel, [queue])
        return super().purge(queue)

    def _taken(self, channel: Any, nodes: Iterable[str]) -> Counter[str]:
        options = self._app.conf.broker_transport_options or {}
        records = [
            options.get('unacked_key', SHARED['unacked_key']),
            *(node_options(self._queues.appname, node)['unacked_key'] for node in sorted(nodes)),
        ]
        found: Counter[str] = Counter()
        with channel.conn_or_acquire() as client:
            keys = [f'{channel.global_keyprefix}{record}' for record in dict.fromkeys(records)]
            pipe = client.pipeline(transaction=False)
            for key in keys:
                _add(pipe, 'HLEN', key)
            for key, length in zip(keys, pipe.execute(), strict=True):
                if length:
                    found.update(self._by_queue(client, key, length))
        return found

    def _by_queue(self, client: Any, key: str, length: int) -> Counter[str]:
        _, entries = _execute(client, 'HSCAN', key, 0, 'COUNT', _LOOKED_AT)
        seen = Counter(self._queue_of(value) for value in entries.values())
        looked_at = sum(seen.values()) or 1
        return Counter(
            {
                queue: round(count * max(length, looked_at) / looked_at)
                for queue, count in seen.items()
            }
        )

    def _queue_of(self, record: bytes | str) -> str:
        """The queue that a taken message came from, as far as its record tells."""
        try:
            _, exchange, key = json.loads(record)[:3]
        except (ValueError, TypeError):
            return ''
        if exchange:
            for name, queue in self._app.amqp.queues.items():
                if queue.exchange.name == exchange and queue.routing_key == key:
                    return str(name)
        return str(key)


def _lengths(channel: Any, queues: Sequence[str]) -> dict[str, int]:
    """How many messages are ready in queues, in one trip.

    Raises:
        ConfigurationError: One of them is no queue.
    """
    steps = channel.priority_steps
    with channel.conn_or_acquire() as client:
        pipe = client.pipeline(transaction=False)
        for queue in queues:
            for step in steps:
                pipe.llen(channel._q_for_pri(queue, step))
        lengths = pipe.execute(raise_on_error=False)
    for number, found in enumerate(lengths):
        if isinstance(found, ResponseError) and str(found).startswith('WRONGTYPE'):
            raise ConfigurationError(
                f'{queues[number // len(steps)]!r} is no queue: Redis keeps something else under '
                'this name'
            )
        if isinstance(found, Exception):
            raise found
    return {
        queue: sum(lengths[number * len(steps) : (number + 1) * len(steps)])
        for number, queue in enumerate(queues)
    }
