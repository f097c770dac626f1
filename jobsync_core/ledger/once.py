"""Run a block, or a function, once per key: the user's face of the ledger."""

from __future__ import annotations

import datetime
import functools
import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any, TypeVar

from ..errors import (
    AttemptsExhausted,
    ClaimLost,
    ConfigurationError,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    JobSyncError,
)
from .attempt import Attempt
from .current import current_ledger
from .execution import Execution
from .functions import check_has_run, is_async
from .interface import Ledger
from .limits import DEFAULT_RETENTION, check_key, retention_seconds
from .options import UNRECORDED, ExactlyOnce

__all__ = ['ExactlyOnce', 'exactly_once', 'once']

F = TypeVar('F', bound=Callable[..., Any])

#: Why an attempt does not begin.
_REFUSALS = (
    DuplicateExecution,
    ExecutionRunning,
    AttemptsExhausted,
    ClaimLost,
    DatabaseUnavailable,
)


def once(
    ledger: Ledger, key: str, *, retention: datetime.timedelta | float = DEFAULT_RETENTION
) -> AbstractContextManager[Execution]:
    """Run the block as an attempt of `key`: `with once(ledger, key) as execution:`.

    The block's normal end records the completion, with `execution.result` if the block sets it. An
    exception, SystemExit and KeyboardInterrupt included, records a failure, so that anybody may try
    again at once.

    Args:
        ledger: The ledger.
        key: The key, at most 2000 bytes.
        retention: For how long its completion is remembered: a timedelta, or seconds.

    Raises:
        DuplicateExecution: The key was completed before; the block does not run. `.result` is the
            stored result.
        ExecutionRunning: Another attempt is running; the block does not run.
        AttemptsExhausted: Too many attempts at the key were lost; the block does not run.
        ClaimLost: This node was evicted and rejoins by itself; the block does not run.
        DatabaseUnavailable: Before the block: it does not run. After it: it ran, but its completion
            is not known to be recorded.
        Fenced: The block ran, but another attempt has taken the key over meanwhile.
        NotCommitted: The block ran, but the transaction that `execution.complete` wrote into is not
            committed.
    """
    return _Block(Attempt(ledger, check_key(key), retention_seconds(retention), awaits_result=True))


class _Block(AbstractContextManager[Execution]):
    """What `once` gives."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def __enter__(self) -> Execution:
        try:
            try:
                return self._attempt.begin()
            except BaseException:
                self._attempt.leave()
                raise
        except BaseException:
            self._attempt.leave()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        attempt = self._attempt
        try:
            try:
                if error is None:
                    attempt.succeed()
                    attempt.settle()
                elif not isinstance(error, GeneratorExit):
                    attempt.fail(error)
                    attempt.settle()
                # A generator or coroutine around the block that is thrown away is so in the middle
                # of anything: no I/O.
            finally:
                attempt.leave()
        finally:
            attempt.leave()


def exactly_once(
    *bare: object,
    key: str | Callable[..., str] | None = None,
    retention: datetime.timedelta | float = DEFAULT_RETENTION,
    on_duplicate: str = 'skip',
    on_running: str = 'requeue',
    store_result: bool = True,
    scope: str | None = None,
    default_key: Callable[[], str | None] | None = None,
    refuse: Callable[[ExactlyOnce, JobSyncError, bool], Any] | None = None,
    ledger: Callable[[], Ledger] = current_ledger,
    completes: Callable[[Execution, BaseException], bool] | None = None,
    check_result: Callable[[Any], object] | None = None,
    as_sent: Callable[[Any], Any] | None = None,
    named_later: bool = False,
    affinity: bool | None = None,
    max_lost: int | None = None,
) -> Callable[[F], F]:
    """Make a function complete once per key, in the whole cluster:
    `@exactly_once(key='order:{order_id}')`.

    Works on functions, methods and `async def`. An attempt whose process dies before it ends is run
    again by another; effects happen exactly once only in the transaction of `current_execution()`.
    A call that raises may be called again.

    Args:
        bare: Nothing: it is here to refuse `@exactly_once` without its options.
        key: A format string over the arguments, defaults included (`{order_id}`, `{order.id}`,
            `{0}` for the first one), or a callable that takes the arguments and returns a string;
            it need not take the `self` of a method or of a bound task. Of several fields the values
            are escaped where they contain what stands between them. Sets, dicts and floats (without
            a format such as `{price:.2f}`) are refused.
        retention: For how long a completion is remembered: a timedelta, or seconds.
        on_duplicate: What a call with a completed key does: 'skip' returns None, 'result' the
            stored result, 'raise' raises DuplicateExecution.
        on_running: What a call does whose key is running elsewhere: 'skip' returns None, 'raise'
            raises ExecutionRunning; so does 'requeue', which a queue's adapter translates: the
            message comes back later.
        store_result: Store what the function returns, as JSON; it comes back equal, tuples as
            tuples; dates, times, Decimal, UUID and bytes too. What else is no JSON, or is longer
            than 1 MB, is not stored: a warning says so once, and duplicates get None.
        scope: What keys begin with. The default, the function's qualified name, keeps two functions
            apart that use the same key; '' lets them share it. Whoever renames or moves the
            function gives the old name here, or all of its keys are forgotten. It is required where
            the name is not the function's alone: in a script (`__main__`), for a lambda, and within
            another function.
        default_key: For adapters: gives the id of the message that is being processed, for
            functions without `key`.
        refuse: For adapters: answers a call that cannot begin, or whose completion cannot be
            recorded (then its third argument is True), in place of an exception.
        ledger: For adapters: gives the ledger of the call.
        completes: For adapters: tells of an exception that ended the function whether the key is
            complete by it.
        check_result: For adapters: called with a result that is not plain JSON in the ledger; what
            it raises fails the attempt.
        as_sent: For adapters: makes of what the function returned what the framework sends; that is
            stored.
        named_later: For adapters: the function gets a name, which is its scope, from
            `ExactlyOnce.adopt`.
        max_lost: How many attempts at a key may be lost, as their process died or was taken for
            dead; then the key is dead, and a call raises AttemptsExhausted until an operator frees
            it. 0: any number; None: as the Job says. Attempts that raise do not count.
        affinity: For adapters: whether messages of the task go to the owner of their key; None: as
            the settings say.

    Raises:
        ConfigurationError: At decoration: an option cannot work, the key names an argument that the
            function does not have, or the decorator stands above the one that makes a task or an
            actor.
        NotEntered: At the call: this process has entered no Job.
    """
    if bare:
        raise ConfigurationError(
            "@exactly_once takes its options by name: write @exactly_once(key='order:{order_id}')"
        )

    def decorate(function: F) -> F:
        options = ExactlyOnce(
            function,
            key,
            retention,
            on_duplicate,
            on_running,
            store_result,
            scope,
            default_key,
            refuse,
            ledger,
            completes,
            check_result,
            as_sent,
            named_later,
            affinity,
            max_lost,
        )
        wrapper = (
            _async_wrapper(function, options) if is_async(function) else _wrapper(function, options)
        )
        with suppress(TypeError, ValueError):
            # For those who do not look through wrappers: Celery's check of a message's arguments,
            # for example.
            vars(wrapper)['__signature__'] = inspect.signature(function)
        vars(wrapper)['exactly_once'] = options
        return wrapper  # type: ignore[return-value]  # of the signature of `function`

    return decorate


def _wrapper(function: Callable[..., Any], options: ExactlyOnce) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            attempt = options.attempt(args, kwargs)
        except _REFUSALS as error:
            return options.answer(error)
        try:
            try:
                return _run(options, attempt, lambda: function(*args, **kwargs))
            finally:
                attempt.leave()
        finally:
            attempt.leave()

    return run


def _run(options: ExactlyOnce, attempt: Attempt, call: Callable[[], Any]) -> Any:
    try:
        attempt.begin()
    except _REFUSALS as error:
        attempt.leave()
        return options.answer(error)
    # Not around the call: an inner function's own DuplicateExecution is this one's failure, not its
    # answer.
    try:
        result = call()
        check_has_run(options.name, result)
        options.keep(attempt.execution, result)
    except BaseException as error:
        end = options.judge(attempt, error)
        attempt.step_back()
        try:
            attempt.settle()
        except UNRECORDED as trouble:
            return options.unrecorded(trouble)
        return end.answer(error)
    attempt.succeed()
    attempt.step_back()
    try:
        attempt.settle()
    except UNRECORDED as error:
        return options.unrecorded(error)
    return result


def _async_wrapper(function: Callable[..., Any], options: ExactlyOnce) -> Callable[..., Any]:
    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        try:
            attempt = options.attempt(args, kwargs)
        except _REFUSALS as error:
            return options.answer(error)
        try:
            try:
                return await _run_async(options, attempt, lambda: function(*args, **kwargs))
            finally:
                attempt.leave()
        finally:
            attempt.leave()

    return run


async def _run_async(
    options: ExactlyOnce, attempt: Attempt, call: Callable[[], Awaitable[Any]]
) -> Any:
    """The same as `_run`, with all that waits awaited."""
    try:
        await attempt.begin_async()
    except _REFUSALS as error:
        attempt.leave()
        return options.answer(error)
    try:
        result = await call()
        options.keep(attempt.execution, result)
    except GeneratorExit:  # the coroutine was closed: nothing may be awaited any more
        raise
    except BaseException as error:
        end = options.judge(attempt, error)
        attempt.step_back()
        try:
            await attempt.settle_async()
        except UNRECORDED as trouble:
            return options.unrecorded(trouble)
        return end.answer(error)
    attempt.succeed()
    attempt.step_back()
    try:
        await attempt.settle_async()
    except UNRECORDED as error:
        return options.unrecorded(error)
    return result
