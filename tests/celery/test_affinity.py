"""Tasks without affinity in a Celery worker: their messages run where they are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, signals
from celery.exceptions import Ignore
from celery.worker import state

from jobsync_celery import JobSync, exactly_once
from jobsync_celery.broker.broker import CeleryBroker
from jobsync_celery.broker.queues import Queues
from jobsync_celery.gate.delivery import Note
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError, ExecutionRunning
from jobsync_core.worker import inbox
from jobsync_core.worker.routing import HOME, HOPS, KEY, Coordination

from .consumers import Bench, Message, bench
from .test_once import app, in_worker, ledger, published, task_of

__all__ = ['app', 'ledger', 'published']


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with bench(monkeypatch) as made:
        yield made


def anywhere(key: str | None = 'other', hops: int | None = None) -> Message:
    """A message of a task without affinity; with hops as an older node passed it on."""
    return Message(key, hops, task='anywhere')


def check_runs_where_it_is_taken(stage: Bench) -> None:
    message = anywhere()
    assert stage.receive(message) == ['run']
    assert stage.dispatch(message) == ['pool']


def check_nothing_without_a_lease(stage: Bench) -> None:
    message = anywhere()
    assert stage.receive(message) == ['run']
    stage.job.leased = False
    assert stage.dispatch(message) == []
    assert stage.look(60.0) == []
    stage.gate.requeue_waiting()
    assert stage.log == ['requeue']


def check_earlier_life(stage: Bench) -> None:
    message = anywhere()
    stage.receive(message)
    stage.job.incarnation = 'life-2'
    assert stage.dispatch(message) == ['requeue']


class TestGate:
    def test_it_runs_where_it_is_taken(self, stage: Bench) -> None:
        check_runs_where_it_is_taken(stage)
        assert stage.counts == {'received': 1, 'run': 1}

    @pytest.mark.parametrize('key', ['other', 'nobody', 'self', 'mine', None])
    @pytest.mark.parametrize('hops', [None, 0, 3, 99])
    def test_wherever_it_was_sent_and_whatever_is_stamped_on_it(
        self, stage: Bench, key: str | None, hops: int | None
    ) -> None:
        message = anywhere(key, hops)
        message.headers[HOME] = 'celery'
        assert stage.receive(message) == ['run']
        assert stage.dispatch(message) == ['pool']
        assert stage.gate.waiting == 0

    def test_by_the_setting_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with bench(monkeypatch, affinity=False) as stage:
            assert stage.receive(Message('other', task='once')) == ['run']
            # What it contradicts runs nowhere: the worker would not have started with it.
            assert stage.receive(Message('other'))[1:] == ['reject']

    def test_the_last_look_asks_for_the_lease(self, stage: Bench) -> None:
        check_nothing_without_a_lease(stage)

    def test_and_for_the_life_that_received_it(self, stage: Bench) -> None:
        check_earlier_life(stage)

    def test_received_without_a_lease_it_waits_for_it(self, stage: Bench) -> None:
        stage.job.leased = False
        assert stage.receive(anywhere()) == []
        stage.job.leased = True
        assert stage.look() == ['run']

    def test_without_a_key_it_is_set_aside_as_ever(self, stage: Bench) -> None:
        message = anywhere(None)
        message.payload = ([], {}, {})
        assert stage.receive(message) == ['reject']

    def test_what_runs_holds_up_no_handover(self, stage: Bench) -> None:
        message = anywhere('mine')
        stage.receive(message)
        stage.dispatch(message)
        state.reserved_requests.add(stage.request)
        try:
            assert not stage.gate.busy(TokenSet.of(range(100)))
        finally:
            state.reserved_requests.discard(stage.request)

    def test_a_worker_that_is_no_node_leaves_it_alone(self, stage: Bench) -> None:
        stage.is_node = False
        assert stage.receive(anywhere()) == ['run']
        assert stage.counts == {}


def ignore_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    route_of = Coordination.route_of

    def always(self: Coordination, *args: Any) -> str | None:
        self.affinity = True
        return route_of(self, *args)

    monkeypatch.setattr(Coordination, 'route_of', always)


def run_without_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    place = inbox.place
    monkeypatch.setattr(
        inbox,
        'place',
        lambda found, here, rules, now: (
            inbox.Outcome(inbox.Action.RUN)
            if found.route is None
            else place(found, here, rules, now)
        ),
    )


def without_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gate at all, as for tasks that are not coordinated."""
    monkeypatch.setattr(Note, 'keep', lambda self, message: None)


FENCES: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Bench], None]]] = [
    (ignore_affinity, check_runs_where_it_is_taken),
    (run_without_a_lease, check_nothing_without_a_lease),
    (without_a_note, check_nothing_without_a_lease),
    (without_a_note, check_earlier_life),
]


@pytest.mark.parametrize(('remove', 'check'), FENCES, ids=lambda item: item.__name__)
def test_without_the_fence_the_check_fails(
    monkeypatch: pytest.MonkeyPatch,
    remove: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Bench], None],
) -> None:
    with bench(monkeypatch) as stage:
        check(stage)
    remove(monkeypatch)
    with bench(monkeypatch) as stage, pytest.raises(AssertionError):
        check(stage)


@pytest.mark.parametrize('queue', ['jobsync.shop_.n2', 'jobsync.shop_.parked'])
def test_in_another_s_queue_or_the_parked_one_its_place_is_home(stage: Bench, queue: str) -> None:
    """What survivors do with a dead node's queue, and with what is parked."""
    queues: Any = Queues(stage.app, 'memory', 'shop_')
    broker = CeleryBroker(stage.app, queues, SimpleNamespace(), stage.tasks.route_of)  # type: ignore[arg-type]  # it forwards nothing
    for message, route in ((anywhere('other', 2), None), (Message('other', 2), 'other')):
        message.headers[HOME] = 'celery'
        message.delivery_info = {'exchange': '', 'routing_key': queue}
        assert broker.address_of(message, queue) == (route, 'celery')


class TestProducer:
    def sent(self, published: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        made = Celery('sender', broker='memory://', set_as_current=False)
        JobSync(made, config=CoordinationConfig(), **settings)
        plugin = JobSync.of(made)
        assert plugin is not None
        affinity = None if 'affinity' in settings else False
        task = made.task(name='pay', shared=False)(
            exactly_once(key='{n}', scope='', affinity=affinity)(_pay)
        )
        task.apply_async((7,), headers={KEY: 'forged', HOME: 'jobsync.sync_.n2', HOPS: 2})
        return published[-1]

    @pytest.mark.parametrize('settings', [{}, {'affinity': False}])
    def test_a_message_goes_home_without_a_question_and_without_a_stamp(
        self,
        settings: dict[str, Any],
        published: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        asked: list[str] = []
        monkeypatch.setattr(
            'jobsync_core.worker.lookup.OwnerLookup.queue_of',
            lambda self, route: asked.append(route),
        )
        headers = self.sent(published, **settings)
        assert asked == [] and not {KEY, HOME, HOPS} & headers.keys()

    def test_what_came_by_a_node_s_queue_comes_back_to_its_home_queue(
        self, app: Celery, ledger: Any
    ) -> None:
        """Where it came from says an older node's message, which had an owner."""
        places: list[str] = []

        def note(routing_key: str, **_: Any) -> None:
            places.append(routing_key)

        ledger.begin_error = ExecutionRunning()
        task = task_of(app, affinity=False)
        signals.before_task_publish.connect(note)
        try:
            with pytest.raises(Ignore):
                in_worker(
                    task,
                    delivery_info={'exchange': '', 'routing_key': 'jobsync.sync_.n1'},
                    **{HOME: 'celery'},
                )
        finally:
            signals.before_task_publish.disconnect(note)
        assert places == ['celery']


def _pay(n: int) -> None:
    """A task."""


class TestDeclaration:
    @pytest.mark.parametrize('options', [{'jobsync_key': '{n}'}, {'jobsync_pin': ['gpu-%']}])
    def test_a_contradiction_is_refused_where_it_is_written(
        self, app: Celery, options: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigurationError, match=r'^pay: jobsync_.* take out one of the two$'):
            app.task(name='pay', shared=False, **options)(
                exactly_once(key='{n}', affinity=False)(_pay)
            )

    def test_it_is_acknowledged_late(self, app: Celery) -> None:
        task = task_of(app, affinity=False)
        assert (task.acks_late, task.reject_on_worker_lost) == (True, True)
