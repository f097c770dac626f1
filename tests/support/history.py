"""What every node answered to `can_claim_task`, and whether two of them were ever right at once.

A node asks itself about each task of a fixed sample again and again and takes the time before and
after each call, on the machine's one monotonic clock. Answers in a row that are True make a run. A
run says for certain: the task was claimed at some moment between the first call's begin and end, at
some moment between the last call's begin and end, and (as no answer in between was False) at all
moments between the two. All ends are taken on the safe side, so that an overlap reported is an
overlap that was.

Runs live in a memory-mapped file that is updated in place: what was written survives SIGKILL, and
can be read meanwhile.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ['History', 'Overlap', 'Recorder', 'Run', 'moment', 'read_runs']

_COUNT = struct.Struct('<QQ')  # runs, passes over all tasks
_SLOT = struct.Struct('<Qdddd')  # task, first call's begin and end, last call's begin and end
_LAST = struct.Struct('<dd')
_LAST_AT = 24
_RUNS = 50_000


def moment() -> float:
    """The time on which records are taken, comparable between the processes of one machine."""
    return time.monotonic()


@dataclass(frozen=True)
class Run:
    """One node's unbroken series of True answers about one task; times by `moment`."""

    node: str
    task: int
    first_begin: float
    first_end: float
    last_begin: float
    last_end: float

    def surely_overlaps(self, other: Run) -> bool:
        """Whether both were in force at one instant, whenever within its call each answer was
        made.
        """
        both_from = max(self.first_end, other.first_end)
        both_until = min(self.last_begin, other.last_begin)
        return (
            both_from < both_until
            or self._encloses_an_answer_of(other)
            or other._encloses_an_answer_of(self)
        )

    def _encloses_an_answer_of(self, other: Run) -> bool:
        return any(
            self.first_end < begin and end < self.last_begin
            for begin, end in (
                (other.first_begin, other.first_end),
                (other.last_begin, other.last_end),
            )
        )


@dataclass(frozen=True)
class Overlap:
    """Two nodes claimed one task at once."""

    task: int
    one: Run
    other: Run

    @property
    def seconds(self) -> float:
        """For how long, at least."""
        return max(
            0.0,
            min(self.one.last_begin, self.other.last_begin)
            - max(self.one.first_end, self.other.first_end),
        )


class Recorder:
    """Writes one process's runs.

    Args:
        path: The file; made anew.
    """

    def __init__(self, path: Path) -> None:
        with path.open('w+b') as file:
            file.truncate(_COUNT.size + _RUNS * _SLOT.size)
            self._map = mmap.mmap(file.fileno(), 0)
        self._open: dict[int, int] = {}
        self._runs = 0
        self._passes = 0

    def ask(self, tasks: Sequence[int], claims: Callable[[int], bool]) -> None:
        """Ask once about each task and write the answers down."""
        for task in tasks:
            begin = moment()
            claimed = claims(task)
            end = moment()
            if not claimed:
                self._open.pop(task, None)
                continue
            slot = self._open.get(task)
            if slot is not None:
                _LAST.pack_into(self._map, slot + _LAST_AT, begin, end)
                continue
            if self._runs == _RUNS:
                raise RuntimeError('the record is full')
            slot = self._open[task] = _COUNT.size + self._runs * _SLOT.size
            _SLOT.pack_into(self._map, slot, task, begin, end, begin, end)
            self._runs += 1
            _COUNT.pack_into(self._map, 0, self._runs, self._passes)
        self._passes += 1
        _COUNT.pack_into(self._map, 0, self._runs, self._passes)


def read_runs(path: Path, node: str) -> list[Run]:
    """All runs that a process has recorded so far."""
    with path.open('rb') as file:
        header = file.read(_COUNT.size)
        if len(header) < _COUNT.size:
            return []  # not yet made
        count, _ = _COUNT.unpack(header)
        slots = file.read(count * _SLOT.size)
    # A kill between the two stores of an update leaves a new begin with an old end.
    return [
        Run(node, task, first_begin, first_end, last_begin, max(last_begin, last_end))
        for task, first_begin, first_end, last_begin, last_end in _SLOT.iter_unpack(slots)
    ]


class History:
    """What the processes of one test answered.

    Args:
        records: Label of each process and its file. Two processes of one node name have two labels.
        tasks: The sample that was asked about.
    """

    def __init__(self, records: Mapping[str, Path], tasks: Iterable[int]) -> None:
        self.tasks = tuple(tasks)
        self.runs = [
            run
            for label, path in records.items()
            if path.exists()
            for run in read_runs(path, label)
        ]

    def overlaps(self) -> list[Overlap]:
        """All pairs of runs of different processes that were in force at once."""
        by_task: dict[int, list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: run.first_begin):
            by_task.setdefault(run.task, []).append(run)
        return [
            Overlap(task, one, other)
            for task, runs in by_task.items()
            for position, one in enumerate(runs)
            for other in runs[position + 1 :]
            if one.node != other.node and one.surely_overlaps(other)
        ]

    def unclaimed_since(self, since: float) -> list[int]:
        """Tasks that nobody has claimed by an answer begun after `since`."""
        claimed = {run.task for run in self.runs if run.last_begin > since}
        return [task for task in self.tasks if task not in claimed]

    def gap(self, task: int, since: float) -> float:
        """Seconds from `since` until somebody claimed the task by an answer that began later;
        infinity where nobody did.
        """
        answers = [
            max(run.first_end, since)
            for run in self.runs
            if run.task == task and run.last_begin > since
        ]
        return min(answers, default=float('inf')) - since

    def longest_gap(self, since: float) -> float:
        """The longest gap of any task."""
        return max(self.gap(task, since) for task in self.tasks)

    def claimed_by(self, node: str, since: float) -> set[int]:
        """Tasks that this process has claimed by an answer begun after `since`."""
        return {run.task for run in self.runs if run.node == node and run.last_begin > since}
