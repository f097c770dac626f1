"""Tasks of every make, what is refused where it is written, and how the messages of an app are
addressed.
"""

from __future__ import annotations

import datetime
import itertools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from celery import Celery, Task, _state, shared_task, signals, states
from celery.app.trace import build_tracer
from celery.exceptions import Reject, WorkerShutdown, WorkerTerminate
from kombu.exceptions import OperationalError

from jobsync_celery import JobSync, exactly_once
from jobsync_celery.hooks import WorkerHooks
from jobsync_celery.tasks.coordinated import (
    TaskExited,
    guard_traces,
    guarded_trace,
    odd_names,
    prepare_tasks,
)
from jobsync_celery.tasks.resending import RequeueLater
from jobsync_core import exactly_once as core_once
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.ledger.current import set_current_ledger
from jobsync_core.testing import MemoryLedger
from jobsync_core.worker.incoming import Refused
from jobsync_core.worker.lookup import OwnerLookup
from jobsync_core.worker.routing import HOME, HOPS, KEY
from jobsync_dramatiq import exactly_once as dramatiq_once

LATE = (True, True)
_NUMBERS = itertools.count()


def make_app(name: str = 'made', **settings: Any) -> Celery:
    app = Celery(name, broker='memory://', backend='cache+memory://', set_as_current=False)
    JobSync(app, config=CoordinationConfig(), **{'route_producers': False, **settings})
    return app


@pytest.fixture
def app() -> Celery:
    return make_app()


@pytest.fixture(autouse=True)
def unshared() -> Iterator[None]:
    """Celery gives each app that is made from now on what was shared."""
    before = set(_state._on_app_finalizers)
    yield
    _state._on_app_finalizers.intersection_update(before)


@pytest.fixture
def published() -> Iterator[list[dict[str, Any]]]:
    """Headers and routing keys of what is published."""
    found: list[dict[str, Any]] = []

    def note(headers: dict[str, Any], routing_key: str, **_: Any) -> None:
        found.append({**headers, 'routing_key': routing_key})

    signals.before_task_publish.connect(note)
    yield found
    signals.before_task_publish.disconnect(note)


def plugin_of(app: Celery) -> JobSync:
    found = JobSync.of(app)
    assert found is not None
    return found


def options_of(app: Celery, name: str) -> tuple[Any, Any]:
    task = app.tasks[name]
    return task.acks_late, task.reject_on_worker_lost


def a_class(name: str = 'doubles', base: type = Task, **attributes: Any) -> Any:
    """A task that is a class; a new one each time, as Celery writes on those that it binds."""

    @exactly_once(key='d:{n}', scope='doubles')
    def run(self: Any, n: int) -> int:
        return 2 * n

    return type('Doubles', (base,), {'name': name, 'run': run, **attributes})


def double(n: int) -> int:
    return 2 * n


def _register_object(app: Celery) -> str:
    return str(app.register_task(a_class()()).name)


def _register_class(app: Celery) -> str:
    return str(app.register_task(a_class()).name)


def _subclass_of_a_task(app: Celery) -> str:
    base = a_class('base')
    app.register_task(base())
    return str(app.register_task(type('More', (base,), {'name': 'more'})()).name)


def _in_the_registry(app: Celery) -> str:
    app.tasks.register(a_class()())
    return 'doubles'


def _function(app: Celery) -> str:
    return str(app.task(name='function', shared=False)(exactly_once(key='d:{n}')(double)).name)


def _bound(app: Celery) -> str:
    def run(self: Any, n: int) -> int:
        return n

    return str(app.task(name='bound', shared=False, bind=True)(exactly_once(key='d:{n}')(run)).name)


def _base(app: Celery) -> str:
    return str(
        app.task(name='based', shared=False, base=a_class('', abstract=True))(
            exactly_once(key='d:{n}')(double)
        ).name
    )


def _retrying(app: Celery) -> str:
    return str(
        app.task(name='retrying', shared=False, autoretry_for=(OSError,))(
            exactly_once(key='d:{n}')(double)
        ).name
    )


def _shared(app: Celery) -> str:
    name = f'shared-{next(_NUMBERS)}'  # apps of former tests may live yet, and get it too
    shared_task(name=name)(exactly_once(key='d:{n}')(double))
    return name


WAYS = [
    _register_object,
    _register_class,
    _subclass_of_a_task,
    _in_the_registry,
    _function,
    _bound,
    _base,
    _retrying,
    _shared,
]


@pytest.mark.parametrize('given', ['proj', None, Celery])
def test_what_is_no_app_is_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r'give the Celery app: .* JobSync\(app\)'):
        JobSync(given)


class TestLateAcknowledgement:
    @pytest.mark.parametrize('make', WAYS)
    def test_whichever_way_a_task_is_made(self, app: Celery, make: Callable[[Celery], str]) -> None:
        assert options_of(app, make(app)) == LATE

    @pytest.mark.parametrize('make', WAYS)
    def test_after_the_app_was_used(self, app: Celery, make: Callable[[Celery], str]) -> None:
        app.finalize()
        assert options_of(app, make(app)) == LATE

    @pytest.mark.parametrize('make', WAYS)
    def test_before_the_plugin_came(self, make: Callable[[Celery], str]) -> None:
        app = Celery('early', broker='memory://', set_as_current=False)
        name = make(app)
        assert name
        JobSync(app, config=CoordinationConfig(), route_producers=False)
        assert options_of(app, name) == LATE

    def test_unless_the_class_says_otherwise(self, app: Celery) -> None:
        base = a_class('base', acks_late=False)
        app.register_task(base())
        app.register_task(type('More', (base,), {'name': 'more'})())
        assert options_of(app, 'base') == options_of(app, 'more') == (False, True)

    def test_a_worker_prepares_what_came_some_other_way(self, app: Celery) -> None:
        task = a_class()()
        dict.__setitem__(app.tasks, 'doubles', task)  # past the registry's own methods
        assert task.acks_late is None
        prepare_tasks(app)
        assert options_of(app, 'doubles') == LATE

    def test_other_tasks_are_left_alone(self, app: Celery) -> None:
        class Plain(Task):  # type: ignore[misc]
            name = 'plain'

            def run(self) -> None:
                """Nothing."""

        app.register_task(Plain())
        assert not any(options_of(app, 'plain'))


class TestRefusals:
    """At the line that is wrong, with the right one."""

    def test_above_the_task(self, app: Celery) -> None:
        with pytest.raises(ConfigurationError, match=r'write it below @app\.task'):
            exactly_once(key='d:{n}')(app.task(shared=False)(double))

    @pytest.mark.parametrize(
        'foreign',
        [core_once(key='d:{n}', scope='core'), dramatiq_once(key='d:{n}', scope='dramatiq')],
    )
    def test_another_s_exactly_once(self, app: Celery, foreign: Any) -> None:
        for decorator in (app.task, app.task(name='x')):
            with pytest.raises(ConfigurationError, match='from jobsync_celery import exactly_once'):
                decorator(foreign(double))
        app.finalize()

    def test_in_a_class(self, app: Celery) -> None:
        class Foreign(Task):  # type: ignore[misc]
            name = 'foreign'

            @core_once(key='d:{n}', scope='core')
            def run(self, n: int) -> int:
                return n

        with pytest.raises(ConfigurationError, match='from jobsync_celery import exactly_once'):
            app.register_task(Foreign())
        assert 'foreign' not in app.tasks

    def test_one_function_for_two_tasks(self, app: Celery) -> None:
        run = exactly_once(key='d:{n}')(double)
        app.task(name='one', shared=False)(run)
        app.finalize()
        with pytest.raises(ConfigurationError, match='run the same @exactly_once function'):
            app.task(name='two', shared=False)(run)

    def test_a_coroutine(self, app: Celery) -> None:
        async def run(n: int) -> int:
            return n

        with pytest.raises(ConfigurationError, match=r'asyncio\.run'):
            app.task(exactly_once(key='d:{n}')(run))

    def test_a_class_as_if_it_were_a_function(self, app: Celery) -> None:
        with pytest.raises(ConfigurationError, match=r'app\.register_task\(.*Doubles\(\)\)'):
            app.task(a_class())

    def test_arguments_that_the_task_does_not_take_are_the_sender_s_error(
        self, app: Celery, published: list[Any]
    ) -> None:
        task = app.task(name='typed', shared=False)(exactly_once(key='d:{n}')(double))
        for args, kwargs in (((), {}), ((1, 2), {}), ((), {'m': 1})):
            with pytest.raises(TypeError):
                task.apply_async(args, kwargs)
        task.delay(1)
        assert [headers[KEY] for headers in published] == ['d:1']


class TestAddressing:
    @pytest.fixture
    def routed(self, app: Celery, monkeypatch: pytest.MonkeyPatch) -> Celery:
        plugin_of(app)
        monkeypatch.setattr(
            OwnerLookup, 'queue_of', lambda self, route, home: f'{home}.jobsync.sync_.{route}'
        )
        return app

    def test_a_key_is_made_once_for_each_message(
        self, routed: Celery, published: list[dict[str, Any]]
    ) -> None:
        made = []

        def key(n: int) -> str:
            made.append(n)
            return f'd:{n}'

        routed.task(name='keyed', shared=False, jobsync_key=key)(double).delay(7)
        assert made == [7]
        (headers,) = published
        assert (headers[KEY], headers[HOME], headers['routing_key']) == (
            'd:7',
            'celery',
            'celery.jobsync.sync_.d:7',
        )

    def test_without_a_key_it_goes_to_its_id_s_owner(
        self, routed: Celery, published: list[dict[str, Any]]
    ) -> None:
        routed.task(name='by_id', shared=False)(exactly_once()(double)).apply_async(
            (1,), task_id='id-5'
        )
        assert published[0]['routing_key'] == 'celery.jobsync.sync_.id-5'

    @pytest.mark.parametrize('options', [{'queue': 'gpu'}, {'routing_key': 'gpu', 'queue': 'gpu'}])
    def test_its_own_queue_is_remembered(
        self, routed: Celery, published: list[dict[str, Any]], options: dict[str, Any]
    ) -> None:
        routed.task(name='keyed', shared=False, jobsync_key='d:{n}')(double).apply_async(
            (1,), **options
        )
        assert (
            published[0][HOME] == 'gpu' and published[0]['routing_key'] == 'gpu.jobsync.sync_.d:1'
        )

    def test_stamps_of_the_sender_s_are_replaced(
        self, app: Celery, published: list[dict[str, Any]]
    ) -> None:
        app.task(name='keyed', shared=False, jobsync_key='d:{n}')(double).apply_async(
            (1,), headers={KEY: 'other', HOPS: 9, HOME: 'elsewhere', 'own': 1}
        )
        (headers,) = published
        assert (headers[KEY], headers.get(HOPS), headers[HOME], headers['own']) == (
            'd:1',
            None,
            'celery',
            1,
        )

    def test_a_key_that_cannot_be_made_goes_home(
        self, routed: Celery, published: list[dict[str, Any]], caplog: Any
    ) -> None:
        def key(n: int) -> str:
            raise LookupError('no tenant')

        task = routed.task(name='keyless', shared=False, jobsync_key=key)(double)
        for _ in range(20):
            task.delay(1)
        assert {(headers.get(KEY), headers['routing_key']) for headers in published} == {
            (None, 'celery')
        }
        assert len([record for record in caplog.records if 'no tenant' in record.getMessage()]) == 1

    @pytest.mark.parametrize('home', ['gpu', None, 5, 'jobsync.sync_.n2'])
    def test_what_a_task_sends_again_goes_home_and_not_to_the_node(
        self, app: Celery, published: list[dict[str, Any]], home: Any
    ) -> None:
        """`self.retry` gives the queue that the message came from."""
        task = app.task(name='keyed', shared=False, jobsync_key='d:{n}')(double)
        task.push_request(
            id='a',
            called_directly=False,
            args=[1],
            kwargs={},
            delivery_info={'exchange': '', 'routing_key': 'jobsync.sync_.n1'},
            **{HOME: home},
        )
        _state._task_stack.push(task)
        try:
            task.signature_from_request(task.request, (1,), {}).apply_async()
        finally:
            _state._task_stack.pop()
            task.pop_request()
        assert published[0]['routing_key'] == ('gpu' if home == 'gpu' else 'celery')

    def test_two_apps_leave_each_other_s_messages_alone(
        self, published: list[dict[str, Any]]
    ) -> None:
        check_two_apps(published)


def check_two_apps(published: list[dict[str, Any]]) -> None:
    """Both have a task of the same name; in one of them it is pinned."""
    one, two = make_app('one'), make_app('two')
    one.task(name='proj.render', shared=False, jobsync_key='one:{n}')(double)
    two.task(name='proj.render', shared=False, jobsync_pin=['%-gpu'], jobsync_key='two:{n}')(double)
    plain = Celery('plain', broker='memory://', set_as_current=False)
    plain.task(name='proj.render', shared=False)(double)
    for app in (one, two, plain):
        app.tasks['proj.render'].delay(1)
    keys = [headers.get(KEY) for headers in published]
    assert keys[0] == 'one:1' and str(keys[1]).startswith('proj.render#') and keys[2] is None


class TestPydantic:
    def _task(self, app: Celery, bind: bool = False) -> Any:
        pydantic = pytest.importorskip('pydantic', reason='pydantic is not installed')
        if not hasattr(__import__('celery.app.base', fromlist=['x']), 'pydantic_wrapper'):
            pytest.skip('this Celery has no pydantic=True')
        order = pydantic.create_model('Order', id=(int, ...), name=(str, 'x'))

        def book(order: Any) -> int:
            return int(order.id)

        def bound(self: Any, order: Any) -> int:
            return int(order.id)

        function = bound if bind else book
        function.__annotations__['order'] = order
        return app.task(name='book', shared=False, pydantic=True, bind=bind)(
            exactly_once(key='order:{order.id}', scope='')(function)
        )

    @pytest.mark.parametrize('bind', [False, True])
    def test_attributes_of_models_make_keys(
        self, app: Celery, published: list[dict[str, Any]], bind: bool
    ) -> None:
        self._task(app, bind).delay({'id': 5})
        assert published[0][KEY] == 'order:5'
        assert plugin_of(app).tasks.route_of('book', [], {'order': {'id': 6}}, 'm') == 'order:6'

    def test_a_duplicate_gets_the_model_as_celery_sends_it(self, app: Celery) -> None:
        pydantic = pytest.importorskip('pydantic', reason='pydantic is not installed')
        self._task(app)
        paid = pydantic.create_model('Paid', at=(datetime.date, ...), note=(Any, None))

        def pay(n: int) -> Any:
            return paid(at=datetime.date(2026, 1, n))

        pay.__annotations__['return'] = paid
        ledger = MemoryLedger()
        set_current_ledger(ledger)
        try:
            task = app.task(
                name='pay', shared=False, pydantic=True, pydantic_dump_kwargs={'exclude_none': True}
            )(exactly_once(key='pay:{n}', scope='')(pay))
            assert task(3) == {'at': '2026-01-03'}
            assert ledger.completed == {'pay:3': {'at': '2026-01-03'}}
            assert task(3) == {'at': '2026-01-03'}
        finally:
            set_current_ledger(None)

    def test_what_is_no_model_has_no_key(self, app: Celery) -> None:
        self._task(app)
        assert isinstance(plugin_of(app).tasks.route_of('book', [{'id': 'x'}], {}, 'm'), Refused)


@pytest.mark.parametrize('key', [lambda n: f'd:{n}', lambda self, n: f'd:{n}'])
def test_a_bound_task_s_callable_key_need_not_take_the_task(app: Celery, key: Any) -> None:
    def run(self: Any, n: int) -> int:
        return n

    app.task(name='once', shared=False, bind=True)(exactly_once(key=key)(run))
    app.task(name='keyed', shared=False, bind=True, jobsync_key=key)(run)
    for name in ('once', 'keyed'):
        assert plugin_of(app).tasks.route_of(name, [3], {}, 'm') == 'd:3'


@pytest.mark.parametrize(
    'embed', [{'chain': [5]}, {'chain': [{}]}, {'callbacks': [5]}, {'errbacks': 5}, {'chord': 5}]
)
def test_what_fails_outside_of_the_body_is_a_failure_and_raises_nothing(
    app: Celery, embed: dict[str, Any]
) -> None:
    task = app.task(name='keyed', shared=False, jobsync_key='d:{n}')(double)
    task.__trace__ = build_tracer('keyed', task, app=app)
    guard_traces(app, plugin_of(app).tasks, solo=False)
    request = {'id': 'm1', 'delivery_info': {}, 'is_eager': False, **embed}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # Celery tells of it this way
        found = task.__trace__('m1', (1,), {}, request)
    assert found.info is None or found.info.state == 'FAILURE'


@pytest.mark.parametrize(
    'error',
    [Reject('no'), Reject('later', requeue=True), MemoryError('none'), KeyError('odd')],
    ids=repr,
)
def test_nothing_comes_out_of_a_tracer(error: Exception) -> None:
    """What an on_success or an after_return raises, in a pool without processes: it is told to the
    request, as a process's is.
    """

    def trace(*args: Any) -> None:
        raise error

    app = Celery('tracing', broker='memory://', backend='cache+memory://', set_as_current=False)
    task = app.task(name='traced', shared=False)(_nothing)
    task.__trace__ = trace
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # Celery's, of the last one
        result, info, _, _ = guarded_trace(task)('m1', (), {}, {})
    assert isinstance(result, ExceptionInfo)
    assert info.state == (states.REJECTED if isinstance(error, Reject) else states.FAILURE)
    assert info.retval is error
    found = result.exception
    assert type(getattr(found, 'exc', found)) is type(error)


class _Unspeakable(BaseException):
    def __repr__(self) -> str:
        raise RuntimeError('no text')

    __str__ = __repr__


_EXITS = (SystemExit(7), KeyboardInterrupt(), GeneratorExit('x'), _Unspeakable())


@pytest.mark.parametrize('error', _EXITS, ids=lambda one: type(one).__name__)
def test_a_task_that_exits_has_failed_where_that_ends_no_process(error: BaseException) -> None:
    def exits() -> None:
        raise error

    app = Celery('tracing', broker='memory://', backend='cache+memory://', set_as_current=False)
    app.backend.forget('m1')  # the memory is all apps'
    task = app.task(name='exits', shared=False)(exits)
    task.__trace__ = build_tracer('exits', task, app=app)
    result, info, _, _ = guarded_trace(task)(
        'm1', (), {}, {'id': 'm1', 'delivery_info': {}, 'is_eager': False}
    )
    assert info.state == states.FAILURE
    assert isinstance(getattr(result.exception, 'exc', result.exception), TaskExited)
    found = app.backend.get_task_meta('m1')
    assert found['status'] == states.FAILURE
    assert str(found['result']).startswith(type(error).__name__)


@pytest.mark.parametrize('error', [WorkerShutdown(0), WorkerTerminate(1)], ids=repr)
def test_what_ends_the_worker_ends_it(error: BaseException) -> None:
    def trace(*args: Any) -> None:
        raise error

    app = Celery('tracing', broker='memory://', backend='cache+memory://', set_as_current=False)
    task = app.task(name='traced', shared=False)(_nothing)
    task.__trace__ = trace
    with pytest.raises(type(error)):
        guarded_trace(task)('m1', (), {}, {})


@pytest.mark.parametrize(('late', 'in_loop'), [(True, False), (True, True), (False, False)])
def test_an_end_that_cannot_be_told_now_brings_the_message_again(late: bool, in_loop: bool) -> None:
    def trace(*args: Any) -> None:
        raise OperationalError('the result backend is away')

    app = Celery('away', broker='memory://', backend='cache+memory://', set_as_current=False)
    task = app.task(name='away', shared=False, acks_late=late)(_nothing)
    task.__trace__ = trace
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        if in_loop:
            with pytest.raises(OperationalError):
                guarded_trace(task, in_loop)('m1', (), {}, {})
            return
        result, info, _, _ = guarded_trace(task)('m1', (), {}, {})
    error = result.exception
    assert (type(getattr(error, 'exc', error)) is RequeueLater, info.state) == (
        (True, 'REJECTED') if late else (False, 'FAILURE')
    )


def _nothing() -> None:
    """A task."""


class TestMisspelt:
    """What means nothing is said once, when the worker starts."""

    def _app(self, **pins: list[str]) -> Celery:
        app = Celery('shop', broker='memory://', set_as_current=False)
        JobSync(app, config=CoordinationConfig(), route_producers=False, pins=pins)
        return app

    def test_options_and_pins_are_named_with_what_was_meant(self) -> None:
        app = self._app()
        app.task(name='pay', shared=False, jobsync_keys='{n}')(_nothing)
        app.task(name='bill', shared=False, jobsync_key='b', jobsync_pin=['a'])(_nothing)
        app.register_task(
            type('Ship', (Task,), {'name': 'ship', 'run': _nothing, 'jobsync_pins': ['a']})()
        )
        assert odd_names(app, {'bill': ['a'], 'bil': ['a']}) == [
            'task pay: its option jobsync_keys means nothing: did you mean jobsync_key?',
            'task ship: its option jobsync_pins means nothing: did you mean jobsync_pin?',
            'pins: there is no task bil here: did you mean bill?',
        ]

    def test_what_is_right_is_not_mentioned(self) -> None:
        app = self._app()
        app.task(name='keyed', shared=False, jobsync_key='{n}', rate_limit='1/s')(_n)
        app.task(name='plain', shared=False, job='a word of the user')(_nothing)
        app.task(name='once', shared=False)(exactly_once(key='k')(_nothing))
        assert odd_names(app, {'keyed': ['a']}) == []

    def test_a_worker_says_so_once_when_it_starts(self, caplog: pytest.LogCaptureFixture) -> None:
        app = self._app(bil=['a'])
        # It gets as far as that: a worker that is refused connects to nothing.
        app.conf.jobsync_on_release = lambda: None
        app.task(name='pay', shared=False, jobsync_keys='{n}')(_nothing)
        worker = SimpleNamespace(pool_cls='celery.concurrency.solo:TaskPool', hostname='w@x')
        hooks = WorkerHooks.of(app)
        assert hooks is not None
        with pytest.raises(ConfigurationError, match='on_release'):
            hooks.prepare_worker(worker, None, None)
        assert caplog.text.count('JobSync: ') == 1
        assert 'did you mean jobsync_key?; pins: there is no task bil here' in caplog.text


def _n(n: int) -> None:
    """A task."""
