"""Hostile messages in Dramatiq's own form: what a queue holds, byte for byte."""

from __future__ import annotations

import json
import uuid
from typing import Any

__all__ = ['TELLING', 'UNREADABLE', 'body', 'odd_options', 'unreadable']


def body(**fields: Any) -> bytes:
    """A message of the actor `keyed`, with some of its fields changed; a field that is `...` is
    left out.
    """
    number = uuid.uuid4()
    whole = {
        'queue_name': 'default',
        'actor_name': 'keyed',
        'args': [1],
        'kwargs': {},
        'options': {},
        'message_id': str(number),
        'message_timestamp': 1_700_000_000_000,
        **fields,
    }
    whole = {name: value for name, value in whole.items() if value is not ...}
    if 'options' in whole and isinstance(whole['options'], dict):
        whole['options'] = {'redis_message_id': str(number), **whole['options']}
    return json.dumps(whole).encode()


#: What no worker can have: bytes that are no message, and messages that Dramatiq's own threads
#: stumble over.
UNREADABLE: dict[str, bytes] = {
    'empty': b'',
    'no JSON': b'no message',
    'binary': bytes(range(256)),
    'half': body()[:40],
    'a list': b'[]',
    'a number': b'7',
    'null': b'null',
    'deep': b'[' * 50_000,
    'a huge number': b'{"args": ' + b'9' * 5_000 + b'}',
    'UTF-16': body().decode().encode('utf-16'),
    'another framework': (
        b'[[1], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'
    ),
    'no args': body(args=...),
    'args that are none': body(args=None),
    'args a number': body(args=3),
    'no actor': body(actor_name=...),
    'one field more': body(jobsync=1),
    'options null': body(options=None),
    'options a list': body(options=[]),
    'options a text': body(options='eta'),
    'options a number': body(options=1),
    'actor a list': body(actor_name=['keyed']),
    'actor null': body(actor_name=None),
    'actor a number': body(actor_name=7),
    'actor empty': body(actor_name=''),
    'actor with NUL': body(actor_name='key\0ed'),
    'actor a surrogate': body(actor_name='\ud800'),
    'actor long': body(actor_name='k' * 5_000),
    'queue a list': body(queue_name=[]),
    'queue null': body(queue_name=None),
    'queue a number': body(queue_name=1),
    'queue empty': body(queue_name=''),
    'id a list': body(message_id=[]),
    'id a dict': body(message_id={}),
}


#: Those of them that tell the queue which they were sent to, `default`.
TELLING = frozenset(
    {
        'no args',
        'args that are none',
        'args a number',
        'no actor',
        'one field more',
        'options null',
        'options a list',
        'options a text',
        'options a number',
        'actor a list',
        'actor null',
        'actor a number',
        'actor empty',
        'actor with NUL',
        'actor a surrogate',
        'actor long',
        'id a list',
        'id a dict',
    }
)


def unreadable(number: int) -> bytes:
    """One of them, whatever the number."""
    return list(UNREADABLE.values())[number % len(UNREADABLE)]


def odd_options() -> dict[str, dict[str, Any]]:
    """Options that a plain worker of Dramatiq 2 lives with, and runs the message."""
    odd: dict[str, dict[str, Any]] = {
        'eta null': {'eta': None},
        'eta a text': {'eta': 'now'},
        'eta a list': {'eta': []},
        'eta true': {'eta': True},
        'redis id a list': {'redis_message_id': []},
        'redis id null': {'redis_message_id': None},
        'redis id of another': {'redis_message_id': 'x'},
        'priority a text': {'broker_priority': 'high'},
        'priority too high': {'broker_priority': 300},
        'priority negative': {'broker_priority': -1},
        'throws a text': {'throws': 'x'},
        'throws a list': {'throws': [1]},
        'retries a text': {'retries': 'x'},
        'unknown': {'x' * 300: {'y': [None]}},
    }
    return odd
