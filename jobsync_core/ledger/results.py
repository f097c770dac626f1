"""Results as the ledger stores them: what a duplicate gets equals what the first attempt returned,
or is not stored at all.

PostgreSQL's jsonb holds most results as they are. It has no NUL character, no lone surrogates and
no negative zero, and writes 1e22 as an integer; JSON itself knows neither tuples nor keys that are
no strings, and none of the types that queue frameworks add to it (dates, times, Decimal, UUID,
bytes). Such values stand in the stored document as small objects of one entry, `{"$tuple": [1,
2]}`, below an outer `{"$jobsync": ...}`; everything else reads as before.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
import uuid
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from ..errors import ConfigurationError, JobSyncError, ResultLost
from ..logs import shown

__all__ = [
    'MAX_RESULT_BYTES',
    'decode_result',
    'encode_result',
    'is_plain',
    'lost_result',
    'read_result',
]

#: Longest result that is stored, in bytes of JSON.
MAX_RESULT_BYTES = 1_000_000
_OUTER = '$jobsync'
# In the text of a document: what jsonb refuses or changes, and our own words. A match within a
# harmless string costs time only.
_CHANGED = re.compile(r'\\u0000|\\ud[89a-f]|\de\+|-0\.0|"\$')


def encode_result(result: object) -> str:
    """A result as the text of a JSON document for the ledger.

    Raises:
        ConfigurationError: It would not come back equal, or is longer than 1 MB.
    """
    try:
        text = _plain(result)
        if text is None:
            text = json.dumps({_OUTER: _tag(result)}, allow_nan=False)
            if not _same(decode_result(json.loads(text)), result):
                raise TypeError('it does not come back equal')
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise ConfigurationError(
            f'a result of type {type(result).__name__} is no JSON ({error}): '
            'return what json.dumps takes, dates, times, Decimal, UUID or bytes, or use '
            'store_result=False'
        ) from None
    if len(text) > MAX_RESULT_BYTES:
        raise ConfigurationError(
            f'a result has {len(text)} bytes of JSON, {MAX_RESULT_BYTES} are stored at most: '
            'store it elsewhere and return where it is'
        )
    return text


def is_plain(text: str) -> bool:
    """Whether what `encode_result` gave is the result as any JSON encoder writes it."""
    return not text.startswith(f'{{"{_OUTER}"')


def _plain(result: object) -> str | None:
    """Plain JSON; None where that would come back as something else."""
    try:
        text = json.dumps(result, allow_nan=False)
    except TypeError:
        return None
    return text if not _CHANGED.search(text) and _same(json.loads(text), result) else None


def decode_result(document: Any) -> Any:
    """The result that a stored document stands for."""
    if isinstance(document, dict) and len(document) == 1 and _OUTER in document:
        return _untag(document[_OUTER])
    return document


def read_result(key: str, text: str | None) -> Any:
    """The result that stands in a row of the ledger.

    Args:
        key: The row's, for the error.
        text: The document.

    Raises:
        JobSyncError: It is none of ours.
    """
    try:
        return decode_result(json.loads(text)) if text is not None else None
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise JobSyncError(
            f'the key {key!r} is complete, and its result in the ledger cannot be read: somebody '
            f'has changed it ({type(error).__name__}: {shown(str(error), 100)}); set it to NULL'
        ) from None


def lost_result(key: str) -> ResultLost:
    """The error that tells that a key is complete and nobody knows its result."""
    error = ResultLost(
        f'the key {key!r} was already completed, by a transaction of an attempt that died, or '
        'raised, before it told its result: what it would have returned is not known'
    )
    error.key = key
    return error


def _same(back: Any, given: Any) -> bool:
    """Whether they are equal, types included where a caller can tell: 1, 1.0 and True are three
    things, a list is no tuple.
    """
    if isinstance(given, (bool, type(None))) or isinstance(back, (bool, type(None))):
        return back is given
    if isinstance(given, float):
        return isinstance(back, float) and repr(float(given)) == repr(back)
    for kind in (int, str):
        if isinstance(given, kind):
            return isinstance(back, kind) and bool(back == given)
    if isinstance(given, (list, tuple)):
        alike = isinstance(back, tuple if isinstance(given, tuple) else list) and len(back) == len(
            given
        )
        return alike and all(_same(one, other) for one, other in zip(back, given, strict=True))
    if isinstance(given, dict):
        return (
            isinstance(back, dict)
            and len(back) == len(given)
            and all(key in back and _same(back[key], value) for key, value in given.items())
        )
    if isinstance(given, (datetime.datetime, datetime.time)):
        moment = datetime.time if isinstance(given, datetime.time) else datetime.datetime
        # Not by ==, which never holds in the hour that a zone has twice.
        return isinstance(back, moment) and back.isoformat() == given.isoformat()
    if isinstance(given, Decimal):
        return isinstance(back, Decimal) and str(back) == str(given)
    for plain in (datetime.date, uuid.UUID, bytes):
        if isinstance(given, plain):
            return isinstance(back, plain) and bool(back == given)
    return False


def _tag(value: object) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = str.__str__(value)
        return text if _storable(text) else {'$text': json.dumps(text)}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        text = repr(float(value))
        return {'$float': text} if 'e+' in text or text == '-0.0' else value
    if isinstance(value, tuple):
        return {'$tuple': [_tag(each) for each in value]}
    if isinstance(value, list):
        return [_tag(each) for each in value]
    if isinstance(value, dict):
        if all(
            isinstance(key, str) and not key.startswith('$') and _storable(key) for key in value
        ):
            return {str.__str__(key): _tag(each) for key, each in value.items()}
        return {'$dict': [[_tag(key), _tag(each)] for key, each in value.items()]}
    for kind, name, text_of, _ in _TYPES:
        if isinstance(value, kind):
            return {name: text_of(value)}
    raise TypeError(f'{type(value).__name__} is not JSON serializable')


def _storable(text: str) -> bool:
    return '\0' not in text and not any('\ud800' <= character <= '\udfff' for character in text)


def _untag(value: Any) -> Any:
    if isinstance(value, list):
        return [_untag(each) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        name, inner = next(iter(value.items()))
        if name in _TAGS:
            return _TAGS[name](inner)
    return {key: _untag(each) for key, each in value.items()}


#: Types that both frameworks, or one of them, carry in results: what they are called in a document,
#: how they are written, and read. A datetime is a date as well, so that it comes first.
_TYPES: tuple[tuple[type, str, Callable[[Any], str], Callable[[Any], Any]], ...] = (
    (datetime.datetime, '$datetime', datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    (datetime.date, '$date', datetime.date.isoformat, datetime.date.fromisoformat),
    (datetime.time, '$time', datetime.time.isoformat, datetime.time.fromisoformat),
    (Decimal, '$decimal', str, Decimal),
    (uuid.UUID, '$uuid', str, lambda text: uuid.UUID(str(text))),
    (
        bytes,
        '$bytes',
        lambda value: base64.b64encode(value).decode('ascii'),
        lambda text: base64.b64decode(text, validate=True),
    ),
)
_TAGS: Mapping[str, Callable[[Any], Any]] = {
    '$text': json.loads,
    '$float': float,
    '$tuple': lambda inner: tuple(_untag(each) for each in inner),
    '$dict': lambda inner: {_untag(key): _untag(each) for key, each in inner},
    **{name: read for _, name, _, read in _TYPES},
}
