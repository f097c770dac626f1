"""The set of tasks that may not be claimed: in memory that forked children share, small, and exact
while it changes.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.protocol import exclusions as module
from jobsync_core.protocol.exclusions import Exclusions

TOTAL = 16


def in_child(question: Callable[[], bool]) -> bool:
    """What a forked child answers."""
    pid = os.fork()
    if not pid:
        status = 2
        try:
            status = 0 if question() else 1
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1)
    return code == 0


class Child:
    """A forked child that answers one question after the other."""

    def __init__(self, answer: Callable[[int, str], bool]) -> None:
        ask, self._ask = os.pipe()
        self._answer, tell = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.close(self._ask)
                while question := os.read(ask, 100):
                    token, _, text = question.decode().partition(' ')
                    os.write(tell, b'y' if answer(int(token), text) else b'n')
            finally:
                os._exit(0)
        os.close(ask)
        os.close(tell)

    def says(self, token: int, text: str) -> bool:
        os.write(self._ask, f'{token} {text}'.encode())
        return os.read(self._answer, 1) == b'y'

    def close(self) -> None:
        os.close(self._ask)
        os.close(self._answer)
        os.waitpid(self._pid, 0)


tasks = st.sets(st.tuples(st.integers(0, TOTAL - 1), st.sampled_from('abcdefgh')), max_size=40)
spans = st.lists(st.tuples(st.integers(0, TOTAL), st.integers(0, TOTAL)), max_size=4).map(
    lambda found: TokenSet(found).ranges
)
steps = st.lists(
    max_size=12,
    elements=st.one_of(
        st.tuples(st.just('replace'), spans, tasks),
        st.tuples(st.just('add'), st.none(), tasks),
        st.tuples(st.just('clear'), st.none(), st.none()),
    ),
)


@pytest.fixture(autouse=True, scope='module')
def small_blocks() -> object:
    """Blocks of four keys, so that few tasks fill several."""
    patch = pytest.MonkeyPatch()
    patch.setattr(module, '_BLOCK', 4)
    yield None
    patch.undo()


@given(steps)
@settings(deadline=None)
def test_it_is_the_set_that_it_stands_for(
    steps: list[tuple[str, tuple[tuple[int, int], ...], set[tuple[int, str]]]],
) -> None:
    exclusions, expected = Exclusions(TOTAL), set[tuple[int, str]]()
    for action, ranges, found in steps:
        if action == 'replace':
            tokens = TokenSet(ranges)
            inside = {task for task in found if task[0] in tokens}
            exclusions.replace(ranges, exclusions.keys_of(inside))
            expected = {task for task in expected if task[0] not in tokens} | inside
        elif action == 'add':
            exclusions.add(exclusions.keys_of(found))
            expected |= found
        else:
            exclusions.clear()
            expected = set()
        assert {
            (token, text)
            for token in range(TOTAL)
            for text in 'abcdefgh'
            if exclusions.excludes(token, text)
        } == expected
        assert len(exclusions) == len(expected)


def test_a_child_knows_what_is_excluded_after_its_fork() -> None:
    exclusions = Exclusions(TOTAL)
    child = Child(exclusions.excludes)
    try:
        assert not child.says(3, 'x')
        exclusions.add(exclusions.keys_of([(3, 'x')]))
        assert child.says(3, 'x') and not child.says(3, 'y')
        many = [(token, str(number)) for token in range(TOTAL) for number in range(200)]
        exclusions.replace(
            ((0, TOTAL),), exclusions.keys_of(many)
        )  # more than the child has mapped
        assert all(child.says(*task) for task in many[::17]) and not child.says(3, 'x')
        exclusions.clear()
        assert not child.says(*many[0])
    finally:
        child.close()


def test_a_child_that_closed_the_memory_takes_tasks_for_excluded(tmp_path: Path) -> None:
    exclusions = Exclusions(TOTAL)

    exclusions.add(exclusions.keys_of([(5, 'y')]))
    exclusions._data = memoryview(b'').cast('Q')  # as in a child that was forked before
    assert not in_child(lambda: exclusions.excludes(7, 'x'))

    def blind(path: Path) -> bool:
        with path.open('r+b') as stranger:
            os.dup2(stranger.fileno(), exclusions._file.fileno())
        return exclusions.excludes(7, 'x')

    other = tmp_path / 'of the same number'
    other.write_bytes(bytes(1 << 20))
    assert in_child(lambda: blind(other)), 'what is in there says nothing about tasks'


def test_a_child_changes_nothing() -> None:
    exclusions = Exclusions(TOTAL)
    exclusions.add(exclusions.keys_of([(3, 'x')]))

    def change() -> bool:
        exclusions.clear()
        exclusions.add(exclusions.keys_of([(4, 'y')]))
        exclusions.replace(((0, TOTAL),), array('Q'))
        return exclusions.excludes(3, 'x') and not exclusions.excludes(4, 'y')

    assert in_child(change)
    assert exclusions.excludes(3, 'x') and not exclusions.excludes(4, 'y')


def test_whoever_looks_while_it_changes_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is stopped in its look finds places used again for other keys: it must not say
    that a task is free.
    """
    exclusions = Exclusions(TOTAL)
    exclusions.add(exclusions.keys_of([(3, 'x')]))
    look = exclusions._look
    stopped: list[bool] = []

    def interrupted(index: memoryview, key: int) -> bool:
        if not stopped:
            stopped.append(True)
            exclusions.replace(((3, 4),), exclusions.keys_of([(3, 'x'), (3, 'z')]))
            exclusions.replace(((3, 4),), exclusions.keys_of([(3, 'x')]))
            return False  # what it has read is of no use
        return look(index, key)

    monkeypatch.setattr(exclusions, '_look', interrupted)
    assert exclusions.excludes(3, 'x') and stopped


def test_a_set_that_never_rests_says_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    exclusions = Exclusions(TOTAL)
    exclusions.add(exclusions.keys_of([(3, 'x')]))
    look = exclusions._look

    def restless(index: memoryview, key: int) -> bool:
        exclusions.head[0] += 2
        return look(index, key)

    monkeypatch.setattr(exclusions, '_look', restless)
    assert exclusions.excludes(3, 'y')


def test_a_million_tasks_take_less_than_ten_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, '_BLOCK', 4096)
    exclusions = Exclusions(10_000)
    step = 2**64 // 1_000_000
    for piece in range(20):  # in pieces of 50,000, as they come from the database
        tokens = piece * 500, piece * 500 + 500
        first = tokens[0] << 50
        exclusions.replace(
            (tokens,), array('Q', (first + number * step // 20 for number in range(50_000)))
        )
    assert len(exclusions) == 1_000_000
    assert os.fstat(exclusions._file.fileno()).st_blocks * 512 < 10_000_000
