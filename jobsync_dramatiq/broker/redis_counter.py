"""What waits in queues at Redis, and what workers have taken from them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from dramatiq.common import dq_name

from jobsync_core.worker.backlog import QueueCount

from .declared import own_queues
from .redis_keys import MESSAGES, RedisKeys, broker_id, text_of
from .redis_scripts import PURGE

__all__ = ['RedisCounter']

#: Messages that one run of the script deletes: Redis does nothing else meanwhile.
_AT_ONCE = 1000


class RedisCounter:
    """Counts and empties queues. Redis' client may be used by any thread.

    Args:
        native: The RedisBroker.
        appname: The cluster.
    """

    #: The plugin's name.
    kind = 'dramatiq'

    def __init__(self, native: Any, appname: str) -> None:
        self._native = native
        self._appname = appname
        self._keys = RedisKeys(native.namespace, appname)
        self._purge = native.client.register_script(PURGE)

    def homes(self) -> Iterable[str]:
        """The queues of the actors."""
        return own_queues(self._native, self._appname)

    def count(self, queues: Sequence[str], nodes: Mapping[str, str]) -> Mapping[str, QueueCount]:
        """What is ready in queues, taken from them, and delayed beside them."""
        client, keys = self._native.client, self._keys
        everybody = {text_of(raw) for raw in client.zrange(keys.signs, 0, -1)}
        everybody.update(broker_id(self._appname, node) for node in nodes.values())
        pipe = client.pipeline(transaction=False)
        for queue in queues:
            # What is in a node's queue only that node takes.
            owners = [broker_id(self._appname, nodes[queue])] if queue in nodes else everybody
            for each in (queue, dq_name(queue)):
                pipe.llen(keys.queue(each))
                for owner in owners:
                    pipe.scard(keys.taken(owner, each))
            pipe.lindex(keys.queue(queue), 0)
        answers = iter(pipe.execute())
        found: dict[str, QueueCount] = {}
        firsts: dict[str, Any] = {}
        for queue in queues:
            others = 1 if queue in nodes else len(everybody)
            ready, taken = next(answers), sum(islice(answers, others))
            delayed = sum(islice(answers, others + 1))
            first = next(answers)
            if ready or taken or delayed:
                found[queue], firsts[queue] = QueueCount(ready, taken, delayed), first
        for queue, age in self._ages(firsts).items():
            found[queue] = replace(found[queue], oldest_sec=age)
        return found

    def _ages(self, firsts: Mapping[str, Any]) -> dict[str, float]:
        """Seconds since the message that is next in a queue was sent."""
        waiting = {queue: first for queue, first in firsts.items() if first is not None}
        pipe = self._native.client.pipeline(transaction=False)
        for queue, first in waiting.items():
            pipe.hget(f'{self._keys.queue(queue)}{MESSAGES}', first)
        found: dict[str, float] = {}
        for queue, data in zip(waiting, pipe.execute(), strict=True):
            # It may be gone by now, or of another encoder.
            with suppress(TypeError, ValueError, KeyError):
                sent = float(json.loads(data)['message_timestamp']) / 1000
                found[queue] = max(0.0, time.time() - sent)
        return found

    def purge(self, queue: str) -> int:
        """Delete what is ready in a queue; how many messages. What was taken stays, and what is
        delayed.
        """
        left = int(self._native.client.llen(self._keys.queue(queue)))
        deleted = 0
        while left > 0:
            count = int(self._purge(keys=[self._keys.queue(queue)], args=[min(left, _AT_ONCE)]))
            if not count:
                break
            deleted += count
            left -= count
        return deleted
