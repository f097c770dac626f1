"""How long a call may wait in a process that ends."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

from jobsync_core.store import deadline
from jobsync_core.store.deadline import Deadlines
from jobsync_core.store.hurry import HURRIED_SEC, Hurry


def test_a_process_that_goes_on_waits_as_long_as_its_limits_say() -> None:
    hurry = Hurry()
    hurry.unanswered()
    assert not hurry.begun and not hurry.is_hopeless
    assert hurry.due(10.0, 26.0) == 26.0


def test_one_that_ends_waits_a_moment_for_each_call_also_for_those_that_are_under_way() -> None:
    hurry = Hurry()
    before = time.monotonic()
    hurry.begin()
    after = time.monotonic()
    assert before + HURRIED_SEC <= hurry.due(before - 9, after + 99) <= after + HURRIED_SEC
    assert hurry.due(after + 50, after + 99) == after + 50 + HURRIED_SEC
    assert hurry.due(after, after + 0.5) == after + 0.5, 'never longer than otherwise'


def test_after_a_call_without_an_answer_the_others_do_not_ask_until_one_is_answered() -> None:
    hurry = Hurry()
    hurry.begin()
    assert not hurry.is_hopeless
    hurry.unanswered()
    assert hurry.is_hopeless
    hurry.answered()
    assert not hurry.is_hopeless


def test_forked_children_know_it() -> None:
    hurry = Hurry()
    child = os.fork()
    if not child:
        deadline = time.monotonic() + 20
        while not hurry.begun and time.monotonic() < deadline:
            time.sleep(0.01)
        os._exit(0 if hurry.begun else 1)
    hurry.begin()
    assert os.waitpid(child, 0)[1] == 0


class Call:
    """A call that waits for an answer that does not come."""

    def __init__(self) -> None:
        self.cut = False
        self.over = threading.Event()

    def cut_off(self) -> None:
        self.cut = True
        self.over.set()


def cut_after(hurry: Hurry, begin_late: bool) -> float:
    """Seconds until a call is cut whose own limit is a minute; 6 if it is not.

    Args:
        begin_late: The process begins to end while the call is under way.
    """
    call: Any = Call()
    began = time.monotonic()
    if not begin_late:
        hurry.begin()
    with Deadlines(hurry).watch(call, 60.0):
        if begin_late:
            hurry.begin()
        call.over.wait(6)
    return time.monotonic() - began


@pytest.mark.parametrize('begin_late', [False, True], ids=['afterwards', 'under way'])
def test_a_call_is_cut_in_a_process_that_ends(begin_late: bool) -> None:
    assert HURRIED_SEC <= cut_after(Hurry(), begin_late) < HURRIED_SEC + 3


def test_without_a_look_now_and_then_what_is_under_way_is_not_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deadline, '_LOOK_SEC', 60.0)
    assert cut_after(Hurry(), begin_late=True) > 5


def test_a_process_may_hurry_more_and_never_less() -> None:
    hurry = Hurry()
    hurry.begin()
    hurry.begin(0.5)
    hurry.begin()
    assert hurry.due(10**9, 10**9 + 60) == 10**9 + 0.5
