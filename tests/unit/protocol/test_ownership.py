"""What a node may claim: a bit and a deadline, also in children that it forked (I1, I2)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.assignment.groups import GROUP_SPAN
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.protocol.ownership import Ownership

# Python 3.12 and later warn of threads in a process that forks; a test runner may have some.
pytestmark = pytest.mark.filterwarnings(
    'ignore:This process .* is multi-threaded:DeprecationWarning'
)

quick = settings(deadline=None, max_examples=200)
ranges = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=6)


def in_child(answer: Callable[[], bool]) -> bool:
    """Whether a forked child answers yes."""
    pid = os.fork()
    if not pid:
        status = 2
        try:
            status = 0 if answer() else 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1)
    return status == 0


def test_a_new_node_may_claim_nothing() -> None:
    ownership = Ownership(100)
    assert not any(ownership.may_claim(token, 0.0) for token in range(100)) and not ownership.tokens


@quick
@given(ranges, ranges, st.integers(1, 70))
def test_exactly_the_tokens_of_the_latest_set_may_be_claimed(
    old: list[tuple[int, int]], new: list[tuple[int, int]], total: int
) -> None:
    ownership = Ownership(total)
    ownership.extend(10.0)
    ownership.replace(TokenSet(old))
    ownership.replace(TokenSet(new))
    assert [token for token in range(total) if ownership.may_claim(token, 9.0)] == [
        token for token in TokenSet(new) if token < total
    ]


@pytest.mark.parametrize(('now', 'expected'), [(9.999, True), (10.0, False), (1e9, False)])
def test_a_lease_ends_at_its_deadline(now: float, expected: bool) -> None:
    ownership = Ownership(8)
    ownership.replace(TokenSet([(0, 8)]))
    ownership.extend(10.0)
    assert ownership.deadline == 10.0 and ownership.may_claim(3, now) is expected


def test_a_suspended_node_claims_nothing_until_its_lease_is_extended() -> None:
    ownership = Ownership(8)
    ownership.replace(TokenSet([(0, 8)]))
    ownership.extend(10.0)
    ownership.suspend()
    assert not ownership.may_claim(3, 1.0) and ownership.tokens == TokenSet([(0, 8)])
    ownership.extend(12.0)
    assert ownership.may_claim(3, 11.0)


def test_a_forked_child_sees_every_later_change() -> None:
    ownership = Ownership(20)
    go, started = os.pipe(), os.pipe()

    def answer() -> bool:
        before = ownership.may_claim(3, 5.0)
        os.write(started[1], b'x')
        os.read(go[0], 1)
        return (
            not before
            and ownership.may_claim(3, 5.0)
            and not ownership.may_claim(9, 5.0)
            and ownership.tokens == TokenSet([(2, 9), (17, 20)])
        )

    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = 0 if answer() else 1
        finally:
            os._exit(status)
    os.read(started[0], 1)
    ownership.replace(TokenSet([(2, 9), (17, 20)]))
    ownership.extend(10.0)
    os.write(go[1], b'x')
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for end in (*go, *started):
        os.close(end)


def test_a_forked_child_stops_when_the_parent_is_suspended() -> None:
    ownership = Ownership(20)
    ownership.replace(TokenSet([(0, 20)]))
    ownership.extend(10.0)
    assert in_child(lambda: ownership.may_claim(19, 9.0))
    ownership.suspend()
    assert not in_child(lambda: ownership.may_claim(19, 9.0))


def test_tasks_are_excluded_with_their_tokens_and_forgotten_with_them() -> None:
    ownership = Ownership(8)
    exclusions = ownership.exclusions
    ownership.exclude(((1, 3),), exclusions.keys_of([(1, 'a'), (2, 'b')]))
    ownership.replace(TokenSet([(1, 4)]))
    ownership.exclude_more(exclusions.keys_of([(3, 'c')]))
    assert [
        exclusions.excludes(token, text) for token, text in ((1, 'a'), (2, 'b'), (3, 'c'), (3, 'd'))
    ] == [True, True, True, False]
    ownership.replace(TokenSet([(1, 2)]))
    assert [exclusions.excludes(token, text) for token, text in ((1, 'a'), (2, 'b'), (3, 'c'))] == [
        True,
        False,
        False,
    ]
    ownership.replace(TokenSet())
    assert not exclusions.excludes(1, 'a') and not len(exclusions)


def test_tokens_of_queue_groups_are_known_to_the_nodes_own_process_alone() -> None:
    ownership = Ownership(8)
    token = 2 * GROUP_SPAN + 5
    ownership.replace(TokenSet([(3, 4), (token, token + 2)]))
    ownership.extend(10.0)
    assert ownership.may_claim(token, 5.0) and not ownership.may_claim(token + 2, 5.0)
    assert not ownership.may_claim(token, 10.0)
    assert not in_child(lambda: ownership.may_claim(token, 5.0))
    assert in_child(lambda: ownership.may_claim(3, 5.0) and ownership.tokens == TokenSet([(3, 4)]))
    ownership.replace(TokenSet([(3, 4)]))
    assert not ownership.may_claim(token, 5.0)


def test_what_is_excluded_is_of_the_plain_jobs_tokens_whatever_happens_in_groups() -> None:
    ownership = Ownership(8)
    exclusions = ownership.exclusions
    ownership.replace(TokenSet([(3, 4), (GROUP_SPAN, GROUP_SPAN + 8)]))
    ownership.exclude(((3, 4),), exclusions.keys_of([(3, 'a')]))
    ownership.replace(TokenSet([(3, 4)]))
    assert exclusions.excludes(3, 'a')
    ownership.replace(TokenSet([(GROUP_SPAN, GROUP_SPAN + 8)]))
    assert not exclusions.excludes(3, 'a') and not len(exclusions)


def test_children_of_a_node_that_leaves_claim_nothing() -> None:
    ownership = Ownership(8)
    ownership.replace(TokenSet([(0, 8)]))
    ownership.extend(10.0)
    assert in_child(lambda: ownership.may_claim(3, 5.0))
    ownership.close()
    assert not in_child(lambda: ownership.may_claim(3, 5.0))
    assert ownership.may_claim(3, 5.0), 'the node itself still leads, and gives its tokens away'


def test_a_child_that_outlives_the_node_may_claim_nothing() -> None:
    """I1: others may take the tokens of a process that is known dead at once, whatever its lease
    says.
    """
    answers = os.pipe()
    go = os.pipe()
    node = os.fork()
    if not node:
        ownership = Ownership(8)
        ownership.replace(TokenSet([(0, 8)]))
        ownership.extend(10.0)
        owner = os.getpid()
        if not os.fork():
            os.write(answers[1], b'y' if ownership.may_claim(3, 5.0) else b'n')
            os.read(go[0], 1)
            while os.getppid() == owner:
                os.sched_yield()
            os.write(answers[1], b'y' if ownership.may_claim(3, 5.0) else b'n')
            os._exit(0)
        os.read(answers[0], 0)
        signal.pause()
    assert os.read(answers[0], 1) == b'y'
    os.kill(node, signal.SIGKILL)
    os.waitpid(node, 0)
    os.write(go[1], b'x')
    assert os.read(answers[0], 1) == b'n'
    for end in (*go, *answers):
        os.close(end)
