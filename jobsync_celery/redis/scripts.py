"""The scripts with which messages are taken and acknowledged on Redis, and what a server says that
does not run them.
"""

from __future__ import annotations

from redis.exceptions import ResponseError

__all__ = ['ACKNOWLEDGE', 'ELSEWHERE', 'FOR_NOW', 'TAKE', 'says']

#: What a server says that has become a replica, or has lost its master.
ELSEWHERE = ('ReadOnlyError', 'READONLY', 'MasterDownError', 'MASTERDOWN')
#: What it says that takes no writes for now: no memory, no disk, too few replicas, a script of
#: somebody's.
FOR_NOW = ('OutOfMemoryError', 'OOM', 'MISCONF', 'NOREPLICAS', 'BUSY')

# KEYS: hash and index of unacknowledged messages, then lists in the order to look at; ARGV: the
# time, then for each list its queue and whether its messages are acknowledged: what is not has no
# record, which nobody would remove. The list is shortened last: a script that Redis stops for lack
# of memory has lost nothing.
TAKE = """
for i = 3, #KEYS do
    local item = redis.call('LINDEX', KEYS[i], -1)
    if item then
        local sound, message = pcall(cjson.decode, item)
        local queue, acknowledged = ARGV[2 * i - 4], ARGV[2 * i - 3] == '1'
        local tag = acknowledged and sound and type(message) == 'table'
            and type(message.properties) == 'table'
            and message.properties.delivery_tag
        local recorded = false
        if type(tag) == 'string' then
            redis.call('ZADD', KEYS[2], ARGV[1], tag)
            redis.call('HSET', KEYS[1], tag, '[' .. item .. ', "", ' .. cjson.encode(queue) .. ']')
            recorded = tag
        end
        redis.call('RPOP', KEYS[i])
        return {queue, item, recorded}
    end
end
return false
"""

# KEYS: as above, without the lists; ARGV: a delivery tag.
ACKNOWLEDGE = """
redis.call('ZREM', KEYS[2], ARGV[1])
return redis.call('HDEL', KEYS[1], ARGV[1])
"""


def says(error: ResponseError, marks: tuple[str, ...]) -> bool:
    """Whether a server's refusal is one of these."""
    said = f'{type(error).__name__} {error}'  # redis-py takes some codes off the text
    return any(mark in said for mark in marks)
