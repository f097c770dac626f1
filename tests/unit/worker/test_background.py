"""What runs for callers that do not wait for it, or for once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from jobsync_core.worker.background import Background
from tests.support.waiting import eventually

WAIT_SEC = 0.3


class Work:
    """A function that ends when a test says so."""

    def __init__(self) -> None:
        self.calls = 0
        self.goes_on = threading.Event()
        self.went_well = True
        self.background = Background(self, 'test background', WAIT_SEC)

    def __call__(self) -> bool:
        self.calls += 1
        assert self.goes_on.wait(20)
        return self.went_well

    def ask(self, wait: bool = True) -> tuple[bool, bool]:
        """Whether it went well, and whether that took a wait."""
        before = time.monotonic()
        return self.background.ask(wait), time.monotonic() - before >= WAIT_SEC / 2

    def is_over(self) -> bool:
        return not any(thread.name == 'test background' for thread in threading.enumerate())


@pytest.fixture
def work() -> Iterator[Work]:
    made = Work()
    yield made
    made.goes_on.set()
    eventually(made.is_over)


def test_there_is_no_thread_before_somebody_asks_and_none_afterwards(work: Work) -> None:
    assert work.is_over()
    work.goes_on.set()
    assert work.ask()[0]
    eventually(work.is_over)


def test_who_does_not_wait_begins_it_and_goes_on(work: Work) -> None:
    assert work.ask(wait=False) == (False, False)
    eventually(lambda: work.calls == 1)
    assert work.ask(wait=False) == (False, False) and work.calls == 1


def test_what_does_not_end_is_waited_for_once_until_it_has_gone_well(work: Work) -> None:
    assert [work.ask() for _ in range(4)] == [(False, True)] + 3 * [(False, False)]
    assert work.calls == 1
    work.goes_on.set()
    eventually(work.is_over)
    work.goes_on.clear()
    assert work.ask() == (False, False), 'it went well, and too late'
    work.goes_on.set()
    eventually(work.is_over)
    work.ask()
    eventually(work.is_over)
    work.goes_on.clear()
    assert work.ask() == (False, True), 'it went well in time, and so is waited for again'


def test_what_failed_is_not_waited_for(work: Work) -> None:
    work.went_well = False
    work.goes_on.set()
    assert not work.ask()[0]
    eventually(work.is_over)
    work.goes_on.clear()
    assert work.ask() == (False, False)


def test_who_comes_late_waits_for_the_rest_alone(work: Work) -> None:
    work.ask(wait=False)
    time.sleep(WAIT_SEC)  # it is time itself that is meant here
    assert work.ask() == (False, False)


def test_threads_wait_together(work: Work) -> None:
    began, threads = time.monotonic(), [threading.Thread(target=work.ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert work.calls == 1 and time.monotonic() - began < 5 * WAIT_SEC


def test_where_no_thread_can_be_had_it_has_failed(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', refuse)
        assert work.ask() == (False, False)
    work.goes_on.set()
    work.ask(wait=False)
    eventually(lambda: work.calls == 1)


def test_a_time_limit_that_strikes_as_it_begins_does_not_end_it_for_ever(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strike(thread: threading.Thread) -> None:
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', strike)
        with pytest.raises(TimeoutError):
            work.ask()
    work.goes_on.set()
    work.ask(wait=False)
    eventually(lambda: work.calls == 1)
