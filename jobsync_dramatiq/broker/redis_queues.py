"""What one process takes from queues at Redis, and what becomes of it: acknowledged, passed on,
buried, or requeued.

An answer of Redis may be lost with a connection, and with it what it brought. Redis counts that as
taken by this process, though no thread has it; so a queue whose answer was lost is looked at for a
while.
"""

from __future__ import annotations

import copy
import math
import random
import threading
from collections.abc import Mapping
from typing import Any

from dramatiq import Message
from dramatiq.common import current_millis, xq_name
from redis.exceptions import RedisError

from jobsync_core import clock
from jobsync_core.logs import get_logger
from jobsync_core.worker.incoming import read_stamps
from jobsync_core.worker.routing import WAITS, is_of_cluster

from ..incoming import read_message
from . import redis_scripts as scripts
from .copies import copy_for, dead_letters, home_of
from .interface import Origins
from .redis_keys import MESSAGES, RedisKeys, redis_id, text_of
from .redis_scripts import ScriptConnection

__all__ = ['RedisQueues']

logger = get_logger(__name__)

#: What `maintenance_chance` counts in.
_MILLION = 1_000_000
#: Seconds for which a queue stays doubtful after an answer was lost, and between two looks at it: a
#: request that the network holds up may reach Redis long after its sender gave it up.
_DOUBT_SEC, _LOOK_SEC = 60.0, 1.0


class RedisQueues:
    """The queues, as one process uses them.

    Args:
        native: The RedisBroker.
        keys: Names of keys.
        appname: The cluster.
        origins: What the process knows of actors.
    """

    def __init__(self, native: Any, keys: RedisKeys, appname: str, origins: Origins) -> None:
        self._native = native
        self._keys = keys
        self._appname = appname
        self._origins = origins
        self.connection = ScriptConnection(native.client)
        register = native.client.register_script
        self._fetch, self._ack = register(scripts.FETCH), register(scripts.ACK)
        self._pass_on, self._bury = register(scripts.PASS_ON), register(scripts.BURY)
        self._mark = register(scripts.MARK)
        #: The node that this process is.
        self.node = ''
        #: What threads of this process work on or keep for later, by queue.
        self.in_hand: dict[str, set[str]] = {}
        #: Queues and Redis ids of what the node's own thread has taken, perhaps from a queue that
        #: is consumed here as well.
        self._held: set[tuple[str, str]] = set()
        #: Held while that thread takes something, and while is looked for what was lost.
        self._taking = threading.Lock()
        #: Queues and Redis ids of what is to go back, and could not yet.
        self._failed: list[tuple[str, str]] = []
        #: Those of them of which an attempt goes on here.
        self._begun: set[tuple[str, str]] = set()
        #: Queues of which a lost answer may have brought messages: until when they are looked at,
        #: and when next.
        self._doubtful: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def is_own(self, queue: str) -> bool:
        """Whether a queue is one of the cluster's."""
        return is_of_cluster(queue, self._appname)

    @property
    def doubtful(self) -> frozenset[str]:
        """Queues of which a lost answer may have brought messages."""
        return frozenset(self._doubtful)

    @property
    def patience(self) -> float:
        """Seconds without a sign of life after which others restore what this process holds."""
        return float(self._native.heartbeat_timeout / 1000)

    def fetch(self, queue: str, number: int) -> list[tuple[str, bytes]]:
        """Take messages, and show that this process lives: Redis ids and data.

        Raises:
            RedisError, OSError: Some may have been taken. The queue is doubtful from then on; see
                `recheck`.
        """
        if random.randrange(_MILLION) < self._native.maintenance_chance:
            self._maintain(queue)
        keys = [*self._places(queue), self._keys.signs, self._keys.sources(self.node)]
        try:
            found = self.connection.run(
                self._fetch, keys, [current_millis(), self._native.broker_id, number, queue]
            )
        except BaseException:
            self.doubt(queue)
            raise
        return [(text_of(found[place]), found[place + 1]) for place in range(0, len(found), 2)]

    def take(self, queue: str) -> tuple[str, bytes] | None:
        """Take one message for the node's own thread: Redis id and data. It is in that thread's
        hand until it is let go or requeued.

        Raises:
            RedisError, OSError: As for `fetch`.
        """
        with self._taking:
            found = self.fetch(queue, 1)
            if not found:
                return None
            self._held.add((queue, found[0][0]))
            return found[0]

    def let_go(self, queue: str, number: str) -> None:
        """The node's own thread is done with a message."""
        self._held.discard((queue, number))

    def let_all_go(self) -> None:
        """The node's own thread has nothing in hand, but for what could not go back yet."""
        with self._lock:
            dropped = self._held.difference(self._failed)
            self._held -= dropped
        for queue in {queue for queue, _ in dropped}:
            self.doubt(queue)  # an error came in between: it is taken, and nobody has it

    def _maintain(self, queue: str) -> None:
        """What Dramatiq's own fetches do for one in a thousand: look after workers that died, of
        those without the plugin too.
        """
        native = copy.copy(self._native)
        native.maintenance_chance = _MILLION
        native.do_fetch(queue, 0)

    def _places(self, queue: str, *targets: str) -> list[str]:
        return [
            self._keys.taken(self._native.broker_id, queue),
            *(self._keys.queue(name) for name in (queue, *targets)),
        ]

    def acknowledge(self, queue: str, number: str) -> None:
        """Acknowledge a message by its Redis id; if Redis does not answer, once more on another
        connection.

        Raises:
            RedisError, OSError: It is not known whether it is.
        """
        try:
            self.connection.run(self._ack, self._places(queue), [number])
        except (RedisError, OSError):
            self._native.do_ack(queue, number)

    def refuse(self, queue: str, number: str) -> None:
        """Put a message of the user's own queue among its dead letters.

        Raises:
            RedisError, OSError: It is not known whether it is there.
        """
        self._native.do_nack(queue, number)

    def pass_on(self, queue: str, leaving: Mapping[str, tuple[str, str, bytes]]) -> None:
        """Put copies of messages into their queues and acknowledge the messages, in one step.

        Args:
            queue: Where they came from.
            leaving: Redis id -> target, and the copy's Redis id and data.

        Raises:
            RedisError, OSError: Some of it may have been done, in the order given.
        """
        args = [item for old, (_, new, data) in leaving.items() for item in (old, new, data)]
        self.connection.run(
            self._pass_on, self._places(queue, *(target for target, _, _ in leaving.values())), args
        )

    def bury(self, message: Any, queue: str) -> None:
        """Put a message that came from a node's queue among the dead letters of its home queue."""
        home, number = home_of(message), redis_id(message)
        data = copy_for(home, message, None, redis_message_id=number).encode()
        self._move(queue, number, xq_name(home), data)

    def set_aside(self, queue: str, number: str, data: bytes, reason: str) -> None:
        """Put what no worker can have among the dead letters, as it is."""
        dead = dead_letters(queue, data, self._appname, self._origins)
        logger.error('queue=%s id=%s goes to %s: %s', queue, number, dead, reason)
        self._move(queue, number, dead, data)

    def _move(self, queue: str, number: str, dead: str, data: bytes) -> None:
        self._bury(keys=self._places(queue, dead), args=[number, current_millis(), data])

    def doubt(self, queue: str) -> None:
        """Something may have been taken from this queue that no thread has."""
        now = clock.now()
        self._doubtful[queue] = now + _DOUBT_SEC, now

    def recheck(self, queue: str) -> None:
        """Look after a doubtful queue, if it is one and it is time: what an answer brought that was
        lost goes back.

        Only the thread that takes from the queue may call this, and only while it holds nothing of
        it that is not in hand.

        Raises:
            RedisError, OSError: Redis cannot be asked; the queue stays doubtful.
        """
        until, at = self._doubtful.get(queue, (0.0, math.inf))
        if (now := clock.now()) < at:
            return
        self.requeue_lost(queue)
        if now < until:
            self._doubtful[queue] = until, now + _LOOK_SEC
        else:
            del self._doubtful[queue]

    def requeue_lost(self, queue: str) -> None:
        """Requeue what Redis counts as taken by this process, while no thread has it: its answer
        to a fetch was lost.

        Only the thread that consumes the queue may call this.

        Raises:
            RedisError, OSError: Redis cannot be asked.
        """
        taken = self._keys.taken(self._native.broker_id, queue)
        with self._taking:
            found = {text_of(number) for number in self._native.client.smembers(taken)}
            known = (*list(self._held), *list(self._failed))  # what could not go back yet, does
            lost = found - self.in_hand.get(queue, set())
            lost -= {number for place, number in known if place == queue}
            if lost:
                logger.warning(
                    'queue=%s: %d messages that this process had lost go back', queue, len(lost)
                )
                self._native.do_requeue(queue, *lost)

    def requeue(self, items: list[tuple[str, str]], begun: bool = False) -> None:
        """Requeue messages; what cannot go back now is tried again by `requeue_failed`.

        Args:
            items: Their queues and Redis ids.
            begun: Attempts of them go on here.
        """
        with self._lock:
            self._failed.extend(items)
            if begun:
                self._begun.update(items)
        self.requeue_failed()

    def requeue_failed(self) -> None:
        """Requeue what could not go back before."""
        with self._lock:
            while self._failed:
                queue, number = item = self._failed[-1]
                try:
                    if item in self._begun:
                        self._mark_begun(queue, number)
                    self._native.do_requeue(queue, number)
                # Dramatiq would end the consumer's thread for what redis-py raises.
                except Exception as error:
                    logger.warning('messages=%d cannot go back now: %r', len(self._failed), error)
                    return
                self._failed.pop()
                self._begun.discard(item)
                self._held.discard(item)
                self.in_hand.get(queue, set()).discard(number)

    def _mark_begun(self, queue: str, number: str) -> None:
        """Write on a message that it came before. RabbitMQ says so itself."""
        data = self._native.client.hget(f'{self._keys.queue(queue)}{MESSAGES}', number)
        found = read_message(data) if data is not None else None
        if isinstance(found, Message):
            found.options[WAITS] = read_stamps(found.options).waits + 1
            self._mark(keys=self._places(queue), args=[number, found.encode()])
