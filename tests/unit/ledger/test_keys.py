"""Keys: different calls have different ones, and the same call has the same one in every
process.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import string
import subprocess
import sys
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jobsync_core.errors import ConfigurationError
from jobsync_core.ledger.keys import Former, Keys, escape, is_ambiguous, key_maker
from jobsync_core.ledger.once import ExactlyOnce, exactly_once


def function(a: object, b: object = 'b', *rest: object, **options: object) -> None:
    """What the keys here are made for."""


def keys(text: str | Callable[..., str], *args: object, **kwargs: object) -> Keys:
    return key_maker(text, function, 'function')(args, kwargs)


def key(text: str, *args: object, **kwargs: object) -> str:
    return keys(text, *args, **kwargs).key


class Color(enum.Enum):
    RED = 1


class Text(str, enum.Enum):
    RED = 'red'


class Number(enum.IntEnum):
    ONE = 1


class Loud(str):
    def __str__(self) -> str:
        return 'LOUD'

    def __format__(self, spec: str) -> str:
        return 'LOUD'


class Plain:
    """Its text is its address."""


class Point:
    def __init__(self, *of: object) -> None:
        self.of = of

    def __repr__(self) -> str:
        return f'Point({self.of})'


@dataclasses.dataclass(frozen=True)
class Tagged:
    tags: object


class Named(NamedTuple):
    tags: object


class Slotted:
    __slots__ = ('__tags',)

    def __init__(self, tags: object) -> None:
        self.__tags = tags

    def __repr__(self) -> str:
        return f'slotted {self.__tags}'


class Order:
    """Its text is its id, whatever it holds."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tags = {'x', 'y'}
        self.plain = {'of': Plain()}

    def __str__(self) -> str:
        return f'order {{{self.number}}}'


values = st.text(st.characters(codec='utf-8', exclude_characters='\0'), min_size=1, max_size=12)
near = st.text(':%/A3a5', min_size=1, max_size=8)


class TestSeveralFields:
    def test_a_separator_in_a_value_makes_another_key(self) -> None:
        assert key('{a}:{b}', 'acme:7', 'x') == 'acme%3A7:x'
        assert key('{a}:{b}', 'acme', '7:x') == 'acme:7%3Ax'

    @given(
        st.tuples(near, near),
        st.tuples(near, near),
        st.sampled_from(
            [
                '{a}:{b}',
                '{a}/{b}',
                'A{a}A:3{b}',
                'x{a}%:{b}',
                '{b}a{a}',
                '{a}3A:{b}',
                'p:{a}::{b}:s',
                '{a}5a{b}',
            ]
        ),
    )
    def test_different_arguments_have_different_keys(
        self, left: tuple[str, str], right: tuple[str, str], text: str
    ) -> None:
        assume(left != right)
        assert key(text, *left) != key(text, *right)

    @given(st.tuples(values, values, values), st.tuples(values, values, values))
    def test_so_they_have_with_any_text_and_three_fields(
        self, left: tuple[str, ...], right: tuple[str, ...]
    ) -> None:
        assume(left != right)
        text = '{a}:{b}|{2}'
        make = key_maker(text, lambda a, b, c: None, 'function')
        assert make(left, {}).key != make(right, {}).key

    def test_values_without_separators_stay_as_they_read(self) -> None:
        assert keys('{a}:{b}', 'acme', 7) == Keys('acme:7', None)
        assert key('shop-{a}-item-{b}', 'item', 'x') == 'shop-item-item-x'

    @pytest.mark.parametrize('text', ['{a}{b}', '{a}0{b}', '{a}%{b}', '{a}AF{b}', 'x:{a}{b}:y'])
    def test_fields_that_nothing_separates_are_refused_at_decoration(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match="put a character such as ':' there"):
            key_maker(text, function, 'function')

    def test_what_an_earlier_version_made_is_told(self) -> None:
        assert keys('{a}:{b}', 'acme:7', 'x').former == 'acme:7:x'
        assert keys('{a}:{b}', '50%', 'x') == Keys('50%25:x', '50%:x')

    @given(values, st.sets(st.sampled_from(string.punctuation), max_size=4))
    def test_what_is_escaped_can_be_undone(self, text: str, characters: set[str]) -> None:
        from urllib.parse import unquote

        escaped = escape(text, characters)
        assert unquote(escaped) == text
        assert not characters - {'%'} & set(escaped)


class TestOneField:
    @given(values)
    def test_it_stays_as_it_reads(self, value: str) -> None:
        assert keys('order:{a}', value) == Keys(f'order:{value}', None)

    @pytest.mark.parametrize(
        ('value', 'text'),
        [
            (5, '5'),
            ('5', '5'),
            (True, 'True'),
            (False, 'False'),
            (-3, '-3'),
            (10**30, '1' + '0' * 30),
            (b'x:', "b'x:'"),
            (Color.RED, 'Color.RED'),
            (Text.RED, 'red'),
            (Number.ONE, '1'),
            (Loud('quiet'), 'quiet'),
            (uuid.UUID(int=5), '00000000-0000-0000-0000-000000000005'),
            (decimal.Decimal('1.50'), '1.50'),
            (datetime.date(2026, 1, 2), '2026-01-02'),
            (datetime.datetime(2026, 1, 2, 3, 4), '2026-01-02 03:04:00'),
            (datetime.timedelta(1), '1 day, 0:00:00'),
            ((1, 'a'), "(1, 'a')"),
            ([1, None], '[1, None]'),
            (Path('/a'), '/a'),
            (Point(1), 'Point((1,))'),
        ],
    )
    def test_what_a_value_reads_like(self, value: object, text: str) -> None:
        assert key('{a}', value) == text

    @pytest.mark.parametrize(
        ('value', 'said'),
        [
            (None, 'is None'),
            ('', "is ''"),
            ({1}, 'a set'),
            (frozenset({1}), 'a frozenset'),
            ({'a': 1}, 'a dict'),
            ({}.keys(), 'dict_keys'),
            (1.5, 'how many count'),
            (float('nan'), 'how many count'),
            (1j, 'how many count'),
            (bytearray(b'x'), 'a bytearray'),
            (memoryview(b'x'), 'a memoryview'),
            (Plain(), 'address in memory'),
            (function, 'address in memory'),
            (object(), 'address in memory'),
            ([{1}], 'a set'),
            ((1, (2.5,)), 'how many count'),
            ([Plain()], 'address in memory'),
            (iter([]), 'address in memory'),
            (functools.partial(function), 'address in memory'),
            (Point(Plain()), 'address in memory'),
        ],
    )
    def test_what_has_no_stable_text_is_refused(self, value: object, said: str) -> None:
        with pytest.raises(ConfigurationError, match=said):
            key('{a}', value)
        with pytest.raises(ConfigurationError, match=said):
            key('{b}:{a}', value, 'b')

    def test_a_number_whose_digits_are_counted_is_fine(self) -> None:
        assert key('{a:.2f}', 1 / 3) == '0.33'
        assert key('{a:.2f}:{b:>5}', 1 / 3, 'x') == '0.33:    x'
        assert key('{a!r}', 'x') == "'x'"
        with pytest.raises(ConfigurationError, match='a set'):
            key('{a!r}', {1})

    @pytest.mark.parametrize(
        'text', ['{a!r}', '{a!s}', '{a!r:.5}', '{a:>10}', '{a:10}', '{a!a}', '{a:,}']
    )
    def test_a_format_that_counts_no_digits_makes_no_number_fine(self, text: str) -> None:
        with pytest.raises(ConfigurationError, match='how many count'):
            key(text, 0.1 + 0.2)

    @pytest.mark.parametrize(
        ('text', 'made'),
        [('{a:.3}', '0.333'), ('{a:e}', '3.333333e-01'), ('{a:.0%}', '33%'), ('{a:.{b}f}', '0.33')],
    )
    def test_one_that_does_is_fine(self, text: str, made: str) -> None:
        assert key(text, 1 / 3, 2) == made

    @pytest.mark.parametrize('text', ['{a}', '{a!r}', '{a!s}', '{a!r:>5}', '{a!r:.3}'])
    @pytest.mark.parametrize(
        ('value', 'said'),
        [
            (Tagged({'x', 'y'}), 'holds a set'),
            (Tagged(frozenset('x')), 'holds a frozenset'),
            (Tagged({'x': 1}), 'holds a dict'),
            (Tagged(collections.OrderedDict(x=1)), 'holds a OrderedDict'),
            (Tagged([({1},)]), 'holds a set'),
            (Tagged(Tagged({'x'})), 'holds a set'),
            (Named(Tagged({'x'})), 'holds a set'),
            (Named({'x'}), 'a set'),
            ([Tagged({'x'})], 'holds a set'),
            (Tagged(Plain()), 'address in memory'),
            (Named(Plain()), 'address in memory'),
            (Point({'x'}), 'holds a set'),
            (Slotted({1}), 'holds a set'),
            (types.SimpleNamespace(tags={'x'}), 'holds a set'),
            (collections.deque([{1}]), 'holds a set'),
        ],
    )
    def test_what_an_object_holds_and_shows_counts(
        self, text: str, value: object, said: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=said):
            key(text, value)

    def test_what_an_object_holds_and_does_not_show_does_not_count(self) -> None:
        assert key('{a}', Order(7)) == 'order {7}'
        assert key('{a!r}', Tagged('x')) == "Tagged(tags='x')"
        assert key('{a}', Named('{')) == "Named(tags='{')"

    def test_attributes_and_items_are_what_counts(self) -> None:
        assert key('{a.hex}', uuid.UUID(int=5)) == '0' * 31 + '5'
        assert key('{a[id]}', {'id': 7}) == '7'
        with pytest.raises(ConfigurationError, match=r'a\[ids\] is a set'):
            key('{a[ids]}', {'ids': {1}})

    def test_a_subclass_of_str_that_a_callable_returns_is_the_text_it_holds(self) -> None:
        assert keys(lambda *args: Text.RED, 1).key == 'red'

    def test_it_is_the_same_in_every_process(self) -> None:
        program = (
            'from tests.unit.ledger.test_keys import *\n'
            "print(key('{a}:{b}', Text.RED, ('x', 1)), key('{a}', Color.RED), key('{a}', b'x'))"
        )
        outputs = {
            subprocess.run(
                [sys.executable, '-bb', '-c', program],
                env={'PYTHONHASHSEED': seed, 'PATH': ''},
                cwd=Path(__file__).parents[3],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for seed in ('1', '2')
        }
        assert outputs == {"red:('x', 1) Color.RED b'x'\n"}


def options_of(decorated: Callable[..., Any]) -> ExactlyOnce:
    found: ExactlyOnce = vars(decorated)['exactly_once']
    return found


class TestScopes:
    def test_names_that_are_not_one_functions_alone_are_refused(self) -> None:
        def local(a: object) -> None: ...

        for target in (local, lambda a: None):
            with pytest.raises(
                ConfigurationError, match=r'another function can have this name.*scope='
            ):
                exactly_once(key='{a}')(target)
            assert (
                options_of(exactly_once(key='{a}', scope='mine')(target)).ledger_key_of((1,), {})
                == 'mine:1'
            )
            exactly_once(default_key=lambda: 'id')(target)  # the id of a message is nobody else's
        scope = options_of(exactly_once(key='{a}')(function)).scope
        assert scope == 'tests.unit.ledger.test_keys.function'

    def test_a_function_of_a_script_needs_one_too(self) -> None:
        program = (
            'from jobsync_core import exactly_once\n'
            'def charge(a): ...\n'
            "exactly_once(key='{a}', scope='shop')(charge)\n"
            "exactly_once(key='{a}')(charge)"
        )
        result = subprocess.run(
            [sys.executable, '-c', program],
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (
            'ConfigurationError: @exactly_once on __main__.charge: another function can have this '
            'name' in result.stderr
        )

    def test_a_scope_with_a_colon_is_no_scope_and_a_key(self) -> None:
        first = options_of(exactly_once(key='{a}', scope='shop')(function))
        second = options_of(exactly_once(key='{a}', scope='shop:eu')(function))
        assert first.ledger_key_of(('eu:1',), {}) != second.ledger_key_of((1,), {})
        assert second.ledger_key_of((1,), {}) == 'shop%3Aeu:1'
        assert second._former_keys(Keys('1')) == (Former('shop:eu:', 'shop:eu:1', ambiguous=True),)

    def test_a_task_gives_its_name_and_the_functions_own_stays_known(self) -> None:
        options = options_of(exactly_once(key='{a}:{b}', named_later=True)(function))
        options.adopt('billing')
        options.adopt('billing')
        assert options.ledger_key_of((1, 2), {}) == 'billing:1:2'
        own = 'tests.unit.ledger.test_keys.function:'
        assert options._former_keys(Keys('1:2')) == (Former(own, own + '1:2'),)
        assert options._former_keys(Keys('1%3A:2', '1::2')) == (
            Former(own, own + '1%3A:2'),
            Former(own, own + '1::2'),
            Former('', 'billing:1::2'),
        )
        assert options._former_keys(Keys('1%253A:2', '1%3A:2'))[-1] == Former(
            '', 'billing:1%3A:2', ambiguous=True
        ), 'that of 1: and 2'

    def test_where_the_name_is_the_functions_nothing_is_looked_up(self) -> None:
        options = options_of(exactly_once(key='{a}', named_later=True)(function))
        options.adopt('tests.unit.ledger.test_keys.function')
        assert options._former_keys(Keys('1')) == ()

    def test_two_tasks_with_one_function_are_refused(self) -> None:
        options = options_of(exactly_once(key='{a}', named_later=True)(function))
        options.adopt('first')
        with pytest.raises(ConfigurationError, match="'first' and 'second' run the same"):
            options.adopt('second')
        shared = options_of(exactly_once(key='{a}', scope='both', named_later=True)(function))
        shared.adopt('first')
        shared.adopt('second')
        assert shared.scope == 'both'

    def test_a_task_of_a_script_is_refused(self) -> None:
        options = options_of(exactly_once(key='{a}', named_later=True)(function))
        with pytest.raises(
            ConfigurationError, match=r"'__main__\.charge' can have the name of another"
        ):
            options.adopt('__main__.charge')

    @pytest.mark.parametrize(
        ('name', 'ambiguous'),
        [
            ('shop.charge', False),
            ('charge', False),
            ('__main__.charge', True),
            ('shop.<lambda>', True),
            ('shop.make.<locals>.crawl', True),
        ],
    )
    def test_which_names_are_ambiguous(self, name: str, ambiguous: bool) -> None:
        assert is_ambiguous(name) is ambiguous
