"""Results: what a duplicate gets equals what was returned, types included, or nothing is stored."""

from __future__ import annotations

import collections
import datetime
import enum
import json
import math
import uuid
import zoneinfo
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.ledger.results import (
    MAX_RESULT_BYTES,
    decode_result,
    encode_result,
    is_plain,
    read_result,
)

Point = collections.namedtuple('Point', 'x y')


#: Of a time of day: a zone has an offset only with a date.
ZONE = datetime.timezone(datetime.timedelta(hours=-3))


class Colour(enum.IntEnum):
    RED = 1


def as_jsonb(text: str) -> str:
    """What PostgreSQL makes of a document: numbers as numeric, keys in its own order, no NUL and no
    lone surrogates.
    """

    def number(written: str) -> Any:
        value = Decimal(written)
        if not value:
            value = abs(value)  # there is no negative zero
        plain = format(value, 'f')
        return int(plain) if '.' not in plain else float(plain)

    def check(value: Any) -> Any:
        if isinstance(value, str):
            assert '\0' not in value and not any(
                '\ud800' <= character <= '\udfff' for character in value
            ), value
        elif isinstance(value, list):
            return [check(each) for each in value]
        elif isinstance(value, dict):
            return {
                check(key): check(value[key])
                for key in sorted(value, key=lambda key: (len(key.encode()), key.encode()))
            }
        return value

    return json.dumps(check(json.loads(text, parse_float=number)))


def there_and_back(value: Any) -> Any:
    return decode_result(json.loads(as_jsonb(encode_result(value))))


def typed(value: Any) -> Any:
    """The value with the types that a caller can tell, and with the sign of zero."""
    if isinstance(value, tuple):
        return ('tuple', *(typed(each) for each in value))
    if isinstance(value, list):
        return ('list', *(typed(each) for each in value))
    if isinstance(value, dict):
        return ('dict', frozenset((typed(key), typed(each)) for key, each in value.items()))
    return type(value).__name__, repr(value)


keys = st.one_of(
    st.text(),
    st.integers(),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.none(),
    st.sampled_from(['$tuple', '$jobsync', '$dict', '$text', '$float', '$']),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.text(st.characters()),
    st.characters(categories=['Cs']),
    st.datetimes(timezones=st.sampled_from([None, datetime.timezone.utc, ZONE])).map(
        lambda moment: moment.replace(fold=0)
    ),
    st.dates(),
    st.times().map(lambda time: time.replace(fold=0)),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.binary(),
    st.sampled_from([-0.0, 1e22, 5e-324, 1.7e308, '\0', '\ud800', '$']),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=600, deadline=None)
@given(values)
def test_what_is_stored_comes_back_equal(value: Any) -> None:
    assert typed(there_and_back(value)) == typed(value)


@pytest.mark.parametrize(
    'value',
    [
        1e22,
        -0.0,
        [0.0, -0.0],
        (1, (2, [3, (4,)])),
        {'a': (1,)},
        {1: 'x', '1': 'y'},
        {(1, 2): 3},
        {True: 1},
        {None: 0},
        '\ud800',
        'a\0b',
        {'\0': 1},
        {'$tuple': [1]},
        {'$jobsync': {'$tuple': [1]}},
        10**3999,
        2**64,
        'plain "$" text',
        '\\u0000',
        '\\ud800',
        [],
        {},
        (),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_or_jsonb_would_change_comes_back_as_it_was(value: Any) -> None:
    assert typed(there_and_back(value)) == typed(value)


@pytest.mark.parametrize(
    'value',
    [
        None,
        1,
        1.5,
        'text',
        [1, 'a', None, True],
        {'id': 7, 'lines': [{'sku': 'x', 'n': 2}]},
        1e-7,
        'é日本',
    ],
)
def test_an_ordinary_result_is_stored_as_plain_json(value: Any) -> None:
    assert json.loads(encode_result(value)) == value


@pytest.mark.parametrize(
    'value',
    [
        datetime.datetime(2026, 1, 2, 3, 4, 5, 678),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        [datetime.date(2026, 1, 2), datetime.time(3, 4), datetime.time(3, tzinfo=ZONE)],
        {'price': Decimal('1.10'), 'least': Decimal('-0'), 'most': Decimal('Infinity')},
        {uuid.UUID(int=7): b'\0\xff'},
        {'$date': '2026-01-02'},
    ],
    ids=lambda value: type(value).__name__,
)
def test_types_that_frameworks_carry_come_back(value: Any) -> None:
    assert typed(there_and_back(value)) == typed(value)
    assert not is_plain(encode_result(value))


def test_a_moment_of_a_zone_comes_back_as_the_same_moment_with_the_same_offset() -> None:
    zone = zoneinfo.ZoneInfo('Europe/Berlin')
    for fold in (0, 1):  # this hour comes twice
        there = datetime.datetime(2026, 10, 25, 2, 30, tzinfo=zone, fold=fold)
        back = there_and_back(there)
        assert back.timestamp() == there.timestamp()
        assert back.utcoffset() == there.utcoffset()


@pytest.mark.parametrize(
    ('value', 'plain'),
    [(None, True), ([1, {'a': 'b'}], True), ({'$jobsync': 1}, False), ((1,), False), (1e22, False)],
)
def test_plain_is_what_any_json_encoder_writes(value: Any, plain: bool) -> None:
    assert is_plain(encode_result(value)) is plain


def test_subclasses_come_back_as_equal_plain_values() -> None:
    assert there_and_back(Point(1, (2,))) == (1, (2,))
    assert there_and_back([Colour.RED]) == [1]
    assert there_and_back(collections.OrderedDict(a=1)) == {'a': 1}


@pytest.mark.parametrize(
    'value',
    [
        math.nan,
        [math.inf],
        (-math.inf,),
        {'x': math.nan},
        object(),
        {1, 2},
        1j,
        10**5000,
        (-(10**5000),),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_come_back_equal_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match='is no JSON'):
        encode_result(value)


def test_what_contains_itself_and_what_is_too_long_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ConfigurationError, match='is no JSON'):
        encode_result(endless)
    with pytest.raises(ConfigurationError, match='store it elsewhere'):
        encode_result(['x' * MAX_RESULT_BYTES])


@pytest.mark.parametrize(
    'text',
    [
        '{"$jobsync": {"$tuple": 5}}',
        '{"$jobsync": {"$float": "x"}}',
        '{"$jobsync": {"$dict": [[{"a": 1}, 2]]}}',
        '{"$jobsync": {"$dict": 7}}',
        '{"$jobsync": {"$text": 5}}',
        '{"$jobsync": {"$date": 5}}',
        '{"$jobsync": {"$datetime": "soon"}}',
        '{"$jobsync": {"$decimal": "x"}}',
        '{"$jobsync": {"$decimal": {}}}',
        '{"$jobsync": {"$uuid": 7}}',
        '{"$jobsync": {"$bytes": "*"}}',
        '{"$jobsync": {"$text": "no JSON"}}',
        '9' * 5_000,
        '[' * 5_000 + ']' * 5_000,
        'no JSON',
    ],
    ids=lambda text: text[:30],
)
def test_what_somebody_wrote_by_hand_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(JobSyncError, match="the key 'k' is complete, and its result") as caught:
        read_result('k', text)
    assert len(str(caught.value)) < 400
