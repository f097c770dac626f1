"""Counting a member of a chord whose first attempt was killed after its result was stored, and before it was counted."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery import states

if TYPE_CHECKING:
    from celery.backends.redis import RedisBackend

__all__ = ['count_member']


def count_member(backend: Any, request: Any, result: Any) -> bool:
    """Count a member of a chord once, whether or not it was counted before.

    On Redis a chord counts its members itself, and what it has counted can be read. Backends that do not count (databases) look at
    stored results instead. Those with a bare counter (Memcached and the like) cannot tell, so that the member is not counted again.

    Args:
        backend: The result backend.
        request: The member's request.
        result: Its stored result.

    Returns:
        False where all members are counted and somebody, perhaps dead, is about to send the chord's body: ask again later.
    """
    if not _is_redis(backend) or not request.group:
        return True
    client = backend.client
    members, size, more = (backend.get_key_for_group(request.group, end) for end in ('.j', '.s', '.t'))
    if not client.exists(members, size):
        return True  # its body was sent
    if not hasattr(backend, '_chord_part_return_script'):  # from Celery 5.7 on, counting twice is counting once
        _forget_member(backend, members, request.id)
    backend.on_chord_part_return(request, states.SUCCESS, result)
    expected = client.get(size)
    counted = client.zcard(members) if backend._chord_zset else client.llen(members)
    return expected is None or counted != int(expected) + int(client.get(more) or 0)


def _forget_member(backend: RedisBackend, members: Any, message_id: str) -> None:
    client = backend.client
    for entry in client.zrange(members, 0, -1) if backend._chord_zset else client.lrange(members, 0, -1):
        if backend.decode(entry)[1] == message_id:
            if backend._chord_zset:
                client.zrem(members, entry)
            else:
                client.lrem(members, 1, entry)


def _is_redis(backend: Any) -> bool:
    try:
        from celery.backends.redis import RedisBackend
    except ImportError:
        return False
    return isinstance(backend, RedisBackend)
