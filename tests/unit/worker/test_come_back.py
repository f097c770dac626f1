"""When a message comes back, and which come-backs are told."""

from __future__ import annotations

import pytest

from jobsync_core.errors import ClaimLost, DatabaseUnavailable, ExecutionRunning, JobSyncError
from jobsync_core.worker.come_back import ComeBacks, come_back_sec, waited_sec


def running(key: str = 'k') -> ExecutionRunning:
    error = ExecutionRunning()
    error.key = key
    return error


def lines(come_backs: ComeBacks, error: JobSyncError, seconds: int, every: int = 30) -> int:
    """How many lines the come-backs of one message are within a time."""
    found = [
        come_backs.next('t', error, 9, float(now), told=False).more
        for now in range(0, seconds, every)
    ]
    return sum(more is not None for more in found)


def test_it_waits_twice_as_long_each_time_up_to_half_a_minute() -> None:
    assert [come_back_sec(waits) for waits in range(8)] == [1, 2, 4, 8, 16, 30, 30, 30]
    assert come_back_sec(10**9) == 30 and come_back_sec(10, 60.0) == 60


@pytest.mark.parametrize('waits', [0, 1, 5, 6, 19, 20, 21, 50])
def test_what_it_has_waited_is_the_sum_of_that(waits: int) -> None:
    assert waited_sec(waits) == sum(come_back_sec(before) for before in range(waits))


@pytest.mark.parametrize('error', [ClaimLost(), DatabaseUnavailable()])
def test_what_is_in_the_way_of_all_is_over_for_all_and_needs_no_long_pause(
    error: JobSyncError,
) -> None:
    delays = [ComeBacks().next('t', error, waits, 0.0).delay_sec for waits in range(7)]
    assert delays == [1, 2, 4, 8, 15, 15, 15]


class TestLines:
    def test_a_key_that_runs_for_a_day_is_one_line(self) -> None:
        assert lines(ComeBacks(), running(), 86_400) == 1

    def test_the_same_key_that_runs_another_time_is_another(self) -> None:
        come_backs = ComeBacks()
        assert [come_backs.next('t', running(), 0, now).more for now in (0.0, 30.0, 120.0)] == [
            '',
            None,
            '',
        ]

    def test_each_key_and_each_task_has_its_own(self) -> None:
        come_backs = ComeBacks()
        given = [('a', 'k'), ('a', 'k'), ('a', 'l'), ('b', 'k')]
        said = [come_backs.next(task, running(key), 0, 0.0).more for task, key in given]
        assert said == ['', None, '', '']

    def test_what_another_process_has_told_of_is_none(self) -> None:
        assert ComeBacks().next('t', running(), 3, 0.0, told=True).more is None

    def test_what_is_in_the_way_of_all_is_said_each_minute_with_its_count(self) -> None:
        come_backs, error = ComeBacks(), DatabaseUnavailable()
        said = [come_backs.next('t', error, 3, now, told=True).more for now in (0.0, 30.0, 61.0)]
        assert said == ['', None, ' (1 more like it)']

    def test_of_many_keys_those_are_remembered_that_come_back_still(self) -> None:
        come_backs = ComeBacks()
        for number in range(3000):
            come_backs.next('t', running('first'), 0, 0.0)
            come_backs.next('t', running(str(number)), 0, 0.0)
        assert len(come_backs._told) == 1000
        assert come_backs.next('t', running('first'), 0, 0.0).more is None
        assert come_backs.next('t', running('0'), 0, 0.0).more == ''
