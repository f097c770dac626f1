"""What of a delivery Celery itself would fall over: checked before its consumer, its strategies and
its pool read it.

An exception in the consumer's callback, in its timers or on the way to the pool ends a worker, and
then each worker that the message goes to. Nothing here raises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from celery.app.task import Context
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from jobsync_core.logs import shown
from jobsync_core.worker.incoming import Refused, read_name

__all__ = ['Incoming', 'context_of', 'read_delivery', 'read_raw', 'read_record']

#: How deeply a message may be nested.
MAX_DEPTH = 200
#: The longest time limit that is one, in seconds: ten years.
_MAX_LIMIT_SEC = 315_360_000


@dataclass(frozen=True)
class Incoming:
    """A message of a task, as its sender wrote it.

    Attributes:
        task: The task's name.
        id: The message's id; whatever it is, it can be looked up.
        args, kwargs: The arguments, not checked.
    """

    task: str
    id: Any
    args: Any
    kwargs: Any


def read_delivery(message: Any) -> Incoming | Refused:
    """What a delivery is for, or why no worker can take it.

    Args:
        message: Kombu's message. Its body is decoded, which it remembers.
    """
    errors = getattr(message, 'errors', None)
    if errors:
        return Refused(f'it cannot be decoded: {shown(errors[0][1])}')
    headers = message.headers
    if headers is not None and not isinstance(headers, Mapping):
        return Refused(f'its headers are {shown(headers, 60)}: give a mapping')
    try:
        payload = message.payload
    except (
        Exception
    ) as error:  # of a serializer, of what refuses content types, of a broken encoding
        return Refused(f'it cannot be decoded: {type(error).__name__}: {shown(_text(error))}')
    if any(_is_deep(part) for part in (headers, message.properties, payload)):
        return Refused(f'it is nested deeper than {MAX_DEPTH} levels')
    if headers and 'task' in headers:
        return _protocol_2(headers, payload)
    return _protocol_1(payload)


def _is_deep(value: object) -> bool:
    """Whether a value is nested too deeply to be handed on to a pool's process: pickling it would
    fail in the event loop.
    """
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        # By identity: a serializer may share one part between many.
        inner: dict[int, object] = {}
        for item in level:
            parts = (
                item.values()
                if isinstance(item, Mapping)
                else item
                if isinstance(item, (list, tuple))
                else ()
            )
            inner.update(
                (id(part), part) for part in parts if isinstance(part, (Mapping, list, tuple))
            )
        if not inner:
            return False
        level = list(inner.values())
    return True


def read_raw(text: str | bytes) -> dict[str, Any] | Refused:
    """A message as kombu stores it in a list of Redis.

    Args:
        text: The entry of the list.
    """
    message = _loaded(text)
    return message if isinstance(message, Refused) else _whole(message, text)


def read_record(text: str | bytes) -> tuple[dict[str, Any], str, str] | Refused:
    """What kombu records of a message that is not acknowledged: the message, its exchange and its
    routing key.

    Args:
        text: The record.
    """
    record = _loaded(text)
    if isinstance(record, Refused):
        return record
    if (
        not isinstance(record, list)
        or len(record) != 3
        or not all(part is None or isinstance(part, str) for part in record[1:])
    ):
        return Refused(f'it is no message, exchange and routing key: {shown(text, 100)}')
    message = _whole(record[0], text)
    return message if isinstance(message, Refused) else (message, record[1] or '', record[2] or '')


def _loaded(text: str | bytes) -> Any:
    try:
        return loads(bytes_to_str(text))
    except Exception as error:  # no JSON, or more than it can hold
        return Refused(f'{type(error).__name__}: {shown(_text(error))}: {shown(text, 100)}')


def _whole(message: Any, text: str | bytes) -> dict[str, Any] | Refused:
    properties = message.get('properties') if isinstance(message, dict) else None
    if not isinstance(properties, dict) or not isinstance(properties.get('delivery_tag'), str):
        return Refused(f'it has no properties with a delivery_tag: {shown(text, 100)}')
    place = properties.get('delivery_info')
    if (
        not isinstance(place, dict)
        or not isinstance(place.get('exchange'), str)
        or not isinstance(place.get('routing_key'), str)
    ):
        properties['delivery_info'] = {'exchange': '', 'routing_key': ''}
    if properties.get('priority') in (math.inf, -math.inf):
        del properties['priority']  # kombu counts with it
    return cast(dict[str, Any], message)


def _protocol_2(headers: Mapping[str, Any], payload: Any) -> Incoming | Refused:
    if isinstance(payload, Mapping) and 'args' in payload:  # some senders mix the protocols
        return _checked(headers, payload.get('args'), payload.get('kwargs'))
    if not isinstance(payload, (list, tuple)) or len(payload) != 3:
        return Refused(f'its body is {shown(payload, 60)}: give [args, kwargs, embed]')
    args, kwargs, embed = payload
    if embed is not None and not isinstance(embed, Mapping):
        return Refused(
            f'the third part of its body is {shown(embed, 60)}: give a mapping of callbacks, '
            'errbacks, chain and chord'
        )
    return _checked(headers, args, kwargs)


def _protocol_1(payload: Any) -> Incoming | Refused:
    if not isinstance(payload, Mapping) or 'task' not in payload:
        return Refused(f'it is no task: {shown(payload, 60)}')
    return _checked(payload, payload.get('args', ()), payload.get('kwargs', {}))


def _checked(head: Mapping[str, Any], args: Any, kwargs: Any) -> Incoming | Refused:
    name = read_name(head.get('task'), 'its task')
    if isinstance(name, Refused):
        return name
    message_id = head.get('id')
    if message_id is None or not isinstance(message_id, (str, int)):
        return Refused(f'its id is {shown(message_id, 60)}: give a text')
    wrong = _wrong_limits(head.get('timelimit')) or _wrong_stamps(head)
    shadow = head.get('shadow')
    if shadow is not None and not isinstance(shadow, str):
        wrong = wrong or f'its shadow is {shown(shadow, 60)}: give a text'
    return Refused(wrong) if wrong else Incoming(name, message_id, args, kwargs)


def _wrong_limits(limits: Any) -> str | None:
    """The pool counts with these in the event loop."""
    if not limits:
        return None
    if (
        not isinstance(limits, (list, tuple))
        or len(limits) != 2
        or not all(
            limit is None or (type(limit) in (int, float) and 0 <= limit <= _MAX_LIMIT_SEC)
            for limit in limits
        )
    ):
        return f'its timelimit is {shown(limits, 60)}: give two numbers of seconds, or null'
    return None


def _wrong_stamps(head: Mapping[str, Any]) -> str | None:
    """These are looked up among what is revoked, on the way to the pool."""
    names, stamps = head.get('stamped_headers'), head.get('stamps')
    if names and not (
        isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    ):
        return f'its stamped_headers are {shown(names, 60)}: give a list of names'
    if stamps and not isinstance(stamps, Mapping):
        return f'its stamps are {shown(stamps, 60)}: give a mapping'
    return None


def context_of(message: Any) -> Context | None:
    """What a result backend wants to know of a message that fails: its errbacks, its chord, where
    its sender waits; None where nothing of it can be read.
    """
    try:
        headers, payload = message.headers or {}, message.payload
        if 'task' in headers:
            embed = payload[2] if isinstance(payload, (list, tuple)) else {}
            args, kwargs = payload[:2] if isinstance(payload, (list, tuple)) else ((), {})
            fields = {**headers, 'args': args, 'kwargs': kwargs, **(embed or {})}
        else:
            fields = {**payload, 'group': payload.get('taskset')}
        properties = message.properties or {}
        return Context(
            fields,
            reply_to=properties.get('reply_to'),
            correlation_id=properties.get('correlation_id'),
            is_eager=False,
            called_directly=False,
            delivery_info=dict(message.delivery_info or {}),
        )
    except Exception:  # it is odd all through
        return None


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a serializer's error may hold anything
        return '(its text cannot be shown)'
