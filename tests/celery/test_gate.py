"""The gate of a worker: what becomes of each message, in which order, whatever fails."""

from __future__ import annotations

import itertools
import pickle
import ssl
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from amqp.exceptions import NotFound, RecoverableConnectionError
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.exceptions import (
    BackendStoreError,
    InvalidTaskError,
    Reject,
    Retry,
    TaskRevokedError,
    WorkerShutdown,
)
from celery.worker import state
from kombu.exceptions import ContentDisallowed, DecodeError, OperationalError

from jobsync_celery import JobSync
from jobsync_celery.consuming import LeasedConsumer
from jobsync_celery.gate.delivery import unstamped
from jobsync_celery.gate.placing import Placing
from jobsync_celery.gate.refusal import as_refused, is_refused
from jobsync_celery.hooks import restore_last
from jobsync_celery.loop_watch import LoopWatch
from jobsync_celery.redis.carried_over import CarriedOver
from jobsync_celery.steps import NodeStep
from jobsync_celery.tasks.resending import RequeueLater
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import DatabaseRefused, MessageRefused, Unroutable
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.node_status import refusal
from jobsync_core.worker.owners import Place
from jobsync_core.worker.routing import REFUSED
from tests.support.waiting import eventually

from .consumers import Bench, Message, Request, bench

PARKED = 'send celery.jobsync.shop_.parked hops=0'
UNKNOWN = 'send jobsync.shop_.unknown hops=0'


class BackendAway(Exception):
    """As redis-py's ConnectionError, which is none of Python's own."""


#: What befalls a message through no fault of its own: of a result backend, of a pool, of a machine.
TROUBLE = [
    BackendAway('away'),
    ConnectionError('the result backend'),
    RuntimeError("can't start new thread"),
    OSError(24, 'Too many open files'),
    OperationalError('away'),
    ssl.SSLCertVerificationError('self-signed'),
    BackendStoreError('away'),
    BlockingIOError(),
]
#: What is so each time, wherever it goes.
FAULTS = [
    KeyError('root_id'),
    pickle.PicklingError('a lock'),
    InvalidTaskError('odd'),
    DecodeError('odd'),
    ContentDisallowed('pickle'),
    UnicodeDecodeError('utf-8', b'', 0, 1, 'odd'),
    RecursionError(),
]


def raising(error: Exception) -> Callable[..., Any]:
    def fall(*_: Any) -> None:
        raise error

    return fall


def check_goes_back(stage: Bench, error: Exception) -> None:
    """It is tried again here, ever less often, and each tenth time it is given back."""
    tries: list[float] = []

    def fall(message: Message) -> None:
        tries.append(stage.clock.time)
        raise error

    stage.handle = fall
    message = Message(None)
    stage.consumer.create_task_handler()(message)
    while stage.gate.waiting:
        assert message.state == ''
        stage.look(0.5)
    assert message.state == 'requeue'
    assert [round(later - former) for former, later in itertools.pairwise(tries)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        60,
        60,
        60,
    ]
    assert stage.counts == {'retried': 9, 'returned': 1}


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


def check_set_aside(stage: Bench, payload: Any) -> None:
    message = Message(None)
    message.payload = payload
    assert stage.receive(message) == ['reject']
    assert stage.counts == {'refused': 1}


def check_forged_key(stage: Bench) -> None:
    message = Message('other')
    message.headers['jobsync_key'] = 'mine'
    assert stage.receive(message) == ['send q2 hops=1', 'ack']


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
        stage.job.mine.add('7')
        assert stage.receive(Message(None)) == ['run']
        stage.log.clear()
        stage.job.mine.clear()
        stage.owners.places['7'] = Place('n2', 'q2')
        assert stage.receive(Message(None)) == ['send q2 hops=1', 'ack']

    def test_tasks_that_are_not_coordinated_are_not_touched(self, stage: Bench) -> None:
        assert stage.receive(Message(None, task='plain')) == ['run']
        assert stage.counts == {}

    def test_another_s_is_dropped_where_every_node_gets_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with bench(monkeypatch, on_unclaimed='drop') as stage:
            assert stage.receive(Message('other')) == ['ack']
            assert stage.counts['dropped'] == 1

    @pytest.mark.parametrize('error', [ConnectionError('lost'), ValueError('odd')])
    def test_an_acknowledgement_that_fails_raises_nothing(
        self, stage: Bench, error: Exception
    ) -> None:
        stage.ack_error = error
        assert stage.receive(Message('other')) == ['send q2 hops=1']
        assert stage.gate.waiting == 0

    @pytest.mark.parametrize('error', [RuntimeError('map'), ConnectionError('db')])
    def test_a_gate_that_fails_raises_nothing_and_the_message_waits(
        self, stage: Bench, error: Exception
    ) -> None:
        stage.owners.error = error
        assert stage.receive(Message('other')) == []
        stage.owners.error = None
        assert stage.look() == ['send q2 hops=1', 'ack']

    @pytest.mark.parametrize(
        'payload',
        [
            ([], {}, {}),
            ([7, 8], {}, {}),
            ([''], {}, {}),
            ([None], {}, {}),
            (['x' * 2001], {}, {}),
            (5, {}, {}),
            ([7], [], {}),
            ([], {'m': 1}, None),
        ],
    )
    def test_arguments_without_a_key_run_nowhere(
        self, stage: Bench, payload: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        check_set_aside(stage, payload)
        eventually(lambda: stage.app.backend.get_task_meta('m1')['status'] == 'FAILURE')
        assert type(stage.app.backend.get_task_meta('m1')['result']) is Unroutable
        assert len(caplog.records) == 1 and 'Task keyed[m1] is set aside' in caplog.text

    @pytest.mark.parametrize('hops', ['x', [], {}])
    def test_an_odd_header_raises_nothing(self, stage: Bench, hops: object) -> None:
        message = Message('other')
        message.headers['jobsync_hops'] = hops
        assert stage.receive(message) == ['send q2 hops=1', 'ack']

    def test_a_forged_key_does_not_move_a_message(self, stage: Bench) -> None:
        check_forged_key(stage)


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
        stage.gate.requeue_waiting()
        assert (stage.log, stage.gate.waiting, stage.counts['returned']) == (
            ['requeue', 'requeue'],
            0,
            2,
        )
        assert stage.look(60.0) == ['requeue', 'requeue']

    def test_after_a_reconnect_the_broker_delivers_it_again(self, stage: Bench) -> None:
        stage.receive(Message('nobody'))
        stage.gate.disconnected()
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
        stage.gate.requeue_waiting()
        assert stage.log == ['requeue']

    def test_what_did_not_pass_the_gate_is_not_touched(self, stage: Bench) -> None:
        assert stage.dispatch(Message(None, task='plain')) == ['pool']


class TestUnknownTasks:
    def _receive(self, stage: Bench, name: Any = 'nobody knows it') -> Message:
        message = Message(None, task=name)
        stage.consumer.on_unknown_task(None, message, KeyError(name))
        return message

    def test_a_message_of_an_unknown_task_is_set_apart_and_then_acknowledged(
        self, stage: Bench
    ) -> None:
        message = self._receive(stage)
        assert (stage.log, message.state) == ([UNKNOWN], 'ack')

    def test_it_stays_unacknowledged_where_it_cannot_be_sent_and_is_tried_again(
        self, stage: Bench
    ) -> None:
        stage.publish_error = OSError('the broker is away')
        message = self._receive(stage)
        assert (stage.log, message.state) == ([], '')
        stage.publish_error = None
        stage.look(2.0)
        assert (stage.log, message.state) == ([UNKNOWN], 'ack')

    def test_many_of_one_task_are_one_line(
        self, stage: Bench, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(100):
            self._receive(stage)
        assert len(caplog.records) == 1
        stage.clock.time += 60.0
        self._receive(stage)
        assert '(99 more like it)' in caplog.text


def nested(depth: int) -> list[Any]:
    """Lists in lists: JSON takes more of them than pickle does on the way to a pool's process."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


class TestOddMessages:
    """Whatever comes, nothing is raised into the consumer, and what no worker can take is rejected
    once with one line.
    """

    def _receive(self, stage: Bench, message: Any) -> str:
        stage.consumer.create_task_handler()(message)
        return str(message.state)

    @pytest.mark.parametrize(
        ('part', 'value'),
        [
            ('headers', []),
            ('headers', 'text'),
            ('headers', 5),
            ('payload', None),
            ('payload', 5),
            ('payload', [1, 2]),
            ('payload', []),
            ('payload', [1, 2, 3, 4]),
            ('payload', {}),
            ('payload', 'abc'),
            ('payload', ([7], {}, 5)),
            ('errors', [(None, OSError('bz2'), None)]),
            ('payload', ([nested(300)], {}, {})),
            ('headers', {'task': 't', 'deep': nested(300)}),
        ],
    )
    def test_what_has_no_shape(
        self, stage: Bench, caplog: pytest.LogCaptureFixture, part: str, value: Any
    ) -> None:
        message = Message(None)
        setattr(message, part, value)
        assert self._receive(stage, message) == 'reject'
        assert len(caplog.records) == 1 and stage.counts == {'refused': 1}

    @pytest.mark.parametrize(
        ('name', 'value'),
        [
            ('task', []),
            ('task', ''),
            ('task', {}),
            ('task', 'x' * 1001),
            ('task', None),
            ('id', None),
            ('id', []),
            ('id', {}),
            ('timelimit', 5),
            ('timelimit', ['x', 'y']),
            ('timelimit', [1]),
            ('timelimit', [[], {}]),
            ('timelimit', [float('nan'), None]),
            ('timelimit', [-1, None]),
            ('timelimit', [10**30, None]),
            ('stamped_headers', [[1]]),
            ('stamped_headers', 'abc'),
            ('stamped_headers', {'a': 1}),
            ('stamps', [1]),
            ('stamps', 'abc'),
        ],
    )
    def test_headers_that_would_end_a_worker(
        self, stage: Bench, caplog: pytest.LogCaptureFixture, name: str, value: Any
    ) -> None:
        message = Message(None)
        message.headers[name] = value
        assert self._receive(stage, message) == 'reject'
        assert len(caplog.records) == 1 and caplog.records[0].getMessage().isprintable()

    def test_what_was_set_aside_elsewhere_is_rejected_with_a_line(
        self, stage: Bench, caplog: pytest.LogCaptureFixture
    ) -> None:
        message = Message(None)
        message.headers[REFUSED] = True
        assert self._receive(stage, message) == 'reject' and stage.log == []
        (line,) = (record.getMessage() for record in caplog.records)
        assert line.startswith('Task keyed[m1] was set aside in the queue of a node')

    def test_on_redis_nothing_comes_to_be_rejected_whatever_it_says(self, stage: Bench) -> None:
        message = Message(None)
        message.headers[REFUSED] = True
        assert is_refused(message, 'amqp') and not is_refused(message, 'redis')

    def test_a_dead_letter_that_is_sent_again_is_a_message_like_any_other(
        self, stage: Bench
    ) -> None:
        message = Message('a')
        message.headers.update({REFUSED: True, 'x-death': [{'count': 1}]})
        assert not is_refused(message, 'amqp')
        assert REFUSED not in unstamped(message)

    def test_what_goes_home_to_be_rejected_is_known_there(self, stage: Bench) -> None:
        message = Message(None)
        message.headers['x-death'] = [{'count': 1}]  # on Redis, which writes none
        message.headers = as_refused(message)
        assert is_refused(message, 'amqp')

    def test_what_celery_falls_over_is_set_aside(self, stage: Bench) -> None:
        check_celery_falls(stage)

    def test_what_ends_the_worker_or_its_connection_goes_through(self, stage: Bench) -> None:
        stage.consumer.connection.connected = False
        for error in (ConnectionError('broker'), MemoryError()):
            stage.handle = raising(error)
            with pytest.raises(type(error)):
                self._receive(stage, Message(None))

    @pytest.mark.parametrize('error', TROUBLE, ids=repr)
    def test_what_is_no_message_s_fault_is_tried_again(
        self, stage: Bench, error: Exception
    ) -> None:
        check_goes_back(stage, error)

    def test_what_rabbitmq_would_drop_is_not_given_back(self, stage: Bench) -> None:
        stage.handle = raising(BackendAway('away'))
        message = Message(None)
        message.properties['expiration'] = '0'
        self._receive(stage, message)
        for _ in range(2000):
            stage.look(0.5)
        assert (message.state, stage.gate.waiting) == ('', 1)

    @pytest.mark.parametrize('error', FAULTS, ids=repr)
    def test_what_is_its_fault_sets_it_aside(self, stage: Bench, error: Exception) -> None:
        stage.handle = raising(error)
        assert self._receive(stage, Message(None)) == 'reject'

    @pytest.mark.parametrize('name', ['on_decode_error', 'on_invalid_task', 'on_unknown_message'])
    def test_what_celery_would_acknowledge_or_reject_is_rejected(
        self, stage: Bench, caplog: pytest.LogCaptureFixture, name: str
    ) -> None:
        message, error = Message(None), ValueError('odd')
        given = {
            'on_decode_error': (message, error),
            'on_invalid_task': (None, message, error),
            'on_unknown_message': (None, message),
        }
        getattr(stage.consumer, name)(*given[name])
        assert message.state == 'reject'
        assert len(caplog.records) == 1

    def test_a_result_backend_that_fails_hinders_nothing(
        self, stage: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise ConnectionError('backend away')

        monkeypatch.setattr(type(stage.app.backend), 'mark_as_failure', broken)
        monkeypatch.setattr(type(stage.app.backend), 'store_result', broken)
        message = Message(None)
        message.headers['task'] = []
        assert self._receive(stage, message) == 'reject'

    def test_an_errback_that_takes_long_or_raises_holds_up_nobody(
        self, stage: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check_not_held_up(stage, monkeypatch)

    def test_its_errbacks_are_told(self, stage: Bench) -> None:
        told: list[tuple[str, str]] = []

        def tell(request: Any, error: BaseException, traceback: Any) -> None:
            told.append((request.id, type(error).__name__))

        stage.app.task(name='tell', shared=False)(tell)
        message = Message(None)
        message.payload = (
            [],
            {},
            {
                'errbacks': [stage.app.tasks['tell'].s()],
                'callbacks': None,
                'chain': None,
                'chord': None,
            },
        )
        assert stage.receive(message) == ['reject']
        eventually(lambda: told == [('m1', 'Unroutable')])

    def test_a_task_that_cannot_be_coordinated_runs_nowhere(
        self, stage: Bench, caplog: pytest.LogCaptureFixture
    ) -> None:
        stage.app.task(name='wrong', shared=False, jobsync_key='{m}')(_n)
        assert stage.receive(Message(None, task='wrong')) == ['reject']
        assert "names 'm'" in caplog.text

    def test_a_pin_that_came_late_holds(self, stage: Bench) -> None:
        stage.app.task(name='late', shared=False, jobsync_pin=['%-gpu'])(_n)
        assert stage.receive(Message(None, task='late')) == [UNKNOWN, 'ack']


def _n(n: int) -> None:
    """A task."""


def check_not_held_up(stage: Bench, monkeypatch: pytest.MonkeyPatch, limit: float = 10.0) -> None:
    """Twenty messages are set aside, with errbacks that wait for what comes last, and raise."""
    go, told = threading.Event(), []

    def tell(*_: Any, **__: Any) -> None:
        told.append(go.wait(limit))
        raise SystemExit('an errback')

    monkeypatch.setattr(type(stage.app.backend), 'mark_as_failure', tell)
    for _ in range(20):
        message = Message(None)
        message.payload = ([], {}, {})
        stage.receive(message)
    assert (stage.log, [done for done in told if done]) == (['reject'] * 20, [])
    go.set()
    eventually(lambda: told == [True] * 20, limit)


def check_celery_falls(stage: Bench) -> None:
    def fall(message: Message) -> None:
        raise KeyError('root_id')

    stage.handle = fall
    message = Message(None)
    stage.consumer.create_task_handler()(message)
    assert message.state == 'reject'
    message.ack_log_error(None, ())  # what was promised before, and is kept in the event loop
    assert message.state == 'reject'


def check_each_on_its_own(stage: Bench) -> None:
    """A strategy that raises while waiting messages are looked at."""
    stage.log.clear()
    for _ in range(3):
        assert stage.receive(Message('nobody')) == []
    stage.job.mine.add('nobody')
    stage.strategy_errors = iter([None, KeyError('odd'), None])
    assert stage.look() == ['run', 'reject', 'run']
    assert (stage.gate.waiting, stage.counts['refused']) == (0, 1)


class TestWhatTheTaskRaised:
    @pytest.mark.parametrize('wrapped', [True, False])
    def test_a_memory_error_ends_the_task_and_not_the_worker(
        self, stage: Bench, wrapped: bool
    ) -> None:
        assert (
            end_with(stage, MemoryError('no memory'), wrapped) == "failed MemoryError('no memory')"
        )

    def test_a_retry_for_one_stays_a_retry(self, stage: Bench) -> None:
        assert end_with(stage, Retry('again', MemoryError()), wrapped=False).startswith(
            'failed Retry('
        )


def end_with(stage: Bench, error: Exception, wrapped: bool) -> str:
    """A task of this node ends with an error; what Celery's request was told."""
    message = Message('mine')
    stage.job.mine.add('mine')
    stage.receive(message)
    request = Request(stage, message)
    stage.gate._pool_entry.guard_end(request)
    try:
        raise error
    except Exception:
        info = ExceptionInfo()
    if not wrapped:
        info.exception = error
    request.on_failure(info, return_ok=True)
    return stage.log[-1]


class TestEachOnItsOwn:
    def test_a_strategy_that_raises_drops_nothing_behind_it(self, stage: Bench) -> None:
        check_each_on_its_own(stage)

    def test_a_gate_that_raises_drops_nothing_either(
        self, stage: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for _ in range(3):
            stage.receive(Message('nobody'))
        place, calls = Placing.place, []

        def odd(self: Placing, waiting: Any) -> bool:
            calls.append(waiting)
            if len(calls) == 1:
                raise RuntimeError('odd')
            return place(self, waiting)

        monkeypatch.setattr(Placing, 'place', odd)
        stage.look()
        assert (stage.log, stage.gate.waiting) == (['requeue'], 2)

    def test_a_message_that_can_never_be_sent_is_set_aside(self, stage: Bench) -> None:
        stage.publish_error = TypeError('not serializable')
        assert stage.receive(Message('other')) == []  # it may have been the connection
        assert stage.look(1.1) == ['reject']

    def test_a_connection_that_broke_in_an_odd_way_costs_no_message(self, stage: Bench) -> None:
        check_odd_connection(stage)

    @pytest.mark.parametrize('error', TROUBLE, ids=repr)
    def test_what_has_waited_is_tried_again_as_well(self, stage: Bench, error: Exception) -> None:
        stage.receive(Message('nobody'))
        stage.job.mine.add('nobody')
        stage.strategy_error = error
        assert stage.look() == []
        stage.strategy_error = None
        assert (stage.look(1.1), stage.gate.waiting) == (['run'], 0)

    def test_looking_more_often_starts_no_second_timer(self, stage: Bench) -> None:
        stage.receive(Message('nobody'))
        stage.handle = raising(RuntimeError('odd'))
        stage.consumer.create_task_handler()(Message(None))
        for _ in range(20):  # as a node's duties do, once a second
            stage.gate.look()
        assert len(stage.timers) == 2
        stage.look()
        assert len(stage.timers) == 2


class TestIntoThePool:
    """Whatever fails on the way into the pool, and in it: the worker goes on, and each message
    comes to its right end.
    """

    def _hand_over(self, stage: Bench, error: Exception | None, task: str = 'plain') -> list[str]:
        message = Message('mine', task=task)
        stage.receive(message)
        stage.pool_error = error
        stage.handle = lambda message: stage.log.append('received')
        stage.consumer.create_task_handler()
        return stage.dispatch(message)

    @pytest.mark.parametrize('task', ['plain', 'keyed'])
    @pytest.mark.parametrize('error', TROUBLE, ids=repr)
    def test_in_trouble_it_is_tried_again(self, stage: Bench, error: Exception, task: str) -> None:
        assert self._hand_over(stage, error, task) == []
        assert stage.look(0.9) == []
        assert stage.look(0.2) == ['received']

    def test_what_cannot_be_handed_over_goes_back_when_consuming_stops(self, stage: Bench) -> None:
        self._hand_over(stage, TROUBLE[0])
        stage.gate.requeue_waiting()
        assert (stage.log, stage.gate.waiting) == (['requeue'], 0)

    @pytest.mark.parametrize('error', FAULTS, ids=repr)
    def test_what_cannot_be_handed_over_is_set_aside(self, stage: Bench, error: Exception) -> None:
        assert self._hand_over(stage, error) == ['reject']
        eventually(lambda: type(stage.app.backend.get_task_meta('m1')['result']) is MessageRefused)

    def test_a_task_that_rejects_its_message_has_its_way(self, stage: Bench) -> None:
        assert self._hand_over(stage, Reject('no')) == ['failed ExceptionWithTraceback()']

    def test_one_that_wants_it_again_gets_it_after_a_pause(self, stage: Bench) -> None:
        assert self._hand_over(stage, Reject('later', requeue=True)) == []
        assert stage.look(1.1) == ['received']

    def test_what_is_acknowledged_stays_so(
        self, stage: Bench, caplog: pytest.LogCaptureFixture
    ) -> None:
        message = Message(None, task='plain')
        request = Request(stage, message)
        request.acknowledged = True
        stage.pool_error = BackendAway('away')
        stage.consumer.on_task_request(request)
        assert (stage.log, stage.gate.waiting) == ([], 0)
        assert 'ended in a way that Celery does not handle: BackendAway: away' in caplog.text

    def test_a_slot_that_was_taken_is_given_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with bench(monkeypatch, slots=True) as stage:
            check_slot(stage)

    def test_a_job_that_could_not_be_written_is_forgotten(self, stage: Bench) -> None:
        message = Message(None, task='plain')
        request = Request(stage, message)
        jobs = {
            1: SimpleNamespace(_callback=request.on_success, _accepted=False),
            2: SimpleNamespace(_callback=None, _accepted=False),
        }
        stage.pool = SimpleNamespace(_pool=SimpleNamespace(_cache=jobs))
        stage.pool_error = pickle.PicklingError('a lock')
        stage.consumer.on_task_request(request)
        assert list(jobs) == [2]

    @pytest.mark.parametrize('begun', [False, True])
    def test_what_a_thread_has_begun_does_not_go_back_and_what_goes_back_is_not_begun(
        self, stage: Bench, begun: bool
    ) -> None:
        check_begun_once(stage, begun)

    def test_an_end_that_cannot_be_told_is_told_later_and_the_task_does_not_run_again(
        self, stage: Bench
    ) -> None:
        check_end_told_later(stage)

    def test_what_comes_back_by_itself_and_cannot_is_tried_again(self, stage: Bench) -> None:
        self._hand_over(stage, None, 'once')
        stage.log.clear()
        try:
            raise RequeueLater('no broker', requeue=True)
        except RequeueLater:
            stage.request.on_failure(ExceptionInfo())
        assert (stage.log, stage.gate.waiting) == ([], 1)
        assert stage.look(1.1) == ['received']


def check_odd_connection(stage: Bench) -> None:
    stage.publish_error = ValueError('file descriptor cannot be a negative integer (-1)')
    assert stage.receive(Message('other')) == []
    stage.publish_error = None
    assert stage.look(1.1) == ['send q2 hops=1', 'ack']


def check_slot(stage: Bench) -> None:
    stage.pool_error = pickle.PicklingError('a lock')
    assert stage.dispatch(Message(None, task='plain')) == ['slot taken', 'reject', 'slot freed']


def check_begun_once(stage: Bench, begun: bool) -> None:
    message = Message(None, task='plain')
    stage.pool = SimpleNamespace(executor=None)
    request = Request(stage, message)

    def process(request: Any) -> None:
        if begun:
            request.on_accepted(1, 0.0)
        raise RuntimeError("can't start new thread")

    stage.gate._pool_entry._process = process
    stage.handle = lambda message: stage.log.append('received')
    stage.consumer.create_task_handler()
    stage.consumer.on_task_request(request)
    stage.look(1.1)
    if begun:
        assert stage.log == ['accepted']
    else:
        assert stage.log == ['received']
        with pytest.raises(TaskRevokedError):
            request.on_accepted(1, 0.0)


def check_end_told_later(stage: Bench) -> None:
    message = Message('mine', task='once')
    stage.receive(message)
    request = Request(stage, message)
    ends: list[str] = []

    def on_success(result: Any) -> None:
        ends.append(result)
        if len(ends) < 3:
            raise BackendAway('away')

    vars(request)['on_success'] = on_success
    stage.gate._pool_entry.guard_end(request)
    stage.log.clear()
    request.on_success('result')
    stage.look(1.1)
    stage.look(2.1)
    assert (ends, stage.log, stage.gate.waiting) == (['result'] * 3, [], 0)


class TestReturnRunning:
    """A worker that lost its lease on RabbitMQ."""

    @pytest.mark.parametrize(('task', 'expected'), [('once', ['requeue']), ('keyed', [])])
    def test_what_is_executed_goes_back_if_it_completes_once(
        self, stage: Bench, task: str, expected: list[str]
    ) -> None:
        message = Message('mine', task=task)
        stage.receive(message)
        assert stage.dispatch(message) == ['pool']
        stage.log.clear()
        stage.gate.requeue_running()
        assert stage.log == []  # the pool has not begun it: it comes back by itself
        state.active_requests.add(stage.request)
        stage.gate.requeue_running()
        stage.gate.requeue_running()
        assert stage.log == expected


def test_green_threads_are_refused_before_the_worker_starts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Celery('green', broker='memory://', set_as_current=False)
    JobSync(app, config=CoordinationConfig(appname='shop_'))
    worker = SimpleNamespace(app=app, pool_cls='celery.concurrency.gevent:TaskPool', hostname='w@x')
    with pytest.raises(WorkerShutdown) as ended:
        NodeStep(worker)
    assert ended.value.code == 1
    assert (
        "pool 'celery.concurrency.gevent:TaskPool'" in caplog.text
        and '--pool prefork' in caplog.text
    )


def test_a_worker_whose_messages_redis_would_not_record_does_not_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Celery('bare', broker='redis://127.0.0.1:1/0', set_as_current=False)
    app.conf.broker_transport_options = {'ack_emulation': False}
    JobSync(app, config=CoordinationConfig(appname='shop_'))
    worker = SimpleNamespace(app=app, pool_cls='celery.concurrency.solo:TaskPool', hostname='w@x')
    with pytest.raises(WorkerShutdown) as ended:
        NodeStep(worker)
    assert ended.value.code == 1
    assert "['ack_emulation'] is False" in caplog.text and 'take the option out' in caplog.text


class TestWhatWasNotRecorded:
    """Messages that a lost connection to Redis brought, when the worker ends."""

    LEFT = CarriedOver({'tag': '[{"headers": {"id": "m7"}}, "", "celery"]'})

    def test_it_is_restored(self) -> None:
        restored: list[str] = []
        broker: Any = SimpleNamespace(restore_own=restored.append)
        restore_last(broker, 'n1', CarriedOver())
        assert restored == [], 'nothing is left, and the broker is not asked'
        restore_last(broker, 'n1', self.LEFT)
        assert restored == ['n1']

    def test_with_the_broker_away_it_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        broker: Any = SimpleNamespace(restore_own=raising(ConnectionError('away')))
        restore_last(broker, 'n1', self.LEFT)
        assert '1 messages' in caplog.text and 'send them again: m7' in caplog.text


def leased_consumer(stage: Bench, driver: str = 'redis') -> LeasedConsumer:
    """The stage's consumer, which follows lease and database."""
    job: Any = stage.job
    carried = CarriedOver()
    return LeasedConsumer(
        stage.consumer, stage.gate, lambda: job, LoopWatch(carried, False), carried, driver, 10.0
    )


def test_a_reconnect_leaves_one_look_at_the_lease(stage: Bench) -> None:
    looks: list[SimpleNamespace] = []

    def call_repeatedly(seconds: float, call: Callable[[], object]) -> SimpleNamespace:
        entry = SimpleNamespace(live=True)
        entry.cancel = lambda: setattr(entry, 'live', False)
        looks.append(entry)
        return entry

    stage.consumer.timer.call_repeatedly = call_repeatedly
    leased = leased_consumer(stage)
    for _ in range(3):
        leased.connected()
        assert sum(entry.live for entry in looks) == 1
        leased.disconnected()
        assert sum(entry.live for entry in looks) == 0


@pytest.mark.parametrize('there', [True, False])
def test_queues_that_others_have_deleted_are_made_before_they_are_consumed_again(
    stage: Bench, there: bool
) -> None:
    """The lease comes back on RabbitMQ. Is one deleted even now, the worker connects anew."""

    def queue(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, declare=lambda: stage.log.append(f'declare {name}'))

    def consume() -> None:
        if not there:
            raise NotFound('no queue')
        stage.log.append('consume')

    stage.consumer.task_consumer = SimpleNamespace(
        queues=[queue('celery'), queue('celery.jobsync.shop_.n1')],
        cancel=lambda: stage.log.append('cancel'),
        consume=consume,
    )
    stage.consumer.timer.call_repeatedly = lambda seconds, call: None
    stage.consumer.connection = None
    leased = leased_consumer(stage, 'amqp')
    leased.connected()
    stage.job.leased = False
    leased.follow()
    stage.job.leased = True
    if there:
        leased.follow()
        assert stage.log == ['cancel', 'declare celery.jobsync.shop_.n1', 'consume']
    else:
        for consume_again in (leased.follow, leased.queues_changed):
            with pytest.raises(RecoverableConnectionError):
                consume_again()


class TestRefusals:
    """The database refuses to begin anything."""

    FULL = DatabaseRefused('no space left', '53100', True)

    @pytest.fixture
    def consuming(self, stage: Bench) -> Bench:
        """The stage, whose consumer can be stopped and started."""
        stage.consumer.task_consumer = SimpleNamespace(
            cancel=lambda: stage.log.append('cancel'), consume=lambda: stage.log.append('consume')
        )
        stage.consumer.timer.call_repeatedly = lambda seconds, call: None
        return stage

    def _hand_over(self, stage: Bench, count: int = 3, task: str = 'once') -> list[str]:
        log: list[str] = []
        for _ in range(count):
            message = Message('mine', task=task)
            stage.receive(message)
            log += stage.dispatch(message)
        stage.log.clear()
        return log

    def test_consuming_stops_with_one_line_and_goes_on_once_the_database_answers(
        self, consuming: Bench, caplog: pytest.LogCaptureFixture
    ) -> None:
        stage, pausing = consuming, consuming.job.pausing
        leased = leased_consumer(stage)
        leased.connected()
        job: Any = stage.job
        stage.receive(Message('nobody'))
        pausing.refused(self.FULL, stage.clock.time)
        for _ in range(3):
            leased.follow()
        assert stage.log == ['cancel', 'requeue']
        assert not leased.consumes and refusal(job, stage.clock.time) == 'no space left'
        stage.clock.time = pausing.until
        leased.follow()
        assert stage.log == ['cancel', 'requeue', 'consume'] and leased.consumes
        pausing.refused(self.FULL, stage.clock.time)
        leased.follow()
        stage.clock.time = pausing.until
        leased.follow()
        pausing.answered()
        leased.follow()
        assert stage.log[3:] == ['cancel', 'consume']
        assert [record.levelname for record in caplog.records] == [
            'WARNING'
        ]  # once, though it was refused twice
        assert 'no space left' in caplog.text and 'free disk space' in caplog.text

    def test_in_the_pause_nothing_that_asks_the_database_goes_to_the_pool_and_after_it_one(
        self, stage: Bench
    ) -> None:
        check_one_tries(stage)

    def test_what_does_not_ask_the_database_runs(self, stage: Bench) -> None:
        stage.job.pausing.refused(self.FULL, stage.clock.time)
        assert self._hand_over(stage, task='keyed') == ['pool'] * 3

    def test_what_comes_due_in_the_pause_goes_back(self, consuming: Bench) -> None:
        stage = consuming
        leased = leased_consumer(stage)
        leased.connected()
        stage.job.pausing.refused(self.FULL, stage.clock.time)
        leased.follow()
        assert self._hand_over(stage) == []
        leased.follow()
        assert stage.log == ['requeue'] * 3

    def test_what_runs_goes_back_a_timeout_after_the_lease_ran_out_in_a_pause(
        self, consuming: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage = consuming
        stage.consumer.connection = None
        leased = leased_consumer(stage, 'amqp')
        leased.connected()
        returned: list[str] = []
        monkeypatch.setattr(stage.gate, 'requeue_running', lambda: returned.append('all'))
        stage.job.pausing.refused(self.FULL, stage.clock.time)
        leased.follow()
        stage.job.leased = False
        leased.follow()
        assert returned == []
        stage.clock.time += 10.0 + 1
        leased.follow()
        assert returned == ['all']


def check_one_tries(stage: Bench) -> None:
    pausing, hand_over = stage.job.pausing, TestRefusals()._hand_over
    pausing.refused(TestRefusals.FULL, stage.clock.time)
    assert hand_over(stage) == [] and stage.gate.waiting == 3
    assert stage.look() == []
    stage.clock.time = pausing.until
    assert stage.look() == ['pool'] and stage.gate.waiting == 2
    assert stage.look() == ['pool']
    pausing.answered()
    assert stage.look() == ['pool'] * 3


def test_without_that_every_message_would_try(
    stage: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gate, 'admits', lambda *args: True)
    with pytest.raises(AssertionError):
        check_one_tries(stage)
