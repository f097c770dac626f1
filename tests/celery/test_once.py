"""`exactly_once` in a worker's place: what Celery is told of duplicates, of running keys, and where
there is no worker.
"""

from __future__ import annotations

import datetime
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, Task, signals, states
from celery._state import _task_stack
from celery.exceptions import Ignore, Reject, Retry
from kombu.exceptions import EncodeError, OperationalError

from jobsync_celery import JobSync, exactly_once
from jobsync_celery.tasks import once as once_module
from jobsync_celery.tasks.resending import RequeueLater
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import (
    ClaimLost,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    Fenced,
    JobSyncError,
    NotEntered,
    ResultLost,
)
from jobsync_core.ledger.current import set_current_ledger
from jobsync_core.ledger.state import Unsettled
from jobsync_core.worker.come_back import ComeBacks
from jobsync_core.worker.incoming import MAX_WAITS
from jobsync_core.worker.routing import WAITS
from tests.support.fakes import FakeLedger, duplicate, lost_result

OPTIONS = {
    'args': [3],
    'kwargs': {},
    'called_directly': False,
    'is_eager': False,
    'delivery_info': {},
    'retries': 2,
}


class Recording(FakeLedger):
    """Remembers how attempts ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[str] = []

    def settle(self, mine: Unsettled) -> None:
        super().settle(mine)
        self.ends.append(f'done {mine.result}' if mine.succeeded else f'failed {mine.failure!r}')


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    made = Recording()
    monkeypatch.setattr(once_module, '_come_backs', ComeBacks())
    set_current_ledger(made)
    yield made
    set_current_ledger(None)


@pytest.fixture
def app() -> Celery:
    made = Celery('once', broker='memory://', backend='cache+memory://', set_as_current=False)
    JobSync(made, config=CoordinationConfig(), route_producers=False)
    return made


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
    return app.task(name='double', shared=False)(
        exactly_once(key='d:{n}', scope='', **options)(double)
    )


def in_worker(task: Any, **request: Any) -> Any:
    """Run a task as the tracer does."""
    task.push_request(**{**OPTIONS, 'id': 'm1', **request})
    _task_stack.push(task)
    try:
        return task.run(3)
    finally:
        _task_stack.pop()
        task.pop_request()


def broken(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def check_never_skipped(app: Celery, ledger: FakeLedger, **came: Any) -> None:
    """What runs may be the message's own attempt, on a worker that was killed a moment ago."""
    ledger.begin_error = ExecutionRunning()
    for option in ('skip', 'raise'):
        app.tasks.pop('double', None)
        with pytest.raises(Ignore):
            in_worker(task_of(app, on_running=option), **came)


def check_message_stays(
    app: Celery, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    ledger.begin_error = ExecutionRunning()
    task = task_of(app)
    monkeypatch.setattr(Task, 'apply_async', broken(error))
    with pytest.raises(RequeueLater) as raised:
        in_worker(task)
    again = pickle.loads(pickle.dumps(raised.value))  # as a process of the pool tells its worker
    assert (
        type(again) is RequeueLater and again.requeue and type(error).__name__ in str(again.reason)
    )


def check_duplicate_rule(app: Celery, ledger: FakeLedger) -> None:
    """The same message again, which had succeeded: its link went out already."""
    ledger.begin_error = duplicate()
    task = task_of(app)
    app.backend.store_result('m1', 6, states.SUCCESS)
    with pytest.raises(Ignore):
        in_worker(task, callbacks=[task.s(3)])


class TestDuplicates:
    @pytest.mark.parametrize('follows', ['callbacks', 'chain', 'chord', 'group'])
    def test_the_same_message_again_whose_link_went_out_is_ignored(
        self, app: Celery, ledger: FakeLedger, follows: str
    ) -> None:
        ledger.begin_error = duplicate()
        task = task_of(app)
        app.backend.store_result('m1', 6, states.SUCCESS)
        with pytest.raises(Ignore):
            in_worker(task, **{follows: 'g1' if follows == 'group' else [task.s(3)]})

    def test_the_check_of_the_fences_holds(self, app: Celery, ledger: FakeLedger) -> None:
        check_duplicate_rule(app, ledger)

    @pytest.mark.parametrize(
        'state', [states.PENDING, states.STARTED, states.RETRY, states.FAILURE]
    )
    def test_the_same_message_whose_success_is_not_known_replays_its_result(
        self, app: Celery, ledger: FakeLedger, state: str
    ) -> None:
        ledger.begin_error = duplicate()
        task = task_of(app)
        if state != states.PENDING:
            app.backend.store_result(
                state, ValueError() if state in (states.FAILURE, states.RETRY) else None, state
            )
        # An id of its own: the backend in memory is shared.
        assert in_worker(task, id=state, callbacks=[task.s(3)]) == 6

    def test_another_message_with_the_key_replays_the_result(
        self, app: Celery, ledger: FakeLedger
    ) -> None:
        ledger.begin_error = duplicate()
        task = task_of(app)
        app.backend.store_result('m1', 6, states.SUCCESS)
        assert in_worker(task, id='m2', callbacks=[task.s(3)]) == 6

    def test_without_a_link_the_result_is_replayed(self, app: Celery, ledger: FakeLedger) -> None:
        ledger.begin_error = duplicate()
        app.backend.store_result('m1', 6, states.SUCCESS)
        assert in_worker(task_of(app)) == 6

    def test_a_backend_that_fails_does_not_hinder_the_replay(
        self, app: Celery, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(task_id: str) -> str:
            raise ConnectionError('backend away')

        ledger.begin_error = duplicate()
        task = task_of(app)
        monkeypatch.setattr(app.backend, 'get_task_meta', broken)
        assert in_worker(task, callbacks=[task.s(3)]) == 6

    def test_it_may_be_skipped_or_raised(self, app: Celery, ledger: FakeLedger) -> None:
        ledger.begin_error = duplicate()
        assert in_worker(task_of(app, on_duplicate='skip')) is None
        app.tasks.pop('double')
        with pytest.raises(DuplicateExecution):
            in_worker(task_of(app, on_duplicate='raise'))

    def test_a_lost_result_fails_the_message(self, app: Celery, ledger: FakeLedger) -> None:
        ledger.begin_error = lost_result()
        with pytest.raises(ResultLost):
            in_worker(task_of(app), id='lost')
        app.tasks.pop('double')
        assert in_worker(task_of(app, on_duplicate='skip'), id='lost') is None

    def test_but_not_one_whose_success_is_known(self, app: Celery, ledger: FakeLedger) -> None:
        ledger.begin_error = lost_result()
        app.backend.store_result('told before', 6, states.SUCCESS)
        with pytest.raises(Ignore):
            in_worker(task_of(app), id='told before')


class TestComeBack:
    @pytest.mark.parametrize('error', [ExecutionRunning, ClaimLost, DatabaseUnavailable])
    def test_a_copy_is_published_before_the_message_is_ignored(
        self,
        app: Celery,
        ledger: FakeLedger,
        published: list[dict[str, Any]],
        error: type[JobSyncError],
    ) -> None:
        ledger.begin_error = error()
        with pytest.raises(Ignore):
            in_worker(task_of(app))
        (headers,) = published
        assert (headers['id'], headers['task'], headers['retries'], headers['eta'] is not None) == (
            'm1',
            'double',
            2,
            True,
        )
        assert delays(published) == [1]

    @pytest.mark.parametrize('error', [DatabaseUnavailable, Fenced])
    def test_a_completion_that_is_not_known_to_be_recorded_comes_back(
        self,
        app: Celery,
        ledger: FakeLedger,
        published: list[dict[str, Any]],
        error: type[JobSyncError],
    ) -> None:
        ledger.finish_error = error()
        with pytest.raises(Ignore):
            in_worker(task_of(app))
        assert [headers['id'] for headers in published] == ['m1']

    @pytest.mark.parametrize('error', [DatabaseUnavailable, Fenced])
    def test_a_transaction_of_the_ledger_that_fails_in_the_body_is_no_failure_of_the_task(
        self,
        app: Celery,
        ledger: FakeLedger,
        published: list[dict[str, Any]],
        error: type[JobSyncError],
    ) -> None:
        def body(n: int) -> int:
            raise error()

        task = app.task(name='body', shared=False)(exactly_once(key='d:{n}', scope='')(body))
        with pytest.raises(Ignore):
            in_worker(task)
        assert [headers['id'] for headers in published] == ['m1']

    @pytest.mark.parametrize(
        'error',
        [
            ConnectionError('broker away'),
            OperationalError('no confirm'),
            EncodeError('only pickle can'),
        ],
    )
    def test_where_the_copy_cannot_be_published_the_message_stays(
        self, app: Celery, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        check_message_stays(app, ledger, monkeypatch, error)

    def test_where_it_is_acknowledged_already_its_sender_is_told(
        self, app: Celery, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger.begin_error = ExecutionRunning()
        task = app.task(name='double', shared=False, acks_late=False)(
            exactly_once(key='d:{n}', scope='')(double)
        )
        monkeypatch.setattr(Task, 'apply_async', broken(ConnectionError('broker away')))
        with pytest.raises(ConnectionError):
            in_worker(task)

    def test_the_copy_is_sent_over_a_connection_that_is_kept_and_made_anew_once(
        self, app: Celery, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger.begin_error = ExecutionRunning()
        task, given, errors = task_of(app), [], [None, OSError('it was idle for long'), None]

        def apply_async(self: Any, *_: Any, **options: Any) -> None:
            given.append(options['producer'])
            assert options['retry'] is False
            error = errors.pop(0)
            if error is not None:
                raise error

        monkeypatch.setattr(Task, 'apply_async', apply_async)
        for _ in range(2):
            with pytest.raises(Ignore):
                in_worker(task)
        assert errors == []
        assert given[0] is given[1] is not given[2]

    def test_a_running_key_may_be_skipped_or_raised(
        self, app: Celery, ledger: FakeLedger, published: list[dict[str, Any]]
    ) -> None:
        ledger.begin_error = ExecutionRunning()
        assert in_worker(task_of(app, on_running='skip')) is None
        app.tasks.pop('double')
        with pytest.raises(ExecutionRunning):
            in_worker(task_of(app, on_running='raise'))
        assert published == []

    @pytest.mark.parametrize(
        'came',
        [{'delivery_info': {'redelivered': True}}, {WAITS: 1}, {WAITS: MAX_WAITS}],
        ids=['redelivered', 'came back', 'often'],
    )
    def test_a_message_that_came_before_is_not_skipped_for_its_own_attempt(
        self, app: Celery, ledger: FakeLedger, published: list[dict[str, Any]], came: dict[str, Any]
    ) -> None:
        check_never_skipped(app, ledger, **came)
        waits = came.get(WAITS, 0) + 1
        assert [headers[WAITS] for headers in published] == [waits, waits]

    @pytest.mark.parametrize('place', [{}, {'redelivered': False}, {'redelivered': None}, None])
    def test_one_that_comes_for_the_first_time_is(
        self,
        app: Celery,
        ledger: FakeLedger,
        published: list[dict[str, Any]],
        place: dict[str, Any] | None,
    ) -> None:
        ledger.begin_error = ExecutionRunning()
        assert in_worker(task_of(app, on_running='skip'), delivery_info=place) is None
        assert published == []

    def test_without_that_a_redelivered_message_is_lost(
        self, app: Celery, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(once_module._once), 'came_before', lambda self: False)
        with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
            check_never_skipped(app, ledger, delivery_info={'redelivered': True})


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

    @pytest.mark.parametrize(
        ('options', 'error', 'expected'),
        [
            ({}, duplicate, 6),
            ({'on_duplicate': 'skip'}, duplicate, None),
            ({'on_running': 'skip'}, ExecutionRunning, None),
            ({'on_duplicate': 'raise'}, duplicate, DuplicateExecution),
            ({}, ExecutionRunning, ExecutionRunning),
        ],
    )
    def test_a_direct_call_gets_what_the_options_say(
        self,
        app: Celery,
        ledger: FakeLedger,
        published: list[dict[str, Any]],
        options: dict[str, Any],
        error: Callable[[], JobSyncError],
        expected: Any,
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

        task = app.task(name='bound', shared=False, bind=True)(
            exactly_once(key='b:{n}', scope='')(bound)
        )
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

        task = app.task(
            name='flaky',
            shared=False,
            autoretry_for=(OSError,),
            retry_backoff=False,
            default_retry_delay=0,
        )(exactly_once(key='f:{n}', scope='')(flaky))
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
            'acks_late': True,
            'reject_on_worker_lost': True,
            **given,
        }

    def test_in_a_base_class_too(self, app: Celery) -> None:
        class Early(Task):  # type: ignore[misc]  # celery has no types
            acks_late = False

        task = app.task(name='double', shared=False, base=Early)(exactly_once(key='d:{n}')(double))
        assert (task.acks_late, task.reject_on_worker_lost) == (False, True)

    def test_other_tasks_keep_celery_s_own(self, app: Celery) -> None:
        task = app.task(name='double', shared=False)(double)
        assert not task.acks_late and not task.reject_on_worker_lost


class TestEnds:
    """Exceptions with which Celery lets a task end."""

    def _task(self, app: Celery, error: Callable[[], BaseException]) -> Any:
        def run(n: int) -> None:
            raise error()

        return app.task(name='ends', shared=False)(exactly_once(key='d:{n}', scope='')(run))

    def test_ignore_completes_the_key(self, app: Celery, ledger: Recording) -> None:
        with pytest.raises(Ignore):
            in_worker(self._task(app, Ignore))
        assert ledger.ends == ['done None']

    @pytest.mark.parametrize(
        'error',
        [
            lambda: Reject('no', requeue=True),
            lambda: Reject('no', requeue=False),
            lambda: Retry(),
            lambda: ValueError('v'),
        ],
    )
    def test_what_fails_or_is_tried_again_does_not(
        self, app: Celery, ledger: Recording, error: Callable[[], BaseException]
    ) -> None:
        with pytest.raises(type(error())):
            in_worker(self._task(app, error))
        assert [end.partition(' ')[0] for end in ledger.ends] == ['failed']

    def _replace(self, app: Celery, ledger: Recording, published: list[dict[str, Any]]) -> Any:
        def run(task: Any, n: int) -> Any:
            raise task.replace(app.tasks['other'].s(n))

        app.task(name='other', shared=False)(double)
        task = app.task(name='replaced', shared=False, bind=True)(
            exactly_once(key='d:{n}', scope='')(run)
        )
        with pytest.raises(Ignore):
            in_worker(task, id='first')
        assert [(headers['task'], headers['id']) for headers in published] == [('other', 'first')]
        return task

    def test_a_replacement_completes_the_key_when_it_is_sent(
        self, app: Celery, ledger: Recording, published: list[dict[str, Any]]
    ) -> None:
        self._replace(app, ledger, published)
        assert ledger.ends == ["done {'jobsync_replaced': 'first'}"]

    def test_the_same_message_again_sends_nothing(
        self, app: Celery, ledger: Recording, published: list[dict[str, Any]]
    ) -> None:
        task = self._replace(app, ledger, published)
        ledger.begin_error = duplicate({'jobsync_replaced': 'first'})
        with pytest.raises(Ignore):
            in_worker(task, id='first', callbacks=[task.s(3)])
        assert len(published) == 1

    def test_another_message_gets_the_replacement_s_result(
        self, app: Celery, ledger: Recording, published: list[dict[str, Any]]
    ) -> None:
        task = self._replace(app, ledger, published)
        app.backend.forget('first')
        ledger.begin_error = duplicate({'jobsync_replaced': 'first'})
        with pytest.raises(Ignore):
            in_worker(task, id='second')
        assert [headers['id'] for headers in published] == ['first', 'second']  # it waits
        app.backend.store_result('first', ValueError('bad'), states.FAILURE)
        with pytest.raises(ValueError, match='bad'):
            in_worker(task, id='second')
        app.backend.forget('first')
        app.backend.store_result('first', 14, states.SUCCESS)
        assert in_worker(task, id='second') == 14
        assert task(3) == 14

    def test_a_replacement_is_another_piece_of_work(self, app: Celery, ledger: Recording) -> None:
        task = app.task(name='by_id', shared=False)(exactly_once(scope='')(double))
        in_worker(task)
        in_worker(task, replaced_task_nesting=2)
        assert ledger.keys == ['m1', 'm1~2']

    def test_celery_s_text_is_the_one_that_is_looked_for(self) -> None:
        assert once_module._REPLACED_TEXT in inspect.getsource(Task.on_replace)


class TestResultsThatCannotBeSent:
    @pytest.mark.parametrize('stored', [True, False])
    def test_the_attempt_fails_with_its_sender(
        self, app: Celery, ledger: Recording, stored: bool
    ) -> None:
        check_result_that_cannot_be_sent(app, ledger, stored)

    @pytest.mark.parametrize(
        'url', ['redis://localhost:1', 'db+sqlite://', 'rpc://', 'file:///tmp']
    )
    def test_whatever_the_backend_is(self, ledger: Recording, url: str) -> None:
        other = Celery('other', broker='memory://', backend=url, set_as_current=False)
        JobSync(other, config=CoordinationConfig(), route_producers=False)
        check_result_that_cannot_be_sent(other, ledger)

    def test_unless_nobody_waits_for_it(self, app: Celery, ledger: Recording) -> None:
        task = app.task(name='odd', shared=False, ignore_result=True)(
            exactly_once(key='d:{n}', scope='')(odd)
        )
        in_worker(task)
        assert ledger.ends == ['done None']

    def test_what_celery_s_json_carries_is_stored(self, app: Celery, ledger: Recording) -> None:
        task = app.task(name='when', shared=False)(exactly_once(key='d:{n}', scope='')(when))
        assert in_worker(task) == when(3)
        assert ledger.ends == [f'done {when(3)}']

    def test_what_the_ledger_stores_and_the_backend_cannot_is_a_fault(
        self, app: Celery, ledger: Recording
    ) -> None:
        def pairs(n: int) -> Any:
            return {(1, 2): n}

        task = app.task(name='pairs', shared=False)(exactly_once(key='d:{n}', scope='')(pairs))
        with pytest.raises(EncodeError):
            in_worker(task)
        assert [end.partition(' ')[0] for end in ledger.ends] == ['failed']


def odd(n: int) -> Any:
    return object()


def when(n: int) -> Any:
    return datetime.datetime(2026, 1, n)


def check_result_that_cannot_be_sent(app: Celery, ledger: Recording, stored: bool = True) -> None:
    options: dict[str, Any] = {} if stored else {'store_result': False, 'on_duplicate': 'skip'}
    task = app.task(name='odd', shared=False)(exactly_once(key='d:{n}', scope='', **options)(odd))
    with pytest.raises(EncodeError):
        in_worker(task)
    assert [end.partition(' ')[0] for end in ledger.ends] == ['failed']


class TestBackOff:
    def test_a_running_key_is_asked_for_less_and_less_often(
        self, app: Celery, ledger: Recording, published: list[dict[str, Any]]
    ) -> None:
        check_back_off(app, ledger, published)

    @pytest.mark.parametrize('waits', [10**9, -1, 'x', [], None])
    def test_whatever_the_message_says(
        self, app: Celery, ledger: Recording, published: list[dict[str, Any]], waits: Any
    ) -> None:
        ledger.begin_error = ExecutionRunning()
        with pytest.raises(Ignore):
            in_worker(task_of(app), jobsync_waits=waits)
        assert published[0][WAITS] in (1, MAX_WAITS + 1)

    def test_many_that_wait_for_one_key_are_one_line(
        self,
        app: Celery,
        ledger: Recording,
        published: list[dict[str, Any]],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level('INFO')
        task = task_of(app)
        for number in range(100):
            ledger.begin_error = ExecutionRunning()
            ledger.begin_error.key = 'one line'
            with pytest.raises(Ignore):
                in_worker(task, id=str(number))
        assert len(published) == 100
        assert [record.getMessage().partition(' comes')[0] for record in caplog.records] == [
            'Task double[0]'
        ]

    def test_what_another_process_of_the_pool_sent_back_was_told_of(
        self,
        app: Celery,
        ledger: Recording,
        published: list[dict[str, Any]],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level('INFO')
        ledger.begin_error = ExecutionRunning()
        with pytest.raises(Ignore):
            in_worker(task_of(app), **{WAITS: 3})
        assert len(published) == 1 and caplog.records == []


def delays(published: list[dict[str, Any]]) -> list[float]:
    now = datetime.datetime.now(datetime.timezone.utc)
    return [
        round((datetime.datetime.fromisoformat(headers['eta']) - now).total_seconds())
        for headers in published
    ]


def check_back_off(app: Celery, ledger: Recording, published: list[dict[str, Any]]) -> None:
    task = task_of(app)
    for waits in range(9):
        ledger.begin_error = ExecutionRunning()
        with pytest.raises(Ignore):
            in_worker(task, **({WAITS: waits} if waits else {}))
    assert [headers[WAITS] for headers in published] == list(range(1, 10))
    assert delays(published) == [1, 2, 4, 8, 16, 30, 30, 30, 30]


@pytest.mark.parametrize('error', [ClaimLost, DatabaseUnavailable])
def test_whatever_else_is_in_the_way_is_asked_for_less_and_less_often_and_said_once(
    app: Celery,
    ledger: Recording,
    published: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    error: type[JobSyncError],
) -> None:
    task = task_of(app)
    caplog.set_level('INFO')
    for waits in range(7):
        ledger.begin_error = error()
        with pytest.raises(Ignore):
            in_worker(task, **({WAITS: waits} if waits else {}))
    assert delays(published) == [1, 2, 4, 8, 15, 15, 15]
    assert len([record for record in caplog.records if 'comes back in' in record.getMessage()]) <= 1


class TestDirectCalls:
    """A task that is called by another one's code."""

    def test_the_stored_result_is_returned_within_a_message_of_the_same_task(
        self, app: Celery, ledger: Recording
    ) -> None:
        check_direct_call(app, ledger)

    def test_map_gets_stored_results(
        self, app: Celery, ledger: Recording, published: list[dict[str, Any]]
    ) -> None:
        task = task_of(app)
        ledger.begin_error = duplicate()
        xmap = app.tasks['celery.map']
        xmap.push_request(**{**OPTIONS, 'id': 'm1'})
        _task_stack.push(xmap)
        try:
            assert xmap.run(task.s(), [1, 2, 2]) == [6, 6, 6]
        finally:
            _task_stack.pop()
            xmap.pop_request()
        assert published == []

    def test_outside_of_a_worker_it_names_what_works(self, app: Celery) -> None:
        with pytest.raises(NotEntered, match=r'\.delay\(\).*\.apply\(\).*jobsync_core\.testing'):
            task_of(app)(3)

    def test_in_a_worker_without_the_plugin_it_asks_for_the_plugin(self, app: Celery) -> None:
        with pytest.raises(
            NotEntered, match=r'^task double runs in a worker .*write JobSync\(app\)'
        ):
            in_worker(task_of(app))

    def test_a_task_with_a_call_of_its_own_is_still_a_message_s(
        self, app: Celery, ledger: Recording
    ) -> None:
        class Loud(Task):  # type: ignore[misc]  # celery has no types
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return super().__call__(*args, **kwargs)

        task = app.task(name='loud', shared=False, base=Loud)(exactly_once(scope='')(double))
        assert task.apply((3,), task_id='m7').get() == 6
        assert ledger.keys == ['m7']

    def test_a_task_inside_of_a_tracing_object_is_still_a_message_s(
        self, app: Celery, ledger: Recording, published: list[dict[str, Any]]
    ) -> None:
        class Traced:
            """As New Relic's: its `run` is not the task's."""

            def __init__(self, task: Any) -> None:
                self._task = task

            def __getattr__(self, name: str) -> Any:
                return getattr(self._task, name)

            def run(self, *args: Any) -> Any:
                return self._task.run(*args)

        task = Traced(task_of(app))
        ledger.begin_error = ExecutionRunning()
        with pytest.raises(Ignore):
            in_worker(task)
        assert delays(published) == [1]
        ledger.begin_error = None
        by_id = app.task(name='by_id', shared=False)(exactly_once(scope='')(double))
        assert in_worker(Traced(by_id)) == 6
        assert ledger.keys[-1] == 'm1'


def check_direct_call(app: Celery, ledger: Recording) -> None:
    seen = []

    def outer(task: Any, n: int) -> int:
        if n == 3:
            ledger.begin_error = duplicate()
            seen.append(task(4))
            ledger.begin_error = None
        return n

    task = app.task(name='outer', shared=False, bind=True)(
        exactly_once(key='d:{n}', scope='')(outer)
    )
    app.backend.store_result('m1', 6, states.SUCCESS)
    assert in_worker(task, callbacks=[task.s(3)]) == 3
    assert seen == [6]
