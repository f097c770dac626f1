"""Redis: a queue is a list, and publishing to it always succeeds.

Redis keeps what a process has taken and not acknowledged under its broker id, which follows from
the node's name: so survivors find all of it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dramatiq import Message
from dramatiq.errors import ConnectionClosed
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError
from redis.exceptions import ConnectionError as RedisAway
from redis.exceptions import TimeoutError as RedisSilent

from jobsync_core.logs import get_logger, shown
from jobsync_core.worker.broker import Delivery, search
from jobsync_core.worker.incoming import Refused
from jobsync_core.worker.routing import old_node_queue

from ..errors import BrokerAway
from ..incoming import read_message
from ..parts import REDIS
from . import redis_scripts as scripts
from .copies import copy_for, route_and_home
from .interface import Origins, QueueConsumer
from .redis_consumer import RedisQueueConsumer
from .redis_keys import RedisKeys, broker_id, redis_id, text_of
from .redis_queues import RedisQueues

__all__ = ['RedisWorkerBroker']

logger = get_logger(__name__)


class _Taken:
    """A message that was taken off a queue for rescue, parking or evacuation."""

    def __init__(
        self,
        broker: RedisWorkerBroker,
        queue: str,
        number: str,
        message: Message[Any],
        origins: Origins,
        appname: str,
    ) -> None:
        self._broker, self._queue, self._number, self.message = broker, queue, number, message
        self.id, self.task = shown(message.message_id), message.actor_name
        self.route: str | None
        self.route, self.home = route_and_home(origins, message, queue, appname)

    def forward(self, queue: str) -> None:
        """Publish it to a queue, then acknowledge it here."""
        self._broker.send(self.message, queue, self.route)
        self._broker.native.do_ack(self._queue, self._number)
        self._broker.queues.let_go(self._queue, self._number)

    def requeue(self) -> None:
        """Requeue it. What cannot go back now does later: Redis gives nothing back
        because a connection is lost.
        """
        self._broker.queues.requeue([(self._queue, self._number)])


class RedisWorkerBroker:
    """A WorkerBroker at Redis.

    Args:
        native: The RedisBroker.
        appname: The cluster.
        origins: What this process knows of actors.

    Attributes:
        queues: What this process takes from queues.
    """

    catches_strays = False
    requeue_is_free = True
    kind = 'dramatiq'
    parts = frozenset({REDIS})

    def __init__(self, native: Any, appname: str, origins: Origins) -> None:
        self.native = native
        self._appname = appname
        self._origins = origins
        self._keys = RedisKeys(native.namespace, appname)
        self.queues = RedisQueues(native, self._keys, appname, origins)
        register = native.client.register_script
        self._restore, self._delete = register(scripts.RESTORE), register(scripts.DELETE)
        self._drop = register(scripts.DROP_SOURCE)
        #: Queues that the node's own thread has taken from, and that are named as such.
        self._sources: set[str] = set()
        #: Queues that the node's own thread takes from.
        self._swept: set[str] = set()

    @property
    def place(self) -> str:
        """The address of the server, the number of its database, and the namespace; no password."""
        space = self.native.namespace
        pool = getattr(self.native.client, 'connection_pool', None)
        if pool is None:
            return f'Redis Cluster ({space})'
        known = pool.connection_kwargs
        if master := getattr(pool, 'service_name', None):
            return (
                f'Redis, the master {shown(master, 100)} of Sentinel/{known.get("db", 0)} ({space})'
            )
        address = known.get('path') or f'{known.get("host", "localhost")}:{known.get("port", 6379)}'
        return f'redis://{address}/{known.get("db", 0)} ({space})'

    def reach(self) -> None:
        """Look whether Redis answers.

        Raises:
            BrokerAway: It cannot be reached.
        """
        try:
            self.native.client.ping()
        except (AuthenticationError, AuthorizationError):
            raise
        except (RedisAway, RedisSilent, OSError) as error:
            raise BrokerAway(f'Redis cannot be reached at {self.place}: {error}') from error

    def identify(self, make: bool) -> str | None:
        """The mark, which is a key of its own."""
        if make:
            self.mark(str(uuid.uuid4()))
        found = self.native.client.get(self._keys.mark)
        return text_of(found) if found is not None else None

    def mark(self, mark: str) -> None:
        """Write the mark where there is none."""
        self.native.client.set(self._keys.mark, mark, nx=True)

    def join(self, node: str) -> None:
        """Take messages under the node's broker id."""
        self.queues.node = node
        self.native.broker_id = broker_id(self._appname, node)

    def declare(self, home: str, queue: str) -> None:
        """Nothing: a list needs no making."""

    def consume(self, queue: str, prefetch: int, timeout: int) -> QueueConsumer:
        """Begin to consume a queue; what this process had taken from it, and lost, goes back."""
        if queue.endswith('.DQ'):
            # The worker forgets what waited for its time when a consumer breaks; nobody else holds
            # any of it.
            self.queues.in_hand.pop(queue, None)
        try:
            self.queues.requeue_lost(queue)
        except (RedisError, OSError) as error:
            raise ConnectionClosed(error) from error
        return RedisQueueConsumer(self.queues, queue, prefetch, timeout)

    def send(
        self,
        message: Any,
        queue: str,
        route: str | None,
        hops: int = 0,
        source: QueueConsumer | None = None,
    ) -> None:
        """Publish a copy, or note it to be published together with the acknowledgement."""
        number = str(uuid.uuid4())
        data = copy_for(queue, message, route, hops, redis_message_id=number).encode()
        if isinstance(source, RedisQueueConsumer):
            source.leaving[redis_id(message)] = queue, number, data
        else:
            self.native.do_enqueue(queue, number, data)

    def requeue_failed(self) -> None:
        """Requeue what could not go back, and what the node's own thread took in an answer that
        was lost. That thread has nothing in hand when it calls this.

        Raises:
            RedisError, OSError: Redis cannot be asked; it is tried again.
        """
        self.queues.requeue_failed()
        self.queues.let_all_go()
        # What is consumed here its consumer looks after: it alone knows what it has fetched.
        for queue in (self._swept & self.queues.doubtful) - self.queues.in_hand.keys():
            self.queues.recheck(queue)

    def restore(self, node: str) -> int:
        """Restore what a node that is gone had taken, queue by queue; returns how many
        messages.
        """
        owner, moved = broker_id(self._appname, node), 0
        sources = self._keys.sources(node)
        for raw in self.native.client.smembers(sources):
            queue = text_of(raw)
            keys = [self._keys.taken(owner, queue), self._keys.queue(queue)]
            moved += int(self._restore(keys=keys))
        self.native.client.zrem(self._keys.signs, owner)
        return moved

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        """Queues that nodes that are gone may have left something in: in few trips, however many
        they are.
        """
        client, appname = self.native.client, self._appname

        def any_of(group: Sequence[str]) -> bool:
            nodes = sorted({queues[each] for each in group})
            # All take from the same few queues.
            sources = client.sunion([self._keys.sources(each) for each in nodes])
            owners = [broker_id(appname, node) for node in nodes]
            taken = (self._keys.taken(owner, text_of(raw)) for owner in owners for raw in sources)
            return bool(client.exists(*map(self._keys.queue, group), *taken))

        return search(sorted(queues), any_of)

    def size(self, queue: str) -> int:
        """How many messages wait in a queue."""
        return int(self.native.client.llen(self._keys.queue(queue)))

    def take(self, queue: str) -> Delivery | None:
        """The next message of a queue; None where it is empty."""
        if not self.size(queue):
            self._drop_source(queue)
            return None
        self._sources.add(queue)
        self._swept.add(queue)
        while found := self.queues.take(queue):
            number, data = found
            try:
                message = read_message(data)
                if not isinstance(message, Refused):
                    return _Taken(self, queue, number, message, self._origins, self._appname)
                self.queues.set_aside(queue, number, data, message.reason)
            except BaseException:
                self.queues.doubt(queue)  # it is taken, and nobody has it
                self.queues.let_go(queue, number)
                raise
            self.queues.let_go(queue, number)
        return None

    def _drop_source(self, queue: str) -> None:
        # What is swept once would be looked at for ever by whoever sweeps this node: nodes times
        # orphans.
        if queue in self._sources and queue not in self.queues.in_hand:
            taken = self._keys.taken(self.native.broker_id, queue)
            self._drop(keys=[self._keys.sources(self.queues.node), taken], args=[queue])
            self._sources.discard(queue)

    def begin_evacuation(self) -> None:
        """Take messages under a name like a node's: what is in hand when this is interrupted is
        found by the next one.
        """
        self.join(f'evacuation-{os.getpid()}')

    def places(self) -> Iterable[str]:
        """Names of this plugin's queues at Redis: there may be some that no table knows of."""
        found = self.native.client.scan_iter(match=self._keys.pattern, count=1000)
        queues = {self._keys.queue_of(text_of(key)) for key in found}
        return sorted(queue for queue in queues if queue is not None)

    def close(self) -> None:
        """Close all connections. What a lost answer brought goes back now, or when somebody
        evacuates again.
        """
        try:
            self.requeue_failed()
        except (RedisError, OSError) as error:
            logger.warning('messages may still be in hand; evacuate once more: %r', error)
        self.native.client.close()

    def delete(self, queue: str) -> bool:
        """Delete a queue if it is empty; whether it is gone."""
        node = queue.partition(old_node_queue(self._appname, ''))[2]
        owner = broker_id(self._appname, node) if node else ''
        keys = [self._keys.queue(queue), self._keys.sources(node)]
        return bool(self._delete(keys=keys, args=[self._keys.taken_by(owner)]))

    def reset(self) -> None:
        """Nothing is known of Redis any more; redis-py drops broken connections by itself."""
        self._sources.clear()
