"""`exactly_once` in a worker's place: what Dramatiq is told of duplicates, of running keys, and of
a ledger out of reach.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import dramatiq
import pytest
from dramatiq.broker import MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import GroupCallbacks, SkipMessage
from dramatiq.rate_limits.backends import StubBackend

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import (
    ClaimLost,
    ConfigurationError,
    DatabaseRefused,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    Fenced,
    NotEntered,
    ResultLost,
    StoreTimeout,
)
from jobsync_core.ledger.current import set_current_ledger
from jobsync_core.testing import MemoryLedger
from jobsync_core.worker.come_back import ComeBacks
from jobsync_core.worker.inbox import Received
from jobsync_core.worker.routing import WAITS
from jobsync_dramatiq import JobSync, exactly_once
from jobsync_dramatiq import once as once_module
from jobsync_dramatiq.groups import mark_members
from jobsync_dramatiq.notes import Note
from tests.support.fakes import FakeLedger, duplicate, lost_result


@pytest.fixture
def ledger() -> Iterator[FakeLedger]:
    made = FakeLedger()
    set_current_ledger(made)
    yield made
    set_current_ledger(None)


@pytest.fixture
def memory() -> Iterator[MemoryLedger]:
    made = MemoryLedger()
    set_current_ledger(made)
    yield made
    set_current_ledger(None)


class Bench:
    """A broker in memory, and a worker's thread that is the test's own."""

    def __init__(self) -> None:
        self.broker = StubBroker()
        self.plugin = JobSync(config=CoordinationConfig(), route_producers=False)
        self.broker.add_middleware(self.plugin)
        self.broker.add_middleware(GroupCallbacks(StubBackend()))
        self.sent: list[tuple[Any, int | None]] = []
        self.send_error: Exception | None = None

    def actor(self, **options: Any) -> Any:
        made = dramatiq.actor(actor_name='double', broker=self.broker)(
            exactly_once(key='d:{n}', scope='', **options)(double)
        )
        mark_members(self.broker, self.plugin.producer.actors)
        vars(self.broker)['enqueue'] = self._enqueue
        return made

    def _enqueue(self, message: Any, *, delay: int | None = None) -> Any:
        if self.send_error is not None:
            raise self.send_error
        self.sent.append((message, delay))
        return message

    def run(self, actor: Any, message: Any) -> Any:
        """Process a message as a worker's thread does; what the actor returns."""
        self.broker.emit_before('process_message', message)
        try:
            result = actor.fn(*message.args)
        except SkipMessage:
            self.broker.emit_after('skip_message', message)
            raise
        except Exception as error:
            self.broker.emit_after('process_message', message, exception=error)
            raise
        self.broker.emit_after('process_message', message, result=result)
        return result


def double(n: int) -> int:
    return 2 * n


def delivered(message: Any) -> Any:
    return MessageProxy(dramatiq.Message.decode(message.encode()))


def group_of(bench: Bench, actor: Any, size: int) -> list[Any]:
    """The members of a group with a completion callback, as they are sent."""
    group = dramatiq.group([actor.message(n) for n in range(size)], broker=bench.broker)
    group.add_completion_callback(actor.message(99))
    group.run()
    members, bench.sent = [message for message, _ in bench.sent], []
    return members


def check_group_counts_once(bench: Bench, ledger: FakeLedger) -> None:
    """A worker dies after it has counted a member, and before it has acknowledged the message."""
    actor = bench.actor()
    members = group_of(bench, actor, 2)
    bench.run(actor, delivered(members[0]))
    ledger.begin_error = duplicate()
    for _ in range(3):
        assert bench.run(actor, delivered(members[0])) == 6
    assert bench.sent == []
    ledger.begin_error = None
    bench.run(actor, delivered(members[1]))
    assert len(bench.sent) == 1
    ledger.begin_error = duplicate()
    bench.run(actor, delivered(members[1]))
    assert len(bench.sent) == 1


def check_never_skipped(
    stamps: dict[str, Any] | None = None, redelivered: bool = False
) -> list[Any]:
    """What runs may be the message's own attempt, on a worker that was killed a moment ago."""
    sent: list[Any] = []
    for option in ('skip', 'raise'):
        bench = Bench()
        actor = bench.actor(on_running=option)
        found = delivered(actor.message(3).copy(options=stamps or {}))
        vars(found)['redelivered'] = redelivered  # as Dramatiq's and the plugin's consumers
        with pytest.raises(SkipMessage):
            bench.run(actor, found)
        sent += [each for each, _ in bench.sent]
    return sent


class TestDuplicates:
    def test_a_duplicate_returns_the_stored_result(self, ledger: FakeLedger) -> None:
        bench = Bench()
        actor = bench.actor()
        ledger.begin_error = duplicate()
        assert bench.run(actor, delivered(actor.message(3))) == 6

    def test_one_that_skips_returns_none_and_one_that_raises_raises(
        self, ledger: FakeLedger
    ) -> None:
        ledger.begin_error = duplicate()
        for option, outcome in (('skip', None), ('raise', DuplicateExecution)):
            bench = Bench()
            actor = bench.actor(on_duplicate=option)
            if outcome is None:
                assert bench.run(actor, delivered(actor.message(3))) is None
            else:
                with pytest.raises(outcome):
                    bench.run(actor, delivered(actor.message(3)))

    def test_a_lost_result_fails_the_message_unless_it_skips(self, ledger: FakeLedger) -> None:
        ledger.begin_error = lost_result()
        bench = Bench()
        actor = bench.actor()
        message = delivered(actor.message(3))
        note = Note(SimpleNamespace(), Received('', 'd:3'))
        vars(message)['jobsync_note'] = note
        with pytest.raises(ResultLost):
            bench.run(actor, message)
        assert message.failed and note.exhausted, 'at once: no retry can help'
        bench = Bench()
        actor = bench.actor(on_duplicate='skip')
        message = delivered(actor.message(3))
        assert bench.run(actor, message) is None and not message.failed

    def test_a_member_of_a_group_that_is_delivered_again_counts_once(
        self, ledger: FakeLedger
    ) -> None:
        check_group_counts_once(Bench(), ledger)

    def test_a_member_that_was_complete_and_not_counted_counts(self, ledger: FakeLedger) -> None:
        bench = Bench()
        actor = bench.actor()
        members = group_of(bench, actor, 1)
        ledger.begin_error = duplicate()
        bench.run(actor, delivered(members[0]))
        assert len(bench.sent) == 1

    def test_two_members_of_one_key_count_both(self, ledger: FakeLedger) -> None:
        bench = Bench()
        actor = bench.actor()
        members = group_of(bench, actor, 2)
        bench.run(actor, delivered(members[0]))
        ledger.begin_error = duplicate()
        bench.run(actor, delivered(members[1]))
        assert len(bench.sent) == 1


class TestComingBack:
    @pytest.mark.parametrize('error', [ExecutionRunning(), ClaimLost(), DatabaseUnavailable()])
    def test_what_cannot_begin_comes_back_with_its_id_and_stores_no_result(
        self, ledger: FakeLedger, error: Any
    ) -> None:
        bench = Bench()
        actor = bench.actor()
        message = delivered(actor.message(3))
        ledger.begin_error = error
        with pytest.raises(SkipMessage):
            bench.run(actor, message)
        [(again, delay)] = bench.sent
        assert (again.message_id, delay, message.options['store_results']) == (
            message.message_id,
            1000,
            False,
        )
        assert 'store_results' not in again.options

    def test_it_waits_longer_each_time_that_its_key_is_still_running_and_one_line_says_so(
        self, ledger: FakeLedger, caplog: pytest.LogCaptureFixture
    ) -> None:
        bench = Bench()
        actor = bench.actor()
        error = ExecutionRunning('it runs')
        error.key = f'd:{uuid.uuid4()}'
        ledger.begin_error = error
        message, delays = delivered(actor.message(3)), list[int | None]()
        with caplog.at_level('INFO'):
            for _ in range(9):
                with pytest.raises(SkipMessage):
                    bench.run(actor, message)
                ((again, delay),) = bench.sent
                bench.sent.clear()
                delays.append(delay)
                message = delivered(again)
        assert delays == [1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000, 30000]
        assert (
            len([record for record in caplog.records if 'comes back in' in record.getMessage()])
            == 1
        )

    @pytest.mark.parametrize(
        ('when', 'error'),
        [
            ('begin', ClaimLost()),
            ('begin', DatabaseUnavailable()),
            ('begin', DatabaseRefused('disk full')),
            ('begin', StoreTimeout()),
            ('finish', DatabaseUnavailable()),
            ('finish', Fenced()),
        ],
    )
    def test_so_it_does_whatever_else_is_in_the_way_and_one_line_speaks_for_all(
        self,
        ledger: FakeLedger,
        caplog: pytest.LogCaptureFixture,
        when: str,
        error: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr('jobsync_dramatiq.once._come_backs', ComeBacks())
        bench = Bench()
        actor = bench.actor()
        setattr(ledger, f'{when}_error', error)
        for n in range(3):
            message, delays = delivered(actor.message(n)), list[int | None]()
            with caplog.at_level('INFO'):
                for _ in range(6):
                    with pytest.raises(SkipMessage):
                        bench.run(actor, message)
                    ((again, delay),) = bench.sent
                    bench.sent.clear()
                    delays.append(delay)
                    message = delivered(again)
            assert delays == [1000, 2000, 4000, 8000, 15000, 15000]
        assert (
            len([record for record in caplog.records if 'comes back in' in record.getMessage()])
            == 1
        )

    @pytest.mark.parametrize('waits', ['x', -3, [], 10**9, 10**40, True, None, float('nan')])
    def test_whatever_the_message_says_of_its_waits(self, ledger: FakeLedger, waits: Any) -> None:
        bench = Bench()
        actor = bench.actor()
        ledger.begin_error = ExecutionRunning()
        with pytest.raises(SkipMessage):
            bench.run(actor, delivered(actor.message_with_options(args=(3,), jobsync_waits=waits)))
        [(_, delay)] = bench.sent
        assert delay in (1000, 30_000)

    @pytest.mark.parametrize('error', [Fenced(), DatabaseUnavailable()])
    def test_so_does_what_ran_and_is_not_recorded(self, ledger: FakeLedger, error: Any) -> None:
        bench = Bench()
        actor = bench.actor()
        ledger.finish_error = error
        with pytest.raises(SkipMessage):
            bench.run(actor, delivered(actor.message(3)))
        assert len(bench.sent) == 1

    def test_where_it_cannot_be_sent_it_goes_back_unacknowledged(self, ledger: FakeLedger) -> None:
        bench = Bench()
        actor = bench.actor()
        message = delivered(actor.message(3))
        note = Note(SimpleNamespace(), Received('', 'd:3'))
        vars(message)['jobsync_note'] = note
        ledger.begin_error, bench.send_error = ExecutionRunning(), ConnectionError('away')
        with pytest.raises(SkipMessage):
            bench.run(actor, message)
        assert (note.goes_back, note.unseen) == (True, False)

    def test_what_went_back_while_it_ran_is_not_sent_a_second_time(
        self, ledger: FakeLedger
    ) -> None:
        bench = Bench()
        actor = bench.actor()
        message = delivered(actor.message(3))
        vars(message)['jobsync_note'] = Note(SimpleNamespace(), Received('', 'd:3'), sent_on=True)
        ledger.finish_error = Fenced()
        with pytest.raises(SkipMessage):
            bench.run(actor, message)
        assert (bench.sent, message.options['store_results']) == ([], False)

    def test_a_running_key_may_be_skipped_or_raise(self, ledger: FakeLedger) -> None:
        ledger.begin_error = ExecutionRunning()
        bench = Bench()
        actor = bench.actor(on_running='skip')
        assert bench.run(actor, delivered(actor.message(3))) is None
        bench = Bench()
        actor = bench.actor(on_running='raise')
        with pytest.raises(ExecutionRunning):
            bench.run(actor, delivered(actor.message(3)))

    @pytest.mark.parametrize('came', [{'redelivered': True}, {'stamps': {WAITS: 1}}])
    def test_a_message_that_came_before_is_not_skipped_for_its_own_attempt(
        self, ledger: FakeLedger, came: dict[str, Any]
    ) -> None:
        ledger.begin_error = ExecutionRunning()
        assert len(check_never_skipped(**came)) == 2

    def test_without_that_a_redelivered_message_is_lost(
        self, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger.begin_error = ExecutionRunning()
        monkeypatch.setattr(type(once_module._once), 'came_before', lambda self: False)
        with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
            check_never_skipped(redelivered=True)


class TestKeys:
    def test_without_a_key_it_is_the_message_s_id(self, ledger: FakeLedger) -> None:
        bench = Bench()
        actor = dramatiq.actor(actor_name='double', broker=bench.broker)(
            exactly_once(scope='')(double)
        )
        message = delivered(actor.message(3))
        bench.run(actor, message)
        assert ledger.keys == [message.message_id]

    def test_one_decorator_may_be_put_on_several_functions(self, ledger: FakeLedger) -> None:
        bench, once = Bench(), exactly_once()
        actors = [
            dramatiq.actor(actor_name=f'a{n}', broker=bench.broker)(once(lambda n: n))
            for n in range(3)
        ]
        messages = [delivered(actor.message(3)) for actor in actors]
        assert [
            bench.run(actor, message) for actor, message in zip(actors, messages, strict=True)
        ] == [3, 3, 3]
        assert [key.rpartition(':')[2] for key in ledger.keys] == [
            message.message_id for message in messages
        ]

    def test_outside_of_a_message_there_is_none(self, ledger: FakeLedger) -> None:
        with pytest.raises(ConfigurationError, match='called outside of a message'):
            exactly_once(scope='')(double)(3)

    def test_outside_of_a_worker_errors_go_through(self, ledger: FakeLedger) -> None:
        ledger.begin_error = ExecutionRunning()
        with pytest.raises(ExecutionRunning):
            exactly_once(key='d:{n}', scope='')(double)(3)


class TestCallsInsideOfAMessage:
    """An actor's function that another one calls is no message: the one that is being processed
    never comes back for it.
    """

    def inner(self, **options: Any) -> Any:
        ran: list[int] = []

        def inner(n: int) -> int:
            ran.append(n)
            return 10 * n

        made = exactly_once(key='i:{n}', scope='', **options)(inner)
        vars(made)['ran'] = ran
        return made

    def outer(self, bench: Bench, inner: Any, once: bool) -> Any:
        def outer(n: int) -> str:
            try:
                return f'{inner(n)} {inner(n)}'
            except Exception as error:  # as user code does
                return type(error).__name__

        function = exactly_once(key='o:{n}', scope='')(outer) if once else outer
        actor = dramatiq.actor(actor_name='outer', broker=bench.broker)(function)
        vars(bench.broker)['enqueue'] = bench._enqueue
        return actor

    @pytest.mark.parametrize('once', [True, False], ids=['once', 'plain'])
    @pytest.mark.parametrize(
        ('options', 'answer'),
        [
            ({}, '30 30'),
            ({'on_duplicate': 'skip'}, '30 None'),
            ({'on_duplicate': 'raise'}, 'DuplicateExecution'),
        ],
    )
    def test_a_duplicate_is_answered_as_its_options_say(
        self, memory: MemoryLedger, once: bool, options: dict[str, Any], answer: str
    ) -> None:
        bench = Bench()
        inner = self.inner(**options)
        actor = self.outer(bench, inner, once)
        assert bench.run(actor, delivered(actor.message(3))) == answer
        assert (inner.ran, bench.sent) == ([3], [])

    @pytest.mark.parametrize('once', [True, False], ids=['once', 'plain'])
    @pytest.mark.parametrize(
        ('options', 'answer'), [({}, 'ExecutionRunning'), ({'on_running': 'skip'}, 'None None')]
    )
    def test_a_running_key_sends_nothing(
        self, memory: MemoryLedger, once: bool, options: dict[str, Any], answer: str
    ) -> None:
        bench = Bench()
        memory.hold('i:3')
        actor = self.outer(bench, self.inner(**options), once)
        assert bench.run(actor, delivered(actor.message(3))) == answer
        assert bench.sent == []

    @pytest.mark.parametrize('once', [True, False], ids=['once', 'plain'])
    def test_without_a_key_of_its_own_it_has_none(self, memory: MemoryLedger, once: bool) -> None:
        """The message's id is the outer one's: two different calls would share it."""
        bench = Bench()
        actor = self.outer(bench, exactly_once(scope='i')(double), once)
        assert bench.run(actor, delivered(actor.message(3))) == 'ConfigurationError'

    def test_the_same_function_once_more_is_a_call_too(self, memory: MemoryLedger) -> None:
        bench = Bench()
        calls: list[int] = []

        def again(n: int) -> str:
            calls.append(n)
            try:
                return str(itself(n))
            except ExecutionRunning:
                return 'running'

        itself: Any = exactly_once(key='a:{n}', scope='')(again)
        actor = dramatiq.actor(actor_name='again', broker=bench.broker)(itself)
        assert bench.run(actor, delivered(actor.message(3))) == 'running'
        assert (calls, bench.sent) == ([3], [])

    def test_what_is_not_recorded_raises(self, ledger: FakeLedger) -> None:
        bench = Bench()
        ledger.finish_error = Fenced()
        actor = self.outer(bench, self.inner(), once=False)
        assert bench.run(actor, delivered(actor.message(3))) == 'Fenced'
        assert bench.sent == []


def test_without_a_job_it_names_what_works() -> None:
    actor = dramatiq.actor(actor_name='double', broker=StubBroker())(
        exactly_once(key='d:{n}', scope='')(double)
    )
    with pytest.raises(NotEntered, match=r'\.send\(\).*with Job.*JobSync\(\).*middleware'):
        actor(3)


def test_without_a_key_it_cannot_be_called_and_says_so() -> None:
    actor = dramatiq.actor(actor_name='double', broker=StubBroker())(exactly_once()(double))
    with pytest.raises(ConfigurationError, match=r'send it as a message, or .* a key over its arg'):
        actor(3)
