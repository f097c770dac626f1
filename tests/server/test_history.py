"""The checker itself: it sees overlaps that were, and no others; and what a killed process wrote is
still there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.support.history import History, Recorder, Run, moment, read_runs
from tests.support.waiting import eventually

_ROOT = Path(__file__).parents[2]
Call: TypeAlias = 'tuple[float, float]'


def run(node: str, first: tuple[float, float], last: tuple[float, float]) -> Run:
    """A run about task 1."""
    return Run(node, 1, *first, *last)


@pytest.mark.parametrize(
    ('one', 'other', 'overlap'),
    [
        (((0, 1), (9, 10)), ((4, 5), (14, 15)), True),  # one goes on after the other has begun
        (((0, 1), (9, 10)), ((4, 5), (6, 7)), True),  # the other lies within
        (((0, 1), (9, 10)), ((4, 5), (4, 5)), True),  # a single answer within
        (((0, 1), (9, 10)), ((11, 12), (14, 15)), False),  # one after the other
        (
            ((0, 1), (9, 10)),
            ((9.5, 11), (14, 15)),
            False,
        ),  # the calls overlap, the answers need not
        (
            ((0, 10), (0, 10)),
            ((4, 5), (4, 5)),
            False,
        ),  # a call that took long may have been answered before or after
        (
            ((0, 1), (2, 20)),
            ((4, 5), (14, 15)),
            False,
        ),  # so may the last one, of a process that was stopped during it
        (((0, 8), (9, 10)), ((1, 2), (4, 5)), False),
    ],
)
def test_an_overlap_is_reported_when_it_is_certain(
    one: tuple[Call, Call], other: tuple[Call, Call], overlap: bool
) -> None:
    assert run('a', *one).surely_overlaps(run('b', *other)) is overlap
    assert run('b', *other).surely_overlaps(run('a', *one)) is overlap


def test_answers_are_joined_to_runs_and_overlaps_found(tmp_path: Path) -> None:
    a, b = Recorder(tmp_path / 'a'), Recorder(tmp_path / 'b')
    for holder in 'aabbXaab':
        a.ask([1, 2], lambda task, holder=holder: holder in 'aX' and task == 1)  # type: ignore[misc]
        b.ask([1, 2], lambda task, holder=holder: holder in 'bX' and task == 1)  # type: ignore[misc]
    history = History({'a': tmp_path / 'a', 'b': tmp_path / 'b'}, [1, 2])
    assert [run.node for run in sorted(history.runs, key=lambda run: run.first_begin)] == [
        'a',
        'b',
        'a',
        'b',
    ]
    (overlap,) = history.overlaps()
    assert (overlap.task, {overlap.one.node, overlap.other.node}) == (1, {'a', 'b'})


def test_gaps_and_unclaimed_tasks(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / 'a')
    recorder.ask([1, 2], lambda task: True)
    since = moment()
    recorder.ask([1, 2], lambda task: task == 1)
    history = History({'a': tmp_path / 'a'}, [1, 2])
    assert history.unclaimed_since(since) == [2]
    assert history.gap(1, since) < 1
    assert history.longest_gap(since) == float('inf')
    assert history.claimed_by('a', since) == {1}


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    program = (
        'import itertools, pathlib, sys; from tests.support.history import Recorder\n'
        'recorder = Recorder(pathlib.Path(sys.argv[1]))\n'
        'for number in itertools.count(): recorder.ask([number % 2], lambda task: True)'
    )
    path = tmp_path / 'record'
    process = subprocess.Popen([sys.executable, '-c', program, str(path)], cwd=_ROOT)
    try:
        eventually(lambda: path.exists() and len(read_runs(path, 'a')) == 2, timeout=30)
        alive = moment()
        eventually(lambda: min(run.last_begin for run in read_runs(path, 'a')) > alive)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    gone = moment()
    for found in read_runs(path, 'a'):
        assert alive < found.last_begin <= found.last_end <= gone
