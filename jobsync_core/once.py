"""Run a block, or a function, once per key: the user's face of the ledger."""
from __future__ import annotations

import asyncio
import datetime
import functools
import inspect
import logging
import string
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from .errors import ConfigurationError, DuplicateExecution, ExecutionRunning
from .ledger import DEFAULT_RETENTION, Execution, Ledger, LocalLedger, _execution, check_key, current_ledger, retention_seconds

__all__ = ['ExactlyOnce', 'exactly_once', 'once']

logger = logging.getLogger(__name__)

F = TypeVar('F', bound=Callable[..., Any])

_ON_DUPLICATE = ('skip', 'result', 'raise')
_ON_RUNNING = ('requeue', 'skip', 'raise')


@contextmanager
def once(
    ledger: Ledger | LocalLedger, key: str, *, retention: datetime.timedelta | float = DEFAULT_RETENTION,
) -> Iterator[Execution]:
    """Run the block as an attempt of `key`: `with once(ledger, key) as execution:`.

    The block's normal end records the completion, with `execution.result` if the block sets it. An exception, SystemExit and
    KeyboardInterrupt included, records a failure, so that anybody may try again at once.

    Args:
        ledger: The ledger.
        key: The key, at most 2000 bytes.
        retention: For how long its completion is remembered: a timedelta, or seconds.

    Raises:
        DuplicateExecution: The key was completed before; the block does not run. `.result` is the stored result.
        ExecutionRunning: Another attempt is running; the block does not run.
        ClaimLost: This node was evicted and rejoins by itself; the block does not run.
        DatabaseUnavailable: Before the block: it does not run. After it: it ran, but its completion is not known to be recorded.
        Fenced: The block ran, but another attempt has taken the key over meanwhile.
    """
    execution = ledger.begin(check_key(key), retention_seconds(retention))
    token = _execution.set(execution)
    try:
        yield execution
    except BaseException as error:
        ledger.fail(execution, error)
        raise
    else:
        ledger.finish(execution)
    finally:
        _execution.reset(token)


class ExactlyOnce:
    """What an `exactly_once` function promises, for those who run it: found as `function.exactly_once`.

    Args:
        function: The function.
        key: A format string over its arguments, a callable that takes them, or None for `default_key`.
        retention: For how long a completion is remembered: a timedelta, or seconds.
        on_duplicate: 'skip', 'result' or 'raise'.
        on_running: 'requeue', 'skip' or 'raise'.
        store_result: Whether results are stored.
        scope: What keys begin with; None is the function's qualified name, '' nothing.
        default_key: Gives the key where `key` is None: the id of the message that is being processed.

    Raises:
        ConfigurationError: A value cannot work.
    """

    def __init__(
        self, function: Callable[..., Any], key: str | Callable[..., str] | None, retention: datetime.timedelta | float,
        on_duplicate: str, on_running: str, store_result: bool, scope: str | None, default_key: Callable[[], str | None] | None,
    ) -> None:
        self.name = _check_function(function)
        self.retention_sec = retention_seconds(retention)
        for option, value, allowed in (('on_duplicate', on_duplicate, _ON_DUPLICATE), ('on_running', on_running, _ON_RUNNING)):
            if value not in allowed:
                raise ConfigurationError(f'{option}={value!r} of {self.name}: use one of {", ".join(map(repr, allowed))}')
        if not isinstance(store_result, bool):
            raise ConfigurationError(f'store_result={store_result!r} of {self.name}: give True or False')
        if on_duplicate == 'result' and not store_result:
            raise ConfigurationError(f"on_duplicate='result' of {self.name} needs store_result=True")
        if scope is not None and not isinstance(scope, str):
            raise ConfigurationError(f'scope={scope!r} of {self.name}: give a string, or None for the name of the function')
        self.on_duplicate = on_duplicate
        self.on_running = on_running
        self.store_result = store_result
        self.scope = self.name if scope is None else scope
        self._warned = False
        self._make = self._key_maker(function, key, default_key)

    def __repr__(self) -> str:
        return f'<ExactlyOnce {self.name}>'

    def key_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The user's key of a call: what is hashed, locked and shown.

        Raises:
            ConfigurationError: The arguments make no key.
            TypeError: The function does not take these arguments.
        """
        return check_key(self._make(args, kwargs))

    def ledger_key_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """The key of a call in the ledger: `key_of` behind the scope, so that two functions never share a key by accident."""
        key = self.key_of(args, kwargs)
        return check_key(f'{self.scope}:{key}') if self.scope else key

    def _key_maker(
        self, function: Callable[..., Any], key: str | Callable[..., str] | None, default_key: Callable[[], str | None] | None,
    ) -> Callable[[Sequence[Any], Mapping[str, Any]], object]:
        if isinstance(key, str):
            return _Format(key, function, self.name)
        if key is None:
            if default_key is None:
                raise ConfigurationError(
                    f"{self.name} needs a key, as there is no message whose id could be one: @exactly_once(key='order:{{order_id}}')")
            source = default_key
            return lambda args, kwargs: self._message_id(source)
        if not callable(key) or inspect.iscoroutinefunction(key):
            raise ConfigurationError(f'key={key!r} of {self.name}: give a format string, or a callable that returns a string')
        maker = key
        return lambda args, kwargs: maker(*args, **kwargs)

    def _message_id(self, source: Callable[[], str | None]) -> str:
        found = source()
        if found is None:
            raise ConfigurationError(
                f'{self.name} was called outside of a message, whose id is its key: give @exactly_once a key over its arguments')
        return found

    def answer(self, error: DuplicateExecution | ExecutionRunning) -> Any:
        """What a call returns that did not run, or its exception."""
        if isinstance(error, DuplicateExecution):
            if self.on_duplicate == 'raise':
                raise error
            return getattr(error, 'result', None) if self.on_duplicate == 'result' else None
        if self.on_running == 'skip':
            return None
        vars(error).update(requeue=self.on_running == 'requeue')
        raise error

    def keep(self, execution: Execution, result: Any) -> None:
        """Let the completion carry the result, if it can be stored and the function has set no other."""
        if not self.store_result or execution.result is not None:
            return
        try:
            execution.result = result
        except ConfigurationError as error:
            if not self._warned:
                self._warned = True
                logger.warning('function=%s completes without its results: %s', self.name, error)


def exactly_once(
    key: str | Callable[..., str] | None = None,
    *,
    retention: datetime.timedelta | float = DEFAULT_RETENTION,
    on_duplicate: str = 'skip',
    on_running: str = 'requeue',
    store_result: bool = True,
    scope: str | None = None,
    default_key: Callable[[], str | None] | None = None,
) -> Callable[[F], F]:
    """Make a function complete once per key, in the whole cluster: `@exactly_once(key='order:{order_id}')`.

    Works on functions, methods and `async def`. An attempt whose process dies before it ends is run again by another;
    effects happen exactly once only in the transaction of `current_execution()`. A call that raises may be called again.

    Args:
        key: A format string over the arguments, defaults included (`{order_id}`, `{order.id}`, `{0}` for the first one), or
            a callable that takes the arguments and returns a string.
        retention: For how long a completion is remembered: a timedelta, or seconds.
        on_duplicate: What a call with a completed key does: 'skip' returns None, 'result' the stored result, 'raise' raises
            DuplicateExecution.
        on_running: What a call does whose key is running elsewhere: 'skip' returns None, 'raise' raises ExecutionRunning;
            so does 'requeue', which a queue's adapter translates: the message comes back later.
        store_result: Store what the function returns, as JSON; a tuple comes back as a list. What is no JSON, or longer than
            1 MB, is not stored: a warning says so once, and duplicates get None.
        scope: What keys begin with. The default, the function's qualified name, keeps two functions apart that use the same key;
            '' lets them share it.
        default_key: For adapters: gives the id of the message that is being processed, for functions without `key`.

    Raises:
        ConfigurationError: At decoration: an option cannot work, or the key names an argument that the function does not have.
        NotEntered: At the call: this process has entered no Job.
    """
    if key is not None and inspect.isfunction(key) and _used_bare(key):
        raise ConfigurationError(f"@exactly_once on {key.__qualname__} lacks its options: write @exactly_once(key='order:{{order_id}}')")

    def decorate(function: F) -> F:
        options = ExactlyOnce(function, key, retention, on_duplicate, on_running, store_result, scope, default_key)
        wrapper = _async_wrapper(function, options) if _is_async(function) else _wrapper(function, options)
        vars(wrapper)['exactly_once'] = options
        return wrapper  # type: ignore[return-value]  # of the signature of `function`

    return decorate


def _used_bare(function: Callable[..., Any]) -> bool:
    # `@exactly_once` without brackets: the decorated function arrives as the key, and its `def` is being executed by the caller.
    frame = sys._getframe(2)
    return frame.f_code.co_qualname == '' if False else False  # noqa
