"""Which ledger a call uses: the Job around it, also where Jobs are nested, side by side, or in
threads of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from jobsync_core.errors import NotEntered
from jobsync_core.job import Job
from jobsync_core.ledger.current import (
    current_ledger,
    enter_ledger,
    leave_ledger,
    set_current_ledger,
)
from jobsync_core.ledger.single import SingleLedger
from jobsync_core.testing import FakeJob


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    set_current_ledger(None)
    yield
    set_current_ledger(None)


def test_an_inner_job_gives_the_outer_one_back() -> None:
    with Job('outer') as outer:
        with Job('inner') as inner:
            assert current_ledger() is inner.ledger
        assert current_ledger() is outer.ledger
    with pytest.raises(NotEntered):
        current_ledger()


def test_a_single_node_job_within_a_node_takes_nothing_away() -> None:
    with FakeJob('node') as node:
        with Job('alone') as alone:
            assert current_ledger() is alone.ledger
        assert current_ledger() is node.ledger


def test_jobs_that_end_in_another_order_leave_each_other_alone() -> None:
    first, second = SingleLedger(), SingleLedger()
    enter_ledger(first)
    enter_ledger(second)
    leave_ledger(first)
    assert current_ledger() is second
    leave_ledger(second)
    with pytest.raises(NotEntered):
        current_ledger()


def test_threads_that_are_each_in_a_job_use_their_own() -> None:
    entered = threading.Barrier(2)
    found: dict[str, bool] = {}

    def work(name: str) -> None:
        with Job(name) as job:
            entered.wait(30)
            found[name] = current_ledger() is job.ledger
            entered.wait(30)

    threads = [threading.Thread(target=work, args=(name,)) for name in ('a', 'b')]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {'a': True, 'b': True}


def test_a_thread_that_is_in_no_job_uses_the_one_that_is_left() -> None:
    found: list[object] = []

    def look() -> None:
        found.append(current_ledger())

    with Job('outer') as outer:
        with Job('inner') as inner:
            thread = threading.Thread(target=look)
            thread.start()
            thread.join(30)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(30)
    assert found == [inner.ledger, outer.ledger]


def test_a_ledger_that_is_entered_twice_is_left_once() -> None:
    ledger = SingleLedger()
    enter_ledger(ledger)  # before a fork
    enter_ledger(ledger)  # by the Job itself
    leave_ledger(ledger)
    with pytest.raises(NotEntered):
        current_ledger()
