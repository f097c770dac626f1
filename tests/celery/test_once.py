"""`exactly_once` in a worker's place: what Celery is told of duplicates, of running keys, and where there is no worker."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, Task, signals, states
from celery._state import _task_stack
from celery.exceptions import Ignore

from jobsync_celery import JobSync, exactly_once
from jobsync_celery.once import COME_BACK_SEC
from jobsync_core.config import CoordinationConfig
from jobsync_core.current_ledger import set_current_ledger
from jobsync_core.errors import ClaimLost, DatabaseUnavailable, DuplicateExecution, ExecutionRunning, Fenced, JobSyncError, NotEntered

from ..fakes import FakeLedger, duplicate

OPTIONS = {'args': [3], 'kwargs': {}, 'called_directly': False, 'is_eager': False, 'delivery_info': {}, 'retries': 2}


@pytest.fixture
def ledger() -> Iterator[FakeLedger]:
    made = FakeLedger()
    set_current_ledger(made)
    yield made
    set_current_ledger(None)


@pytest.fixture
def app() -> Iterator[Celery]:
    made = Celery('once', broker='memory://', backend='cache+memory://', set_as_current=False)
    plugin = JobSync(made, config=CoordinationConfig(), route_producers=False)
    yield made
    signals.before_task_publish.disconnect(plugin._before_publish)


@pytest.fixture
def published(app: Celery) -> Iterator[list[dict[str, Any]]]:
    """Headers of what is published."""
    found: list[dict[str, Any]] = []

    def note(headers: dict[str, Any], **_: Any) -> None:
        found.append(headers)

    signals.before_task_publish.connect(note)
    yield found
    signals.before_task_publish.disconnect(note)


def double(n: int) -> int:
    return 2 * n


def task_of(app: Celery, **options: Any) -> Any:
    return app.task(name='double', shared=False)(exactly_once(key='d:{n}', scope='', **options)(double))


def in_worker(task: Any, **request: Any) -> Any:
    """Run a task as the tracer does."""
    task.push_request(**{**OPTIONS, 'id': 'm1', **request})
    _task_stack.push(task)
    try:
        return task.run(3)
    finally:
        _task_stack.pop()
        task.pop_request()


def check_duplicate_rule(app: Celery, ledger: FakeLedger) -> None:
    """The same message again, which had succeeded: its link went out already."""
    ledger.begin_error = duplicate()
    task = task_of(app)
    app.backend.store_result('m1', 6, states.SUCCESS)
    with pytest.raises(Ignore):
        in_worker(task, callbacks=[task.s(3)])


class TestDuplicates:
    @pytest.mark.parametrize('follows', ['callbacks', 'chain', 'chord', 'group'])
    def test_the_same_message_again_whose_link_went_out_is_ignored(self, app: Celery, ledger: FakeLedger, follows: str) -> None:
        ledger.begin_error = duplicate()
        task = task_of(app)
        app.backend.store_result('m1', 6, states.SUCCESS)
        with pytest.raises(Ignore):
            in_worker(task, **{follows: 'g1' if follows == 'group' else [task.s(3)]})

    def test_the_check_of_the_fences_holds(self, app: Celery, ledger: FakeLedger) -> None:
        check_duplicate_rule(app, ledger)

    @pytest.mark.parametrize('state', [states.PENDING, states.STARTED, states.RETRY, states.FAILURE])
    def test_the_same_message_whose_success_is_not_known_replays_its_result(
        self, app: Celery, ledger: FakeLedger, state: str,
    ) -> None:
        ledger.begin_error = duplicate()
        task = task_of(app)
        if state != states.PENDING:
            app.backend.store_result(state, ValueError() if state in (states.FAILURE, states.RETRY) else None, state)
        # An id of its own: the backend in memory is shared.
        assert in_worker(task, id=state, callbacks=[task.s(3)]) == 6

    def test_another_message_with_the_key_replays_the_result(self, app: Celery, ledger: FakeLedger) -> None:
        ledger.begin_error = duplicate()
        task = task_of(app)
        app.backend.store_result('m1', 6, states.SUCCESS)
        assert in_worker(task, id='m2', callbacks=[task.s(3)]) == 6

    def test_without_a_link_the_result_is_replayed(self, app: Celery, ledger: FakeLedger) -> None:
        ledger.begin_error = duplicate()
        app.backend.store_result('m1', 6, states.SUCCESS)
        assert in_worker(task_of(app)) == 6

    def test_a_backend_that_fails_does_not_hinder_the_replay(
        self, app: Celery, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def broken(task_id: str) -> str:
            raise ConnectionError('backend away')

        ledger.begin_error = duplicate()
        task = task_of(app)
        monkeypatch.setattr(app.backend, 'get_state', broken)
        assert in_worker(task, callbacks=[task.s(3)]) == 6

    def test_it_may_be_skipped_or_raised(self, app: Celery, ledger: FakeLedger) -> None:
        ledger.begin_error = duplicate()
        assert in_worker(task_of(app, on_duplicate='skip')) is None
        app.tasks.pop('double')
        with pytest.raises(DuplicateExecution):
            in_worker(task_of(app, on_duplicate='raise'))


class TestComeBack:
    @pytest.mark.parametrize('error', [ExecutionRunning, ClaimLost, DatabaseUnavailable])
    def test_a_copy_is_published_before_the_message_is_ignored(
        self, app: Celery, ledger: FakeLedger, published: list[dict[str, Any]], error: type[JobSyncError],
    ) -> None:
        ledger.begin_error = error()
        with pytest.raises(Ignore):
            in_worker(task_of(app))
        (headers,) = published
        assert (headers['id'], headers['task'], headers['retries'], headers['eta'] is not None) == ('m1', 'double', 2, True)
        assert COME_BACK_SEC == 1.0

    @pytest.mark.parametrize('error', [DatabaseUnavailable, Fenced])
    def test_a_completion_that_is_not_known_to_be_recorded_comes_back(
        self, app: Celery, ledger: FakeLedger, published: list[dict[str, Any]], error: type[JobSyncError],
    ) -> None:
        ledger.finish_error = error()
        with pytest.raises(Ignore):
            in_worker(task_of(app))
        assert [headers['id'] for headers in published] == ['m1']

    @pytest.mark.parametrize('error', [DatabaseUnavailable, Fenced])
    def test_a_transaction_of_the_ledger_that_fails_in_the_body_is_no_failure_of_the_task(
        self, app: Celery, ledger: FakeLedger, published: list[dict[str, Any]], error: type[JobSyncError],
    ) -> None:
        def body(n: int) -> int:
            raise error()

        task = app.task(name='body', shared=False)(exactly_once(key='d:{n}', scope='')(body))
        with pytest.raises(Ignore):
            in_worker(task)
        assert [headers['id'] for headers in published] == ['m1']

    def test_where_the_copy_cannot_be_published_the_message_is_not_ignored(
        self, app: Celery, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise ConnectionError('broker away')

        ledger.begin_error = ExecutionRunning()
        task = task_of(app)
        monkeypatch.setattr(Task, 'apply_async', broken)
        with pytest.raises(ConnectionError):
            in_worker(task)

    def test_a_running_key_may_be_skipped_or_raised(
        self, app: Celery, ledger: FakeLedger, published: list[dict[str, Any]],
    ) -> None:
        ledger.begin_error = ExecutionRunning()
        assert in_worker(task_of(app, on_running='skip')) is None
        app.tasks.pop('double')
        with pytest.raises(ExecutionRunning):
            in_worker(task_of(app, on_running='raise'))
        assert published == []


class TestWithoutWorker:
    """No Job: eager tasks run; direct calls say what is missing."""

    def test_eager_tasks_run(self, app: Celery) -> None:
        app.conf.task_always_eager = True
        assert task_of(app).delay(3).get() == 6

    def test_apply_runs(self, app: Celery) -> None:
        assert task_of(app).apply((3,)).get() == 6

    def test_by_id_too(self, app: Celery) -> None:
        task = app.task(name='by_id', shared=False)(exactly_once()(double))
        assert task.apply((3,)).get() == 6

    def test_a_direct_call_needs_a_job(self, app: Celery) -> None:
        with pytest.raises(NotEntered):
            task_of(app)(3)

    @pytest.mark.parametrize(('options', 'error', 'expected'), [
        ({}, duplicate, 6), ({'on_duplicate': 'skip'}, duplicate, None), ({'on_running': 'skip'}, ExecutionRunning, None),
        ({'on_duplicate': 'raise'}, duplicate, DuplicateExecution), ({}, ExecutionRunning, ExecutionRunning)])
    def test_a_direct_call_gets_what_the_options_say(
        self, app: Celery, ledger: FakeLedger, published: list[dict[str, Any]], options: dict[str, Any],
        error: Callable[[], JobSyncError], expected: Any,
    ) -> None:
        ledger.begin_error = error()
        if isinstance(expected, type):
            with pytest.raises(expected):
                task_of(app, **options)(3)
        else:
            assert task_of(app, **options)(3) == expected
        assert published == []


class TestKinds:
    def test_a_bound_task(self, app: Celery, ledger: FakeLedger) -> None:
        def bound(self: Any, n: int) -> tuple[str, int]:
            return self.request.id, n

        task = app.task(name='bound', shared=False, bind=True)(exactly_once(key='b:{n}', scope='')(bound))
        assert in_worker(task) == ('m1', 3)
        assert ledger.keys == ['b:3']
        plugin = JobSync.of(app)
        assert plugin is not None and plugin.tasks.route_of('bound', (3,), {}, 'm1') == 'b:3'

    def test_a_class(self, app: Celery, ledger: FakeLedger) -> None:
        class Doubles(Task):  # type: ignore[misc]  # celery has no types
            name = 'doubles'

            @exactly_once(key='c:{n}', scope='')
            def run(self, n: int) -> int:
                return 2 * n

        task = app.register_task(Doubles())
        assert in_worker(task) == 6
        assert ledger.keys == ['c:3']
        plugin = JobSync.of(app)
        assert plugin is not None and plugin.tasks.route_of('doubles', (3,), {}, 'm1') == 'c:3'

    def test_autoretry_wraps_it(self, app: Celery, ledger: FakeLedger) -> None:
        calls = []

        def flaky(n: int) -> int:
            calls.append(n)
            if len(calls) < 3:
                raise OSError
            return n

        task = app.task(name='flaky', shared=False, autoretry_for=(OSError,), retry_backoff=False, default_retry_delay=0)(
            exactly_once(key='f:{n}', scope='')(flaky))
        assert task.apply((3,)).get() == 3
        assert len(calls) == 3
        plugin = JobSync.of(app)
        assert plugin is not None and plugin.tasks.route_of('flaky', (3,), {}, 'm1') == 'f:3'


class TestOptions:
    def test_it_is_acknowledged_late_and_given_back(self, app: Celery) -> None:
        task = task_of(app)
        assert (task.acks_late, task.reject_on_worker_lost) == (True, True)

    @pytest.mark.parametrize('given', [{'acks_late': False}, {'reject_on_worker_lost': False}])
    def test_unless_the_user_says_otherwise(self, app: Celery, given: dict[str, bool]) -> None:
        task = app.task(name='double', shared=False, **given)(exactly_once(key='d:{n}')(double))
        assert {name: getattr(task, name) for name in ('acks_late', 'reject_on_worker_lost')} == {
            'acks_late': True, 'reject_on_worker_lost': True, **given}

    def test_in_a_base_class_too(self, app: Celery) -> None:
        class Early(Task):  # type: ignore[misc]  # celery has no types
            acks_late = False

        task = app.task(name='double', shared=False, base=Early)(exactly_once(key='d:{n}')(double))
        assert (task.acks_late, task.reject_on_worker_lost) == (False, True)

    def test_other_tasks_keep_celery_s_own(self, app: Celery) -> None:
        task = app.task(name='double', shared=False)(double)
        assert not task.acks_late and not task.reject_on_worker_lost
