"""The gate of a worker: what becomes of each message, in which order, whatever fails."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from celery.exceptions import WorkerShutdown
from celery.worker import state

from jobsync_celery.mail import Leftovers
from jobsync_celery.steps import NodeStep
from jobsync_core.owners import Place

from .consumers import Bench, Message, bench

PARKED = 'send jobsync.shop_.parked hops=0'


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with bench(monkeypatch) as made:
        yield made


def check_published_before_acknowledged(stage: Bench) -> None:
    assert stage.receive(Message('other')) == ['send q2 hops=1', 'ack']


def check_failure_leaves_it_unacknowledged(stage: Bench) -> None:
    stage.publish_error = ConnectionError('broker away')
    assert stage.receive(Message('other')) == []
    assert stage.gate.waiting == 1
    stage.publish_error = None
    assert stage.look() == ['send q2 hops=1', 'ack']


def check_hop_limit(stage: Bench) -> None:
    assert stage.receive(Message('other', hops=3)) == ['send q2 hops=4', 'ack']
    stage.log.clear()
    assert stage.receive(Message('other', hops=4)) == []
    assert stage.look(3.0) == [PARKED, 'ack', 'stray']


def check_never_to_self(stage: Bench) -> None:
    assert stage.receive(Message('self')) == []
    stage.job.mine.add('self')
    assert stage.look() == ['run']


def check_late(stage: Bench) -> None:
    message = Message('mine')
    assert stage.receive(message) == ['run']
    stage.job.mine.clear()
    stage.owners.places['mine'] = Place('n2', 'q2')
    assert stage.dispatch(message) == ['send q2 hops=1', 'ack']


class TestReceipt:
    def test_what_is_mine_runs(self, stage: Bench) -> None:
        assert stage.receive(Message('mine')) == ['run']
        assert stage.counts == {'received': 1}

    def test_another_s_is_published_before_it_is_acknowledged(self, stage: Bench) -> None:
        check_published_before_acknowledged(stage)
        assert stage.counts == {'received': 1, 'forwarded': 1}

    def test_a_publish_that_fails_leaves_it_unacknowledged(self, stage: Bench) -> None:
        check_failure_leaves_it_unacknowledged(stage)

    def test_a_message_is_handed_on_only_so_often(self, stage: Bench) -> None:
        check_hop_limit(stage)

    def test_never_to_oneself(self, stage: Bench) -> None:
        check_never_to_self(stage)

    def test_a_key_is_made_where_the_producer_made_none(self, stage: Bench) -> None:
        stage.job.mine.add('k:7')
        assert stage.receive(Message(None)) == ['run']
        stage.log.clear()
        stage.job.mine.clear()
        stage.owners.places['k:7'] = Place('n2', 'q2')
        assert stage.receive(Message(None)) == ['send q2 hops=1', 'ack']

    def test_tasks_that_are_not_coordinated_are_not_touched(self, stage: Bench) -> None:
        assert stage.receive(Message(None, task='plain')) == ['run']
        assert stage.counts == {}

    def test_another_s_is_dropped_where_every_node_gets_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with bench(monkeypatch, on_unclaimed='drop') as stage:
            assert stage.receive(Message('other')) == ['ack']
            assert stage.counts['dropped'] == 1

    @pytest.mark.parametrize('error', [ConnectionError('lost'), ValueError('odd')])
    def test_an_acknowledgement_that_fails_raises_nothing(self, stage: Bench, error: Exception) -> None:
        stage.ack_error = error
        assert stage.receive(Message('other')) == ['send q2 hops=1']
        assert stage.gate.waiting == 0

    @pytest.mark.parametrize('error', [RuntimeError('map'), ConnectionError('db')])
    def test_a_gate_that_fails_raises_nothing_and_the_message_waits(self, stage: Bench, error: Exception) -> None:
        stage.owners.error = error
        assert stage.receive(Message('other')) == []
        stage.owners.error = None
        assert stage.look() == ['send q2 hops=1', 'ack']

    def test_arguments_without_a_key_run_here_and_fail_in_the_task(self, stage: Bench) -> None:
        message = Message(None)
        message.payload = ([], {}, {})
        assert stage.receive(message) == ['run']

    @pytest.mark.parametrize('hops', ['x', [], {}])
    def test_an_odd_header_raises_nothing(self, stage: Bench, hops: object) -> None:
        message = Message('other')
        message.headers['jobsync_hops'] = hops
        stage.receive(message)
        assert len(stage.log) + stage.gate.waiting > 0


class TestWaiting:
    def test_what_nobody_owns_waits_in_memory_first_and_is_parked_then(self, stage: Bench) -> None:
        assert stage.receive(Message('nobody')) == []
        assert stage.look(1.9) == []
        assert stage.look(0.2) == [PARKED, 'ack', 'stray']
        assert (stage.gate.waiting, stage.counts['parked']) == (0, 1)

    def test_it_goes_to_its_owner_as_soon_as_there_is_one(self, stage: Bench) -> None:
        stage.receive(Message('nobody'))
        stage.owners.places['nobody'] = Place('n3', 'q3')
        assert stage.look() == ['send q3 hops=1', 'ack']

    def test_without_a_lease_nothing_runs_and_nothing_is_parked(self, stage: Bench) -> None:
        stage.job.leased = False
        assert stage.receive(Message('mine')) == []
        assert stage.look(60.0) == []
        stage.job.leased = True
        assert stage.look() == ['run']

    def test_it_can_be_given_back(self, stage: Bench) -> None:
        stage.receive(Message('nobody'))
        stage.receive(Message('nowhere'))
        stage.gate.give_back()
        assert (stage.log, stage.gate.waiting, stage.counts['returned']) == (['requeue', 'requeue'], 0, 2)
        assert stage.look(60.0) == ['requeue', 'requeue']

    def test_after_a_reconnect_the_broker_delivers_it_again(self, stage: Bench) -> None:
        stage.receive(Message('nobody'))
        stage.gate.forget()
        assert stage.look(60.0) == []
        assert stage.gate.waiting == 0

    def test_one_timer_is_enough(self, stage: Bench) -> None:
        for _ in range(5):
            stage.receive(Message('nobody'))
        assert len(stage.timers) == 1

    def test_parking_that_fails_is_tried_again(self, stage: Bench) -> None:
        stage.receive(Message('nobody'))
        stage.publish_error = OSError('away')
        assert stage.look(3.0) == []
        stage.publish_error = None
        assert stage.look(2.0) == [PARKED, 'ack', 'stray']


class TestBeforeThePool:
    def test_what_is_still_mine_goes_to_the_pool(self, stage: Bench) -> None:
        message = Message('mine')
        stage.receive(message)
        assert stage.dispatch(message) == ['pool']
        assert stage.counts['run'] == 1

    def test_what_is_another_s_by_now_is_handed_on(self, stage: Bench) -> None:
        check_late(stage)

    def test_what_an_earlier_life_received_goes_back(self, stage: Bench) -> None:
        message = Message('mine')
        stage.receive(message)
        stage.job.incarnation = 'life-2'
        assert stage.dispatch(message) == ['requeue']
        assert stage.counts['returned'] == 1

    def test_what_waited_over_the_end_of_a_life_goes_back(self, stage: Bench) -> None:
        stage.receive(Message('nobody'))
        stage.job.incarnation = 'life-2'
        assert stage.look() == ['requeue']

    def test_without_a_lease_it_waits(self, stage: Bench) -> None:
        message = Message('mine')
        stage.receive(message)
        stage.job.leased = False
        assert stage.dispatch(message) == []
        stage.gate.give_back()
        assert stage.log == ['requeue']

    def test_what_did_not_pass_the_gate_is_not_touched(self, stage: Bench) -> None:
        assert stage.dispatch(Message(None, task='plain')) == ['pool']


class TestUnknownTasks:
    def test_a_message_of_an_unknown_task_is_parked_and_then_acknowledged(self, stage: Bench) -> None:
        message = Message(None, task='nobody knows it')
        vars(message)['ack'] = lambda: stage.log.append('ack')
        stage.consumer.on_unknown_task(None, message, KeyError(message.headers['task']))
        assert stage.log == ['send jobsync.shop_.parked hops=0', 'ack', 'stray']

    def test_it_stays_unacknowledged_where_it_cannot_be_parked(self, stage: Bench) -> None:
        stage.publish_error = OSError('the broker is away')
        message = Message(None, task='nobody knows it')
        vars(message)['ack'] = lambda: stage.log.append('ack')
        stage.consumer.on_unknown_task(None, message, KeyError(message.headers['task']))
        assert stage.log == []


class TestSurrender:
    """A worker that lost its lease on RabbitMQ."""

    @pytest.mark.parametrize(('task', 'expected'), [('once', ['requeue']), ('keyed', [])])
    def test_what_is_executed_goes_back_if_it_completes_once(self, stage: Bench, task: str, expected: list[str]) -> None:
        message = Message('mine', task=task)
        stage.receive(message)
        assert stage.dispatch(message) == ['pool']
        stage.log.clear()
        stage.gate.surrender()
        assert stage.log == []  # the pool has not begun it: it comes back by itself
        state.active_requests.add(stage.request)
        stage.gate.surrender()
        stage.gate.surrender()
        assert stage.log == expected


def test_green_threads_are_refused_before_the_worker_starts(stage: Bench, caplog: pytest.LogCaptureFixture) -> None:
    worker = SimpleNamespace(app=stage.app, pool_cls='celery.concurrency.gevent:TaskPool', hostname='w@x')
    with pytest.raises(WorkerShutdown) as ended:
        NodeStep(worker)
    assert ended.value.code == 1
    assert "pool 'celery.concurrency.gevent:TaskPool'" in caplog.text and '--pool prefork' in caplog.text


class TestWhatWasNotRecorded:
    """Messages that a lost connection to Redis brought, when the worker ends."""

    @pytest.fixture
    def leaving(self, stage: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
        stage.plugin._left.unrecorded['tag'] = '[{"headers": {"id": "m7"}}, "", "celery"]'
        monkeypatch.setattr(type(stage.job), '__exit__', lambda *args: None, raising=False)
        return stage

    def _leave(self, stage: Bench, restore: Callable[[str, Leftovers], int]) -> None:
        vars(stage.plugin)['_mail'] = SimpleNamespace(restore=restore, close=lambda: None)
        vars(stage.plugin)['_consumer_gate'] = None
        stage.plugin.leave()

    def test_it_is_given_back(self, leaving: Bench) -> None:
        given: list[tuple[str, dict[str, str]]] = []

        def restore(node: str, left: Leftovers) -> int:
            given.append((node, dict(left.unrecorded)))
            return 1

        self._leave(leaving, restore)
        assert given == [('n1', {'tag': '[{"headers": {"id": "m7"}}, "", "celery"]'})]

    def test_with_the_broker_away_it_is_named(self, leaving: Bench, caplog: pytest.LogCaptureFixture) -> None:
        def restore(node: str, left: Leftovers) -> int:
            raise ConnectionError('away')

        self._leave(leaving, restore)
        assert '1 messages' in caplog.text and 'send them again: m7' in caplog.text


def test_a_reconnect_leaves_one_look_at_the_lease(stage: Bench) -> None:
    looks: list[SimpleNamespace] = []

    def call_repeatedly(seconds: float, call: Callable[[], object]) -> SimpleNamespace:
        entry = SimpleNamespace(live=True)
        entry.cancel = lambda: setattr(entry, 'live', False)
        looks.append(entry)
        return entry

    stage.consumer.timer.call_repeatedly = call_repeatedly
    vars(stage.plugin)['_consumer'] = stage.consumer
    for _ in range(3):
        stage.plugin.connected()
        assert sum(entry.live for entry in looks) == 1
        stage.plugin.disconnected()
        assert sum(entry.live for entry in looks) == 0
