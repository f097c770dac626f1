"""The decorator and the block: what they do with a ledger's answers, and which options and keys
they refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from jobsync_core.errors import (
    ClaimLost,
    ConfigurationError,
    DatabaseRefused,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    Fenced,
    JobSyncError,
    MissingPrivilege,
    NotEntered,
    StatementRefused,
)
from jobsync_core.ledger.cluster import UNCOORDINATED, ClusterLedger
from jobsync_core.ledger.current import current_ledger, message_ledger, set_current_ledger
from jobsync_core.ledger.execution import current_execution
from jobsync_core.ledger.limits import check_key, retention_seconds
from jobsync_core.ledger.once import ExactlyOnce, exactly_once, once
from jobsync_core.ledger.results import MAX_RESULT_BYTES
from jobsync_core.ledger.single import SingleLedger
from jobsync_core.ledger.state import Unsettled
from jobsync_core.store.tables import Tables
from jobsync_core.testing.memory import MemoryLedger


class FakeLedger(SingleLedger):
    """Remembers completions in memory, and every call."""

    def __init__(self) -> None:
        self.done: dict[str, str | None] = {}
        self.running: set[str] = set()
        self.retentions: list[float] = []
        self.failures: list[BaseException] = []
        self.abandoned: list[str] = []
        self.finish_error: Exception | None = None

    def begin(self, mine: Unsettled) -> None:
        key = check_key(mine.key)
        if key in self.running:
            raise ExecutionRunning()
        if key in self.done:
            error = DuplicateExecution()
            vars(error).update(key=key, result=self.done[key])
            raise error
        self.running.add(key)
        self.retentions.append(mine.retention_sec)
        mine.begin(len(self.retentions), 1)

    def settle(self, mine: Unsettled) -> None:
        self.running.discard(mine.key)
        if mine.succeeded and self.finish_error is not None:
            mine.settled = True
            raise self.finish_error
        super().settle(mine)
        if mine.failure is not None:
            self.failures.append(mine.failure)
        else:
            self.done[mine.key] = mine.result

    def leave(self, mine: Unsettled) -> None:
        if mine.began and not mine.settled and not mine.busy:
            mine.settled = True
            self.running.discard(mine.key)
            self.abandoned.append(mine.key)


@pytest.fixture
def ledger() -> Iterator[FakeLedger]:
    fake = FakeLedger()
    set_current_ledger(fake)
    yield fake
    set_current_ledger(None)


@dataclass
class Order:
    id: int
    lines: tuple[str, ...] = ()


def plain(
    order_id: int, amount: int = 3, *lines: str, currency: str = 'EUR', **extra: object
) -> int:
    return amount


def key_of(text: str, *args: Any, **kwargs: Any) -> str:
    options: ExactlyOnce = vars(exactly_once(key=text)(plain))['exactly_once']
    return options.key_of(args, kwargs)


class TestKeys:
    @pytest.mark.parametrize(
        ('text', 'args', 'kwargs', 'expected'),
        [
            ('order:{order_id}', (7,), {}, 'order:7'),
            ('order:{order_id}', (), {'order_id': 7}, 'order:7'),
            ('{order_id}/{amount}/{currency}', (7,), {}, '7/3/EUR'),
            ('{order_id}/{amount}/{currency}', (7, 8), {'currency': 'USD'}, '7/8/USD'),
            ('{0}-{1}', (7,), {}, '7-3'),
            ('{order_id.id}', (Order(5),), {}, '5'),
            ('{order_id.lines[1]}', (Order(5, ('a', 'b')),), {}, 'b'),
            ('{lines[0]}', (7, 8, 'x'), {}, 'x'),
            ('{tenant}:{order_id}', (7,), {'tenant': 'acme'}, 'acme:7'),
            ('{extra[tenant]}', (7,), {'tenant': 'acme'}, 'acme'),
            ('{order_id:>0{amount}}', (7,), {}, '007'),
            ('{{literal}}{order_id!r}', ('é',), {}, "{literal}'é'"),
            ('nightly', (7,), {}, 'nightly'),
        ],
    )
    def test_a_key_is_made_of_the_bound_arguments(
        self, text: str, args: tuple[Any, ...], kwargs: dict[str, Any], expected: str
    ) -> None:
        assert key_of(text, *args, **kwargs) == expected

    @pytest.mark.parametrize(
        ('text', 'said'),
        [
            ('{ordr_id}', "names 'ordr_id': it takes order_id, amount"),
            ('{ordr_id.x}', 'ordr_id'),
            ('{order_id:{wdth}}', 'wdth'),
            ('{5}', "names '5'"),
            ('{}', 'empty {}'),
            ('{order_id', 'no format string'),
            ('', 'non-empty'),
        ],
    )
    def test_a_key_that_cannot_fit_is_refused_at_decoration(self, text: str, said: str) -> None:
        def function(order_id: int, amount: int = 3) -> None: ...

        with pytest.raises(ConfigurationError, match=said.replace('{}', r'\{\}')):
            exactly_once(key=text)(function)

    @pytest.mark.parametrize(
        ('text', 'argument', 'said'),
        [
            ('{order_id}', None, 'order_id is None'),
            ('{order_id}', '', "order_id is ''"),
            ('{order_id}', object(), 'address in memory'),
            ('{order_id.nothing}', 5, 'AttributeError'),
            ('{order_id[nothing]}', {}, 'KeyError'),
            ('{order_id:d}', 'text', 'ValueError'),
            ('{missing}', 5, 'KeyError'),
            ('{order_id}', 'a\0b', 'NUL'),
            ('{order_id}', '\ud800', 'surrogates'),
            ('{order_id}', 'x' * 2001, '2001 bytes'),
        ],
    )
    def test_arguments_that_make_no_key_are_refused_before_the_function_runs(
        self, ledger: FakeLedger, text: str, argument: object, said: str
    ) -> None:
        calls = []

        @exactly_once(scope='test', key=text)
        def function(order_id: object, **extra: object) -> None:
            calls.append(order_id)

        with pytest.raises(ConfigurationError, match=said):
            function(argument)
        assert (calls, ledger.retentions) == ([], [])

    def test_a_callable_makes_the_key(self, ledger: FakeLedger) -> None:
        @exactly_once(key=lambda order, **options: f'o{order.id}', scope='')
        def function(order: Order, urgent: bool = False) -> str:
            return 'ran'

        assert function(Order(4), urgent=True) == 'ran'
        assert set(ledger.done) == {'o4'}

    def test_a_callable_that_makes_no_string_is_refused(self, ledger: FakeLedger) -> None:
        @exactly_once(scope='test', key=lambda number: number)
        def function(number: int) -> None: ...

        with pytest.raises(ConfigurationError, match='is a int: give a string'):
            function(3)

    def test_two_functions_with_the_same_key_do_not_suppress_each_other(
        self, ledger: FakeLedger
    ) -> None:
        @exactly_once(scope='one', key='order:{order_id}')
        def charge(order_id: int) -> str | None:
            return 'charged'

        @exactly_once(scope='two', key='order:{order_id}')
        def ship(order_id: int) -> str | None:
            return 'shipped'

        assert (charge(1), ship(1), charge(1), ship(1)) == ('charged', 'shipped', None, None)

    def test_an_empty_scope_shares_keys(self, ledger: FakeLedger) -> None:
        @exactly_once(key='order:{order_id}', scope='')
        def charge(order_id: int) -> str | None:
            return 'charged'

        @exactly_once(key='order:{order_id}', scope='')
        def charge_again(order_id: int) -> str | None:
            return 'charged again'

        assert (charge(1), charge_again(1)) == ('charged', None)
        assert set(ledger.done) == {'order:1'}

    def test_without_a_key_the_message_id_of_the_adapter_is_the_key(
        self, ledger: FakeLedger
    ) -> None:
        message: list[str | None] = ['id-1']

        @exactly_once(default_key=lambda: message[0], scope='')
        def function() -> str | None:
            return 'ran'

        assert (function(), function()) == ('ran', None)
        message[0] = None
        with pytest.raises(ConfigurationError, match='outside of a message'):
            function()

    def test_without_a_key_and_a_message_decoration_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r'needs a key.*\{order_id\}'):
            exactly_once()(plain)


class TestOptions:
    @pytest.mark.parametrize(
        ('options', 'said'),
        [
            (
                {'on_duplicate': 'ignore'},
                "on_duplicate='ignore' of .*plain: use one of 'skip', 'result', 'raise'",
            ),
            ({'on_running': 'wait'}, "on_running='wait'.*'requeue', 'skip', 'raise'"),
            ({'store_result': 1}, 'store_result=1'),
            ({'on_duplicate': 'result', 'store_result': False}, 'needs store_result=True'),
            ({'scope': 3}, 'scope=3'),
            ({'key': 3}, 'key=3'),
            ({'retention': 0}, 'retention=0'),
            ({'retention': -1.5}, 'retention=-1.5'),
            ({'retention': float('nan')}, 'retention=nan'),
            ({'retention': True}, 'retention=True'),
            ({'retention': '7 days'}, "retention='7 days'"),
            ({'retention': datetime.timedelta(0)}, 'retention=datetime'),
            ({'retention': datetime.timedelta(days=40_000)}, 'at most 100 years'),
        ],
    )
    def test_a_value_that_cannot_work_is_refused_at_decoration(
        self, options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=said):
            exactly_once(**{'key': '{order_id}', **options})(plain)

    def test_what_cannot_run_once_is_refused_at_decoration(self) -> None:
        def generator(order_id: int) -> Iterator[int]:
            yield 1

        async def generate(order_id: int) -> AsyncIterator[int]:
            yield 1

        async def make_key(order_id: int) -> str:
            return ''

        decorate = exactly_once(key='{order_id}')
        below: Any = plain
        for thing, said in (
            (generator, 'generator'),
            (generate, 'generator'),
            (Order, 'put it on a function'),
            (classmethod(below), 'below @classmethod'),
            (staticmethod(below), 'below @staticmethod'),
            (5, 'put it on a function'),
        ):
            with pytest.raises(ConfigurationError, match=said):
                decorate(thing)  # type: ignore[type-var]
        with pytest.raises(ConfigurationError, match='takes its options by name'):
            exactly_once(plain)
        with pytest.raises(ConfigurationError, match='callable that returns a string'):
            exactly_once(key=make_key)(plain)  # type: ignore[arg-type]

    def test_retention_reaches_the_ledger_in_seconds(self, ledger: FakeLedger) -> None:
        exactly_once(key='{order_id}', retention=datetime.timedelta(minutes=2))(plain)(1)
        exactly_once(key='{order_id}', retention=1.5)(plain)(2)
        exactly_once(key='{order_id}')(plain)(3)
        assert ledger.retentions == [120, 1.5, 7 * 86_400]
        assert retention_seconds(3) == 3.0

    def test_the_wrapper_looks_like_the_function(self) -> None:
        wrapped = exactly_once(key='{order_id}')(plain)
        assert (wrapped.__name__, wrapped.__doc__, inspect.signature(wrapped)) == (
            'plain',
            None,
            inspect.signature(plain),
        )
        assert 'plain' in repr(vars(wrapped)['exactly_once'])


class TestDuplicates:
    def count(self, ledger: FakeLedger, **options: Any) -> tuple[Any, list[int]]:
        calls: list[int] = []

        @exactly_once(key='{number}', scope='', **options)
        def function(number: int) -> dict[str, int]:
            calls.append(number)
            return {'number': number}

        return function, calls

    def test_skip_returns_none(self, ledger: FakeLedger) -> None:
        function, calls = self.count(ledger)
        assert (function(1), function(1), calls) == ({'number': 1}, None, [1])

    def test_result_returns_the_stored_result(self, ledger: FakeLedger) -> None:
        function, calls = self.count(ledger, on_duplicate='result')
        assert (function(1), function(1), calls) == ({'number': 1}, {'number': 1}, [1])

    def test_raise_raises(self, ledger: FakeLedger) -> None:
        function, calls = self.count(ledger, on_duplicate='raise')
        function(1)
        with pytest.raises(DuplicateExecution) as caught:
            function(1)
        assert (vars(caught.value)['result'], vars(caught.value)['key'], calls) == (
            {'number': 1},
            '1',
            [1],
        )

    @pytest.mark.parametrize(('option', 'requeue'), [('requeue', True), ('raise', False)])
    def test_a_running_key_raises_and_says_whether_to_requeue(
        self, ledger: FakeLedger, option: str, requeue: bool
    ) -> None:
        function, calls = self.count(ledger, on_running=option)
        ledger.running.add('1')
        with pytest.raises(ExecutionRunning) as caught:
            function(1)
        assert (vars(caught.value)['requeue'], calls) == (requeue, [])

    def test_a_running_key_can_be_skipped(self, ledger: FakeLedger) -> None:
        function, calls = self.count(ledger, on_running='skip')
        ledger.running.add('1')
        assert (function(1), calls) == (None, [])

    def test_without_store_result_nothing_is_stored(self, ledger: FakeLedger) -> None:
        function, _ = self.count(ledger, store_result=False)
        function(1)
        assert ledger.done == {'1': None}

    def test_an_inner_duplicate_is_the_outer_functions_failure_not_its_answer(
        self, ledger: FakeLedger
    ) -> None:
        inner, _ = self.count(ledger, on_duplicate='raise')
        inner(1)

        @exactly_once(scope='test', key='{number}')
        def outer(number: int) -> None:
            inner(number)

        with pytest.raises(DuplicateExecution):
            outer(1)
        assert [type(error) for error in ledger.failures] == [DuplicateExecution]


class TestResults:
    @pytest.mark.parametrize(
        ('result', 'said'),
        [
            (object(), 'is no JSON'),
            (float('nan'), 'is no JSON'),
            (float('inf'), 'is no JSON'),
            ('x' * MAX_RESULT_BYTES, 'store it elsewhere'),
        ],
    )
    def test_a_result_that_cannot_be_stored_completes_without_it_and_warns_once(
        self, ledger: FakeLedger, caplog: pytest.LogCaptureFixture, result: object, said: str
    ) -> None:
        @exactly_once(key='{number}', scope='')
        def function(number: int) -> object:
            return result

        with caplog.at_level(logging.WARNING):
            assert function(1) is result
            assert function(2) is result
        assert ledger.done == {'1': None, '2': None}
        assert len(caplog.records) == 1
        assert said in caplog.text and 'function' in caplog.text

    def test_a_result_that_the_block_has_set_wins_over_what_the_function_returns(
        self, ledger: FakeLedger
    ) -> None:
        @exactly_once(key='{number}', scope='')
        def function(number: int) -> str:
            current_execution().result = 'set'
            return 'returned'

        assert function(1) == 'returned'
        assert ledger.done == {'1': 'set'}


class TestFailures:
    @pytest.mark.parametrize('error', [ValueError('x'), SystemExit(3), KeyboardInterrupt()])
    def test_an_exception_is_recorded_raised_and_the_key_may_run_again(
        self, ledger: FakeLedger, error: BaseException
    ) -> None:
        errors: list[BaseException] = [error]

        @exactly_once(scope='test', key='{number}')
        def function(number: int) -> str:
            if errors:
                raise errors.pop()
            return 'ran'

        with pytest.raises(type(error)) as caught:
            function(1)
        assert caught.value is error
        assert ledger.failures == [error]
        assert function(1) == 'ran'

    @pytest.mark.parametrize('error', [Fenced(), DatabaseUnavailable()])
    def test_an_end_that_cannot_be_recorded_is_raised_and_is_no_failure(
        self, ledger: FakeLedger, error: Exception
    ) -> None:
        ledger.finish_error = error
        with pytest.raises(type(error)):
            exactly_once(key='{order_id}')(plain)(1)
        assert ledger.failures == []

    def test_a_function_that_returns_a_coroutine_has_not_run(self, ledger: FakeLedger) -> None:
        async def work() -> None: ...

        @exactly_once(scope='test', key='{number}')
        def function(number: int) -> Any:
            return work()

        with pytest.raises(ConfigurationError, match='has not run yet'):
            function(1)
        assert ledger.done == {} and len(ledger.failures) == 1

    def test_a_process_outside_of_a_job_gets_a_clear_error(self) -> None:
        with pytest.raises(NotEntered, match='has entered no Job'):
            exactly_once(key='{order_id}')(plain)(1)
        with pytest.raises(ConfigurationError, match=r'outside of a message.*send it as a message'):
            exactly_once(default_key=lambda: None)(plain)(1)
        with pytest.raises(NotEntered, match='has entered no Job'):
            current_ledger()
        with pytest.raises(NotEntered, match='no execution is running here'):
            current_execution()

    def test_wrong_arguments_are_a_type_error(self, ledger: FakeLedger) -> None:
        with pytest.raises(TypeError, match='order_id'):
            exactly_once(key='{order_id}')(plain)()  # type: ignore[call-arg]


class TestKinds:
    def test_methods_class_methods_and_static_methods(self, ledger: FakeLedger) -> None:
        class Shop:
            name = 'shop'

            @exactly_once(key='{self.name}:{number}', scope='')
            def sell(self, number: int) -> str:
                return f'{self.name} {number}'

            @classmethod
            @exactly_once(key='{cls.name}:class:{number}', scope='')
            def open(cls, number: int) -> int:
                return number

            @staticmethod
            @exactly_once(key='static:{number}', scope='')
            def close(number: int) -> int:
                return number

        assert (Shop().sell(1), Shop.open(2), Shop.close(3)) == ('shop 1', 2, 3)
        assert set(ledger.done) == {'shop:1', 'shop:class:2', 'static:3'}

    def test_callable_objects_and_partials(self, ledger: FakeLedger) -> None:
        class Sender:
            def __call__(self, number: int) -> int:
                return number

        assert exactly_once(key='{number}', scope='sender')(Sender())(1) == 1
        assert exactly_once(key='{order_id}', scope='p')(functools.partial(plain, amount=9))(2) == 9
        assert 'sender:1' in ledger.done

    def test_the_execution_is_visible_inside_and_only_there(self, ledger: FakeLedger) -> None:
        @exactly_once(key='inner:{number}', scope='')
        def inner(number: int) -> str:
            return current_execution().key

        @exactly_once(key='outer:{number}', scope='')
        def outer(number: int) -> tuple[str, str, str]:
            return current_execution().key, inner(number), current_execution().key

        assert outer(1) == ('outer:1', 'inner:1', 'outer:1')
        with pytest.raises(NotEntered):
            current_execution()

    @pytest.mark.parametrize('fails', [False, True])
    def test_a_generator_that_is_left_behind_in_a_block_changes_nothing_outside(
        self, ledger: FakeLedger, fails: bool
    ) -> None:
        left: list[Iterator[int]] = []

        def suspended() -> Iterator[int]:
            with once(ledger, 'in a generator'):
                yield 1

        @exactly_once(key='inner:{number}', scope='')
        def inner(number: int) -> None:
            left.append(suspended())
            next(left[0])
            if fails:
                raise LookupError

        @exactly_once(key='outer:{number}', scope='')
        def outer(number: int) -> tuple[str, str]:
            with contextlib.suppress(LookupError):
                inner(number)
            before = current_execution().key
            left.clear()
            return before, current_execution().key

        assert outer(1) == ('outer:1', 'outer:1')
        with pytest.raises(NotEntered):
            current_execution()


class TestAsync:
    def test_it_runs_once_and_sees_its_execution(self, ledger: FakeLedger) -> None:
        @exactly_once(key='{number}', scope='', on_duplicate='result')
        async def function(number: int) -> str:
            await asyncio.sleep(0)
            return current_execution().key

        async def main() -> list[str]:
            return [await function(1), await function(1)]

        assert inspect.iscoroutinefunction(function)
        assert asyncio.run(main()) == ['1', '1']
        assert len(ledger.retentions) == 1

    def test_concurrent_calls_see_their_own_executions(self, ledger: FakeLedger) -> None:
        @exactly_once(key='{number}', scope='')
        async def function(number: int) -> str:
            for _ in range(5):
                await asyncio.sleep(0)
            return current_execution().key

        async def main() -> list[str]:
            return await asyncio.gather(*(function(number) for number in range(20)))

        assert asyncio.run(main()) == [str(number) for number in range(20)]

    def test_an_exception_and_a_cancellation_are_failures(self, ledger: FakeLedger) -> None:
        started = asyncio.Event()

        @exactly_once(scope='test', key='{number}')
        async def function(number: int) -> None:
            if number == 1:
                raise ValueError('x')
            started.set()
            await asyncio.Event().wait()

        async def main() -> None:
            with pytest.raises(ValueError, match='x'):
                await function(1)
            task = asyncio.create_task(function(2))
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert [type(error) for error in ledger.failures] == [ValueError, asyncio.CancelledError]
        assert ledger.running == set()

    def test_a_cancellation_while_the_ledger_begins_leaves_nothing_running(
        self, ledger: FakeLedger
    ) -> None:
        reached, go_on = threading.Event(), threading.Event()
        begin = ledger.begin

        def slow_begin(mine: Unsettled) -> None:
            reached.set()
            assert go_on.wait(10)
            begin(mine)

        ledger.begin = slow_begin  # type: ignore[method-assign]
        calls = []

        @exactly_once(key='{number}', scope='')
        async def function(number: int) -> None:
            calls.append(number)

        async def main() -> None:
            task = asyncio.create_task(function(1))
            assert await asyncio.to_thread(reached.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()

        asyncio.run(main())
        assert (calls, ledger.abandoned, ledger.running) == ([], ['1'], set())

    @pytest.mark.parametrize('inside', [False, True])
    def test_a_coroutine_that_is_thrown_away_abandons_its_key(
        self, ledger: FakeLedger, inside: bool
    ) -> None:
        entered = []
        waiting = threading.Event()
        begin = ledger.begin

        def begin_later(mine: Unsettled) -> None:
            assert waiting.wait(10)
            begin(mine)

        ledger.begin = begin_later  # type: ignore[method-assign]

        @exactly_once(key='{number}', scope='')
        async def function(number: int) -> None:
            entered.append(number)
            await asyncio.Event().wait()

        async def main() -> None:
            coroutine = function(1)
            begun = coroutine.send(None)
            waiting.set()
            while not begun.done():
                await asyncio.sleep(0.001)
            if inside:
                coroutine.send(None)
            coroutine.close()

        asyncio.run(main())
        assert (entered, ledger.abandoned, ledger.running) == ([1] if inside else [], ['1'], set())

    def test_the_loop_goes_on_while_the_ledger_waits(self, ledger: FakeLedger) -> None:
        ticked = threading.Event()
        begin = ledger.begin

        def slow_begin(mine: Unsettled) -> None:
            assert ticked.wait(10), 'the loop was blocked'
            begin(mine)

        ledger.begin = slow_begin  # type: ignore[method-assign]

        @exactly_once(scope='test', key='{number}')
        async def function(number: int) -> int:
            return number

        async def main() -> int:
            task = asyncio.create_task(function(1))
            await asyncio.sleep(0)
            ticked.set()
            return await task

        assert asyncio.run(main()) == 1


class TestBlock:
    def test_the_block_runs_once_and_keeps_its_result(self, ledger: FakeLedger) -> None:
        with once(ledger, 'k') as execution:
            assert current_execution() is execution
            execution.result = [1, 2]
        assert execution.completed
        with pytest.raises(DuplicateExecution) as caught, once(ledger, 'k'):
            pytest.fail('the block ran twice')
        assert vars(caught.value)['result'] == [1, 2]

    def test_an_exception_in_the_block_frees_the_key(self, ledger: FakeLedger) -> None:
        with pytest.raises(RuntimeError), once(ledger, 'k'):
            raise RuntimeError('x')
        with once(ledger, 'k') as execution:
            pass
        assert execution.completed

    @pytest.mark.parametrize('key', ['', 'a\0', 5, None, 'x' * 2001])
    def test_a_key_that_cannot_be_stored_is_refused(self, ledger: FakeLedger, key: Any) -> None:
        with pytest.raises(ConfigurationError, match='execution key'), once(ledger, key):
            pytest.fail('the block ran')


class TestSingleNodeMode:
    def test_everything_runs_every_time(self) -> None:
        set_current_ledger(SingleLedger())
        try:
            wrapped = exactly_once(key='{order_id}')(plain)
            assert (wrapped(1, 5), wrapped(1, 6)) == (5, 6)
        finally:
            set_current_ledger(None)

    def test_complete_is_accepted_and_a_transaction_is_refused(self) -> None:
        with once(SingleLedger(), 'k') as execution:
            execution.complete(object(), result=1)
            assert execution.completed
            with (
                pytest.raises(ConfigurationError, match='single-node mode'),
                execution.transaction(),
            ):
                pytest.fail('there is no database')


class TestAMessagesLedger:
    """What an adapter's worker begins with."""

    def ledger(self, incarnation: str, leased: bool) -> ClusterLedger:
        sessions: Any = None  # never reached
        return ClusterLedger(sessions, Tables('shop_'), 'n1', lambda: incarnation, lambda: leased)

    @pytest.fixture(autouse=True)
    def none_left(self) -> Iterator[None]:
        yield
        set_current_ledger(None)

    def test_with_a_lease_it_is_the_node_s(self) -> None:
        mine = self.ledger('life 1', leased=True)
        set_current_ledger(mine)
        assert message_ledger() is mine

    def test_without_a_lease_nothing_begins(self) -> None:
        set_current_ledger(self.ledger('life 1', leased=False))
        refused: list[JobSyncError] = []

        def refuse(options: ExactlyOnce, error: JobSyncError, ran: bool) -> str:
            refused.append(error)
            assert not ran
            return 'later'

        @exactly_once(key='{order_id}', scope='test', refuse=refuse, ledger=message_ledger)
        def sync(order_id: int) -> None:
            raise AssertionError('begun without a lease')

        @exactly_once(key='{order_id}', scope='test', refuse=refuse, ledger=message_ledger)
        async def later(order_id: int) -> None:
            raise AssertionError('begun without a lease')

        assert [sync(1), asyncio.run(later(1))] == ['later', 'later']
        assert [type(error) for error in refused] == [ClaimLost, ClaimLost]

    @pytest.mark.parametrize(
        ('error', 'comes_back'),
        [
            (DatabaseUnavailable('away'), True),
            (DatabaseRefused('disk full', '53100', True), True),
            (MissingPrivilege('permission denied for table lock', '42501', True), False),
            (StatementRefused('a trigger says no', 'P0001'), False),
        ],
    )
    def test_what_the_server_refuses_to_the_body_fails_its_message(
        self, error: JobSyncError, comes_back: bool
    ) -> None:
        runs = 0

        def refuse(options: ExactlyOnce, error: JobSyncError, ran: bool) -> str:
            assert ran
            return 'later'

        @exactly_once(key='{order_id}', scope='test', refuse=refuse, ledger=MemoryLedger)
        def sync(order_id: int) -> None:
            nonlocal runs
            runs += 1
            raise error

        with contextlib.nullcontext() if comes_back else pytest.raises(type(error)):
            assert sync(1) == 'later'
        assert runs == 1

    def test_uncoordinated_everything_runs(self) -> None:
        set_current_ledger(self.ledger(UNCOORDINATED, leased=False))
        assert isinstance(message_ledger(), SingleLedger)
