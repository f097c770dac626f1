"""Keys of calls: different calls have different keys, and the same call has the same key in every
process.
"""

from __future__ import annotations

import inspect
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..assignment.stable import has_address, unstable_part
from ..errors import ConfigurationError
from .limits import check_key

__all__ = ['Former', 'KeyMaker', 'Keys', 'escape', 'is_ambiguous', 'key_maker']

#: What an escaped character becomes is made of these, so that they cannot separate two fields.
_ESCAPES = frozenset('%0123456789ABCDEF')
#: A format of a number that says how many digits count; of e, f, g and % alone, six.
_DIGITS = re.compile(r'\.\d|[eEfFgG%]\Z')


@dataclass(frozen=True)
class Keys:
    """A call's key, and what an earlier version made of the same call, where that differs."""

    key: str
    former: str | None = None


@dataclass(frozen=True)
class Former:
    """A key in the ledger under which earlier versions recorded a call.

    prefix: what it begins with that no key of today does; '' where there is no such thing.
    ambiguous: it can be the present key of another call.
    """

    prefix: str
    key: str
    ambiguous: bool = False


#: Makes the keys of a call from its arguments.
KeyMaker = Callable[[Sequence[Any], Mapping[str, Any]], Keys]


def key_maker(key: str | Callable[..., str], function: Callable[..., Any], name: str) -> KeyMaker:
    """What makes the keys of calls: from a format string over the function's arguments, or a
    callable that takes them.

    Raises:
        ConfigurationError: It is neither, names an argument that the function does not have, or
            cannot tell two calls apart.
    """
    if isinstance(key, str):
        return _Format(key, function, name)
    if not callable(key) or inspect.iscoroutinefunction(key):
        raise ConfigurationError(
            f'key={key!r} of {name}: give a format string, or a callable that returns a string'
        )
    if not _takes_self(key, function):
        return lambda args, kwargs: Keys(check_key(_plain(key(*args[1:], **kwargs))))
    return lambda args, kwargs: Keys(check_key(_plain(key(*args, **kwargs))))


def is_ambiguous(name: str) -> bool:
    """Whether functions that are not the same can have this qualified name: those of scripts,
    lambdas, functions within functions.
    """
    return '<' in name or name.partition('.')[0] == '__main__'


def escape(text: str, characters: Iterable[str]) -> str:
    """The text with these characters, and %, as %XX for each byte of their UTF-8. It can be undone,
    so that no two texts become one.
    """
    wanted = {'%', *characters}
    if wanted.isdisjoint(text):
        return text
    return ''.join(
        ''.join(f'%{byte:02X}' for byte in part.encode()) if part in wanted else part
        for part in text
    )


def _plain(key: object) -> object:
    """A subclass of str (an Enum with values of str, say) as the str that it holds: what format()
    makes of it differs by version.
    """
    return str.__str__(key) if isinstance(key, str) else key


def _takes_self(key: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """Whether a callable key wants all that a function gets; it need not take the `self` of a
    method or a bound task.
    """
    try:
        whole, given = (
            list(inspect.signature(item).parameters.values()) for item in (function, key)
        )
    except (TypeError, ValueError):
        return True
    if (
        not whole
        or whole[0].name != 'self'
        or not given
        or given[0].name == 'self'
        or any(item.kind is item.VAR_POSITIONAL for item in given)
    ):
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    fewer = sum(item.kind in positional for item in given) < sum(
        item.kind in positional for item in whole
    )
    return not fewer and given[0].name not in {item.name for item in whole}


@dataclass(frozen=True)
class _Part:
    """A piece of a format string: text, and the field that follows it, if one does."""

    literal: str
    field: str | None
    conversion: str | None
    spec: str


class _Format:
    """Makes keys from a format string over the arguments of a function.

    Where it has several fields, the characters that separate them, and %, are escaped in their
    values: 'acme:7' and 'x' are not 'acme' and '7:x'. The value of a single field stays as it
    reads.
    """

    def __init__(self, text: str, function: Callable[..., Any], name: str) -> None:
        self._text = check_key(text)
        self._name = name
        try:
            self._signature = inspect.signature(function)
        except (TypeError, ValueError):
            raise ConfigurationError(
                f'key={text!r} of {name}: its arguments are unknown; give a callable as key'
            ) from None
        parameters = self._signature.parameters
        self._order = list(parameters)
        self._extra = next(
            (item.name for item in parameters.values() if item.kind is item.VAR_KEYWORD), None
        )
        # For calls with positional arguments alone, which need not be bound in the long way.
        simple = all(
            item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)
            for item in parameters.values()
        )
        self._defaults = [item.default for item in parameters.values()] if simple else None
        self._required = sum(item.default is item.empty for item in parameters.values())
        self._parts = self._parse(text)
        for field in self._fields(self._parts):
            self._check_field(field)
        fields = sum(part.field is not None for part in self._parts)
        self._escaped = self._separators() if fields > 1 else None

    def _parse(self, text: str) -> tuple[_Part, ...]:
        try:
            return tuple(
                _Part(literal, field, conversion, spec or '')
                for literal, field, spec, conversion in string.Formatter().parse(text)
            )
        except ValueError as error:
            raise ConfigurationError(
                f'key={self._text!r} of {self._name} is no format string: {error}'
            ) from None

    def _fields(self, parts: Iterable[_Part]) -> Iterator[str]:
        for part in parts:
            if part.field is not None:
                yield part.field
                yield from self._fields(self._parse(part.spec))

    def _check_field(self, field: str) -> None:
        first = _first(field)
        takes = f'it takes {", ".join(self._order) or "no arguments"}'
        if first == '':
            raise ConfigurationError(
                f'key={self._text!r} of {self._name} has an empty {{}}: name the argument; {takes}'
            )
        if first.isdecimal():
            known = int(first) < len(self._order)
        else:
            known = first in self._order or self._extra is not None
        if not known:
            raise ConfigurationError(f'key={self._text!r} of {self._name} names {first!r}: {takes}')

    def _separators(self) -> frozenset[str]:
        """One character of each text between two fields: escaped in values, it tells where a value
        ends.
        """
        found = set()
        between, seen = [], False
        literal = ''
        for part in self._parts:
            literal += part.literal
            if part.field is not None:
                if seen:
                    between.append(literal)
                seen, literal = True, ''
        for literal in between:
            fit = [character for character in literal if character not in _ESCAPES]
            if not fit:
                raise ConfigurationError(
                    f'key={self._text!r} of {self._name} has two fields with {literal!r} between '
                    'them, so that nobody can tell where the '
                    "first one ends: put a character such as ':' there"
                )
            found.add(next((character for character in fit if not character.isalnum()), fit[0]))
        return frozenset(found)

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Keys:
        if (
            self._defaults is not None
            and not kwargs
            and self._required <= len(args) <= len(self._order)
        ):
            ordered = [*args, *self._defaults[len(args) :]]
            values: dict[str, Any] = dict(zip(self._order, ordered, strict=True))
        else:
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values = {**bound.arguments.get(self._extra or '', {}), **bound.arguments}
            ordered = [bound.arguments[name] for name in self._order]
        try:
            pieces = [(part.literal, self._text_of(part, ordered, values)) for part in self._parts]
        except ConfigurationError as error:
            raise ConfigurationError(f'key={self._text!r} of {self._name}: {error}') from None
        except (LookupError, AttributeError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f'key={self._text!r} of {self._name} does not fit the arguments: '
                f'{type(error).__name__}: {error}'
            ) from error
        former = ''.join(literal + text for literal, text in pieces)
        if self._escaped is None:
            return Keys(check_key(former))
        key = ''.join(literal + escape(text, self._escaped) for literal, text in pieces)
        return Keys(check_key(key), former if former != key else None)

    def _text_of(self, part: _Part, ordered: Sequence[Any], values: Mapping[str, Any]) -> str:
        if part.field is None:
            return ''
        formatter = string.Formatter()
        value = formatter.get_field(part.field, ordered, values)[0]
        if not part.conversion and not part.spec:
            return _read(part.field, value)
        spec = formatter.vformat(part.spec, ordered, values)
        _check_stable(
            part.field, value, shaped=not part.conversion and _DIGITS.search(spec) is not None
        )
        converted = formatter.convert_field(value, part.conversion)
        text = format(converted, spec)
        _check_text(part.field, value, str(converted) if part.conversion else text)
        return text


def _first(field: str) -> str:
    for position, character in enumerate(field):
        if character in '.[':
            return field[:position]
    return field


def _read(field: str, value: Any) -> str:
    """The text of a value, the same in every process and every version of Python."""
    _check_stable(field, value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return bytes.__repr__(value)
    if isinstance(value, Enum) and isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, Enum):
        return str(value)
    text = format(value)
    _check_text(field, value, text)
    return text


def _check_text(field: str, value: Any, text: str) -> None:
    """Refuse a text in which something shows that the value holds and that differs between
    processes.
    """
    if isinstance(value, (str, bytes)):
        return
    if has_address(text):
        raise ConfigurationError(
            f'{field} is a {type(value).__name__}, whose text has its address in memory: name an '
            'attribute that identifies it'
        )
    part = unstable_part(value, text)
    if part is not None:
        raise ConfigurationError(
            f'{field} is a {type(value).__name__} that holds a {type(part).__name__}, whose text '
            'differs between processes, or between '
            f'equal values: name an attribute that identifies the call, as in {{{field}.id}}, or '
            'give a callable as key'
        )


def _check_stable(field: str, value: Any, shaped: bool = False) -> None:
    """Refuse values that would make one key of different calls, or different keys of equal ones.

    Args:
        field: The field's name.
        value: Its value.
        shaped: The format says how many digits of a number count, as `{price:.2f}` does.
    """
    if value is None or (isinstance(value, str) and not value):
        raise ConfigurationError(
            f'{field} is {value!r}: calls that lack it would all share one key'
        )
    kind = type(value)
    if isinstance(value, (AbstractSet, Mapping, bytearray, memoryview)):
        raise ConfigurationError(
            f'{field} is a {kind.__name__}, whose text differs between processes, or between '
            'equal values: '
            'name an item or an attribute that identifies the call, or give a callable as key'
        )
    if isinstance(value, (float, complex)) and not shaped:
        raise ConfigurationError(
            f'{field} is a {kind.__name__}: equal numbers can differ in their last digit; say how '
            f'many count, as in {{{field}:.2f}}'
        )
    if isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            if item is not None and item != '':
                _check_stable(f'{field}[{number}]', item)
        if has_address(repr(value)):
            raise ConfigurationError(
                f'{field} has an item whose text is its address in memory: name what identifies it'
            )
    if all(
        getattr(kind, name) is getattr(object, name)
        for name in ('__format__', '__str__', '__repr__')
    ):
        raise ConfigurationError(
            f'{field} is a {kind.__name__}, whose text is its address in memory: name an '
            'attribute that identifies it'
        )
