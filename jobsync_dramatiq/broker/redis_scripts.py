"""The scripts that run at Redis, and the connections on which they run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError

from .redis_keys import MESSAGES

__all__ = [
    'ACK',
    'BURY',
    'DELETE',
    'DROP_SOURCE',
    'FETCH',
    'MARK',
    'PASS_ON',
    'PURGE',
    'RESTORE',
    'ScriptConnection',
]

#: Seconds to wait for an answer where the client's user has not said for how long. No script here
#: takes long.
_ANSWER_SEC = 10.0

_BEGIN = f"local MESSAGES = '{MESSAGES}'"
# KEYS: what this process has taken from the queue, the queue, the signs of life, the names of the
# queues that its node takes from; ARGV: the time, the process, how many, the queue's name. As
# Dramatiq's own, with the ids: what a message says of itself may be wrong, or unreadable.
FETCH = (
    _BEGIN
    + """
redis.call('zadd', KEYS[3], ARGV[1], ARGV[2])
local found = {}
for _ = 1, tonumber(ARGV[3]) do
    local id = redis.call('lpop', KEYS[2])
    if not id then break end
    local data = redis.call('hget', KEYS[2] .. MESSAGES, id)
    if data then
        redis.call('sadd', KEYS[1], id)
        found[#found + 1] = id
        found[#found + 1] = data
    end
end
if #found > 0 then redis.call('sadd', KEYS[4], ARGV[4]) end
return found
"""
)
# KEYS: what a process had taken from a queue, the queue.
RESTORE = (
    _BEGIN
    + """
local ids, moved = redis.call('smembers', KEYS[1]), 0
for _, id in ipairs(ids) do
    if redis.call('hexists', KEYS[2] .. MESSAGES, id) > 0 then
        redis.call('rpush', KEYS[2], id)
        moved = moved + 1
    end
end
redis.call('del', KEYS[1])
return moved
"""
)
# KEYS: the queue, the names of the queues that its owner takes from, which go with it where the
# owner has nothing in hand; ARGV: what the names of what it has taken begin with.
DELETE = (
    _BEGIN
    + """
if redis.call('llen', KEYS[1]) > 0 or redis.call('hlen', KEYS[1] .. MESSAGES) > 0 then return 0 end
redis.call('del', KEYS[1], KEYS[1] .. MESSAGES)
for _, name in ipairs(redis.call('smembers', KEYS[2])) do
    if redis.call('exists', ARGV[1] .. name) > 0 then return 1 end
end
redis.call('del', KEYS[2])
return 1
"""
)
# As Dramatiq's own, which comes with much that each fetch does as well.
ACK = (
    _BEGIN
    + """
if redis.call('srem', KEYS[1], ARGV[1]) > 0 then
    redis.call('hdel', KEYS[2] .. MESSAGES, ARGV[1])
end
"""
)
# KEYS: as for FETCH, then a target for each message; ARGV: old id, new id and copy of each.
PASS_ON = (
    _BEGIN
    + """
for i = 3, #KEYS do
    local old, new, copy = ARGV[3 * i - 8], ARGV[3 * i - 7], ARGV[3 * i - 6]
    redis.call('hset', KEYS[i] .. MESSAGES, new, copy)
    redis.call('rpush', KEYS[i], new)
    if redis.call('srem', KEYS[1], old) > 0 then redis.call('hdel', KEYS[2] .. MESSAGES, old) end
end
"""
)
# KEYS: as for FETCH, with the dead letters in the third place; ARGV: id, time, data.
BURY = (
    _BEGIN
    + """
if redis.call('srem', KEYS[1], ARGV[1]) > 0 then
    redis.call('hdel', KEYS[2] .. MESSAGES, ARGV[1])
    redis.call('zadd', KEYS[3], ARGV[2], ARGV[1])
    redis.call('hset', KEYS[3] .. MESSAGES, ARGV[1], ARGV[3])
end
"""
)
# KEYS: the queue; ARGV: how many at most. What was taken keeps its data.
PURGE = (
    _BEGIN
    + """
local count = 0
for _ = 1, tonumber(ARGV[1]) do
    local id = redis.call('lpop', KEYS[1])
    if not id then break end
    redis.call('hdel', KEYS[1] .. MESSAGES, id)
    count = count + 1
end
return count
"""
)
# KEYS: as for FETCH; ARGV: id, data.
MARK = (
    _BEGIN
    + """
if redis.call('sismember', KEYS[1], ARGV[1]) > 0 then
    redis.call('hset', KEYS[2] .. MESSAGES, ARGV[1], ARGV[2])
end
"""
)
# KEYS: names of the queues that a node takes from, what it has taken from this one; ARGV: the
# queue.
DROP_SOURCE = """
if redis.call('exists', KEYS[2]) == 0 then redis.call('srem', KEYS[1], ARGV[1]) end
"""


class ScriptConnection:
    """Runs scripts, each thread's on a connection of its own that is kept, and each once: nothing
    is tried again.

    In place of calling what `register_script` returns, which costs twice as much. Measured with
    redis-py 8.1, one process and a server beside it: 61 µs for a script, 44 of them CPU time of the
    caller, and 31 and 18 µs here. A worker of 8 threads, which runs two scripts for most messages,
    did 8 to 15 % fewer empty keyed messages a second with `register_script`.

    Args:
        client: The broker's redis-py client.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._own = threading.local()

    def run(self, script: Any, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script; its answer.

        Args:
            script: What the client's `register_script` returned.
            keys: Its keys.
            args: Its arguments.

        Raises:
            RedisError, OSError: It is not known whether it was run.
        """
        connection = self._connection()
        if connection is None:
            return script(keys=keys, args=args)
        if not self._own.connected:
            # By Sentinel redis-py keeps a connection whose answer did not come in time, and would
            # read it as that of the next command.
            connection.disconnect()
            # Not left to `send_command`, which does not ask Sentinel where the master is now; and
            # not asked for before each command, which costs as much as packing it.
            connection.connect()
        self._own.connected = False  # whatever goes wrong from here on may have ended it
        try:
            found = self._do(connection, 'EVALSHA', script.sha, keys, args)
        except NoScriptError:
            found = self._do(connection, 'EVAL', script.script, keys, args)
        self._own.connected = True
        return found

    def _connection(self) -> Any:
        found = getattr(self._own, 'connection', None)
        if found is None:
            # Not taken from the pool, whose size may be bounded. A client of a Redis Cluster has
            # none.
            pool = getattr(self._client, 'connection_pool', None)
            if pool is None:
                return None
            known = dict(pool.connection_kwargs)
            # Before redis-py 8: a network that swallows the answer would hang the thread for ever.
            if known.get('socket_timeout') is None:
                known['socket_timeout'] = _ANSWER_SEC
            found = self._own.connection = pool.connection_class(**known)
            self._own.connected = False
        return found

    @staticmethod
    def _do(
        connection: Any, command: str, script: Any, keys: Sequence[str], args: Sequence[Any]
    ) -> Any:
        connection.send_command(command, script, len(keys), *keys, *args)
        return connection.read_response()
