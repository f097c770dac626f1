"""Values that others chose, on one line; and how often the same is said."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobsync_core.errors import ExecutionRunning
from jobsync_core.logs import Repeats, shown
from jobsync_core.worker import come_back
from jobsync_core.worker.come_back import ComeBacks


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        ('proj.task', 'proj.task'),
        ('übung 漢', 'übung 漢'),
        ('a\nERROR b', 'a\\nERROR b'),
        ('a\r\x1b[31m', 'a\\r\\x1b[31m'),
        ('\ud800', '\\ud800'),
        ('a\u2028b', 'a\\u2028b'),
        ('\0', '\\x00'),
        ('x' * 10, 'xxxxx…'),
        (['a\n'], "['a\\n…"),
        (None, 'None'),
    ],
)
def test_a_value_is_one_line(value: object, expected: str) -> None:
    assert shown(value, 5 if expected.endswith('…') else 300) == expected


def test_what_cannot_be_shown_is_named_by_its_type() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown(Odd()).isprintable() and 'Odd' in shown(Odd())


def test_long_and_deep_values_are_cut() -> None:
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    for value in (
        deep,
        'x' * 10**6,
        10**10_000,
        ['y' * 10**6] * 1000,
        {str(n): n for n in range(10_000)},
    ):
        assert len(shown(value)) <= 301


class TestRepeats:
    def test_the_first_is_said_and_then_one_a_minute_with_the_number_between(self) -> None:
        repeats = Repeats(60)
        assert repeats.say('a', 0.0) == ''
        assert [repeats.say('a', float(second)) for second in range(1, 60)] == [None] * 59
        assert repeats.say('a', 60.0) == ' (59 more like it)'
        assert repeats.say('a', 120.0) == ''

    def test_kinds_are_apart_and_bounded(self) -> None:
        repeats = Repeats(60, most=10)
        assert [repeats.say(number, 0.0) for number in range(100)] == [''] * 100
        assert len(repeats._said) == 10
        assert repeats.say(99, 1.0) is None


def say(repeats: Repeats) -> Callable[[object], object]:
    return lambda kind: repeats.say(kind, 0.0)


def come(come_backs: ComeBacks) -> Callable[[object], object]:
    return lambda kind: come_backs.next(str(kind), ExecutionRunning(), 0, 0.0)


@pytest.mark.parametrize('kind', ['said', 'told'])
def test_threads_that_say_more_than_is_remembered_raise_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """They are switched between any two instructions; it took a tenth of a second to go wrong."""
    monkeypatch.setattr(come_back, '_MOST_KEYS', 4)
    act = say(Repeats(most=4)) if kind == 'said' else come(ComeBacks())
    end = time.monotonic() + 1.0

    def work(thread: int) -> int:
        number = 0
        while time.monotonic() < end:
            number += 1
            act((thread, number))
        return number

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert min(pool.map(work, range(4))) > 0
    finally:
        sys.setswitchinterval(before)
