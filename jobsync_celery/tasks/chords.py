"""Counting a member of a chord whose first attempt was killed after its result was stored, and
before it was counted.
"""

from __future__ import annotations

import enum
import sys
from typing import TYPE_CHECKING, Any

from celery import maybe_signature, states

if TYPE_CHECKING:
    from celery.backends.redis import RedisBackend

__all__ = ['Step', 'close_connections', 'count_member', 'next_step', 'waits_for_others']

_DJANGO = 'django_celery_results.backends.database'


class Step(enum.Enum):
    """What the duplicate of a chord's member does where nobody can tell whether the member was
    counted.
    """

    DONE = 'done'
    WAIT = 'wait'
    TRIGGER = 'trigger'


def next_step(counter_exists: bool, all_ready: bool) -> Step:
    """Whether a chord is done, waits for members, or is to be triggered.

    A count can be lost, a stored result cannot: once all results are there the body may go out,
    whatever the counter says. Who takes the counter away sends it; a member that counts later finds
    no counter.

    Args:
        counter_exists: The chord has a counter, which goes when its body is sent.
        all_ready: All members have a final state in the result backend.
    """
    if not counter_exists:
        return Step.DONE
    return Step.TRIGGER if all_ready else Step.WAIT


def count_member(backend: Any, request: Any, result: Any) -> bool:
    """Count a member of a chord once, whether or not it was counted before.

    On Redis what has been counted can be read. On `django-db` it cannot, but the counter and the
    members' states can: see next_step. Backends without a counter have a task of Celery's that
    polls results. Those with a bare counter (Memcached, DynamoDB, Google Cloud Storage) cannot
    tell, so that the member is not counted again.

    Args:
        backend: The result backend.
        request: The member's request.
        result: Its stored result.

    Returns:
        False where the body is still to be sent, after other members end or by a worker that may be
            dead: ask again later.

    Raises:
        Exception: What the result backend raises. Ask again later.
    """
    if not request.group:
        return True
    if _is_django(backend):
        return _trigger_in_django(backend, request)
    return not _is_redis(backend) or _count_in_redis(backend, request, result)


def waits_for_others(backend: Any) -> bool:
    """Whether count_member may ask to come back until other members have ended, however long that
    takes.
    """
    return _is_django(backend)


def close_connections(backend: Any) -> None:
    """Close what count_member opened in a thread or process that Django does not look after."""
    if _is_django(backend):
        from django.db import connections

        connections.close_all()


def _count_in_redis(backend: RedisBackend, request: Any, result: Any) -> bool:
    client = backend.client
    members, size, more = (
        backend.get_key_for_group(request.group, end) for end in ('.j', '.s', '.t')
    )
    if not client.exists(members, size):
        return True  # its body was sent
    if not hasattr(
        backend, '_chord_part_return_script'
    ):  # from Celery 5.7 on, counting twice is counting once
        _uncount_member(backend, members, request.id)
    backend.on_chord_part_return(request, states.SUCCESS, result)
    expected = client.get(size)
    counted = client.zcard(members) if backend._chord_zset else client.llen(members)
    return expected is None or counted != int(expected) + int(client.get(more) or 0)


def _trigger_in_django(backend: Any, request: Any) -> bool:
    from django.db import router, transaction

    database = sys.modules[_DJANGO]
    using = router.db_for_write(database.ChordCounter)
    counters = database.ChordCounter.objects.using(using).filter(group_id=request.group)
    counter = counters.first()
    # Looked at without a lock, which members that count would wait for: a member that is ready
    # stays so.
    results = counter and counter.group_result(app=backend.app)
    step = next_step(counter is not None, counter is not None and results.ready())
    if step is not Step.TRIGGER:
        return step is Step.DONE
    body = maybe_signature(request.chord, app=backend.app)
    # Sent before the counter is gone for others: who dies in between leaves the counter, and the
    # body goes out again with the same id. A body that is no plain task may be a chord, whose own
    # counter must be there before its members run: it goes after the commit.
    plain = not body.get('subtask_type')
    with transaction.atomic(using=using):
        if counters.select_for_update().first() is None or not counters.delete()[0]:
            return True  # another one was faster
        if plain:
            database.trigger_callback(app=backend.app, callback=body, group_result=results)
    if not plain:
        database.trigger_callback(app=backend.app, callback=body, group_result=results)
    return True


def _uncount_member(backend: RedisBackend, members: Any, message_id: str) -> None:
    client = backend.client
    for entry in (
        client.zrange(members, 0, -1) if backend._chord_zset else client.lrange(members, 0, -1)
    ):
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


def _is_django(backend: Any) -> bool:
    database = sys.modules.get(_DJANGO)  # a backend of it has imported it
    return database is not None and isinstance(backend, database.DatabaseBackend)
