"""What has been handed to the pool and waits there for a process or a thread: it goes on to its
owner when the key is given away, and holds up no hand-over meanwhile.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError
from celery.worker import state

from jobsync_celery.gate.gate import ConsumerGate
from jobsync_celery.gate.pool_entry import PoolEntry
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.worker.owners import Place

from .consumers import Bench, Message, Request, bench
from .test_gate import leased_consumer


class Slots(Bench):
    """A pool all of whose processes are busy until `free` is called."""

    waiting: deque[Any]

    def _process_task_sem(self, request: Any) -> None:
        self.waiting.append(request)

    def free(self) -> list[str]:
        """A process is free: the next request is handed to it."""
        self.log.clear()
        if self.waiting:
            self._process_task(self.waiting.popleft())
        return self.log

    def give_away(self) -> None:
        """The key goes to another node."""
        self.job.mine.clear()
        self.owners.places['mine'] = Place('n2', 'q2')

    def busy(self) -> bool:
        return self.gate.busy(TokenSet([(0, 10**9)]))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slots]:
    monkeypatch.setattr('tests.celery.consumers.Bench', Slots)
    Slots.waiting = deque()
    with bench(monkeypatch, slots=True) as made:
        assert isinstance(made, Slots)
        monkeypatch.setattr(made.consumer, 'call_soon', lambda call, *args: call(*args))
        monkeypatch.setattr(made.job, 'task_to_token', lambda route: 1, raising=False)
        yield made
        state.reserved_requests.clear()


def wait_for_a_slot(stage: Slots) -> None:
    message = Message('mine')
    assert stage.receive(message) == ['run']
    stage.log.clear()
    request = stage.request = Request(stage, message)
    state.reserved_requests.add(request)
    stage.consumer.on_task_request(request)
    assert stage.log == [] and len(stage.waiting) == 1


def check_not_begun_at_the_slot(stage: Slots) -> None:
    wait_for_a_slot(stage)
    stage.give_away()
    assert stage.free() == ['send q2 hops=1', 'ack'], 'no process begins it'


def check_recalled(stage: Slots) -> None:
    wait_for_a_slot(stage)
    stage.give_away()
    stage.gate.recall()
    assert stage.log == ['send q2 hops=1', 'ack'], 'no process is free'
    assert stage.free() == []


class TestProcesses:
    def test_what_waits_goes_on_to_its_owner_published_before_it_is_acknowledged(
        self, stage: Slots
    ) -> None:
        check_recalled(stage)
        assert stage.counts['run'] == 0

    def test_what_was_given_away_is_not_begun_when_its_turn_comes(self, stage: Slots) -> None:
        check_not_begun_at_the_slot(stage)

    def test_what_is_mine_still_stays_in_its_place(self, stage: Slots) -> None:
        wait_for_a_slot(stage)
        stage.gate.recall()
        assert stage.log == [] and stage.free() == ['pool']

    def test_what_waits_holds_up_no_hand_over_and_what_has_begun_does(self, stage: Slots) -> None:
        wait_for_a_slot(stage)
        assert not stage.busy()
        assert stage.free() == ['pool'] and stage.busy()
        stage.give_away()
        stage.gate.recall()
        assert stage.log == ['pool'], 'it runs'

    def test_without_a_lease_it_goes_back_at_once(self, stage: Slots) -> None:
        wait_for_a_slot(stage)
        stage.job.mine.clear()
        stage.job.leased = False
        stage.gate.requeue_waiting()
        assert stage.log == ['requeue'] and stage.free() == []

    def test_what_comes_late_while_there_is_no_lease_goes_back_too(self, stage: Slots) -> None:
        stage.consumer.task_consumer = SimpleNamespace(cancel=lambda: None, consume=lambda: None)
        stage.consumer.timer.call_repeatedly = lambda seconds, call: None
        leased = leased_consumer(stage)
        leased.connected()
        stage.job.leased = False
        leased.follow()
        stage.job.leased = True
        wait_for_a_slot(stage)
        stage.job.mine.clear()
        stage.job.leased = False
        assert stage.free() == [], 'it waits in memory'
        leased.follow()
        assert stage.log == ['requeue']

    def test_a_hand_over_may_ask_while_the_event_loop_hands_more_to_the_pool(
        self, stage: Slots
    ) -> None:
        wait_for_a_slot(stage)
        stage.free()
        ended = threading.Event()
        before = sys.getswitchinterval()

        def hand_over_more() -> None:
            while not ended.is_set():
                message = Message('mine')
                stage.receive(message)
                stage.consumer.on_task_request(Request(stage, message))
                if len(stage.waiting) > 200:
                    stage.waiting.popleft()

        loop = threading.Thread(target=hand_over_more)
        sys.setswitchinterval(1e-5)
        loop.start()
        try:
            assert all(stage.busy() for _ in range(500))
        finally:
            sys.setswitchinterval(before)
            ended.set()
            loop.join()

    def test_what_cannot_be_sent_waits_and_runs_here_once_if_the_key_comes_back(
        self, stage: Slots
    ) -> None:
        wait_for_a_slot(stage)
        stage.give_away()
        stage.publish_error = ConnectionError('the broker is away')
        stage.gate.recall()
        assert stage.log == [] and stage.gate.waiting == 1
        stage.job.mine.add('mine')
        stage.look(2.0)
        assert len(stage.waiting) == 2, 'the old place in the line, and the new one'
        assert stage.free() == [] and stage.free() == ['pool'] and stage.free() == []


@pytest.fixture
def threads(stage: Slots) -> Slots:
    stage.pool = SimpleNamespace(executor=None)
    return stage


class TestThreads:
    def test_what_no_thread_has_begun_goes_on_and_is_not_begun(self, threads: Slots) -> None:
        wait_for_a_slot(threads)
        assert threads.free() == ['pool']
        begin = threads.request.on_accepted  # which the executor has in its line
        assert not threads.busy()
        threads.give_away()
        threads.gate.recall()
        assert threads.log == ['pool', 'send q2 hops=1', 'ack']
        with pytest.raises(TaskRevokedError):
            begin(1, 0.0)
        assert 'accepted' not in threads.log

    def test_a_thread_looks_before_it_begins(self, threads: Slots) -> None:
        wait_for_a_slot(threads)
        threads.free()
        threads.give_away()
        with pytest.raises(TaskRevokedError):
            threads.request.on_accepted(1, 0.0)
        assert threads.log == ['pool', 'send q2 hops=1', 'ack']

    def test_what_a_thread_has_begun_stays(self, threads: Slots) -> None:
        wait_for_a_slot(threads)
        threads.free()
        threads.request.on_accepted(1, 0.0)
        assert threads.busy()
        threads.give_away()
        threads.gate.recall()
        assert threads.log == ['pool', 'accepted']


def without_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoolEntry, '_begins', lambda self, request: True)


def without_withdrawal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConsumerGate, 'recall', lambda self: None)


@pytest.mark.parametrize(
    ('remove', 'check'),
    [(without_look, check_not_begun_at_the_slot), (without_withdrawal, check_recalled)],
)
def test_without_the_fence_the_check_fails(
    monkeypatch: pytest.MonkeyPatch,
    stage: Slots,
    remove: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Slots], None],
) -> None:
    remove(monkeypatch)
    with pytest.raises(AssertionError):
        check(stage)
