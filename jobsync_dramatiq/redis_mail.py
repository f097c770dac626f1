"""Redis: a queue is a list, and publishing to it always succeeds.

Redis keeps what a process has taken and not acknowledged under the broker's id, one set for each
queue. The id follows from the node's name, and the names of the queues stand in a set beside the
node's queue: so survivors find all of it.
"""

from __future__ import annotations

import copy
import math
import os
import random
import re
import threading
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dramatiq import Message
from dramatiq.common import current_millis, xq_name
from dramatiq.errors import ConnectionClosed
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError
from redis.exceptions import ConnectionError as RedisAway
from redis.exceptions import TimeoutError as RedisSilent

from jobsync_core import clock
from jobsync_core.logs import get_logger, shown
from jobsync_core.worker.broker import Delivery
from jobsync_core.worker.incoming import Refused
from jobsync_core.worker.routing import mark_key, node_queue

from .errors import BrokerAway
from .incoming import read_message
from .mail import Hold, dead_letters, home_of, place_of, wrapped
from .redis_hold import RedisHold, redis_id
from .redis_line import Line

if TYPE_CHECKING:
    from .actors import Actors

__all__ = ['RedisMail', 'broker_id']

logger = get_logger(__name__)

#: What `maintenance_chance` counts in.
_MILLION = 1_000_000
#: Seconds for which a queue stays doubtful after an answer was lost, and between two looks at it: a
#: request that the network holds up may reach Redis long after its sender gave it up.
_DOUBT_SEC, _LOOK_SEC = 60.0, 1.0

#: What stands beside a queue.
_ENDINGS = re.compile(r'\.(msgs|sources)$')

# KEYS: what this process has taken from the queue, the queue, the signs of life; ARGV: the time,
# the process, how many. As Dramatiq's own, with the ids: what a message says of itself may be
# wrong, or unreadable.
_FETCH = """
redis.call('zadd', KEYS[3], ARGV[1], ARGV[2])
local found = {}
for _ = 1, tonumber(ARGV[3]) do
    local id = redis.call('lpop', KEYS[2])
    if not id then break end
    local data = redis.call('hget', KEYS[2] .. '.msgs', id)
    if data then
        redis.call('sadd', KEYS[1], id)
        found[#found + 1] = id
        found[#found + 1] = data
    end
end
return found
"""
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

# KEYS: names of the queues that a node takes from, what it has taken from this one; ARGV: the
# queue.
_FORGET_SOURCE = """
if redis.call('exists', KEYS[2]) == 0 then redis.call('srem', KEYS[1], ARGV[1]) end
"""


def broker_id(appname: str, node: str) -> str:
    """The id under which Redis keeps what a node has taken and not acknowledged; '|' ends it, so
    that none begins another.
    """
    return f'{node_queue(appname, node)}|'


class _Letter:
    def __init__(self, mail: RedisMail, queue: str, number: str, message: Message[Any]) -> None:
        self._mail, self._queue, self._number, self.message = mail, queue, number, message
        self.id, self.task = shown(message.message_id), message.actor_name
        self.route: str | None
        self.route, self.home = place_of(mail.actors, message)

    def forward(self, queue: str) -> None:
        """See Delivery."""
        self._mail.send(self.message, queue, self.route)
        self._mail.broker.do_ack(self._queue, self._number)

    def requeue(self) -> None:
        """See Delivery. What cannot go back now does later: Redis gives nothing back because a
        connection is lost.
        """
        self._mail.leave([(self._queue, self._number)])


class RedisMail:
    """See BrokerMail.

    Args:
        broker: The RedisBroker.
        appname: The cluster.
    """

    catches_strays = False
    kind = 'dramatiq'
    actors: Actors | None = None

    def __init__(self, broker: Any, appname: str) -> None:
        self.broker = broker
        self._appname = appname
        self._queue = ''
        self._fetch = broker.client.register_script(_FETCH)
        self._restore = broker.client.register_script(_RESTORE)
        self._delete = broker.client.register_script(_DELETE)
        self._ack = broker.client.register_script(_ACK)
        self._pass = broker.client.register_script(_PASS)
        self._line = Line(broker.client)
        self._bury = broker.client.register_script(_BURY)
        self._forget_source = broker.client.register_script(_FORGET_SOURCE)
        self._sources: set[str] = set()
        #: What threads of this process work on or keep for later, by queue.
        self.in_hand: dict[str, set[str]] = {}
        #: Queues and Redis ids of what is to go back, and could not yet.
        self._left: list[tuple[str, str]] = []
        #: Queues of which a lost answer may have brought messages: until when they are looked at,
        #: and when next.
        self._doubtful: dict[str, tuple[float, float]] = {}
        #: Those of them that the keeper takes from, and nobody consumes here.
        self._swept: set[str] = set()
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        """See BrokerMail."""
        known = self.broker.client.connection_pool.connection_kwargs
        address = known.get('path') or f'{known.get("host", "localhost")}:{known.get("port", 6379)}'
        return f'redis://{address}/{known.get("db", 0)} ({self.broker.namespace})'

    def reach(self) -> None:
        """See BrokerMail."""
        try:
            self.broker.client.ping()
        except (AuthenticationError, AuthorizationError):
            raise
        except (RedisAway, RedisSilent, OSError) as error:
            raise BrokerAway(f'Redis cannot be reached at {self.place}: {error}') from error

    def identify(self, make: bool) -> str | None:
        """See BrokerMail."""
        if make:
            self.mark(str(uuid.uuid4()))
        found = self.broker.client.get(f'{self.broker.namespace}:{mark_key(self._appname)}')
        return _text(found) if found is not None else None

    def mark(self, mark: str) -> None:
        """See Mail."""
        self.broker.client.set(f'{self.broker.namespace}:{mark_key(self._appname)}', mark, nx=True)

    def join(self, node: str, queue: str) -> None:
        """See BrokerMail: a list needs no making."""
        self._queue = queue
        self.broker.broker_id = broker_id(self._appname, node)

    def consume(self, queue: str, prefetch: int, timeout: int) -> Hold:
        """See BrokerMail."""
        self._sources.discard(queue)  # Redis may have been restarted with nothing in it
        if queue.endswith('.DQ'):
            # The worker forgets what waited for its time when a consumer breaks; nobody else holds
            # any of it.
            self.in_hand.pop(queue, None)
        try:
            self._note_source(queue)
            self.reclaim(queue)
        except (RedisError, OSError) as error:
            raise ConnectionClosed(error) from error
        return RedisHold(self, queue, prefetch, timeout)

    def fetch(self, queue: str, number: int) -> list[tuple[str, bytes]]:
        """Take messages, and show that this process lives: Redis ids and data.

        Raises:
            RedisError, OSError: Some may have been taken. The queue is doubtful from then on; see
                `recheck`.
        """
        if random.randrange(_MILLION) < self.broker.maintenance_chance:
            self._maintain(queue)
        keys = [*self._keys(queue), f'{self.broker.namespace}:__heartbeats__']
        try:
            found = self._line.run(
                self._fetch, keys, [current_millis(), self.broker.broker_id, number]
            )
        except BaseException:
            self._doubt(queue)
            raise
        return [(_text(found[place]), found[place + 1]) for place in range(0, len(found), 2)]

    def _maintain(self, queue: str) -> None:
        """What Dramatiq's own fetches do for one in a thousand: look after workers that died, of
        those without the plugin too.
        """
        broker = copy.copy(self.broker)
        broker.maintenance_chance = _MILLION
        broker.do_fetch(queue, 0)

    def send(
        self, message: Any, queue: str, route: str | None, hops: int = 0, source: Hold | None = None
    ) -> None:
        """See BrokerMail."""
        number = str(uuid.uuid4())
        data = wrapped(message, queue, route, hops, redis_message_id=number).encode()
        if isinstance(source, RedisHold):
            source.leaving[redis_id(message)] = queue, number, data
        else:
            self.broker.do_enqueue(queue, number, data)

    def _keys(self, queue: str, *targets: str) -> list[str]:
        space = self.broker.namespace
        return [
            f'{space}:__acks__.{self.broker.broker_id}.{queue}',
            *(f'{space}:{name}' for name in (queue, *targets)),
        ]

    def acknowledge(self, queue: str, number: str) -> None:
        """Acknowledge a message by its Redis id.

        Raises:
            RedisError, OSError: It is not known whether it is.
        """
        self._line.run(self._ack, self._keys(queue), [number])

    def pass_on(self, queue: str, leaving: Mapping[str, tuple[str, str, bytes]]) -> None:
        """Put copies of messages into their queues and acknowledge the messages, in one step.

        Args:
            queue: Where they came from.
            leaving: Redis id -> target, and the copy's Redis id and data.

        Raises:
            RedisError, OSError: Some of it may have been done, in the order given.
        """
        args = [item for old, (_, new, data) in leaving.items() for item in (old, new, data)]
        self._line.run(
            self._pass, self._keys(queue, *(target for target, _, _ in leaving.values())), args
        )

    def bury(self, message: Any, queue: str) -> None:
        """Put a message that came from a node's queue among the dead letters of its home queue."""
        home, number = home_of(message), redis_id(message)
        self._move(
            queue,
            number,
            xq_name(home),
            wrapped(message, home, None, redis_message_id=number).encode(),
        )

    def set_aside(self, queue: str, number: str, data: bytes, reason: str) -> None:
        """Put what no worker can have among the dead letters, as it is."""
        dead = dead_letters(queue, data, self._appname, self.actors)
        logger.error('queue=%s id=%s goes to %s: %s', queue, number, dead, reason)
        self._move(queue, number, dead, data)

    def _move(self, queue: str, number: str, dead: str, data: bytes) -> None:
        self._bury(keys=self._keys(queue, dead), args=[number, current_millis(), data])

    def _doubt(self, queue: str) -> None:
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
        self.reclaim(queue)
        if now < until:
            self._doubtful[queue] = until, now + _LOOK_SEC
        else:
            del self._doubtful[queue]

    def reclaim(self, queue: str) -> None:
        """Put back what Redis counts as taken by this process, while no thread has it: its answer
        to a fetch was lost.

        Only the thread that consumes the queue may call this.
        """
        found = self.broker.client.smembers(
            f'{self.broker.namespace}:__acks__.{self.broker.broker_id}.{queue}'
        )
        lost = {_text(number) for number in found} - self.in_hand.get(queue, set())
        if lost:
            logger.warning(
                'queue=%s: %d messages that this process had lost go back', queue, len(lost)
            )
            self.broker.do_requeue(queue, *lost)

    def leave(self, items: list[tuple[str, str]]) -> None:
        """Give back messages, by their queues and Redis ids; what cannot go back now is tried again
        by the keeper.
        """
        with self._lock:
            self._left.extend(items)
        self._give_back()

    def tidy(self) -> None:
        """See BrokerMail: give back what could not go back, and what the keeper took in an answer
        that was lost.

        The keeper has nothing in hand when it calls this.

        Raises:
            RedisError, OSError: Redis cannot be asked; it is tried again.
        """
        self._give_back()
        for queue in self._swept.intersection(self._doubtful):
            self.recheck(queue)

    def _give_back(self) -> None:
        with self._lock:
            while self._left:
                queue, number = self._left[-1]
                try:
                    self.broker.do_requeue(queue, number)
                except (
                    Exception
                ) as error:  # Dramatiq would end the consumer's thread for what redis-py raises
                    logger.warning('messages=%d cannot go back now: %r', len(self._left), error)
                    return
                self._left.pop()
                self.in_hand.get(queue, set()).discard(number)

    def restore(self, node: str) -> int:
        """See Mail."""
        space, name = self.broker.namespace, broker_id(self._appname, node)
        moved = 0
        for raw in self.broker.client.smembers(
            f'{space}:{node_queue(self._appname, node)}.sources'
        ):
            queue = _text(raw)
            moved += int(
                self._restore(keys=[f'{space}:__acks__.{name}.{queue}', f'{space}:{queue}'])
            )
        self.broker.client.zrem(f'{space}:__heartbeats__', name)
        return moved

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        """See Mail: two trips for all."""
        nodes, space = sorted(queues), self.broker.namespace
        with self.broker.client.pipeline(transaction=False) as pipe:
            for node in nodes:
                pipe.smembers(f'{space}:{queues[node]}.sources')
            sources = pipe.execute()
            for node, found in zip(nodes, sources, strict=True):
                taken = (
                    f'{space}:__acks__.{broker_id(self._appname, node)}.{_text(raw)}'
                    for raw in found
                )
                pipe.exists(f'{space}:{queues[node]}', *taken)
            return frozenset(
                node for node, count in zip(nodes, pipe.execute(), strict=True) if count
            )

    def size(self, queue: str) -> int:
        """See Mail."""
        return int(self.broker.client.llen(f'{self.broker.namespace}:{queue}'))

    def take(self, queue: str) -> Delivery | None:
        """See Mail."""
        space = self.broker.namespace
        if not self.broker.client.llen(f'{space}:{queue}'):
            self._drop_source(queue)
            return None
        self._note_source(queue)
        self._swept.add(queue)
        while found := self.fetch(queue, 1):
            number, data = found[0]
            try:
                message = read_message(data)
                if not isinstance(message, Refused):
                    return _Letter(self, queue, number, message)
                self.set_aside(queue, number, data, message.reason)
            except BaseException:
                self._doubt(queue)  # it is taken, and nobody has it
                raise
        return None

    def _drop_source(self, queue: str) -> None:
        # What is swept once would be looked at for ever by whoever sweeps this node: nodes times
        # orphans.
        if queue in self._sources and queue not in self.in_hand:
            space = self.broker.namespace
            self._forget_source(
                keys=[f'{space}:{self._queue}.sources', self._keys(queue)[0]], args=[queue]
            )
            self._sources.discard(queue)

    def begin_evacuation(self) -> None:
        """See BrokerMail. Under a name like a node's: what is in hand when this is interrupted is
        found by the next one.
        """
        name = f'evacuation-{os.getpid()}'
        self.join(name, node_queue(self._appname, name))

    def places(self) -> Iterable[str]:
        """See Evacuable: there may be some that no table knows of."""
        start = f'{self.broker.namespace}:{node_queue(self._appname, "")}'
        pattern = re.sub(r'([*?\[\]\\])', r'\\\1', start) + '*'
        found = (_text(key) for key in self.broker.client.scan_iter(match=pattern, count=1000))
        return sorted(
            {
                _ENDINGS.sub('', key[len(self.broker.namespace) + 1 :])
                for key in found
                if '.XQ' not in key
            }
        )

    def close(self) -> None:
        """See Evacuable. What a lost answer brought goes back now, or when somebody evacuates
        again.
        """
        try:
            self.tidy()
        except (RedisError, OSError) as error:
            logger.warning('messages may still be in hand; evacuate once more: %r', error)
        self.broker.client.close()

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


def _text(raw: Any) -> str:
    return raw.decode() if isinstance(raw, bytes) else str(raw)
