"""Run a block, or a function, once per key: the user's face of the ledger."""

from __future__ import annotations

import datetime
import functools
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any, TypeVar

from ..errors import (
    ClaimLost,
    CompletedAlready,
    ConfigurationError,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    Fenced,
    JobSyncError,
)
from ..logs import get_logger
from .attempt import Attempt
from .current import current_ledger
from .execution import DEFAULT_RETENTION, Execution, check_key, retention_seconds, running
from .interface import Ledger
from .keys import Former, Keys, escape, is_ambiguous, key_maker

__all__ = ['ExactlyOnce', 'exactly_once', 'once']

logger = get_logger(__name__)

F = TypeVar('F', bound=Callable[..., Any])

# Why an attempt does not begin, and why its completion may not be recorded.
_REFUSALS = (DuplicateExecution, ExecutionRunning, ClaimLost, DatabaseUnavailable)
_UNRECORDED = (DatabaseUnavailable, Fenced)
_ON_DUPLICATE = ('skip', 'result', 'raise')
_ON_RUNNING = ('requeue', 'skip', 'raise')


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
        ClaimLost: This node was evicted and rejoins by itself; the block does not run.
        DatabaseUnavailable: Before the block: it does not run. After it: it ran, but its completion
            is not known to be recorded.
        Fenced: The block ran, but another attempt has taken the key over meanwhile.
        NotCommitted: The block ran, but the transaction that `execution.complete` wrote into is not
            committed.
    """
    return _Block(Attempt(ledger, check_key(key), retention_seconds(retention)))


class _Block(AbstractContextManager[Execution]):
    """See `once`."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._before: Execution | None = None

    def __enter__(self) -> Execution:
        try:
            try:
                execution = self._attempt.begin()
                self._before = running.get()
                running.set(execution)
                return execution
            except BaseException:
                self._attempt.leave()
                raise
        except BaseException:
            self._attempt.leave()
            raise

    def _restore(self) -> None:
        # A generator around the block may be thrown away while another attempt is running in this
        # context.
        if running.get() is self._attempt.unsettled.execution:
            running.set(self._before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        attempt = self._attempt
        try:
            try:
                self._restore()
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


class ExactlyOnce:
    """What an `exactly_once` function promises, for those who run it: found as
    `function.exactly_once`.

    Args:
        function: The function.
        key: A format string over its arguments, a callable that takes them, or None for
            `default_key`.
        retention: For how long a completion is remembered: a timedelta, or seconds.
        on_duplicate: 'skip', 'result' or 'raise'.
        on_running: 'requeue', 'skip' or 'raise'.
        store_result: Whether results are stored.
        scope: What keys begin with; None is the function's qualified name, '' nothing.
        named_later: A framework gives the function a name, which is the scope then: see `adopt`.
        default_key: Gives the key where `key` is None: the id of the message that is being
            processed.
        refuse: Called with these options, an error and whether the function ran, instead of raising
            the error.
        ledger: Gives the ledger of a call.
        completes: Tells of an exception that ended the function whether the key is complete by it.
        check_result: Raises where the caller of the function cannot be given what it returned.

    Raises:
        ConfigurationError: A value cannot work.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        key: str | Callable[..., str] | None,
        retention: datetime.timedelta | float,
        on_duplicate: str,
        on_running: str,
        store_result: bool,
        scope: str | None,
        default_key: Callable[[], str | None] | None,
        refuse: Callable[[ExactlyOnce, JobSyncError, bool], Any] | None = None,
        ledger: Callable[[], Ledger] = current_ledger,
        completes: Callable[[Execution, BaseException], bool] | None = None,
        check_result: Callable[[Any], object] | None = None,
        named_later: bool = False,
    ) -> None:
        self.name = _check_function(function)
        self.retention_sec = retention_seconds(retention)
        for option, value, allowed in (
            ('on_duplicate', on_duplicate, _ON_DUPLICATE),
            ('on_running', on_running, _ON_RUNNING),
        ):
            if value not in allowed:
                raise ConfigurationError(
                    f'{option}={value!r} of {self.name}: use one of {", ".join(map(repr, allowed))}'
                )
        if not isinstance(store_result, bool):
            raise ConfigurationError(
                f'store_result={store_result!r} of {self.name}: give True or False'
            )
        if on_duplicate == 'result' and not store_result:
            raise ConfigurationError(
                f"on_duplicate='result' of {self.name} needs store_result=True"
            )
        if scope is not None and not isinstance(scope, str):
            raise ConfigurationError(
                f'scope={scope!r} of {self.name}: give a string, or None for the name of the '
                'function'
            )
        self.on_duplicate = on_duplicate
        self.on_running = on_running
        self.store_result = store_result
        self.scope = self.name if scope is None else scope
        self._is_scoped = scope is not None
        self._task: str | None = None
        self.refuse = refuse
        self.ledger = ledger
        self.completes = completes
        self.check_result = check_result
        self.has_key = key is not None
        self._warned = False
        self._make = (
            key_maker(key, function, self.name)
            if key is not None
            else self._default_maker(default_key)
        )
        if scope is None and key is not None and not named_later and is_ambiguous(self.name):
            raise ConfigurationError(
                f'@exactly_once on {self.name}: another function can have this name, and the two '
                'would share their keys and results; '
                "give a scope that no other has, @exactly_once(..., scope='billing.charge')"
            )
        self._set_scope(self.scope)

    def __repr__(self) -> str:
        return f'<ExactlyOnce {self.name}>'

    def key_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The user's key of a call: what is hashed, locked and shown.

        Raises:
            ConfigurationError: The arguments make no key.
            TypeError: The function does not take these arguments.
        """
        return self._make(args, kwargs).key

    def ledger_key_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The key of a call in the ledger: `key_of` behind the scope, so that two functions never
        share a key by accident.
        """
        return self._scoped(self.key_of(args, kwargs))

    def adopt(self, task: str) -> None:
        """The function is what this task, or actor, runs: its name is the scope, unless the user
        gave one.

        Keys that were completed under the function's own name, as before, stay known.

        Raises:
            ConfigurationError: Another task runs the same function, or the name does not tell
                functions apart.
        """
        if self._is_scoped or not self.has_key or self._task == task:
            return
        remedy = (
            "give @exactly_once(..., scope='billing.charge'), a text that no other function has"
        )
        if self._task is not None:
            raise ConfigurationError(
                f'the tasks {self._task!r} and {task!r} run the same @exactly_once function '
                f'{self.name}, and would share keys and results: '
                f'give each a function of its own, or, if they shall share them, {remedy}'
            )
        if is_ambiguous(task):
            raise ConfigurationError(
                f'the task {task!r} can have the name of another one, of another script, with '
                'which it would share keys and results: '
                f'name the task, or {remedy}'
            )
        self._task = task
        self._set_scope(task)

    def _set_scope(self, scope: str) -> None:
        self.scope = scope
        self._prefix = f'{escape(scope, ":")}:' if scope else ''
        before = [
            f'{name}:' for name in ((scope,) if self._is_scoped else (scope, self.name)) if scope
        ]
        self._former_prefixes = tuple(
            dict.fromkeys(prefix for prefix in before if prefix != self._prefix)
        )

    def _scoped(self, key: str) -> str:
        return check_key(self._prefix + key) if self._prefix else key

    def _former_keys(self, keys: Keys) -> tuple[Former, ...]:
        """Where earlier versions recorded the same call."""
        texts = (keys.key,) if keys.former is None else (keys.key, keys.former)
        found = [
            Former(prefix, prefix + text, self._is_shared(prefix))
            for prefix in self._former_prefixes
            for text in texts
        ]
        if keys.former is not None:
            # One more separator than a key of today can have; or a %XX of the value's own, which
            # reads like an escaped character.
            found.append(Former('', self._prefix + keys.former, '%' in keys.former))
        return tuple(found)

    def _is_shared(self, prefix: str) -> bool:
        """Whether other functions' keys can begin like this: 'shop:eu:1' is key 'eu:1' of the scope
        'shop', too.
        """
        return ':' in prefix[:-1] or is_ambiguous(self.name)

    def _default_maker(
        self, default_key: Callable[[], str | None] | None
    ) -> Callable[[Sequence[Any], Mapping[str, Any]], Keys]:
        if default_key is None:
            raise ConfigurationError(
                f'{self.name} needs a key, as there is no message whose id could be one: '
                "@exactly_once(key='order:{order_id}')"
            )
        source = default_key
        return lambda args, kwargs: Keys(check_key(self._message_id(source)))

    def _message_id(self, source: Callable[[], str | None]) -> str:
        found = source()
        if found is None:
            raise ConfigurationError(
                f'{self.name} was called outside of a message, whose id is its key: give '
                '@exactly_once a key over its arguments'
            )
        return found

    def answer(self, error: JobSyncError) -> Any:
        """What a call returns that did not run, or its exception."""
        if self.refuse is not None:
            return self.refuse(self, error, False)
        return self.answer_caller(error)

    def answer_caller(self, error: JobSyncError) -> Any:
        """What a call returns that did not run and that the user's own code made, or its
        exception.
        """
        if isinstance(error, DuplicateExecution):
            if self.on_duplicate == 'raise':
                raise error
            return getattr(error, 'result', None) if self.on_duplicate == 'result' else None
        if not isinstance(error, ExecutionRunning):
            raise error
        if self.on_running == 'skip':
            return None
        error.requeue = self.on_running == 'requeue'
        raise error

    def attempt(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Attempt:
        """The attempt of a call, which is not begun yet."""
        ledger, keys = self.ledger(), self._make(args, kwargs)
        return Attempt(ledger, self._scoped(keys.key), self.retention_sec, self._former_keys(keys))

    def judge(self, attempt: Attempt, error: BaseException) -> _End:
        """Note how an attempt has ended whose function raised; returns what its call does after the
        end is recorded.
        """
        if isinstance(error, CompletedAlready) and error.key == attempt.key:
            # A commit whose answer was lost went through: what was to be done is done.
            attempt.succeed()
            return _End(lambda: error.result)
        if self.is_complete(attempt.execution, error):
            attempt.succeed()
            return _End(None)
        attempt.fail(error)
        if isinstance(error, _UNRECORDED) and self.refuse is not None:
            return _End(
                lambda: self.unrecorded(error)
            )  # the ledger's own transaction in the body: no failure of the task
        return _End(None)

    def unrecorded(self, error: JobSyncError) -> Any:
        """What a call returns that ran and whose completion is not recorded, or its exception."""
        if self.refuse is None:
            raise error
        return self.refuse(self, error, True)

    def keep(self, execution: Execution, result: Any) -> None:
        """Let the completion carry the result, if it can be stored and the function has set no
        other.
        """
        if execution.result is not None:
            return
        if not self.store_result:
            self._check(result)
            return
        try:
            execution.result = result
        except ConfigurationError as error:
            self._check(result)  # what the ledger can store, a caller can be given
            if not self._warned:
                self._warned = True
                logger.warning('function=%s completes without its results: %s', self.name, error)

    def _check(self, result: Any) -> None:
        if self.check_result is not None and result is not None:
            self.check_result(result)

    def is_complete(self, execution: Execution, error: BaseException) -> bool:
        """Whether the exception that ended the function is no failure of it."""
        return self.completes is not None and self.completes(execution, error)


class _End:
    """What a call does whose function raised, after that is recorded: it raises the same, or
    returns what `instead` gives.
    """

    def __init__(self, instead: Callable[[], Any] | None) -> None:
        self._instead = instead

    def answer(self, error: BaseException) -> Any:
        """Return or raise."""
        if self._instead is None:
            raise error
        return self._instead()


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
    named_later: bool = False,
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
            tuples. What is no JSON, or longer than 1 MB, is not stored: a warning says so once, and
            duplicates get None.
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
        check_result: For adapters: called with a result that the ledger does not store; what it
            raises fails the attempt.
        named_later: For adapters: the function gets a name, which is its scope, from
            `ExactlyOnce.adopt`.

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
            named_later,
        )
        wrapper = (
            _async_wrapper(function, options)
            if _is_async(function)
            else _wrapper(function, options)
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
        before = running.get()
        try:
            attempt = options.attempt(args, kwargs)
        except _REFUSALS as error:
            return options.answer(error)
        try:
            try:
                return _run(options, attempt, lambda: function(*args, **kwargs))
            finally:
                _let_go(attempt, before)
        finally:
            _let_go(attempt, before)

    return run


def _let_go(attempt: Attempt, before: Execution | None) -> None:
    attempt.leave()
    if running.get() is attempt.unsettled.execution:
        running.set(before)


def _run(options: ExactlyOnce, attempt: Attempt, call: Callable[[], Any]) -> Any:
    before = running.get()
    try:
        running.set(attempt.begin())
    except _REFUSALS as error:
        attempt.leave()
        return options.answer(error)
    # Not around the call: an inner function's own DuplicateExecution is this one's failure, not its
    # answer.
    try:
        result = call()
        _check_result(options.name, result)
        options.keep(attempt.execution, result)
    except BaseException as error:
        end = options.judge(attempt, error)
        running.set(before)  # what follows is no part of the work, and adapters ask
        try:
            attempt.settle()
        except _UNRECORDED as trouble:
            return options.unrecorded(trouble)
        return end.answer(error)
    attempt.succeed()
    running.set(before)
    try:
        attempt.settle()
    except _UNRECORDED as error:
        return options.unrecorded(error)
    return result


def _async_wrapper(function: Callable[..., Any], options: ExactlyOnce) -> Callable[..., Any]:
    @functools.wraps(function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        before = running.get()
        try:
            attempt = options.attempt(args, kwargs)
        except _REFUSALS as error:
            return options.answer(error)
        try:
            try:
                return await _run_async(options, attempt, lambda: function(*args, **kwargs))
            finally:
                _let_go(attempt, before)
        finally:
            _let_go(attempt, before)

    return run


async def _run_async(
    options: ExactlyOnce, attempt: Attempt, call: Callable[[], Awaitable[Any]]
) -> Any:
    before = running.get()
    try:
        running.set(await attempt.begin_async())
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
        running.set(before)  # what follows is no part of the work, and adapters ask
        try:
            await attempt.settle_async()
        except _UNRECORDED as trouble:
            return options.unrecorded(trouble)
        return end.answer(error)
    attempt.succeed()
    running.set(before)
    try:
        await attempt.settle_async()
    except _UNRECORDED as error:
        return options.unrecorded(error)
    return result


def _is_async(function: Callable[..., Any]) -> bool:
    call = function.__call__  # type: ignore[operator]  # every callable has it
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _check_result(name: str, result: object) -> None:
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        if inspect.iscoroutine(result):
            result.close()
        raise ConfigurationError(
            f'{name} returned a {type(result).__name__} that has not run yet: put @exactly_once '
            'on the function that does the work'
        )


def _check_function(function: object) -> str:
    if isinstance(function, (classmethod, staticmethod)):
        raise ConfigurationError(
            f'@exactly_once on a {type(function).__name__}: write it below '
            f'@{type(function).__name__}'
        )
    if not inspect.isroutine(function):
        for method, decorator in (
            ('apply_async', '@app.task'),
            ('send_with_options', '@dramatiq.actor'),
        ):
            if callable(getattr(function, method, None)):
                raise ConfigurationError(
                    f'@exactly_once stands above {decorator}, so that messages would run without '
                    f'it: write it below {decorator}'
                )
    if inspect.isclass(function) or not callable(function):
        raise ConfigurationError(
            f'@exactly_once on {function!r}: put it on a function, a method or an `async def`'
        )
    plain: object = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = f'{_module_of(plain)}.{getattr(plain, "__qualname__", type(plain).__qualname__)}'
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise ConfigurationError(
            f'@exactly_once on the generator {name}: it has not run when it returns; return a list'
        )
    return name


def _module_of(function: object) -> str:
    module = str(getattr(function, '__module__', None) or type(function).__module__)
    # `python -m proj.tasks` runs the same functions that others import as proj.tasks.
    spec = getattr(sys.modules.get('__main__'), '__spec__', None) if module == '__main__' else None
    return spec.name if spec is not None else module
