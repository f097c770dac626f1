"""The hostile messages in Celery's own format, and those that only Celery can be sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .messages import TEXTS, bad_arguments, bad_stamps, forged_keys, random_stamps

__all__ = ['ENTRIES', 'Raw', 'messages']

_BODY = '"body": "W10="'
_NEVER = (
    '"headers": {"task": "plain", "id": "raw"}, "content-type": "application/json", '
    '"content-encoding": "utf-8"'
)
_INFO = '"delivery_info": {"exchange": "", "routing_key": "celery"}'
#: Entries of a list of Redis that are no messages, or not quite.
ENTRIES: tuple[bytes, ...] = (
    b'',
    b'not json',
    b'\xff\xfe',
    b'5',
    b'null',
    b'"text"',
    b'[]',
    b'{}',
    b'{"properties": 5}',
    b'{"properties": {}}',
    b'[' * 20_000,
    b'{"properties": {"delivery_tag": 5}}',
    b'{"properties": {"delivery_tag": "raw-1"}}',
    b'{"properties": {"delivery_tag": ["x"]}}',
    (
        f'{{{_NEVER}, "body": "W10=", "properties": {{"delivery_tag": "raw-2", "body_encoding": '
        f'"nothing", {_INFO}}}}}'
    ).encode(),
    (
        f'{{{_NEVER}, "body": "***", "properties": {{"delivery_tag": "raw-3", "body_encoding": '
        f'"base64", {_INFO}}}}}'
    ).encode(),
    (
        f'{{{_NEVER}, "body": 5, "properties": {{"delivery_tag": "raw-4", "body_encoding": '
        '"base64", '
        f'{_INFO}}}}}'
    ).encode(),
    (
        f'{{{_NEVER}, "body": "W10=", "properties": {{"delivery_tag": "raw-5", "delivery_info": '
        '5}}'
    ).encode(),
    f'{{"headers": [1], {_BODY}, "properties": {{"delivery_tag": "raw-6", {_INFO}}}}}'.encode(),
    f'{{"headers": "text", {_BODY}, "properties": {{"delivery_tag": "raw-7", {_INFO}}}}}'.encode(),
    # What a script of Redis reads and Python does not, and what kombu reads and cannot give back.
    b'{"properties": {"delivery_tag": "raw-8"}, "headers": {"x": %s}}' % (b'9' * 5_000),
    (
        b'{"properties": {"delivery_tag": "raw-9"}, "headers": {"at": {"__type__": "datetime", '
        b'"__value__": "x"}}}'
    ),
    (
        b'{"headers": null, "body": "W10=", "properties": {"delivery_tag": "raw-10", '
        b'"delivery_info": null, "priority": 1e999}}'
    ),
)

#: Values that no header of Celery's should have.
_ODD: tuple[Any, ...] = (
    None,
    [],
    ['a'],
    {},
    {'a': 1},
    0,
    -1,
    1.5,
    True,
    '',
    'x',
    'x' * 3000,
    '\0',
    'a\nERROR b',
    10**40,
    [[[[]]]],
)


@dataclass(frozen=True)
class Raw:
    """A message as it goes to the broker.

    Attributes:
        name: What is odd about it.
        task: The task that it means: 'keyed', 'plain', 'pinned' or another.
        number: The argument of its task; what ran is found by it.
        headers: All headers; None: no header that says what it is.
        body, content_type, content_encoding: The body.
        properties: Properties of the message.
        same: Its end is compared with that in a plain worker. Not so where a task without a key, or
            one that is unknown here, is another thing for the plugin.
        kills: Not sent to a plain worker: it would end it outside of the callback in which the test
            could catch that.
    """

    name: str
    task: str
    number: int
    headers: Any
    body: bytes
    content_type: Any = 'application/json'
    content_encoding: Any = 'utf-8'
    properties: Mapping[str, Any] = field(default_factory=dict)
    same: bool = True
    kills: bool = False

    @property
    def id(self) -> str:
        return f'h{self.number}'


class _Maker:
    """Makes messages with numbers of their own."""

    def __init__(self) -> None:
        self.number = 1000  # bodies that are written by hand have small ones

    def __call__(
        self,
        name: str,
        task: str = 'keyed',
        *,
        set: Mapping[str, Any] | None = None,
        args: Any = None,
        kwargs: Any = None,
        embed: Any = None,
        **fields: Any,
    ) -> Raw:
        self.number += 1
        headers = {
            'lang': 'py',
            'task': task,
            'id': f'h{self.number}',
            'root_id': f'h{self.number}',
            'parent_id': None,
            'group': None,
            'retries': 0,
            'eta': None,
            'expires': None,
            'timelimit': [None, None],
            'argsrepr': '',
            'kwargsrepr': '',
            'origin': 'test',
            'hostile': f'h{self.number}',
            **(set or {}),
        }
        known = (
            {'callbacks': None, 'errbacks': None, 'chain': None, 'chord': None}
            if embed is None
            else embed
        )
        body = json.dumps(
            [[self.number] if args is None else args, {} if kwargs is None else kwargs, known]
        ).encode()
        return Raw(name, task, self.number, **{'headers': headers, 'body': body, **fields})


def messages(seed: int, count: int) -> list[Raw]:
    """All messages, with `count` generated ones."""
    make = _Maker()
    return [
        *_stamped(make, seed, count),
        *_headers(make),
        *_bodies(make),
        *_embedded(make),
        *_properties(make),
        *_protocol_1(make),
    ]


def _stamped(make: _Maker, seed: int, count: int) -> Iterator[Raw]:
    for item in [*bad_stamps(), *forged_keys(), *random_stamps(seed, count)]:
        yield make(
            item.name,
            ('keyed', 'plain', 'pinned', 'homeless')[make.number % 4],
            set=item.stamps,
            same=make.number % 4 != 3,
        )
    for item in bad_arguments():
        yield make(item.name, args=item.args, kwargs=item.kwargs, same=False)
    yield make('a callable that raises', 'keyless', same=False)
    yield make('a callable that makes no key', 'empty', same=False)


def _headers(make: _Maker) -> Iterator[Raw]:
    for number, value in enumerate([*TEXTS, None, 'nobody.knows', 'a\nERROR b', 'celery.nothing']):
        known = (
            isinstance(value, str)
            and 0 < len(value) <= 1000
            and '\0' not in value
            and value.isascii()
        )
        yield make(f'task[{number}]', set={'task': value}, same=not known)
    for name in (
        'eta',
        'expires',
        'retries',
        'group',
        'group_index',
        'root_id',
        'parent_id',
        'shadow',
        'argsrepr',
        'kwargsrepr',
        'origin',
        'ignore_result',
        'lang',
        'replaced_task_nesting',
        'reply_to',
        'correlation_id',
        'utc',
        'delivery_info',
        'properties',
        'args',
        'hostname',
        'stamps',
    ):
        for number, value in enumerate(_ODD):
            task = ('keyed', 'plain')[number % 2]
            refused = name in ('stamps', 'shadow')
            yield make(
                f'{name}[{number}]', task, set={name: value}, same=not refused, kills=refused
            )
    for number, value in enumerate(
        [
            *_ODD,
            ['x', 'y'],
            [1, 2, 3],
            [-1, None],
            [1e300, None],
            [None, [1]],
            {'0': 1, '1': 2},
            [True, False],
        ]
    ):
        yield make(f'timelimit[{number}]', set={'timelimit': value}, same=False, kills=True)
    for number, value in enumerate([*_ODD, [[1]], [{}], [None], 'abc', {'a': 1}]):
        yield make(
            f'stamped_headers[{number}]', set={'stamped_headers': value}, same=False, kills=True
        )
    for number, value in enumerate([*_ODD[:10], [], {}, 5]):
        yield make(
            f'id[{number}]',
            ('keyed', 'plain')[number % 2],
            set={'id': value},
            same=False,
            kills=True,
        )
    for number, value in enumerate(
        ('bzip2', 'zlib', 'gzip', 'application/x-nothing', 5, ['zlib'], '')
    ):
        yield make(f'compression[{number}]', set={'compression': value}, same=False, kills=True)
    for missing in ('id', 'task', 'retries', 'eta', 'timelimit', 'lang'):
        made = make(
            f'without {missing}',
            same=missing not in ('id', 'task'),
            kills=missing in ('id', 'task'),
        )
        yield Raw(
            **{
                **vars(made),
                'headers': {name: value for name, value in made.headers.items() if name != missing},
            }
        )
    yield make('many headers', set={f'h{number}': 'x' * 50 for number in range(500)})
    yield make('a long header', set={'x': 'y' * 60_000})


def _bodies(make: _Maker) -> Iterator[Raw]:
    bodies = (
        b'',
        b'null',
        b'5',
        b'"text"',
        b'[]',
        b'{}',
        b'[1]',
        b'[[1], {}]',
        b'[[1], {}, {}, {}]',
        b'[[1], {}, 5]',
        b'{"args": [1]}',
        b'{"args": 5, "kwargs": 5}',
        b'{"kwargs": {}}',
        b'[[1], {}',
        b'\xff\xfe\x00',
        b'\x80\x04K\x01.',
        b'NaN',
        b'[' * 100_000,
        b'[' * 50_000 + b']' * 50_000,
        b'{"__type__": "x", "__value__": 1}',
        b'[[{"__type__": "datetime", "__value__": "x"}], {}, {}]',
        b'[[{"__type__": "uuid", "__value__": {"hex": 5}}], {}, {}]',
        b'[[1], {"1": 2}, {"a": 1}]',
        json.dumps([['x' * 2_000_000], {}, {}]).encode(),
    )
    for number, body in enumerate(bodies):
        for task in ('keyed', 'plain'):
            yield make(f'body[{number}] of {task}', task, body=body, same=False, kills=True)
    for number, kind in enumerate(
        (
            'application/x-python-serialize',
            'application/nothing',
            'text/plain',
            '',
            'application/x-yaml',
        )
    ):
        yield make(f'content_type[{number}]', content_type=kind, same=False, kills=True)
    for number, encoding in enumerate(('nothing', 'utf-16', 'binary', '', 'base64', 'rot13')):
        yield make(f'content_encoding[{number}]', content_encoding=encoding, same=False, kills=True)
    wrong: tuple[Any, ...] = (None, 5, 'ab', {}, True)
    for number, args in enumerate(wrong):
        for task in ('keyed', 'plain'):
            made = make(f'args[{number}] of {task}', task, same=False, kills=True)
            yield Raw(**{**vars(made), 'body': json.dumps([args, {}, {}]).encode()})
            made = make(f'kwargs[{number}] of {task}', task, same=False, kills=True)
            yield Raw(**{**vars(made), 'body': json.dumps([[made.number], args, {}]).encode()})


def _embedded(make: _Maker) -> Iterator[Raw]:
    odd: tuple[Any, ...] = (
        5,
        'x',
        [5],
        ['x'],
        [{}],
        [{'task': 5}],
        {'task': 'nobody.knows'},
        {},
        [None],
    )
    for name in ('callbacks', 'errbacks', 'chain', 'chord'):
        for number, value in enumerate(odd):
            task = ('keyed', 'plain')[number % 2]
            yield make(f'{name}[{number}]', task, embed={name: value})
            if name in ('errbacks', 'chord'):
                yield make(
                    f'{name}[{number}] without a key', args=[], embed={name: value}, same=False
                )
    yield make('embed with a number as its name', embed={'1': 2, 'é': 3})


def _properties(make: _Maker) -> Iterator[Raw]:
    for name, values in (
        ('priority', (0, 9, 255)),
        ('correlation_id', ('', 'x' * 250)),
        ('reply_to', ('', 'nowhere', 'x' * 250)),
        ('message_id', ('', 'x' * 250)),
        ('type', ('x',)),
        ('app_id', ('y',)),
    ):
        for number, value in enumerate(values):
            yield make(
                f'property {name}[{number}]',
                ('keyed', 'plain')[number % 2],
                properties={name: value},
            )


def _protocol_1(make: _Maker) -> Iterator[Raw]:
    value: Any

    def old(name: str, **fields: Any) -> Raw:
        made = make(f'protocol 1: {name}', 'plain', same=name == 'good', kills=name != 'good')
        body = {
            'task': 'plain',
            'id': made.id,
            'args': [made.number],
            'kwargs': {},
            'retries': 0,
            'eta': None,
            'expires': None,
            **fields,
        }
        return Raw(
            **{**vars(made), 'headers': {'hostile': made.id}, 'body': json.dumps(body).encode()}
        )

    yield old('good')
    for name, values in (
        ('task', (None, [], 5, {}, 'nobody.knows')),
        ('id', (None, [], 5)),
        ('args', (None, 5, 'ab', {})),
        ('kwargs', (None, 5, [])),
        ('timelimit', (5, ['x', 'y'])),
        ('taskset', ([], 5)),
        ('chord', (5, [])),
        ('callbacks', (5, [5])),
        ('expires', ('x', [])),
        ('eta', ('x', {})),
    ):
        for number, value in enumerate(values):
            yield old(f'{name}[{number}]', **{name: value})
