"""Redis: a queue is a list, and publishing to it always succeeds.

Redis keeps what a process has taken and not acknowledged under the broker's id, one set for each queue. The id follows from
the node's name, and the names of the queues stand in a set beside the node's queue: so survivors find all of it.
"""
from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from dramatiq import Message
from dramatiq.common import compute_backoff
from dramatiq.errors import ConnectionClosed, DecodeError
from redis.exceptions import RedisError

from jobsync_core import clock
from jobsync_core.keeper import Letter
from jobsync_core.logs import get_logger
from jobsync_core.routing import KEY, node_queue

from .mail import Hold, home_of, wrapped
from .redis_line import Line

__all__ = ['RedisMail', 'broker_id']

logger = get_logger(__name__)

#: Seconds between two signs of life from a consumer that takes nothing: after a minute other workers put back what it holds.
_SIGN_SEC = 10.0

_RESTORE = """
local ids, moved = redis.call('smembers', KEYS[1]), 0
for _, id in ipairs(ids) do
    if redis.call('hexists', KEYS[2] .. '.msgs', id) > 0 then
        redis.call('rpush', KEYS[2], id)
        moved = moved + 1
    end
end
redis.call('del', KEYS[1])
return moved
"""
_DELETE = """
if redis.call('llen', KEYS[1]) > 0 or redis.call('hlen', KEYS[1] .. '.msgs') > 0 then return 0 end
redis.call('del', KEYS[1], KEYS[1] .. '.msgs', KEYS[1] .. '.sources')
return 1
"""
# As Dramatiq's own, which comes with much that each fetch does as well.
_ACK = """
if redis.call('srem', KEYS[1], ARGV[1]) > 0 then redis.call('hdel', KEYS[2] .. '.msgs', ARGV[1]) end
"""
# KEYS: as above, then a target for each message; ARGV: old id, new id and copy of each.
_PASS = """
for i = 3, #KEYS do
    local old, new, copy = ARGV[3 * i - 8], ARGV[3 * i - 7], ARGV[3 * i - 6]
    redis.call('hset', KEYS[i] .. '.msgs', new, copy)
    redis.call('rpush', KEYS[i], new)
    if redis.call('srem', KEYS[1], old) > 0 then redis.call('hdel', KEYS[2] .. '.msgs', old) end
end
"""
_BURY = """
if redis.call('srem', KEYS[1], ARGV[1]) > 0 then
    redis.call('hdel', KEYS[2] .. '.msgs', ARGV[1])
    redis.call('zadd', KEYS[3], ARGV[2], ARGV[1])
    redis.call('hset', KEYS[3] .. '.msgs', ARGV[1], ARGV[3])
end
"""


def broker_id(appname: str, node: str) -> str:
    """The id under which Redis keeps what a node has taken and not acknowledged; '|' ends it, so that none begins another."""
    return f'{node_queue(appname, node)}|'


def _id(message: Any) -> str:
    return str(message.options['redis_message_id'])


class _Letter:
    def __init__(self, mail: RedisMail, queue: str, message: Message[Any]) -> None:
        self._mail, self._queue, self._message = mail, queue, message
        self.route: str | None = message.options.get(KEY)
        self.home: str | None = home_of(message)

    def forward(self, queue: str) -> None:
        """See Letter."""
        self._mail.send(self._message, queue, self.route)
        self._mail.broker.do_ack(self._queue, _id(self._message))

    def put_back(self) -> None:
        """See Letter."""
        self._mail.broker.do_requeue(self._queue, _id(self._message))


class RedisMail:
    """See BrokerMail.

    Args:
        broker: The RedisBroker.
        appname: The cluster.
    """

    catches_strays = False

    def __init__(self, broker: Any, appname: str) -> None:
        self.broker = broker
        self._appname = appname
        self._queue = ''
        self._restore = broker.client.register_script(_RESTORE)
        self._delete = broker.client.register_script(_DELETE)
        self._ack = broker.client.register_script(_ACK)
        self._pass = broker.client.register_script(_PASS)
        self._line = Line(broker.client)
        self._bury = broker.client.register_script(_BURY)
        self._sources: set[str] = set()
        #: What threads of this process work on or keep for later, by queue.
        self.in_hand: dict[str, set[str]] = {}
        #: Queues and Redis ids of what is to go back, and could not yet.
        self._left: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def join(self, node: str, queue: str) -> None:
        """See BrokerMail: a list needs no making."""
        self._queue = queue
        self.broker.broker_id = broker_id(self._appname, node)

    def consume(self, queue: str, prefetch: int, timeout: int) -> Hold:
        """See BrokerMail."""
        self._sources.discard(queue)  # Redis may have been restarted with nothing in it
        self._note_source(queue)
        if queue.endswith('.DQ'):
            # The worker forgets what waited for its time when a consumer breaks; nobody else holds any of it.
            self.in_hand.pop(queue, None)
        self.reclaim(queue)
        return _RedisHold(self, queue, self.broker.consumer_class(self.broker, queue, prefetch, timeout))

    def send(self, message: Any, queue: str, route: str | None, hops: int = 0, source: Hold | None = None) -> None:
        """See BrokerMail."""
        copy = wrapped(message, queue, route, hops, redis_message_id=str(uuid.uuid4()))
        if not isinstance(source, _RedisHold):
            self.broker.do_enqueue(queue, _id(copy), copy.encode())
            return
        source.leaving[_id(message)] = message.message_id, queue, _id(copy), copy.encode()

    def _keys(self, queue: str, *targets: str) -> list[str]:
        space = self.broker.namespace
        return [f'{space}:__acks__.{self.broker.broker_id}.{queue}', *(f'{space}:{name}' for name in (queue, *targets))]

    def acknowledge(self, queue: str, number: str) -> None:
        """Acknowledge a message by its Redis id.

        Raises:
            RedisError, OSError: It is not known whether it is.
        """
        self._line.run(self._ack, self._keys(queue), [number])

    def pass_on(self, queue: str, leaving: Mapping[str, tuple[str, str, str, bytes]]) -> None:
        """Put copies of messages into their queues and acknowledge the messages, in one step.

        Args:
            queue: Where they came from.
            leaving: Redis id -> message id, target, and the copy with its Redis id.

        Raises:
            RedisError, OSError: Some of it may have been done, in the order given.
        """
        args = [item for old, (_, _, new, copy) in leaving.items() for item in (old, new, copy)]
        self._line.run(self._pass, self._keys(queue, *(target for _, target, _, _ in leaving.values())), args)

    def bury(self, message: Any, queue: str) -> None:
        """Put a message that came from a node's queue among the dead letters of its home queue."""
        home = home_of(message)
        copy = wrapped(message, home, None, redis_message_id=_id(message))
        self._bury(keys=self._keys(queue, f'{home}.XQ'), args=[_id(copy), int(time.time() * 1000), copy.encode()])

    def reclaim(self, queue: str) -> None:
        """Put back what Redis counts as taken by this process, while no thread has it: its answer to a fetch was lost.

        Only the thread that consumes the queue may call this.
        """
        found = self.broker.client.smembers(f'{self.broker.namespace}:__acks__.{self.broker.broker_id}.{queue}')
        lost = {_text(number) for number in found} - self.in_hand.get(queue, set())
        if lost:
            logger.warning('queue=%s: %d messages that this process had lost go back', queue, len(lost))
            self.broker.do_requeue(queue, *lost)

    def leave(self, items: list[tuple[str, str]]) -> None:
        """Give back messages, by their queues and Redis ids; what cannot go back now is tried again by the keeper."""
        with self._lock:
            self._left.extend(items)
        self.tidy()

    def tidy(self) -> None:
        """See BrokerMail: give back what could not go back."""
        with self._lock:
            while self._left:
                queue, number = self._left[-1]
                try:
                    self.broker.do_requeue(queue, number)
                except Exception as error:  # Dramatiq would end the consumer's thread for what redis-py raises
                    logger.warning('messages=%d cannot go back now: %r', len(self._left), error)
                    return
                self._left.pop()
                self.in_hand.get(queue, set()).discard(number)

    def restore(self, node: str) -> int:
        """See Mail."""
        space, name = self.broker.namespace, broker_id(self._appname, node)
        moved = 0
        for raw in self.broker.client.smembers(f'{space}:{node_queue(self._appname, node)}.sources'):
            queue = _text(raw)
            moved += int(self._restore(keys=[f'{space}:__acks__.{name}.{queue}', f'{space}:{queue}']))
        self.broker.client.zrem(f'{space}:__heartbeats__', name)
        return moved

    def take(self, queue: str) -> Letter | None:
        """See Mail."""
        self._note_source(queue)
        while True:
            found = [data for data in self.broker.do_fetch(queue, 1) if data is not None]
            if not found:
                return None
            try:
                return _Letter(self, queue, Message.decode(found[0]))
            except DecodeError:
                # Its id is in there as well. It stays as taken, and comes back when this process has ended.
                logger.exception('queue=%s: a message cannot be decoded', queue)

    def delete(self, queue: str) -> bool:
        """See Mail."""
        return bool(self._delete(keys=[f'{self.broker.namespace}:{queue}']))

    def reset(self) -> None:
        """See Mail: redis-py drops broken connections by itself."""
        self._sources.clear()

    def _note_source(self, queue: str) -> None:
        # Before anything is taken from it.
        if queue not in self._sources:
            self.broker.client.sadd(f'{self.broker.namespace}:{self._queue}.sources', queue)
            self._sources.add(queue)


class _RedisHold:
    """See Hold."""

    def __init__(self, mail: RedisMail, queue: str, raw: Any) -> None:
        self._mail = mail
        self.queue = queue
        self._raw = raw
        self._own = self.queue.startswith('jobsync.')
        #: Messages to be passed on together; see `RedisMail.pass_on`.
        self.leaving: dict[str, tuple[str, str, str, bytes]] = {}
        self._in_hand = mail.in_hand.setdefault(self.queue, set())
        self._signed = clock.now()
        #: Set by acknowledgements once half of what may be prefetched is done, while the consumer waits for that.
        self._room = threading.Event()
        self._waits = False

    def next(self, patient: bool) -> Any:
        """See Hold."""
        if not patient:
            self._raw.misses = 0  # then the pause is short
        if not self._raw.message_cache:
            if self.leaving:
                self._pass_on()
            if self._is_full and not self._wait_for_room():
                return None
        message = next(self._raw)
        if message is not None:
            self._in_hand.add(_id(message))
        return message

    @property
    def _is_full(self) -> bool:
        return bool(self._raw.outstanding_message_count >= self._raw.prefetch)

    @property
    def _has_room(self) -> bool:
        return bool(2 * self._raw.outstanding_message_count <= self._raw.prefetch)

    def _wait_for_room(self) -> bool:
        """Wait until half of what may be prefetched is done; whether anything is.

        At most for as long as Dramatiq sleeps here: that is 5 to 10 ms at first, in which quick actors run out of messages.
        """
        self._raw.misses, milliseconds = compute_backoff(self._raw.misses, max_backoff=self._raw.timeout)
        self._room.clear()
        self._waits = True
        if not self._has_room:
            self._room.wait(milliseconds / 1000)
        self._waits = False
        return not self._is_full

    def _forget(self, message_id: str) -> None:
        """The message does not count as prefetched any more."""
        self._raw.queued_message_ids.discard(message_id)
        if self._waits and self._has_room:
            self._room.set()

    def _pass_on(self) -> None:
        try:
            self._mail.pass_on(self.queue, self.leaving)
        except (RedisError, OSError) as error:
            # The worker closes this consumer, which gives back what is not gone, and makes another one in a second.
            raise ConnectionClosed(error) from error
        for number, (message_id, *_) in self.leaving.items():
            self._raw.queued_message_ids.discard(message_id)
            self._in_hand.discard(number)
        self.leaving.clear()

    def idle(self, seconds: float) -> None:
        """See Hold."""
        time.sleep(seconds)
        if clock.now() - self._signed > _SIGN_SEC:
            self._signed = clock.now()
            self._mail.broker.do_fetch(self.queue, 0)

    def ack(self, message: Any) -> None:
        """See Hold."""
        if _id(message) in self.leaving:
            return
        try:
            self._mail.acknowledge(self.queue, _id(message))
        except (RedisError, OSError):
            self._raw.ack(message)
        self._forget(message.message_id)
        self._in_hand.discard(_id(message))

    def nack(self, message: Any) -> None:
        """See Hold."""
        if self._own:
            self._mail.bury(message, self.queue)
        else:
            self._raw.nack(message)
        self._forget(message.message_id)
        self._in_hand.discard(_id(message))

    def requeue(self, message: Any) -> None:
        """See Hold."""
        self._mail.leave([(self.queue, _id(message))])
        self._forget(message.message_id)

    def pause(self) -> None:
        """See Hold."""
        self._mail.leave(self._cached())

    def resume(self) -> None:
        """See Hold."""
        self._mail.reclaim(self.queue)

    def close(self, waiting: list[Any]) -> None:
        """See Hold. What was fetched, and not handed out yet, would stay in hand until this node is gone."""
        self._mail.leave([(self.queue, _id(message)) for message in waiting] + self._cached())
        self._raw.close()

    def _cached(self) -> list[tuple[str, str]]:
        cache, self._raw.message_cache = self._raw.message_cache, []
        leaving, self.leaving = self.leaving, {}
        for message_id, *_ in leaving.values():
            self._raw.queued_message_ids.discard(message_id)
        return [(self.queue, number) for number in (*leaving, *(_id(Message.decode(data)) for data in cache if data is not None))]


def _text(raw: Any) -> str:
    return raw.decode() if isinstance(raw, bytes) else str(raw)
