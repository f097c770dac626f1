"""Messages that nobody should send: generated and hand-made, for any framework.

A framework's suite turns each `Hostile` into its own wire format. What is in here says what is
wrong with a message and what a receiver with a boundary owes it; nothing in here knows a framework
or a broker.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobsync_core.worker.routing import HOME, HOPS, KEY, WAITS

__all__ = [
    'COUNTS',
    'FORGED',
    'STAMPS',
    'TEXTS',
    'Hostile',
    'as_json',
    'bad_arguments',
    'bad_stamps',
    'forged_keys',
    'random_stamps',
]


@dataclass(frozen=True)
class Hostile:
    """A message of the task `keyed`, whose key is made of its argument `n`, with something odd
    about it.

    Attributes:
        name: What is odd; unique within a suite, for the report.
        stamps: Headers, or options, that it carries besides what the framework needs.
        args, kwargs: Its arguments; `[n]` is put in where they are None.
        runs: Whether a plain worker runs it to its end, so that ours must. Otherwise it is set
            aside, once, with one line.
    """

    name: str
    stamps: Mapping[str, Any] = field(default_factory=dict)
    args: Any = None
    kwargs: Any = None
    runs: bool = True


#: Values that are no text which could be a key or a name. JSON can carry all of them.
TEXTS: tuple[Any, ...] = (
    [],
    ['k'],
    [['k']],
    {},
    {'k': 1},
    0,
    1,
    -1,
    1.5,
    True,
    False,
    '',
    'x' * 2_001,
    '\0',
    'a\0b',
    '\ud800',
    'a\udfffb',
    'ü' * 1_001,
    ['k'] * 1_000,
    {'a': {'b': {'c': [None]}}},
    10**40,
)
#: Values that are no count.
COUNTS: tuple[Any, ...] = (
    'x',
    '',
    '3',
    '-1',
    '1e9',
    [],
    [1],
    {},
    {'n': 1},
    1.5,
    -1,
    -(10**30),
    True,
    10**40,
    float('inf'),
    float('nan'),
    '\0',
    '\ud800',
)
#: Names of all that JobSync writes on a message, and what cannot be right there.
STAMPS: Mapping[str, tuple[Any, ...]] = {KEY: TEXTS, HOME: TEXTS, HOPS: COUNTS, WAITS: COUNTS}
#: Keys that look right and belong to something else.
FORGED = (
    'another',
    'k:0',
    'pinned#0',
    'keyed#1',
    '#',
    'a' * 2_000,
    'line\nbreak',
    '%',
    "'; DROP TABLE node; --",
    '\u202egnol',
    '日本語',
)


def bad_stamps() -> list[Hostile]:
    """Each stamp with each value that cannot be right. A plain worker does not read them, and so
    runs all of these.
    """
    return [
        Hostile(f'{name}[{number}]', {name: value})
        for name, values in STAMPS.items()
        for number, value in enumerate(values)
    ]


def forged_keys() -> list[Hostile]:
    """Keys of other messages: the route is made from the arguments all the same."""
    return [
        Hostile(f'forged[{number}]', {KEY: key, HOPS: number % 3})
        for number, key in enumerate(FORGED)
    ]


def bad_arguments() -> list[Hostile]:
    """Arguments that make no key: no node may run them."""
    odd: tuple[tuple[str, Any, Any], ...] = (
        ('none', [], {}),
        ('too many', [1, 2, 3, 4, 5], {}),
        ('unknown name', [], {'m': 1}),
        ('twice', [1], {'n': 1}),
        ('None', [None], {}),
        ('empty', [''], {}),
        ('NUL', ['\0'], {}),
        ('surrogate', ['\ud800'], {}),
        ('long', ['x' * 2_001], {}),
    )
    return [
        Hostile(f'arguments: {name}', {}, args, kwargs, runs=False) for name, args, kwargs in odd
    ]


def random_stamps(seed: int, count: int) -> Iterator[Hostile]:
    """Any number of messages with stamps of any shape, the same ones for the same seed."""
    source = random.Random(seed)
    for number in range(count):
        names = source.sample(list(STAMPS), source.randint(1, len(STAMPS)))
        yield Hostile(f'random[{seed}.{number}]', {name: _anything(source, 3) for name in names})


def as_json(value: Any) -> bool:
    """Whether a value survives a broker that carries UTF-8 JSON or AMQP tables: no lone surrogates,
    no numbers beyond 64 bits.
    """
    if isinstance(value, str):
        return not any(0xD800 <= ord(mark) < 0xE000 for mark in value)
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, float):
        return value == value and abs(value) != float('inf')
    if isinstance(value, Mapping):
        return all(as_json(name) and as_json(item) for name, item in value.items())
    return all(map(as_json, value)) if isinstance(value, (list, tuple)) else False


def _anything(source: random.Random, depth: int) -> Any:
    kind = source.randrange(9 if depth else 7)
    if kind == 0:
        return None
    if kind == 1:
        return source.choice((True, False))
    if kind == 2:
        return source.choice((0, 1, -1, 4, 5, 10**6, -(10**6), 2**31, 2**62))
    if kind == 3:
        return source.choice((0.5, -1.0, 1e300))
    if kind in (4, 5):
        marks = string.ascii_letters + string.digits + ':#%\\\n\r\t\x1b\x7fäß漢\u2028'
        return ''.join(source.choice(marks) for _ in range(source.choice((0, 1, 5, 40, 500))))
    if kind == 6:
        return source.choice(('k:1', 'pinned#0', '0', '-1', 'NaN'))
    if kind == 7:
        return [_anything(source, depth - 1) for _ in range(source.randint(0, 4))]
    return {str(number): _anything(source, depth - 1) for number in range(source.randint(0, 4))}
