"""The options of an `exactly_once` function: its keys, and what its calls answer."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import (
    CompletedAlready,
    ConfigurationError,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    Fenced,
    JobSyncError,
    ResultLost,
    StatementRefused,
)
from ..logs import get_logger
from .attempt import Attempt
from .current import current_ledger
from .execution import Execution
from .functions import name_of, returns_nothing
from .interface import Ledger
from .keys import Former, Keys, escape, is_ambiguous, key_maker
from .limits import check_key, check_max_lost, retention_seconds
from .results import lost_result

__all__ = ['UNRECORDED', 'End', 'ExactlyOnce']

logger = get_logger(__name__)

#: Why a completion may not be recorded.
UNRECORDED = (DatabaseUnavailable, Fenced)
_ON_DUPLICATE = ('skip', 'result', 'raise')
_ON_RUNNING = ('requeue', 'skip', 'raise')


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
        affinity: False: messages of the task run where they are taken; True: on the owner of their
            key; None: as the framework's settings say.
        default_key: Gives the key where `key` is None: the id of the message that is being
            processed.
        refuse: Called with these options, an error and whether the function ran, instead of raising
            the error.
        ledger: Gives the ledger of a call.
        completes: Tells of an exception that ended the function whether the key is complete by it.
        check_result: Raises where the caller of the function cannot be given what it returned.
        as_sent: Makes of what the function returned what the caller is given.
        max_lost: How many attempts at a key may be lost; 0: any number, None: as the Job says.

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
        as_sent: Callable[[Any], Any] | None = None,
        named_later: bool = False,
        affinity: bool | None = None,
        max_lost: int | None = None,
    ) -> None:
        self.name = name_of(function)
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
        if affinity is not None and not isinstance(affinity, bool):
            raise ConfigurationError(
                f'affinity={affinity!r} of {self.name}: give True or False, or None for what the '
                'settings say'
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
        self._awaits_result = store_result and not returns_nothing(function)
        self.affinity = affinity
        self.max_lost = check_max_lost(max_lost)
        self.scope = self.name if scope is None else scope
        self._is_scoped = scope is not None
        self._task: str | None = None
        self.refuse = refuse
        self.ledger = ledger
        self.completes = completes
        self.check_result = check_result
        self.as_sent = as_sent
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
                f'{self.name} was called outside of a message, whose id is its key: send it as a '
                'message, or give @exactly_once a key over its arguments'
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
            return self.result_of(error) if self.on_duplicate == 'result' else None
        if not isinstance(error, ExecutionRunning):
            raise error
        if self.on_running == 'skip':
            return None
        error.requeue = self.on_running == 'requeue'
        raise error

    def attempt(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Attempt:
        """The attempt of a call, which is not begun yet."""
        # The key first: without one, no ledger would help.
        keys = self._make(args, kwargs)
        return Attempt(
            self.ledger(),
            self._scoped(keys.key),
            self.retention_sec,
            self._former_keys(keys),
            self._awaits_result,
            self.max_lost,
        )

    def result_of(self, error: DuplicateExecution) -> Any:
        """The result of the attempt that completed the key.

        Raises:
            ResultLost: Nobody knows it.
        """
        if isinstance(error, ResultLost):
            raise error
        return error.result

    def judge(self, attempt: Attempt, error: BaseException) -> End:
        """Note how an attempt has ended whose function raised; returns what its call does after the
        end is recorded.
        """
        if isinstance(error, CompletedAlready) and error.key == attempt.key:
            # A commit whose answer was lost went through: what was to be done is done.
            if attempt.unsettled.pending and attempt.execution.result is None:
                attempt.fail(error)
                return End(lambda: self.answer(lost_result(attempt.key)))
            attempt.succeed()
            return End(lambda: error.result)
        if self.is_complete(attempt.execution, error):
            attempt.succeed()
            return End(None)
        attempt.fail(error)
        # What the ledger's own transaction in the body raises is no failure of the task. What the
        # server refuses of the body's other calls on the Job is one: again it would do the same.
        if isinstance(error, StatementRefused) or self.refuse is None:
            return End(None)
        return End(lambda: self.unrecorded(error)) if isinstance(error, UNRECORDED) else End(None)

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
            execution.result = self.as_sent(result) if self.as_sent is not None else result
        except ConfigurationError as error:
            self._check(result)
            if not self._warned:
                self._warned = True
                logger.warning('function=%s completes without its results: %s', self.name, error)
        else:
            # Any framework sends what is plain JSON.
            if not execution.is_plain:
                self._check(result)

    def _check(self, result: Any) -> None:
        if self.check_result is not None and result is not None:
            self.check_result(result)

    def is_complete(self, execution: Execution, error: BaseException) -> bool:
        """Whether the exception that ended the function is no failure of it."""
        return self.completes is not None and self.completes(execution, error)


class End:
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
