"""What the decorator offers to adapters, and what it says to those who put it in the wrong
place.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobsync_core.errors import ConfigurationError, DuplicateExecution
from jobsync_core.ledger.current import set_current_ledger
from jobsync_core.ledger.execution import Execution
from jobsync_core.ledger.once import exactly_once
from jobsync_core.ledger.state import Unsettled
from tests.support.fakes import FakeLedger, duplicate


class Recording(FakeLedger):
    """Remembers how attempts ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[str] = []

    def settle(self, mine: Unsettled) -> None:
        super().settle(mine)
        self.ends.append(f'done {mine.result}' if mine.succeeded else f'failed {mine.failure!r}')


@pytest.fixture
def ledger() -> Iterator[Recording]:
    made = Recording()
    set_current_ledger(made)
    yield made
    set_current_ledger(None)


class Ends(Exception):
    """Ends a function, well."""


def completes(execution: Execution, error: BaseException) -> bool:
    if isinstance(error, Ends):
        execution.result = 'ended'
    return isinstance(error, Ends)


class TestEnds:
    def test_an_exception_may_complete_the_key(self, ledger: Recording) -> None:
        @exactly_once(scope='test', key='{n}', completes=completes)
        def run(n: int) -> None:
            raise Ends if n else ValueError

        with pytest.raises(Ends):
            run(1)
        with pytest.raises(ValueError):
            run(0)
        assert ledger.ends == ['done ended', 'failed ValueError()']

    def test_of_a_coroutine_too(self, ledger: Recording) -> None:
        @exactly_once(scope='test', key='{n}', completes=completes)
        async def run(n: int) -> None:
            raise Ends

        with pytest.raises(Ends):
            asyncio.run(run(1))
        assert ledger.ends == ['done ended']

    @pytest.mark.parametrize('stored', [True, False])
    def test_a_result_that_nobody_can_be_given_fails_the_attempt(
        self, ledger: Recording, stored: bool
    ) -> None:
        def check(result: object) -> None:
            raise TypeError('no way')

        @exactly_once(scope='test', key='{n}', store_result=stored, check_result=check)
        def run(n: int) -> Any:
            return {1, 2} if n else None

        with pytest.raises(TypeError):
            run(1)
        assert run(0) is None
        assert ledger.ends == ["failed TypeError('no way')", 'done None']

    def test_what_the_ledger_stores_is_not_looked_at_again(self, ledger: Recording) -> None:
        seen: list[Any] = []

        @exactly_once(scope='test', key='{n}', check_result=seen.append)
        def run(n: int) -> int:
            return n

        assert (run(4), seen) == (4, [])


class TestDeclaration:
    def test_the_signature_is_that_of_the_function(self, ledger: Recording) -> None:
        @exactly_once(scope='test', key='{n}')
        def run(n: int, *, m: str = 'x') -> int:
            return n

        assert inspect.getfullargspec(run).args == ['n'] and inspect.getfullargspec(
            run
        ).kwonlyargs == ['m']

    @pytest.mark.parametrize(
        ('method', 'decorator'),
        [('apply_async', '@app.task'), ('send_with_options', '@dramatiq.actor')],
    )
    def test_above_a_task_or_an_actor_it_is_refused_with_the_right_line(
        self, method: str, decorator: str
    ) -> None:
        made = type('Made', (), {method: lambda self: None, '__call__': lambda self: None})()
        with pytest.raises(ConfigurationError, match=f'write it below {decorator}'):
            exactly_once(key='k')(made)

    @pytest.mark.parametrize(
        ('key', 'expected'),
        [
            (lambda n, m=1: f'{n}', '5'),
            (lambda self, n, m=1: f'{type(self).__name__}:{n}', 'Works:5'),
            (lambda order: f'{order}', '5'),
            (lambda it, n, m=1: f'{type(it).__name__}:{n}', 'Works:5'),
            (lambda *args, **kwargs: f'{len(args)}', '2'),
            (lambda n, **rest: f'{n}', '5'),
        ],
    )
    def test_a_callable_key_need_not_take_self(
        self, ledger: Recording, key: Callable[..., str], expected: str
    ) -> None:
        class Works:
            @exactly_once(key=key, scope='')
            def run(self, n: int, m: int = 1) -> int:
                return n

        Works().run(5)
        assert ledger.keys == [expected]

    def test_of_a_function_it_takes_all(self, ledger: Recording) -> None:
        @exactly_once(key=lambda a, b: f'{a}{b}', scope='')
        def run(a: int, b: int) -> None:
            """Nothing."""

        run(1, 2)
        assert ledger.keys == ['12']


def test_a_call_of_the_user_s_own_is_answered_as_the_options_say(ledger: Recording) -> None:
    @exactly_once(scope='test', key='{n}', on_duplicate='result')
    def run(n: int) -> int:
        return n

    @exactly_once(scope='test', key='{n}', on_duplicate='raise')
    def strict(n: int) -> int:
        return n

    ledger.begin_error = duplicate()
    assert run(3) == 6
    with pytest.raises(DuplicateExecution):
        strict(3)
