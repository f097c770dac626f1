"""The gate of a worker: what becomes of each message, in which order, whatever fails."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import dramatiq
import prometheus_client  # noqa: F401  # before the middleware tells it to keep its values in files
import pytest
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import AgeLimit, MiddlewareError
from dramatiq.middleware.prometheus import Prometheus

from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.errors import DatabaseRefused
from jobsync_core.worker.owners import Place
from jobsync_core.worker.routing import HOME, HOPS, KEY
from jobsync_dramatiq import JobSync, exactly_once, node
from jobsync_dramatiq.broker.copies import copy_for
from jobsync_dramatiq.gate import WorkerGate
from jobsync_dramatiq.hooks import Consumers

from .stage import Stage, message
from .stage import stage as make_stage

PARKED = 'send default.jobsync.shop_.parked hops=0'


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with make_stage() as made:
        yield made


def check_published_before_acknowledged(stage: Stage) -> None:
    assert stage.receive(message('other')) is None
    assert stage.log == ['send q2 hops=1', 'ack']


def check_failure_leaves_it_unacknowledged(stage: Stage) -> None:
    stage.send_error = ConnectionError('broker away')
    assert stage.receive(message('other')) is None
    assert stage.log == []
    stage.send_error = None
    assert stage.look(2.0) is None
    assert stage.log == ['send q2 hops=1', 'ack']


def check_hop_limit(stage: Stage) -> None:
    assert stage.receive(message('other', hops=3)) is None
    assert stage.log == ['send q2 hops=4', 'ack']
    stage.log.clear()
    assert stage.receive(message('other', hops=4)) is None
    assert stage.log == []
    assert stage.look(3.0) is None
    assert stage.log == [PARKED, 'ack', 'stray']


def check_never_to_self(stage: Stage) -> None:
    assert stage.receive(message('self')) is None
    assert stage.log == []
    stage.job.mine.add('self')
    assert stage.look() is not None


def check_late(stage: Stage) -> None:
    found = stage.receive(message('mine'))
    stage.job.mine.clear()
    assert stage.process(found) == ['requeue']


class TestReceipt:
    def test_what_is_mine_runs(self, stage: Stage) -> None:
        found = stage.receive(message('mine'))
        assert stage.process(found) == ['run', 'ack']
        assert stage.counts == {'received': 1, 'run': 1}
        assert stage.middleware == ['begin', 'end', 'ack']

    def test_another_s_is_published_before_it_is_acknowledged(self, stage: Stage) -> None:
        check_published_before_acknowledged(stage)
        assert stage.counts == {'received': 1, 'forwarded': 1}

    def test_a_publish_that_fails_leaves_it_unacknowledged(self, stage: Stage) -> None:
        check_failure_leaves_it_unacknowledged(stage)

    def test_a_publish_that_fails_is_tried_again_after_a_second(self, stage: Stage) -> None:
        stage.send_error = ConnectionError('broker away')
        stage.receive(message('other'))
        stage.send_error = None
        stage.look(0.5)
        assert stage.log == []
        stage.look(0.6)
        assert stage.log == ['send q2 hops=1', 'ack']

    def test_a_message_is_handed_on_only_so_often(self, stage: Stage) -> None:
        check_hop_limit(stage)

    def test_never_to_oneself(self, stage: Stage) -> None:
        check_never_to_self(stage)

    def test_a_key_is_made_where_the_producer_made_none(self, stage: Stage) -> None:
        stage.job.mine.add('7')
        assert stage.receive(message(None)) is not None
        stage.job.mine.clear()
        stage.owners.places['7'] = Place('n2', 'q2')
        assert stage.receive(message(None)) is None
        assert stage.log == ['send q2 hops=1', 'ack']

    def test_actors_that_are_not_coordinated_are_not_touched(self, stage: Stage) -> None:
        assert stage.process(stage.receive(message(None, actor='plain'))) == ['run', 'ack']
        assert stage.counts == {}

    def test_what_waits_for_its_time_is_not_touched(self, stage: Stage) -> None:
        assert stage.receive(message('other', eta=1)) is not None
        assert stage.log == []

    def test_another_s_is_dropped_where_every_node_gets_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with make_stage(on_unclaimed='drop') as stage:
            assert stage.receive(message('other')) is None
            assert (stage.log, stage.counts['dropped']) == (['ack'], 1)

    @pytest.mark.parametrize('error', [ConnectionError('lost'), ValueError('odd')])
    def test_an_acknowledgement_that_fails_raises_nothing(
        self, stage: Stage, error: Exception
    ) -> None:
        stage.source.ack_error = error
        assert stage.receive(message('other')) is None
        assert stage.log == ['send q2 hops=1']
        stage.source.ack_error = None
        stage.look(10.0)
        assert stage.log == ['send q2 hops=1']

    def test_a_gate_that_fails_raises_nothing_and_the_message_waits(self, stage: Stage) -> None:
        stage.owners.error = RuntimeError('map')
        assert stage.receive(message('other')) is None
        stage.owners.error = None
        stage.look()
        assert stage.log == ['send q2 hops=1', 'ack']


class TestWithoutAKey:
    """Nobody can tell where such a message may run: it runs nowhere, and fails for good."""

    @pytest.mark.parametrize(
        'args', [(), (1, 2), ('',), (None,), ('\0',), ('x' * 2001,), ('\ud800',)]
    )
    @pytest.mark.parametrize('actor', ['keyed', 'pinned', 'once'])
    def test_it_fails_at_once_and_goes_to_the_dead_letters(
        self, stage: Stage, actor: str, args: tuple[Any, ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        found = stage.receive(message(None, actor=actor, args=args))
        with caplog.at_level('WARNING'):
            assert stage.process(found) == ['nack default']
        (said,) = (
            record.getMessage()
            for record in caplog.records
            if 'cannot be routed' in record.getMessage()
        )
        assert (
            f'actor={actor} id={found.message_id} cannot be routed, and goes to the dead letters: '
            'no key can be made for it' in said
        )
        assert (stage.counts['unroutable'], stage.middleware) == (1, ['begin', 'end'])
        assert 'throws' not in found.options and 'retries' not in found.options

    def test_whatever_retry_when_says(self, stage: Stage) -> None:
        actor: Any = dramatiq.actor(
            actor_name='stubborn',
            broker=stage.broker,
            jobsync_key='{n}',
            retry_when=lambda *_: True,
        )(stage._run)
        assert stage.process(stage.receive(message(None, actor=actor.actor_name, args=()))) == [
            'nack default'
        ]

    def test_without_a_lease_it_goes_back_like_any_other(self, stage: Stage) -> None:
        found = stage.receive(message(None, args=()))
        stage.job.leased = False
        assert stage.process(found) == ['requeue']

    def test_a_key_of_exactly_once_that_cannot_be_made_beside_a_route_that_can(
        self, stage: Stage
    ) -> None:
        def run(n: str, m: object = None) -> None:
            stage.log.append('run')

        dramatiq.actor(actor_name='both', broker=stage.broker, jobsync_key='{n}')(
            exactly_once(key='{m}')(run)
        )
        dramatiq.actor(actor_name='scoped', broker=stage.broker)(
            exactly_once(key='{n}', scope='s' * 100)(run)
        )
        stage.job.mine.update(('mine', 'x' * 1950))
        for actor, key in (('both', 'mine'), ('scoped', 'x' * 1950)):
            assert stage.process(stage.receive(message(key, actor=actor))) == ['nack default']


class TestForgedMessages:
    @pytest.mark.parametrize(
        'key', ['other', 'nobody', 'pinned#0', ['other'], 7, 'x' * 2001, '\0', '\ud800', '']
    )
    def test_the_key_is_made_from_the_arguments(self, stage: Stage, key: Any) -> None:
        found = stage.receive(message('mine', **{KEY: key}))
        assert stage.process(found) == ['run', 'ack']
        assert KEY not in found.options

    @pytest.mark.parametrize('key', ['mine', 'keyed#1', 'pinned#64', 'pinned#-1', 'pinned#0x', '#'])
    def test_no_message_goes_around_a_pin(self, stage: Stage, key: str) -> None:
        stage.job.mine.add(key)
        assert stage.receive(message('7', None, 'pinned', **{KEY: key})) is None
        assert stage.process(
            stage.receive(message(None, None, 'pinned', args=(), **{KEY: key}))
        ) == ['nack default']

    @pytest.mark.parametrize(
        'hops', ['x', '3', [], {}, 1.5, -1, -(10**30), True, float('nan'), float('inf'), None]
    )
    def test_hops_that_are_no_count_are_none(self, stage: Stage, hops: Any) -> None:
        assert stage.receive(message('other', hops=0, **{HOPS: hops})) is None
        assert stage.log == ['send q2 hops=1', 'ack']

    @pytest.mark.parametrize(
        'home',
        ['elsewhere', 'jobsync.shop_.n2', 'default.XQ', ['default'], 7, '', '\0', 'x' * 2000],
    )
    def test_dead_letters_of_a_home_that_is_none_go_to_the_actor_s(
        self, stage: Stage, home: Any
    ) -> None:
        found = stage.receive(message('mine', hops=1, **{HOME: home}))
        assert found.queue_name == 'default'

    def test_a_queue_name_that_is_none_is_that_of_the_queue(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with make_stage(queue='default') as stage:
            for name in ('elsewhere', 'jobsync.shop_.n2', 'default.XQ'):
                odd = message('mine').copy(queue_name=name)
                assert stage.process(stage.receive(odd)) == ['run', 'ack']
                assert stage.receive(odd).queue_name == 'default'


class TestHome:
    def test_a_message_is_in_its_actor_s_queue_again_when_it_runs(self, stage: Stage) -> None:
        found = stage.receive(message('mine', hops=1))
        assert (found.queue_name, HOME in found.options, HOPS in found.options) == (
            'default',
            False,
            False,
        )

    def test_a_copy_keeps_id_time_arguments_and_options(self) -> None:
        first = message('other', retries=2)
        copy = copy_for('jobsync.shop_.n2', first, 'other', 3)
        assert copy.options == {'retries': 2, KEY: 'other', HOPS: 3, HOME: 'default'}
        again = copy_for('jobsync.shop_.n3', copy, 'other', 4)
        assert again.options == {'retries': 2, KEY: 'other', HOPS: 4, HOME: 'default'}
        back = copy_for('default', again, None)
        assert back.options == {'retries': 2}
        for each in (copy, again, back):
            assert (each.message_id, each.message_timestamp, each.args) == (
                first.message_id,
                first.message_timestamp,
                first.args,
            )

    def test_age_counts_from_the_first_sending_as_without_the_plugin(self, stage: Stage) -> None:
        stage.broker.add_middleware(AgeLimit(max_age=60_000))
        sent = message('mine', hops=1)
        old: Any = dramatiq.Message(
            **{**sent.asdict(), 'message_timestamp': sent.message_timestamp - 61_000}
        )
        assert stage.process(stage.receive(copy_for(old.queue_name, old, 'mine', 1))) == [
            'nack default'
        ]


class TestWaiting:
    def test_what_nobody_owns_waits_in_memory_first_and_is_parked_then(self, stage: Stage) -> None:
        stage.receive(message('nobody'))
        stage.look(1.9)
        assert stage.log == []
        stage.look(0.2)
        assert stage.log == [PARKED, 'ack', 'stray']
        assert stage.counts['parked'] == 1

    def test_it_goes_to_its_owner_as_soon_as_there_is_one(self, stage: Stage) -> None:
        stage.receive(message('nobody'))
        stage.owners.places['nobody'] = Place('n3', 'q3')
        stage.look()
        assert stage.log == ['send q3 hops=1', 'ack']

    def test_an_actor_that_is_not_known_here_may_be_known_to_its_owner(self, stage: Stage) -> None:
        assert stage.receive(message('other', actor='newer')) is None
        assert stage.log == ['send q2 hops=1', 'ack']

    def test_what_waited_over_the_end_of_a_life_goes_back(self, stage: Stage) -> None:
        stage.receive(message('nobody'))
        stage.job.incarnation = 'life-2'
        assert stage.look() is None
        assert stage.log == ['requeue']

    def test_a_closed_consumer_gives_back_what_waits(self, stage: Stage) -> None:
        stage.receive(message('nobody'))
        stage.consumer.close()
        assert stage.log == ['close waiting=1']

    @pytest.mark.parametrize('key', ['mine', None])
    def test_a_message_of_an_actor_that_is_not_known_here_waits_apart(
        self, stage: Stage, key: str | None
    ) -> None:
        assert stage.receive(message(key, actor='newer')) is None
        assert (stage.log, stage.counts['unknown']) == (
            ['send jobsync.shop_.unknown hops=0', 'ack'],
            1,
        )


class TestLease:
    def test_without_it_what_waits_goes_back_and_nothing_is_taken(self, stage: Stage) -> None:
        stage.receive(message('nobody'))
        stage.job.leased = False
        assert stage.receive(message('mine')) is None
        assert stage.log == ['requeue', 'pause']
        assert stage.look(60.0) is None
        assert stage.log == ['requeue', 'pause']
        stage.job.leased = True
        assert stage.look() is not None
        assert stage.log == ['requeue', 'pause', 'resume']

    @pytest.mark.parametrize(
        ('actor', 'log'), [('once', ['requeue begun', 'pause']), ('keyed', ['pause', 'ack'])]
    )
    def test_what_runs_goes_back_once_if_it_completes_once(
        self, stage: Stage, actor: str, log: list[str]
    ) -> None:
        found = stage.receive(message('mine', actor=actor))
        stage.gate.begin(found)
        stage.job.leased = False
        stage.look()
        stage.look()
        stage.consumer.ack(found)
        assert stage.log == log
        found.fail()
        stage.consumer.nack(found)
        assert stage.log[2:] == (['nack default'] if actor == 'keyed' else [])

    def test_what_is_not_coordinated_does_not_begin_either(self, stage: Stage) -> None:
        found = stage.receive(message(None, actor='plain'))
        stage.job.leased = False
        assert stage.process(found) == ['requeue']

    def test_what_an_earlier_life_received_goes_back(self, stage: Stage) -> None:
        found = stage.receive(message(None, actor='plain'))
        stage.job.incarnation = 'life-2'
        assert stage.process(found) == ['requeue']

    def test_what_the_worker_has_and_has_not_begun_goes_back(self, stage: Stage) -> None:
        found = stage.receive(message('mine'))
        other = stage.receive(message(None, actor='plain'))
        stage.job.leased = False
        stage.look()
        assert stage.log == ['requeue', 'requeue', 'pause']
        stage.job.leased = True
        for each in (found, other):
            assert (
                stage.process(each) == []
            )  # a thread takes it up all the same: it neither runs nor goes back a second time
        assert stage.middleware == []

    @pytest.mark.parametrize('change', ['lease', 'life'])
    def test_what_is_delayed_in_memory_is_forgotten(
        self, monkeypatch: pytest.MonkeyPatch, change: str
    ) -> None:
        with make_stage(queue='default.DQ') as stage:
            assert stage.receive(message('other', eta=1)) is not None
            take = stage.source.next

            def stopped(patient: bool) -> Any:  # in there the process was stopped for long
                if change == 'lease':
                    stage.job.leased = False
                else:
                    stage.job.incarnation = 'life-2'
                return take(patient)

            vars(stage.source)['next'] = stopped
            with pytest.raises(ConnectionClosed):
                stage.receive(message('other', eta=1))
            assert stage.log == [
                'requeue'
            ]  # the one just taken; closing the consumer gives back the rest
            with pytest.raises(ConnectionClosed):
                stage.look()

    def test_a_consumer_of_delayed_messages_that_has_given_none_waits_for_the_lease(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with make_stage(queue='default.DQ') as stage:
            stage.job.leased = False
            assert stage.look() is None
            stage.job.leased, stage.job.incarnation = True, 'life-2'
            assert stage.receive(message('other', eta=1)) is not None
            assert stage.look() is None
            assert stage.log == ['pause', 'resume']


class TestRefusals:
    """The database refuses to begin anything."""

    FULL = DatabaseRefused('no space left', '53100', True)

    def test_nothing_is_taken_and_what_has_not_begun_goes_back_with_one_line(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        pausing = stage.job.pausing
        begun, waits = (
            stage.receive(message('mine', actor='once')),
            stage.receive(message('mine', actor='once')),
        )
        stage.gate.begin(begun)
        stage.receive(message('nobody'))
        pausing.refused(self.FULL, stage.clock.time)
        assert stage.receive(message('mine')) is None
        assert stage.look() is None
        assert stage.log == ['requeue', 'requeue', 'pause']  # what runs stays: it may complete
        assert stage.process(waits) == []
        stage.clock.time = pausing.until
        assert stage.look() is not None
        assert stage.log == ['resume']
        pausing.refused(self.FULL, stage.clock.time)
        stage.look()
        assert (
            len(caplog.records) == 1
            and 'no space left' in caplog.text
            and 'free disk space' in caplog.text
        )

    def test_after_the_pause_one_tries(self, stage: Stage) -> None:
        check_one_tries(stage)

    def test_what_does_not_ask_the_database_runs_after_the_pause(self, stage: Stage) -> None:
        stage.job.pausing.refused(self.FULL, stage.clock.time)
        stage.clock.time = stage.job.pausing.until
        assert all(stage.receive(message('mine')) is not None for _ in range(3))

    def test_what_is_delayed_goes_to_its_queue_in_the_pause_too(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with make_stage(queue='default.DQ') as stage:
            stage.job.pausing.refused(self.FULL, stage.clock.time)
            assert stage.receive(message('other', eta=1)) is not None

    def test_what_runs_goes_back_too_where_the_lease_runs_out_in_the_pause(
        self, stage: Stage
    ) -> None:
        found = stage.receive(message('mine', actor='once'))
        stage.gate.begin(found)
        stage.job.pausing.refused(self.FULL, stage.clock.time)
        stage.look()
        assert stage.log == ['pause']
        stage.job.leased = False
        stage.look()
        stage.look()
        assert stage.log == ['pause', 'requeue begun']


def check_one_tries(stage: Stage) -> None:
    pausing = stage.job.pausing
    pausing.refused(TestRefusals.FULL, stage.clock.time)
    assert stage.look() is None
    stage.clock.time = pausing.until
    given = [stage.receive(message('mine', actor='once')) for _ in range(3)]
    assert [found is not None for found in given] == [True, False, False]
    pausing.answered()
    assert stage.look() is not None and stage.look() is not None


def test_without_that_every_message_would_try(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkerGate, 'admits', lambda *args: True)
    with pytest.raises(AssertionError):
        check_one_tries(stage)


class TestBeforeTheActor:
    def test_what_is_another_s_by_now_goes_back(self, stage: Stage) -> None:
        check_late(stage)
        assert stage.counts['returned'] == 1

    def test_no_other_middleware_hears_of_it(self, stage: Stage) -> None:
        check_late(stage)
        assert stage.middleware == []

    def test_prometheus_counts_it_neither_as_begun_nor_as_ended(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ('PROMETHEUS_MULTIPROC_DIR', 'prometheus_multiproc_dir'):
            monkeypatch.setenv(name, '')  # what the middleware sets goes again
        counter: Any = Prometheus()
        counter.after_process_boot(stage.broker)
        stage.broker.add_middleware(counter)
        check_late(stage)
        stage.job.mine.add('mine')
        assert stage.process(stage.receive(message('mine', hops=1))) == ['run', 'ack']
        labels = ('default', 'keyed')
        assert counter.inprogress_messages.labels(*labels)._value.get() == 0
        assert counter.total_messages.labels(*labels)._value.get() == 1

    def test_whoever_gives_a_token_away_sees_what_runs_on_it(self, stage: Stage) -> None:
        found = stage.receive(message('mine'))
        stage.gate.begin(found)
        assert stage.gate.busy(TokenSet([(4, 5)]))
        assert not stage.gate.busy(TokenSet([(5, 9)]))
        stage.gate.end(found)
        assert not stage.gate.busy(TokenSet([(4, 5)]))

    def test_the_token_is_that_of_the_queue_s_group(self, stage: Stage) -> None:
        vars(stage.job)['token_of'] = lambda route, group: {'default': 100}[group] + len(route)
        stage.gate.begin(stage.receive(message('mine')))
        assert stage.gate.busy(TokenSet([(104, 105)]))
        assert not stage.gate.busy(TokenSet([(4, 5)]))


class OtherBroker(dramatiq.Broker):
    """Of neither kind that the plugin knows."""


class TestBoot:
    @pytest.mark.parametrize('required', [True, False])
    def test_green_threads_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, required: bool
    ) -> None:
        monkeypatch.setattr(node, 'is_gevent_active', lambda: True)
        plugin = JobSync(host='nowhere', dbname='none', required=required)
        broker = OtherBroker(middleware=[plugin])
        with pytest.raises(MiddlewareError, match='green threads'):
            dramatiq.Worker(broker).start()

    def test_other_brokers_are_refused(self) -> None:
        broker = OtherBroker(middleware=[JobSync(host='nowhere', dbname='none')])
        with pytest.raises(
            MiddlewareError,
            match='OtherBroker: JobSync coordinates workers of RedisBroker and RabbitmqBroker only',
        ):
            dramatiq.Worker(broker).start()


def test_a_message_that_came_by_the_node_s_queue_does_not_need_its_own_queue_s_consumer() -> None:
    ready, early = SimpleNamespace(consumer=object()), SimpleNamespace(consumer=None)
    consumers = Consumers(home=early, node=ready)
    assert consumers['home'] is consumers['node'] is consumers['elsewhere'] is ready
    early.consumer = object()
    assert consumers['home'] is early


def test_a_consumer_that_comes_meanwhile_is_no_error() -> None:
    class Early:
        @property
        def consumer(self) -> None:
            consumers['late'] = SimpleNamespace(consumer=object())

    ready = SimpleNamespace(consumer=object())
    consumers = Consumers(early=Early(), ready=ready)
    assert consumers['elsewhere'] is ready


def check_recalled(stage: Stage) -> None:
    found = stage.receive(message('mine'))
    assert found is not None and stage.log == []
    stage.job.mine.clear()
    stage.owners.places['mine'] = Place('n2', 'q2')
    stage.gate.recall()
    assert stage.log == ['send q2 hops=1', 'ack'], 'no thread is free'
    assert stage.process(found) == [], 'its copy runs elsewhere'


class TestRecall:
    """What waits for a thread while the key is given away."""

    def test_it_goes_on_published_before_it_is_acknowledged(self, stage: Stage) -> None:
        check_recalled(stage)
        assert stage.counts['forwarded'] == 1

    def test_what_is_mine_still_stays(self, stage: Stage) -> None:
        found = stage.receive(message('mine'))
        stage.gate.recall()
        assert stage.log == []
        assert stage.process(found) == ['run', 'ack']

    def test_what_cannot_be_sent_goes_back_and_is_not_begun(self, stage: Stage) -> None:
        found = stage.receive(message('mine'))
        stage.job.mine.clear()
        stage.owners.places['mine'] = Place('n2', 'q2')
        stage.send_error = ConnectionError('the broker is away')
        stage.gate.recall()
        assert stage.log == ['requeue'] and stage.process(found) == []

    def test_one_that_fails_keeps_none_behind_it_in_hand(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage.job.mine.add('odd')
        for key in ('odd', 'mine'):
            stage.receive(message(key))
        stage.job.mine.clear()
        stage.owners.places['mine'] = Place('n2', 'q2')
        find = stage.owners.find

        def find_badly(route: str, home: str = '') -> Place:
            if route == 'odd':
                raise RuntimeError('nobody foresaw it')
            return find(route, home)

        monkeypatch.setattr(stage.owners, 'find', find_badly)
        stage.gate.recall()
        assert stage.log == ['requeue', 'send q2 hops=1', 'ack']

    def test_what_has_no_owner_yet_goes_back(self, stage: Stage) -> None:
        stage.receive(message('mine'))
        stage.job.mine.clear()
        stage.owners.places.pop('mine', None)
        stage.gate.recall()
        assert stage.log == ['requeue'] and stage.counts['returned'] == 1
