"""Redis, as the keeper needs it."""
from __future__ import annotations

from typing import Any

from dramatiq import Message

from jobsync_core.keeper import Letter
from jobsync_core.routing import KEY

from .actors import HOME
from .gate import publish

__all__ = ['RedisMail', 'broker_id']

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
redis.call('del', KEYS[1], KEYS[1] .. '.msgs')
return 1
"""


def broker_id(appname: str, node: str) -> str:
    """The id under which Redis keeps what a node has taken and not acknowledged; '|' ends it, so that none begins another."""
    return f'jobsync.{appname}.{node}|'


class _Letter:
    def __init__(self, broker: Any, queue: str, message: Message[Any]) -> None:
        self._broker, self._queue, self._message = broker, queue, message
        self.route: str | None = message.options.get(KEY)
        self.home: str | None = message.options.get(HOME)

    def forward(self, queue: str) -> None:
        """See Letter."""
        publish(self._broker, self._message, queue, self.home or self._message.queue_name, self.route, 0)
        self._broker.do_ack(self._queue, self._message.options['redis_message_id'])

    def put_back(self) -> None:
        """See Letter."""
        self._broker.do_requeue(self._queue, self._message.options['redis_message_id'])


class RedisMail:
    """See Mail.

    Args:
        broker: The RedisBroker.
        appname: The cluster.
    """

    catches_strays = False

    def __init__(self, broker: Any, appname: str) -> None:
        self._broker = broker
        self._appname = appname
        self._restore = broker.client.register_script(_RESTORE)
        self._delete = broker.client.register_script(_DELETE)

    def restore(self, node: str) -> int:
        """See Mail."""
        name = broker_id(self._appname, node)
        space = self._broker.namespace
        start = f'{space}:__acks__.{name}.'
        moved = 0
        for raw in self._broker.client.scan_iter(match=f'{space}:__acks__.jobsync.*', count=1000):
            key = raw.decode() if isinstance(raw, bytes) else raw
            if key.startswith(start):
                moved += int(self._restore(keys=[key, f'{space}:{key[len(start):]}']))
        self._broker.client.zrem(f'{space}:__heartbeats__', name)
        return moved

    def take(self, queue: str) -> Letter | None:
        """See Mail."""
        found = [data for data in self._broker.do_fetch(queue, 1) if data is not None]
        return _Letter(self._broker, queue, Message.decode(found[0])) if found else None

    def delete(self, queue: str) -> bool:
        """See Mail."""
        return bool(self._delete(keys=[f'{self._broker.namespace}:{queue}']))

    def reset(self) -> None:
        """See Mail: redis-py drops broken connections by itself."""
