"""What an adapter says of its tasks and messages: which are coordinated, and what becomes of a
message whose attempt is refused.
"""

from __future__ import annotations

import datetime
import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from ..errors import (
    AttemptsExhausted,
    ConfigurationError,
    DuplicateExecution,
    ExecutionRunning,
    JobSyncError,
    ResultLost,
)
from ..ledger import once as core
from ..ledger.current import message_ledger
from ..ledger.execution import Execution, running
from ..ledger.interface import Ledger
from ..ledger.limits import DEFAULT_RETENTION
from ..ledger.once import ExactlyOnce
from .affinity import has_affinity
from .routing import Coordination
from .settings import PluginSettings

__all__ = ['CoordinatedTasks', 'Declared', 'MessageOnce', 'once_of']

F = TypeVar('F', bound=Callable[..., Any])


def once_of(function: object) -> ExactlyOnce | None:
    """The `exactly_once` options of a function; None where it has none."""
    found = getattr(function, 'exactly_once', None)
    return found if isinstance(found, ExactlyOnce) else None


@dataclass(frozen=True)
class Declared:
    """How the user declared a task.

    Args:
        function: What it runs, for a key over its arguments.
        once: Its `exactly_once` options, if it has them.
        key: Its `jobsync_key`.
        pin: Its `jobsync_pin`.
        internal: It is the framework's own, so that `coordinate='all'` does not mean it.
        prepare: Makes of a message's arguments those of the function, where they differ.
    """

    function: Callable[..., Any]
    once: ExactlyOnce | None
    key: str | Callable[..., str] | None
    pin: Sequence[str] | str | None
    internal: bool = False
    prepare: (
        Callable[[Sequence[Any], Mapping[str, Any]], tuple[Sequence[Any], Mapping[str, Any]]] | None
    ) = None


class CoordinatedTasks:
    """The coordinated tasks of an application; looked up by name, built once each.

    Args:
        settings: The plugin's.
        declared: How a task was declared; None where it is not known here, or not yet.
        names: The names of all tasks that are known now.
    """

    def __init__(
        self,
        settings: PluginSettings,
        declared: Callable[[str], Declared | None],
        names: Callable[[], Iterable[str]],
    ) -> None:
        self._settings = settings
        self._declared = declared
        self._names = names
        self._known: dict[str, Coordination | None] = {}

    def find(self, name: str) -> Coordination | None:
        """How a task is coordinated; None: it is not, or it is unknown here.

        Raises:
            ConfigurationError: Its key or its pin cannot work.
        """
        if name not in self._known:
            declared = self._declared(name)
            if declared is None:
                return None  # another process's task; it may be declared here later
            self._known[name] = self._build(name, declared)
        return self._known[name]

    def pins(self) -> dict[str, tuple[str, ...]]:
        """Pinned tasks and their patterns."""
        pins: dict[str, tuple[str, ...]] = {
            name: tuple(patterns) for name, patterns in self._settings.pins.items()
        }
        for name in list(self._names()):
            found = self.find(name)
            if found is not None and found.pin is not None:
                pins[name] = found.pin
        return pins

    def unknown_pins(self) -> list[str]:
        """What is to be said at the start of pins in the settings whose tasks are not known here:
        most likely they are misspelt.
        """
        names = list(self._names())
        found: list[str] = []
        for name in self._settings.pins:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                found.append(
                    f'pins: {name!r} is not known here'
                    + (f'; did you mean {near[0]!r}?' if near else '')
                )
        return found

    def _build(self, name: str, task: Declared) -> Coordination | None:
        if task.pin is not None and not task.pin:
            raise ConfigurationError(
                f"{name}: jobsync_pin={task.pin!r} is empty: give at least one pattern ('%' "
                'matches every node), or None for no pin'
            )
        given = self._settings.pins.get(name)
        pin = task.pin if task.pin is not None else given
        everything = self._settings.coordinate == 'all' and not task.internal
        if task.once is None and task.key is None and pin is None and not everything:
            return None
        places = {'jobsync_key': task.key, 'jobsync_pin': task.pin, f'pins[{name!r}]': given}
        affinity = has_affinity(name, task.once, places, self._settings)
        if task.once is not None:
            task.once.adopt(name)
        return Coordination(
            name,
            task.function,
            task.once,
            task.key,
            pin,
            self._settings.pin_slots,
            task.prepare,
            affinity,
        )


class MessageOnce(ABC):
    """`@exactly_once` for the messages of a framework."""

    def exactly_once(
        self,
        *bare: object,
        key: str | Callable[..., str] | None = None,
        retention: datetime.timedelta | float = DEFAULT_RETENTION,
        on_duplicate: str = 'result',
        on_running: str = 'requeue',
        store_result: bool = True,
        scope: str | None = None,
        affinity: bool | None = None,
        max_lost: int | None = None,
    ) -> Callable[[F], F]:
        """Make a task (an actor) complete once per key: put it below the framework's own decorator.

        Args:
            bare: Nothing: it is here to refuse `@exactly_once` without parentheses.
            key: A format string over the arguments, or a callable that takes them. Default: the
                message's id, which suppresses redeliveries.
            retention: For how long a completion is remembered: a timedelta, or seconds.
            on_duplicate: What a message with a completed key returns: 'result' the stored result,
                'skip' None; 'raise' raises DuplicateExecution.
            on_running: What becomes of a message whose key is running: 'requeue' brings it back,
                'skip' returns None, 'raise' raises ExecutionRunning.
            store_result: Store what the function returns, as JSON.
            scope: What keys begin with; default: the task's (the actor's) name.
            affinity: False: a message runs where it is taken from its queue; True: on the node that
                owns its key; default: as the setting `affinity` says.
            max_lost: How many attempts at a key may be lost, as their process died or was taken for
                dead; then its message fails with AttemptsExhausted and goes to the dead letters. 0:
                any number; default: as the setting `max_lost` says. Attempts that raise do not
                count.

        Raises:
            ConfigurationError: An option cannot work.
        """
        if bare:
            return core.exactly_once(*bare)  # refuses them

        def decorate(function: F) -> F:
            # Of its own for each function: one decorator may be put on several.
            made: list[ExactlyOnce] = []
            wrapper = core.exactly_once(
                key=key,
                retention=retention,
                on_duplicate=on_duplicate,
                on_running=on_running,
                store_result=store_result,
                scope=scope,
                default_key=lambda: self.message_id() if self._is_own(made[0]) else None,
                refuse=self._refuse,
                ledger=self.ledger,
                completes=self.completes,
                check_result=self.check_result,
                as_sent=self.as_sent,
                named_later=True,
                affinity=affinity,
                max_lost=max_lost,
            )(function)
            made.append(vars(wrapper)['exactly_once'])
            return wrapper

        return decorate

    def made(self, options: ExactlyOnce) -> bool:
        """Whether this framework's `exactly_once` made the options, and not the core's or another
        framework's.
        """
        return getattr(options.refuse, '__self__', None) is self

    @abstractmethod
    def message_id(self) -> str | None:
        """The id of the message that is being processed; None where there is none."""

    @abstractmethod
    def duplicate(self, error: DuplicateExecution) -> None:
        """The message that is being processed is a duplicate: tell those who want to know."""

    @abstractmethod
    def replay(self, error: DuplicateExecution) -> None:
        """The duplicate is about to end with the stored result. Where the same message did so
        before, keep from happening again what happened then; what this raises ends it instead.
        """

    @abstractmethod
    def come_back(self, error: JobSyncError) -> NoReturn:
        """Have the message that is being processed come back later; raise what ends it for now."""

    @abstractmethod
    def exhausted(self, error: AttemptsExhausted) -> NoReturn:
        """Have the message that is being processed fail for good, and go where dead letters go;
        raise what ends it.
        """

    def is_processing(self) -> bool:
        """Whether the function was called for a message, and not by the user's own code."""
        return self.message_id() is not None

    @abstractmethod
    def came_before(self) -> bool:
        """Whether the message that is being processed may have been processed before: its broker
        delivers it again, or it has come back.
        """

    def is_task_of_message(self, options: ExactlyOnce) -> bool:
        """Whether these are the options of the very task that the message is for."""
        return True

    def _is_own(self, options: ExactlyOnce) -> bool:
        # A task that calls its own function once more is inside of its execution then.
        return running.get() is None and self.is_task_of_message(options)

    def ledger(self) -> Ledger:
        """The ledger of this call."""
        return message_ledger()

    def completes(self, execution: Execution, error: BaseException) -> bool:
        """Whether a function that ended with an exception has completed its key by it. The
        framework's own ways of ending, perhaps.
        """
        return False

    def stored_result(self, result: Any) -> Any:
        """What the ledger's result of a completed key stands for, to be given to a call of the
        user's own code.
        """
        return result

    def check_result(self, result: Any) -> None:  # noqa: B027  # most frameworks have nothing to check
        """Called with a result that is not plain JSON in the ledger, before the key is complete.
        What this raises fails the attempt.
        """

    def result_lost(self) -> None:  # noqa: B027  # most frameworks make no retry by themselves
        """Called before a message fails as nobody knows its key's result: no retry can help."""

    def as_sent(self, result: Any) -> Any:
        """What the framework sends for what a function returned: the ledger stores that."""
        return result

    def _refuse(self, options: ExactlyOnce, error: JobSyncError, ran: bool) -> Any:
        if not self.is_processing() or not self._is_own(options):
            # Called by the user's own code, inside of another task too: the message that is being
            # processed must not come back for it.
            if ran:
                raise error
            if isinstance(error, DuplicateExecution):
                error.result = self.stored_result(error.result)
            return options.answer_caller(error)
        if isinstance(error, DuplicateExecution):
            self.duplicate(error)
            if options.on_duplicate == 'raise':
                raise error
            self.replay(error)
            if options.on_duplicate != 'result':
                return None
            if isinstance(error, ResultLost):
                self.result_lost()
            return options.result_of(error)
        if isinstance(error, AttemptsExhausted):
            self.exhausted(error)
        # What runs may be this very message's, on a worker that is dead and not known to be yet.
        other = isinstance(error, ExecutionRunning) and not self.came_before()
        if other and options.on_running != 'requeue':
            if options.on_running == 'skip':
                return None
            raise error
        # Running elsewhere, the ledger out of reach, this node evicted, or the completion unknown:
        # the next delivery finds out.
        self.come_back(error)
