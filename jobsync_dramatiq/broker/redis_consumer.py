"""The consumer of one queue at Redis: it knows each message by the id that Redis has for it,
whatever the message itself says.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from dramatiq.broker import MessageProxy
from dramatiq.common import compute_backoff
from dramatiq.errors import ConnectionClosed
from redis.exceptions import RedisError

from jobsync_core import clock
from jobsync_core.worker.incoming import Refused

from ..incoming import read_message
from .redis_keys import REDIS_ID, redis_id
from .redis_queues import RedisQueues

__all__ = ['RedisQueueConsumer']

#: Seconds between two signs of life from a consumer that takes nothing, at most, and as part of the
#: time after which other workers restore what it holds: the broker's `heartbeat_timeout`, by
#: default a minute.
_SIGN_SEC, _SIGN_PART = 10.0, 1 / 4


class RedisQueueConsumer:
    """A QueueConsumer.

    Args:
        queues: What this process takes from queues.
        queue: The queue.
        prefetch: How many messages may be taken and not done.
        timeout: Longest time between two looks at an empty queue, in milliseconds.
    """

    def __init__(self, queues: RedisQueues, queue: str, prefetch: int, timeout: int) -> None:
        self._queues = queues
        self.queue = queue
        self._prefetch = prefetch
        self._timeout = timeout
        self._own = queues.is_own(queue)
        #: Redis ids and data of what was fetched and not handed out.
        self._cache: deque[tuple[str, bytes]] = deque()
        #: Redis ids of what was handed out and is not done.
        self._out: set[str] = set()
        self._misses = 0
        #: Messages to be passed on together; see `RedisQueues.pass_on`.
        self.leaving: dict[str, tuple[str, str, bytes]] = {}
        self._in_hand = queues.in_hand.setdefault(queue, set())
        self._signed = clock.now()
        self._sign_sec = min(_SIGN_SEC, queues.patience * _SIGN_PART)
        #: Set by acknowledgements once half of what may be prefetched is done, while the consumer
        #: waits for that.
        self._room = threading.Event()
        self._waits = False

    @property
    def outstanding(self) -> int:
        """Messages that were fetched and are not done."""
        return len(self._out) + len(self._cache)

    def next(self, patient: bool) -> Any:
        """The next message that can be read."""
        if not patient:
            self._misses = 0  # then the pause is short
        try:
            while self._cache or self._fetch():
                number, data = self._cache.popleft()
                found = read_message(data)
                if isinstance(found, Refused):
                    self._queues.set_aside(self.queue, number, data, found.reason)
                    continue
                found.options[REDIS_ID] = number
                self._out.add(number)
                self._in_hand.add(number)
                return MessageProxy(found)
        except (RedisError, OSError) as error:
            # The gate closes this consumer, which requeues what is not done, and makes another
            # one.
            raise ConnectionClosed(error) from error
        return None

    def _fetch(self) -> bool:
        """Fetch what there is room for; whether there is anything."""
        if self.leaving:
            self._pass_on()
        if self.outstanding >= self._prefetch and not self._wait_for_room():
            return False
        self._cache.extend(self._take(self._prefetch - self.outstanding))
        if self._cache:
            self._misses = 0
            return True
        self._misses, milliseconds = compute_backoff(self._misses, max_backoff=self._timeout)
        time.sleep(milliseconds / 1000)
        return False

    def _take(self, number: int) -> list[tuple[str, bytes]]:
        self._queues.recheck(self.queue)
        try:
            return self._queues.fetch(self.queue, number)
        except (RedisError, OSError):
            # The answer may be lost with the connection, and what it brought: that goes back with
            # the next call.
            return self._queues.fetch(self.queue, number)

    @property
    def _has_room(self) -> bool:
        return 2 * self.outstanding <= self._prefetch

    def _wait_for_room(self) -> bool:
        """Wait until half of what may be prefetched is done; whether anything is.

        At most for as long as Dramatiq sleeps here: that is 5 to 10 ms at first, in which quick
        actors run out of messages.
        """
        self._misses, milliseconds = compute_backoff(self._misses, max_backoff=self._timeout)
        self._room.clear()
        self._waits = True
        if not self._has_room:
            self._room.wait(milliseconds / 1000)
        self._waits = False
        return self.outstanding < self._prefetch

    def _settle(self, number: str) -> None:
        """The message does not count as prefetched any more."""
        self._out.discard(number)
        if self._waits and self._has_room:
            self._room.set()

    def _pass_on(self) -> None:
        self._queues.pass_on(self.queue, self.leaving)
        self._out.difference_update(self.leaving)
        self._in_hand.difference_update(self.leaving)
        self.leaving.clear()

    def idle(self, seconds: float) -> None:
        """Wait, and show from time to time that this process lives."""
        time.sleep(seconds)
        if clock.now() - self._signed > self._sign_sec:
            self._signed = clock.now()
            try:
                self._queues.fetch(self.queue, 0)
            except (RedisError, OSError) as error:
                raise ConnectionClosed(error) from error

    def ack(self, message: Any) -> None:
        """Acknowledge a message, unless it is about to be passed on."""
        number = redis_id(message)
        if number in self.leaving:
            return
        try:
            self._queues.acknowledge(self.queue, number)
        except (RedisError, OSError) as error:
            raise ConnectionClosed(error) from error  # the worker tries again
        self._done(number)

    def nack(self, message: Any) -> None:
        """Put a message among the dead letters of its home queue."""
        try:
            if self._own:
                self._queues.bury(message, self.queue)
            else:
                self._queues.refuse(self.queue, redis_id(message))
        except (RedisError, OSError) as error:
            raise ConnectionClosed(error) from error
        self._done(redis_id(message))

    def _done(self, number: str) -> None:
        self._settle(number)
        self._in_hand.discard(number)

    def requeue(self, message: Any, begun: bool = False) -> None:
        """Requeue a message."""
        self._queues.requeue([(self.queue, redis_id(message))], begun)
        self._settle(redis_id(message))

    def pause(self) -> None:
        """Requeue what was fetched and not handed out."""
        self._queues.requeue(self._fetched())

    def resume(self) -> None:
        """Requeue what an answer brought that was lost meanwhile."""
        try:
            self._queues.requeue_lost(self.queue)
        except (RedisError, OSError) as error:
            raise ConnectionClosed(error) from error

    def close(self, waiting: list[Any]) -> None:
        """What was fetched, and not handed out yet, would stay in hand until this node is
        gone.
        """
        self._queues.requeue(
            [(self.queue, redis_id(message)) for message in waiting] + self._fetched()
        )

    def _fetched(self) -> list[tuple[str, str]]:
        cache, self._cache = self._cache, deque()
        leaving, self.leaving = self.leaving, {}
        self._out.difference_update(leaving)
        return [(self.queue, number) for number in (*leaving, *(number for number, _ in cache))]
