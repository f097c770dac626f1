"""FakeJob and MemoryLedger, without a database."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jobsync_core import (
    ClaimLost,
    ConfigurationError,
    CoordinationConfig,
    DuplicateExecution,
    ExecutionRunning,
    Fenced,
    InvalidTaskId,
    Job,
    NotEntered,
    RebalanceEvent,
    Task,
    TokenSet,
    current_execution,
    exactly_once,
)
from jobsync_core.assignment.hashing import task_to_token
from jobsync_core.testing import FakeJob, MemoryLedger, standing_in
from jobsync_core.worker.node_of_tests import node_of_tests

from ..support import attempts as by_hand

ROOT = Path(__file__).parents[2]


class TestOwnership:
    def test_it_owns_everything_unless_told_otherwise(self) -> None:
        with FakeJob() as job:
            assert all(job.can_claim_task(number) for number in range(100))
            assert job.asked == list(range(100))
            assert len(job.my_tokens) == 1_000_000

    def test_it_owns_what_the_test_says(self) -> None:
        with FakeJob(owned=['a', Task('b')]) as job:
            assert [job.can_claim_task(name) for name in 'abc'] == [True, True, False]
            assert [job.owns(name) for name in 'abc'] == [True, True, False]
            assert [job.owner_of(name) for name in 'abc'] == ['test-node', 'test-node', None]
            job.own('c')
            job.lose('a')
            assert [job.can_claim_task(Task(name)) for name in 'abc'] == [False, True, True]
            job.lose()
            assert not any(job.can_claim_task(name) for name in 'abc')
            job.own()
            assert all(job.can_claim_task(name) for name in 'abc')

    def test_tokens_are_those_of_a_real_cluster(self) -> None:
        config = CoordinationConfig(total_tokens=64, hash_function='md5')
        with FakeJob('n', config, owned=['x']) as job:
            assert job.task_to_token('x') == task_to_token('x', 64, 'md5')
            assert job.my_tokens == TokenSet.of([job.task_to_token('x')])
            sharing = [
                number
                for number in range(500)
                if job.task_to_token(number) == job.task_to_token('x')
            ]
            assert sharing and all(job.can_claim_task(number) for number in sharing)

    def test_without_a_lease_nothing_is_claimed(self) -> None:
        with FakeJob() as job:
            assert job.am_i_healthy() and job.am_i_leader()
            job.healthy = False
            assert (
                not job.can_claim_task('a')
                and not job.owns('a')
                and not job.am_i_healthy()
                and not job.am_i_leader()
            )
            assert job.my_tokens == TokenSet() and not job.has_lease
            assert job.local_status()['healthy'] is False
            job.healthy = True
            assert job.can_claim_task('a') and job.has_lease

    def test_leadership_is_what_the_test_says(self) -> None:
        with FakeJob() as job:
            job.leader = False
            assert not job.am_i_leader() and job.am_i_healthy()

    def test_bad_ids_are_refused_as_in_a_job(self) -> None:
        with FakeJob() as job:
            for bad in (None, ['list'], 'nul\0'):
                with pytest.raises(InvalidTaskId):
                    job.can_claim_task(bad)  # type: ignore[arg-type]

    def test_draining_gives_everything_away_until_undrain(self) -> None:
        with FakeJob(owned=['a']) as job:
            assert job.drain() and not job.can_claim_task('a')
            assert job.local_status()['state'] == 'draining'
            job.undrain()
            assert job.can_claim_task('a') and not job.can_claim_task('b')


class TestCallbacks:
    def test_they_hear_of_each_change_in_order(self) -> None:
        heard: list[Any] = []
        with FakeJob(owned=['a'], on_rebalance=heard.append, on_release=heard.append) as job:
            job.own('b', 'c')
            assert heard[0] == RebalanceEvent(True, 1, 1, 0)
            job.lose('a')
            job.lose('a')  # nothing changes
            gone = TokenSet.of([job.task_to_token('a')])
            assert heard[1:] == [
                RebalanceEvent(False, 2, 2, 0),
                gone,
                RebalanceEvent(False, 3, 0, 1),
            ]

    def test_the_first_one_comes_when_the_name_is_bound_and_before_whatever_is_done_with_it(
        self,
    ) -> None:
        def enter() -> None:
            heard: list[int] = []
            with FakeJob(owned=['a'], on_rebalance=lambda: heard.append(len(job.my_tokens))) as job:
                assert job.can_claim_task('a')
                assert heard == [1]

        for _ in range(50):
            enter()

    def test_what_the_first_one_raises_is_raised_by_what_is_done_next_or_by_the_end_of_the_block(
        self,
    ) -> None:
        def fail() -> None:
            raise ValueError('from the callback')

        with FakeJob(owned=['a'], on_rebalance=fail) as job:
            with pytest.raises(ValueError, match='from the callback'):
                job.can_claim_task('a')
            assert job.can_claim_task('a'), 'it is said once'
        with pytest.raises(ValueError, match='from the callback'), FakeJob(on_rebalance=fail):
            pass
        with FakeJob() as after:
            assert after.can_claim_task('a'), 'nothing is left behind'

    def test_a_release_is_told_before_the_token_is_gone(self) -> None:
        seen: list[bool] = []
        with FakeJob(on_release=lambda tokens: seen.append(job.owns('a'))) as job:
            job.lose('a')
        assert seen == [True]

    def test_a_callback_may_take_no_argument_and_its_error_is_the_tests(self) -> None:
        heard: list[str] = []

        def fail(tokens: TokenSet) -> None:
            raise ValueError('from the callback')

        with FakeJob(on_rebalance=lambda: heard.append('called'), on_release=fail) as job:
            assert job.can_claim_task('a') and heard == ['called']
            with pytest.raises(ValueError, match='from the callback'):
                job.lose('a')

    def test_waiting_sees_what_the_test_changes(self) -> None:
        with FakeJob(owned=[]) as job:
            assert not job.wait_until(lambda: job.owns('a'), 0)
            thread = threading.Thread(target=job.own, args=('a',))
            thread.start()
            assert job.wait_until(lambda: job.owns('a'), 10)
            thread.join()


class TestRecords:
    def test_what_is_claimed_added_and_audited(self) -> None:
        with FakeJob() as job:
            job.add_task(Task(1, 'one'))
            job.set_claim(['a', 'b'])
            job.set_claim('word')
            assert (job.claimed, job.added, job.audited) == ([1, 'a', 'b', 'word'], [1], [])
            job.write_audit()
            assert (job.added, job.get_audit()) == ([], [{'node': 'test-node', 'task_id': '1'}])
            job.add_task(2)
        assert job.audited == [1, 2]

    def test_what_was_not_finished_is_not_audited(self) -> None:
        with contextlib.suppress(ZeroDivisionError), FakeJob() as job:
            job.add_task(1)
            job.add_task(2)
            raise ZeroDivisionError
        assert job.audited == [1]

    def test_another_nodes_task_is_refused(self) -> None:
        with FakeJob(owned=['a', 'c']) as job:
            with pytest.raises(ClaimLost, match="does not own 'b'"):
                job.add_task('b')
            with pytest.raises(ClaimLost):
                job.set_claim(['a', 'b', 'c'])
            assert (job.claimed, job.added) == (['a', 'c'], [])

    def test_locks(self) -> None:
        def provide(job: Job) -> None:
            job.register_lock('t', ['gpu-1', '%'], 'why', 2)

        with FakeJob(lock_provider=provide) as job:
            assert job.locks == {'t': ['gpu-1', '%']}
            (lock,) = job.list_locks()
            assert lock['expires_at'] is not None and lock['expires_at'] > lock['created_at']
            with pytest.raises(ConfigurationError):
                job.register_locks_bulk([('t',)])
            assert job.clear_locks_by_creator('somebody') == 0
            assert job.clear_locks_by_creator('test-node') == 1 and job.list_locks() == []


class TestLife:
    def test_outside_of_its_block_it_is_as_strict_as_a_job(self) -> None:
        job = FakeJob()
        for call in (
            lambda: job.can_claim_task('a'),
            lambda: job.add_task('a'),
            lambda: job.once('a'),
        ):
            with pytest.raises(NotEntered):
                call()
        with job:
            pass
        with pytest.raises(NotEntered):
            job.can_claim_task('a')
        with pytest.raises(NotEntered), job:
            pass

    def test_it_stands_in_for_as_long_as_it_is_entered(self) -> None:
        assert node_of_tests() is None
        with contextlib.suppress(ZeroDivisionError), FakeJob() as job:
            assert node_of_tests() is job
            raise ZeroDivisionError
        assert node_of_tests() is None

    def test_only_one_stands_in(self) -> None:
        with FakeJob('first') as first:
            with pytest.raises(ConfigurationError, match="'first'"), FakeJob('second'):
                pass
            with (
                Job('single') as single,
                pytest.raises(ConfigurationError, match="'first'"),
                standing_in(single),
            ):
                pass
            assert node_of_tests() is first

    def test_a_job_in_single_node_mode_can_stand_in(self) -> None:
        with Job('single') as job, standing_in(job):
            assert node_of_tests() is job
            assert charge(1) == charge(1) == 1
        assert node_of_tests() is None

    def test_an_error_while_entering_leaves_nothing_behind(self) -> None:
        def fail(job: Job) -> None:
            raise ValueError('no locks')

        with pytest.raises(ValueError, match='no locks'), FakeJob(lock_provider=fail):
            pass
        assert node_of_tests() is None
        with pytest.raises(NotEntered):
            charge(1)

    def test_it_takes_the_place_of_the_class(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(globals(), 'Job', FakeJob)
        with Job(
            'worker-01', CoordinationConfig(minimum_nodes=3), wait_on_enter=120, weight=2.0
        ) as job:
            assert job.can_claim_task(1) and job.node_name == 'worker-01'

    def test_every_method_of_a_job_works(self) -> None:
        # Those that are for a cluster alone, or are called above.
        apart = {'session', 'drain'}
        arguments: dict[str, tuple[Any, ...]] = {
            'can_claim_task': ('a',),
            'owns': ('a',),
            'add_task': ('a',),
            'set_claim': ('a',),
            'once': ('a',),
            'task_to_token': ('a',),
            'token_of': ('a', 'fast'),
            'enroll': (['fast'],),
            'holds': ('fast',),
            'owner_of': ('a',),
            'explain': ('a',),
            'release_child': (1,),
            'abandon': ('mark',),
            'wait_until': (lambda: True, 1),
            'register_lock': ('a', '%'),
            'register_locks_bulk': ([('a', '%', None)],),
            'clear_locks_by_creator': ('x',),
        }
        with FakeJob() as job:
            for name in dir(Job):
                if not name.startswith('_') and name not in apart:
                    found = getattr(job, name)
                    if callable(found):
                        found(*arguments.get(name, ()))


@exactly_once(key='order:{order_id}', scope='', on_duplicate='result')
def charge(order_id: int, fail: bool = False) -> int:
    if fail:
        raise ValueError('declined')
    return order_id


class TestLedger:
    def test_a_key_completes_once(self) -> None:
        calls = []

        @exactly_once(key='{n}', scope='f', on_duplicate='result')
        def function(n: int) -> Any:
            calls.append(n)
            return n, 'x'

        with FakeJob() as job:
            assert function(1) == (1, 'x')
            assert function(1) == (1, 'x')
            assert calls == [1]
            assert job.ledger.completed == {'f:1': (1, 'x')}
            job.ledger.forget('f:1')
            assert function(1) == (1, 'x')
            assert calls == [1, 1]

    def test_a_failure_may_be_tried_again(self) -> None:
        with FakeJob() as job:
            with pytest.raises(ValueError):
                charge(1, fail=True)
            assert job.ledger.failed == {'order:1': 'ValueError: declined'}
            assert charge(1) == 1
            assert (
                job.ledger.failed,
                job.ledger.attempts('order:1'),
                job.ledger.attempts('order:2'),
            ) == ({}, 2, 0)

    def test_another_node_is_at_it_or_was(self) -> None:
        with FakeJob() as job:
            job.ledger.hold('order:1')
            assert job.ledger.running == ['order:1']
            with pytest.raises(ExecutionRunning):
                charge(1)
            job.ledger.complete('order:1', {'by': 'another'})
            assert charge(1) == {'by': 'another'}  # type: ignore[comparison-overlap]
            with pytest.raises(DuplicateExecution) as caught, job.once('order:1'):
                pass
            assert (caught.value.key, caught.value.result) == ('order:1', {'by': 'another'})

    def test_an_attempt_that_was_taken_over_is_fenced(self) -> None:
        with FakeJob() as job:
            with pytest.raises(Fenced), job.once('k') as execution:
                job.ledger.take_over('k')
            assert not execution.completed
            assert job.ledger.running == ['k']
            job.ledger.forget()
            with contextlib.suppress(ZeroDivisionError), job.once('k'):
                job.ledger.take_over('k')
                raise ZeroDivisionError
            assert (job.ledger.running, job.ledger.failed) == (['k'], {})

    def test_the_transactional_forms(self) -> None:
        class Cursor:
            def execute(self, *statement: object) -> None:
                raise AssertionError(statement)

        with FakeJob() as job:
            with job.once('k') as execution:
                assert current_execution() is execution
                execution.complete(Cursor(), result=7)
            assert job.ledger.completed == {'k': 7}
            with (
                pytest.raises(ConfigurationError, match='jobsync_node'),
                job.once('t') as execution,
                execution.transaction(),
            ):
                pass
            assert job.ledger.attempts('t') == 1 and 't' in job.ledger.failed

    def test_it_refuses_keys_that_the_real_one_refuses(self) -> None:
        with pytest.raises(ConfigurationError):
            by_hand.begin(MemoryLedger(), '', 60)

    def test_coroutines(self) -> None:
        @exactly_once(key='{n}', scope='a', on_duplicate='result')
        async def function(n: int) -> int:
            await asyncio.sleep(0)
            return n

        async def twice() -> list[int]:
            return [await function(1), await function(1)]

        with FakeJob() as job:
            assert asyncio.run(twice()) == [1, 1]
            assert job.ledger.attempts('a:1') == 1

    def test_of_many_threads_one_runs(self) -> None:
        barrier = threading.Barrier(8)
        found: list[str] = []

        def attempt() -> None:
            barrier.wait()
            try:
                with job.once('k'):
                    found.append('ran')
            except (ExecutionRunning, DuplicateExecution):
                found.append('refused')

        with FakeJob() as job:
            threads = [threading.Thread(target=attempt) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert sorted(found) == ['ran'] + ['refused'] * 7


class TestWithoutPytest:
    def test_the_classes_are_there(self) -> None:
        program = (
            'import sys\n'
            "sys.modules['pytest'] = None\n"
            'import jobsync_core.testing as testing\n'
            'with testing.FakeJob() as job: assert job.can_claim_task(1)\n'
            'print(sorted(testing.__all__))\n'
        )
        done = subprocess.run(
            [sys.executable, '-W', 'error', '-c', program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (
            0,
            "['Cluster', 'FakeJob', 'MemoryLedger', 'standing_in']\n",
        )

    def test_the_core_does_not_import_them(self) -> None:
        program = (
            'import sys, jobsync_core, jobsync_core.worker.settings; print([n for n in '
            "sys.modules if 'pytest' in n or 'testing' in n])"
        )
        done = subprocess.run(
            [sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        assert done.stdout == '[]\n'
