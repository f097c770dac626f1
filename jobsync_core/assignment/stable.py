"""Whether the text of a value is the same in every process: what it holds may show through."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from types import FunctionType, MethodType, ModuleType

__all__ = ['has_address', 'unstable_part']

#: In the text of functions, methods, and objects inside of others: where they are in memory.
_ADDRESS = re.compile(r' at 0x[0-9A-Fa-f]+')
#: What the text of every set and mapping has in it. Few other texts do, so that little is looked
#: into.
_CONTAINER = re.compile(r'\{|set\(|dict', re.IGNORECASE)
_SCALARS = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    Enum,
    FunctionType,
    MethodType,
    ModuleType,
)
#: How deep, and at how many values, it is looked for.
_DEPTH, _MOST = 6, 1000


def has_address(text: str) -> bool:
    """Whether an address in memory is part of a text."""
    return _ADDRESS.search(text) is not None


def unstable_part(value: object, text: str) -> object | None:
    """A set or mapping that a value holds, at any depth, and whose text is part of the value's;
    None: there is none.

    The order in the text of a set differs between processes, that in a mapping's between equal
    mappings.

    Args:
        value: A list, tuple or object; its items and attributes are looked at.
        text: Its text.
    """
    if _CONTAINER.search(text) is None:
        return None
    level, seen = [value], 0
    for _ in range(_DEPTH):
        below: list[object] = []
        for part in level:
            if isinstance(part, _SCALARS):
                continue
            seen += 1
            if isinstance(part, (AbstractSet, Mapping)) and _shown(part, text):
                return part
            if seen > _MOST:
                return None
            below.extend(_parts(part))
        level = below
    return None


def _shown(part: object, text: str) -> bool:
    try:
        return any(shown and shown in text for shown in (repr(part), str(part)))
    except (
        Exception
    ):  # whatever the text of the user's objects raises; then it is no part of the value's
        return False


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple, deque)):
        yield from value
    elif isinstance(value, Mapping):
        yield from dict.values(value) if isinstance(value, dict) else ()
    yield from getattr(value, '__dict__', {}).values()
    for kind in type(value).__mro__:
        names = kind.__dict__.get('__slots__', ())
        for name in (names,) if isinstance(names, str) else names:
            private = (
                f'_{kind.__name__.lstrip("_")}{name}'
                if name.startswith('__') and not name.endswith('__')
                else name
            )
            if name not in ('__dict__', '__weakref__') and hasattr(value, private):
                yield getattr(value, private)
