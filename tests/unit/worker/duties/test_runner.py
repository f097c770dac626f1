"""The runner, and the duties that follow lease, plan and mark."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from jobsync_core import JobSyncError, clock
from jobsync_core.worker import registry
from jobsync_core.worker.duties.duty import Every, Moment
from jobsync_core.worker.duties.lease import LeaseWatch
from jobsync_core.worker.duties.mark import BrokerMark
from jobsync_core.worker.duties.plan import PlanWatch
from jobsync_core.worker.duties.runner import Runner
from jobsync_core.worker.registry import restore_former_life
from tests.support.fake_broker import Contents, FakeBroker
from tests.support.fake_registry import FakeRegistry, Time, never
from tests.support.waiting import eventually


class Once:
    """A duty that is due until it has run."""

    def __init__(self, name: str, log: list[str], action: Callable[[], object]) -> None:
        self.name = name
        self._log = log
        self._action = action
        self.stopped: bool | None = None
        self._due = 0.0

    def due(self, moment: Moment) -> float:
        return self._due

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        self._log.append(self.name)
        self._action()
        self.stopped, self._due = stop(), math.inf


class Node:
    """A node, as the runner sees one."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.leased, self.version = True, 1
        self.resets = 0

    def look(self) -> Moment:
        return Moment(clock.now(), self.leased, self.version)

    def duty(self, name: str, action: Callable[[], object] = lambda: None) -> Once:
        return Once(name, self.log, action)

    def runner(self, *duties: Once) -> Runner:
        return Runner(
            'n1',
            duties,
            self.look,
            wait=lambda condition, timeout: None,
            wake=lambda: None,
            reset=self.reset,
        )

    def reset(self) -> None:
        self.resets += 1


def _raise(error: Exception) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


class TestRunner:
    def test_one_that_fails_holds_up_no_other_and_is_not_tried_in_a_loop(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        node = Node()
        runner = node.runner(
            node.duty('first', _raise(ConnectionError('broker away'))),
            node.duty('second', _raise(JobSyncError('database away'))),
            node.duty('third'),
        )
        runner.turn()
        runner.turn()
        assert node.log == ['first', 'second', 'third']
        assert node.resets == 1, 'the broker has nothing to do with what the database says'
        assert 'duty=first failed; it is tried again: ConnectionError: broker away' in caplog.text

    def test_one_that_cannot_say_when_it_is_due_has_failed(self) -> None:
        node = Node()
        broken = node.duty('broken')
        broken.due = _raise(RuntimeError('changed size during iteration'))  # type: ignore[assignment]
        node.runner(broken, node.duty('good')).turn()
        assert node.log == ['good']

    def test_a_long_run_is_told_of_another_plan_and_of_a_lost_lease(self) -> None:
        node = Node()
        plan = node.duty('plan', lambda: setattr(node, 'version', 2))
        lease = node.duty('lease', lambda: setattr(node, 'leased', False))
        quiet = node.duty('quiet')
        runner = node.runner(plan, lease, quiet)
        for _ in range(3):
            runner.turn()
        assert (plan.stopped, lease.stopped, quiet.stopped) == (True, True, False)

    def test_what_follows_a_plan_comes_after_the_one_that_reads_it(self) -> None:
        node = Node()
        read: list[int] = []
        seen: list[tuple[int, int]] = []

        class Reads(Once):
            def due(self, moment: Moment) -> float:
                return 0.0 if read[-1:] != [moment.version] else math.inf

            def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
                read.append(moment.version)

        class Follows(Once):
            def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
                seen.append((moment.version, read[-1]))

        def change() -> None:
            node.version = 2

        reads, follows = (kind('', [], lambda: None) for kind in (Reads, Follows))
        runner = node.runner(reads, node.duty('rescue', change), follows)
        runner.turn()
        runner.turn()
        assert seen == [(2, 2)]

    def test_what_nobody_foresaw_does_not_end_the_thread(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr('jobsync_core.worker.duties.runner._FAILED_SEC', 0.01)
        node = Node()
        looks = iter([TypeError('no list yet')])

        def look() -> Moment:
            for error in looks:
                raise error
            return Moment(clock.now(), node.leased, node.version)

        monkeypatch.setattr(node, 'look', look)
        runner = node.runner(node.duty('any'))
        runner.start()
        eventually(lambda: node.log == ['any'])
        runner.stop(5)
        assert 'no list yet' in caplog.text

    def test_a_runner_that_is_told_to_end_begins_nothing(self) -> None:
        node = Node()
        runner = node.runner(node.duty('any'))
        runner.stop(1)
        runner.turn()
        assert node.log == []


class TestLease:
    def test_what_is_told_is_what_has_changed_and_again_where_it_failed(self) -> None:
        time, told, answers = Time(), list[object](), [ConnectionError()]

        def tell(leased: bool) -> None:
            told.append(leased)
            if leased and answers:
                raise answers.pop()

        watch = LeaseWatch(lambda: told.append('recorded'), tell)
        assert not time.run(watch), 'a node begins with a lease'
        time.leased = False
        assert time.run(watch) and not time.run(watch)
        time.leased = True
        with pytest.raises(ConnectionError):
            time.run(watch)
        assert time.run(watch) and not time.run(watch)
        assert told == [False, 'recorded', True, 'recorded', True]


class TestPlan:
    def test_the_map_is_read_before_the_worker_hears_of_a_plan(self) -> None:
        time, log = Time(), list[str]()
        watch = PlanWatch(lambda: log.append('map'), lambda: log.append('told'))
        assert time.run(watch) and not time.run(watch)
        assert log == ['map', 'told']
        time.leased, time.version = False, 2
        assert not time.run(watch)
        time.leased = True
        assert time.run(watch)

    def test_the_worker_hears_of_it_though_the_map_cannot_be_read(self) -> None:
        time, log = Time(), list[str]()
        watch = PlanWatch(_raise(ValueError()), lambda: log.append('told'))
        with pytest.raises(ValueError):  # ours
            time.run(watch)
        assert log == ['told']


def test_the_mark_is_looked_after_with_a_lease_and_without_one() -> None:
    time, broker, mark = Time(leased=False), FakeBroker(Contents()), ['']
    duty = BrokerMark(lambda: mark[0], broker.mark)
    assert not time.run(duty), 'a broker that has none needs none'
    mark[0] = 'mark-1'
    assert time.run(duty) and not time.run(duty)
    time.now += 5
    assert time.run(duty)
    assert broker.marks == ['mark-1', 'mark-1']


def test_a_call_is_made_once_in_a_while() -> None:
    time, calls = Time(leased=False), list[int]()
    duty = Every('tick', 1.0, lambda: calls.append(1))
    assert time.run(duty) and not time.run(duty)
    time.now += 1
    assert time.run(duty) and len(calls) == 2


class TestFormerLife:
    def restore(self, former: FakeRegistry, time: Time, closing: Callable[[], bool]) -> int:
        def wait(condition: Callable[[], bool], seconds: float) -> None:
            time.now += seconds

        self.broker = FakeBroker(Contents())
        return restore_former_life(former, self.broker, 'n1', wait=wait, closing=closing, now=time)

    def test_it_is_restored(self) -> None:
        self.restore(FakeRegistry(), Time(), never)
        assert self.broker.restored == ['n1']

    def test_a_new_life_does_not_wait_for_ever(self) -> None:
        time = Time()
        with pytest.raises(JobSyncError, match="earlier life of 'n1'"):
            self.restore(FakeRegistry(busy={'n1'}), time, never)
        assert time.now >= 1000 + registry._FORMER_SEC

    def test_a_worker_that_is_told_to_stop_does(self) -> None:
        assert self.restore(FakeRegistry(busy={'n1'}), Time(), lambda: True) == 0
        assert self.broker.restored == []
