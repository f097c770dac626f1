"""Promises: what a node has said yes to goes along when the token is handed over."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, Task, clock
from jobsync_core.agent import task_claims
from jobsync_core.agent.task_claims import TaskClaims
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.errors import ClaimLost, InvalidTaskId
from jobsync_core.protocol.ownership import Ownership
from jobsync_core.store.tables import Tables
from jobsync_core.store.tasks import TaskStore
from tests.support.waiting import eventually

TOTAL = 64
EVERYTHING = TokenSet([(0, TOTAL)])


def _nothing() -> None:
    pass


class Database:
    """Stands for the claim and audit tables: what `TaskClaims` asks of TaskStore."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused: set[str] = set()
        self.audited: list[str] = []
        self.promised: set[str] = set()
        #: What happens meanwhile, and what claims are answered if not what stands to reason.
        self.while_claiming = self.before_audit = self.after_audit = _nothing
        self.answers: Iterator[list[str]] | None = None
        for name in ('claim', 'audit', 'release_promise', 'read_epoch'):
            monkeypatch.setattr(TaskStore, name, getattr(self, name))

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        yield None

    def claim(
        self,
        node: str,
        incarnation: str,
        date: object,
        rows: list[tuple[str, int]],
        child: int | None,
    ) -> list[str]:
        self.while_claiming()
        if self.answers is not None:
            return next(self.answers)
        return [text for text, _ in rows if text not in self.refused]

    def read_epoch(self) -> int:
        return 7

    def audit(self, node: str, date: object, rows: list[tuple[str, int]], epoch: int) -> None:
        assert epoch == 7
        self.before_audit()
        self.audited += [text for text, _ in rows]
        self.after_audit()

    def release_promise(self, node: str, incarnation: str, date: object, text: str) -> bool:
        found = text in self.promised
        self.promised.discard(text)
        return found


class Node:
    """Task claims with everything it needs, and a lease."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(clock, 'now', lambda: self.now)
        self.database = Database(monkeypatch)
        self.ownership = Ownership(TOTAL)
        self.ownership.replace(EVERYTHING)
        self.ownership.extend(self.now + 10)
        self.incarnation = 'first'
        sessions: Any = self.database
        self.tasks = TaskClaims(
            self.ownership,
            sessions,
            CoordinationConfig(total_tokens=TOTAL),
            Tables('sync_'),
            'a',
            datetime.date(2026, 1, 2),
            lambda: self.incarnation,
        )


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(monkeypatch)


def test_a_yes_is_a_promise_that_goes_along_with_the_token(node: Node) -> None:
    assert node.tasks.can_claim(Task('x'))
    node.ownership.replace(TokenSet())
    assert node.tasks.promises(EVERYTHING) == (('x', node.tasks.token_of('x')),)


def test_a_promise_of_other_tokens_stays(node: Node) -> None:
    token = node.tasks.token_of('x')
    assert node.tasks.can_claim('x')
    assert node.tasks.promises(EVERYTHING - TokenSet.of([token])) == ()


def test_the_next_question_of_the_thread_ends_its_promise(node: Node) -> None:
    assert node.tasks.can_claim('x')
    assert node.tasks.can_claim('y')
    assert [text for text, _ in node.tasks.promises(EVERYTHING)] == ['y']


def test_an_old_promise_is_void(node: Node) -> None:
    assert node.tasks.can_claim('x')
    node.now += CoordinationConfig().heartbeat_timeout_sec + 1
    assert node.tasks.promises(EVERYTHING) == ()


def test_a_promise_whose_token_went_is_taken_back_when_the_thread_asks_again(node: Node) -> None:
    assert node.tasks.can_claim('x')
    node.ownership.replace(TokenSet())
    assert node.tasks.promises(EVERYTHING) == (('x', node.tasks.token_of('x')),)
    node.database.promised.add('x')
    assert not node.tasks.can_claim('x')
    eventually(lambda: not node.database.promised)
    assert node.tasks.promises(EVERYTHING) == ()


def test_a_promise_that_is_not_written_yet_is_taken_back_later(node: Node) -> None:
    assert node.tasks.can_claim('x')
    node.ownership.replace(TokenSet())
    node.tasks.promises(EVERYTHING)
    assert not node.tasks.can_claim('y')
    assert node.tasks.promises(EVERYTHING) == (), 'no hand-over writes it again'
    node.database.promised.add('x')
    eventually(lambda: not node.database.promised)


def test_a_node_that_leaves_takes_nothing_back_any_more(node: Node) -> None:
    assert node.tasks.can_claim('x')
    node.ownership.replace(TokenSet())
    node.tasks.promises(EVERYTHING)
    assert not node.tasks.can_claim('y')
    node.tasks.close()
    eventually(
        lambda: (
            not [thread for thread in threading.enumerate() if thread.name == 'jobsync promises']
        )
    )


def test_a_promise_that_was_recorded_stays(node: Node) -> None:
    assert node.tasks.can_claim('x')
    node.ownership.replace(TokenSet())
    node.tasks.promises(EVERYTHING)
    node.database.promised.add('x')
    node.tasks.add('x')
    assert node.tasks.can_claim('x')
    assert node.database.promised == {'x'}


def test_what_an_earlier_life_took_is_not_this_ones(node: Node) -> None:
    node.tasks.add('x')
    node.ownership.replace(TokenSet())
    assert node.tasks.can_claim('x')
    node.incarnation = 'second'
    assert not node.tasks.can_claim('x')


def test_nothing_is_held_without_a_lease(node: Node) -> None:
    node.tasks.add('x')
    node.ownership.suspend()
    assert not node.tasks.can_claim('x')


def test_a_token_that_goes_between_the_look_and_the_promise_is_refused(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shrink() -> int:
        node.ownership.replace(TokenSet())
        return 1

    monkeypatch.setattr(task_claims, 'get_ident', shrink)
    assert not node.tasks.can_claim('x')


def test_a_task_that_another_node_took_is_refused_though_its_token_is_here(node: Node) -> None:
    token = node.tasks.token_of('x')
    node.ownership.exclude(((token, token + 1),), node.ownership.exclusions.keys_of([(token, 'x')]))
    assert not node.tasks.can_claim('x')
    assert node.tasks.can_claim('y')


def test_a_refused_claim_raises(node: Node) -> None:
    node.database.refused.add('x')
    with pytest.raises(ClaimLost, match="'x'"):
        node.tasks.record(['x', 'y'])


def test_a_promise_is_kept_when_the_claim_met_a_row_that_was_being_rewritten(node: Node) -> None:
    def lose() -> None:
        node.ownership.replace(TokenSet())  # the plan takes the token away at the same moment
        node.tasks.promises(EVERYTHING)

    assert node.tasks.can_claim('x')
    node.database.while_claiming, node.database.answers = lose, iter([[], ['x']])
    node.tasks.add('x')
    assert node.tasks.can_claim('x')


@pytest.mark.parametrize('broken', ['of another task', 'too old', 'never given'])
def test_without_a_promise_a_claim_whose_token_went_is_refused_at_once(
    node: Node, broken: str
) -> None:
    if broken != 'never given':
        assert node.tasks.can_claim('y' if broken == 'of another task' else 'x')
    if broken == 'too old':
        node.now += CoordinationConfig().heartbeat_timeout_sec + 1
    node.ownership.replace(TokenSet())
    node.database.answers = iter([[], ['x']])
    with pytest.raises(ClaimLost, match="'x'"):
        node.tasks.add('x')


def test_an_audited_task_is_done(node: Node) -> None:
    node.tasks.add('x')
    assert node.tasks.audit() == 1
    assert node.database.audited == ['x']
    assert not node.tasks.can_claim('x')
    assert node.tasks.audit() == 0


def test_the_task_in_which_the_block_failed_is_not_audited(node: Node) -> None:
    node.tasks.add('x')
    node.tasks.add('y')
    assert node.tasks.audit(but_last_of=threading.get_ident()) == 1
    assert node.database.audited == ['x']


@pytest.mark.parametrize('bad', [None, [1], {'a': 1}, 'a\0b', '\ud800', 'x' * 3000])
def test_ids_that_cannot_be_stored_are_refused(node: Node, bad: object) -> None:
    with pytest.raises(InvalidTaskId):
        node.tasks.can_claim(bad)


def test_a_forked_child_has_nothing_to_audit_and_has_promised_nothing(node: Node) -> None:
    node.tasks.add('x')
    assert node.tasks.can_claim('y')
    pid = os.fork()
    if not pid:
        status = 1
        try:
            node.tasks.add('z')
            status = (
                0
                if node.tasks.audit() == 1
                and node.database.audited == ['z']
                and not node.tasks.promises(EVERYTHING)
                else 1
            )
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert node.tasks.audit() == 1 and node.database.audited == ['x']
    assert node.tasks.promises(EVERYTHING) == (('y', node.tasks.token_of('y')),)


def test_two_threads_that_audit_at_once_write_each_task_once(node: Node) -> None:
    for text in ('x', 'y', 'z'):
        node.tasks.add(text)
    inside, go_on, counts = threading.Event(), threading.Event(), list[int]()

    def wait() -> None:
        inside.set()
        assert go_on.wait(10)

    node.database.before_audit = wait
    threads = [threading.Thread(target=lambda: counts.append(node.tasks.audit())) for _ in range(2)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    node.tasks.add('w')  # meanwhile
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert sorted(counts) == [1, 3]
    assert node.database.audited == ['x', 'y', 'z', 'w']


def test_a_task_that_is_added_again_while_it_is_audited_harms_no_audit(node: Node) -> None:
    def interrupt() -> None:
        if len(node.database.audited) == 2:
            assert node.tasks.audit() == 2  # as by the handler of a signal

    for text in ('x', 'y'):
        node.tasks.add(text)
    node.database.after_audit = interrupt
    assert node.tasks.audit() == 2
    assert node.tasks.audit() == 0


def test_a_forked_child_keeps_what_it_audited_long_ago_in_little_room_and_still_says_no(
    node: Node,
) -> None:
    def child() -> None:
        numbers = range(500)
        for number in numbers:
            node.tasks.add(number)
        assert node.tasks.audit() == 500
        own = node.tasks._own
        assert len(own.done) == 500
        node.now += CoordinationConfig().heartbeat_timeout_sec + 1
        node.ownership.extend(node.now + 10)
        node.tasks.add('new')
        assert node.tasks.audit() == 1
        assert list(own.done) == ['new']
        assert own.past is not None and len(own.past) == 500
        assert len(node.ownership.exclusions) == 0, 'those are of the main process'
        assert not any(node.tasks.can_claim(number) for number in (*numbers, 'new'))
        assert node.tasks.can_claim('other')

    pid = os.fork()
    if not pid:
        code = 1
        try:
            child()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_closed_book_answers_no(node: Node) -> None:
    node.tasks.add('x')
    node.tasks.close()
    assert not node.tasks.can_claim('x')
    assert not node.tasks.can_claim('y')
