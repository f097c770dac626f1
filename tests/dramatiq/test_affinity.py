"""Actors without affinity in a Dramatiq worker: their messages run where they are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker

from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.config import CoordinationConfig
from jobsync_core.worker import inbox
from jobsync_core.worker.incoming import Refused, Stamps
from jobsync_core.worker.routing import HOME, HOPS, KEY, WAITS, Coordination
from jobsync_dramatiq import JobSync, exactly_once
from jobsync_dramatiq.broker.copies import route_and_home
from jobsync_dramatiq.errors import DeclarationRefused
from jobsync_dramatiq.gate import WorkerGate
from tests.support.fakes import FakeLedger

from .stage import Stage, message, stage
from .test_once import ledger

__all__ = ['ledger']


@pytest.fixture(name='stage')
def made_stage() -> Iterator[Stage]:
    with stage() as made:
        yield made


def anywhere(key: str | None = 'other', hops: int | None = None, **options: Any) -> Any:
    """A message of an actor without affinity; with hops as an older node passed it on."""
    return message(key, hops, 'anywhere', **options)


def check_runs_where_it_is_taken(stage: Stage) -> None:
    found = stage.receive(anywhere())
    assert found is not None
    assert stage.process(found) == ['run', 'ack']


def check_nothing_without_a_lease(stage: Stage) -> None:
    found = stage.receive(anywhere())
    stage.job.leased = False
    assert stage.process(found) == ['requeue']


def check_earlier_life(stage: Stage) -> None:
    found = stage.receive(anywhere())
    stage.job.incarnation = 'life-2'
    assert stage.process(found) == ['requeue']


class TestGate:
    @pytest.fixture(autouse=True)
    def _ledger(self, ledger: FakeLedger) -> None:
        """Something to complete the key in."""

    def test_it_runs_where_it_is_taken(self, stage: Stage) -> None:
        check_runs_where_it_is_taken(stage)
        assert stage.counts == {'received': 1, 'run': 1}
        assert stage.middleware == ['begin', 'end', 'ack']

    @pytest.mark.parametrize('key', ['other', 'nobody', 'self', 'mine', None])
    @pytest.mark.parametrize('hops', [None, 0, 3, 99])
    def test_wherever_it_was_sent_and_whatever_is_stamped_on_it(
        self, stage: Stage, key: str | None, hops: int | None
    ) -> None:
        found = stage.receive(anywhere(key, hops))
        assert found is not None and found.queue_name == 'default'
        assert stage.process(found) == ['run', 'ack']

    def test_by_the_setting_too(self) -> None:
        with stage(affinity=False) as made:
            assert made.process(made.receive(message('other', actor='once'))) == ['run', 'ack']
            # What it contradicts runs nowhere: the worker would not have started with it.
            assert made.process(made.receive(message('other')))[-1] == 'nack default'

    def test_the_last_look_asks_for_the_lease(self, stage: Stage) -> None:
        check_nothing_without_a_lease(stage)

    def test_and_for_the_life_that_received_it(self, stage: Stage) -> None:
        check_earlier_life(stage)

    def test_what_runs_goes_back_without_a_lease_and_says_that_it_came_before(
        self, stage: Stage
    ) -> None:
        stage.gate.begin(stage.receive(anywhere()))
        stage.job.leased = False
        stage.look()
        assert stage.log == ['requeue begun', 'pause']

    def test_what_runs_holds_up_no_handover(self, stage: Stage) -> None:
        stage.gate.begin(stage.receive(anywhere('mine')))
        assert not stage.gate.busy(TokenSet.of(range(100)))

    @pytest.mark.parametrize('args', [(), (7, 8), ('',), ('x' * 2001,)])
    def test_without_a_key_it_goes_to_the_dead_letters_as_ever(
        self, stage: Stage, args: tuple[Any, ...]
    ) -> None:
        assert stage.process(stage.receive(anywhere(None, args=args))) == ['nack default']

    def test_a_key_that_is_too_long_behind_its_scope_does_so_too(self, stage: Stage) -> None:
        """The actor itself would raise, and be retried for hours."""
        found = stage.receive(anywhere(None, args=('x' * 1995,)))
        assert stage.process(found) == ['nack default']


def ignore_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    route_of = Coordination.route_of

    def always(self: Coordination, *args: Any) -> str | None:
        self.affinity = True
        return route_of(self, *args)

    monkeypatch.setattr(Coordination, 'route_of', always)


def without_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkerGate, 'begin', lambda self, message: None)


def trust_what_has_no_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, 'may_begin', lambda found, here: found.route is None or here.mine)


FENCES: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Stage], None]]] = [
    (ignore_affinity, check_runs_where_it_is_taken),
    (without_the_last_look, check_nothing_without_a_lease),
    (trust_what_has_no_owner, check_nothing_without_a_lease),
    (trust_what_has_no_owner, check_earlier_life),
]


@pytest.mark.parametrize(('remove', 'check'), FENCES, ids=lambda item: item.__name__)
def test_without_the_fence_the_check_fails(
    monkeypatch: pytest.MonkeyPatch,
    ledger: FakeLedger,
    remove: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Stage], None],
) -> None:
    with stage() as made:
        check(made)
    remove(monkeypatch)
    with stage() as made, pytest.raises(AssertionError):
        check(made)


def test_in_another_s_queue_or_the_parked_one_its_place_is_home(stage: Stage) -> None:
    """What survivors do with a dead node's queue, and with what is parked."""
    found = anywhere('other', 2)
    actors, queue = stage.plugin.producer.actors, 'default.jobsync.shop_.n2'
    assert route_and_home(actors, found, queue, 'shop_') == (None, 'default')
    assert route_and_home(actors, message('other', 2), queue, 'shop_')[0] == 'other'


class TestProducer:
    @pytest.mark.parametrize('affinity', [False, None])
    def test_a_message_goes_home_without_a_question_and_without_a_stamp(
        self, affinity: bool | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        monkeypatch.setattr(
            'jobsync_core.worker.lookup.OwnerLookup.queue_of',
            lambda self, route: asked.append(route),
        )
        broker = StubBroker()
        settings = {} if affinity is False else {'affinity': False}
        broker.add_middleware(JobSync(config=CoordinationConfig(), **settings))
        actor = dramatiq.actor(actor_name='pay', broker=broker)(
            exactly_once(key='{n}', scope='', affinity=affinity)(_pay)
        )
        sent = actor.message(7).copy(
            options={KEY: 'forged', HOME: 'jobsync.sync_.n2', HOPS: 2, WAITS: 1}
        )
        found = broker.enqueue(sent)
        assert asked == [] and found.options.keys() == {WAITS}
        assert broker.queues['default'].qsize() == 1


def _pay(n: int) -> None:
    """An actor."""


class TestDeclaration:
    @pytest.mark.parametrize('options', [{'jobsync_key': '{n}'}, {'jobsync_pin': ['gpu-%']}])
    def test_a_contradiction_is_refused_where_it_is_written(self, options: dict[str, Any]) -> None:
        broker = StubBroker()
        broker.add_middleware(JobSync(config=CoordinationConfig()))
        declare: Any = dramatiq.actor
        with pytest.raises(DeclarationRefused, match=r'^pay: jobsync_.* take out one of the two$'):
            declare(actor_name='pay', broker=broker, **options)(
                exactly_once(key='{n}', affinity=False)(_pay)
            )

    @pytest.mark.parametrize('affinity', [True, False])
    def test_of_a_class_the_key_is_not_taken_for_one_of_its_own(self, affinity: bool) -> None:
        broker = StubBroker()
        broker.add_middleware(plugin := JobSync(config=CoordinationConfig()))
        made = broker

        class Pay(dramatiq.GenericActor):
            class Meta:
                actor_name, broker = 'pay', made

            @exactly_once(key='pay:{n}', scope='', affinity=affinity)
            def perform(self, n: int) -> None:
                """Nothing."""

        declared: Any = Pay
        actors = plugin.producer.actors
        route = actors.read_route(declared.message(7), Stamps())
        assert route == ('pay:7' if affinity else None)
        assert isinstance(actors.read_route(declared.message(), Stamps()), Refused)
