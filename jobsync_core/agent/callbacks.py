"""Running the user's callbacks: in order, one at a time, never on the agent's thread, never
fatal.
"""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from .. import clock
from ..assignment.tokens import TokenSet
from ..errors import ConfigurationError
from ..logs import get_logger
from ..protocol.effects import RebalanceEvent

__all__ = ['Callbacks', 'check_release', 'with_event']

logger = get_logger(__name__)

SLOW_SEC = 1.0
#: Seconds after which on_rebalance is called although the caller of `__enter__` does not seem to
#: have gone on.
_BINDING_SEC = 1.0
_LOOK_FIRST, _LOOK_LAST = 0.0005, 0.02


@dataclass
class _Leaving:
    """Tokens that are about to be handed over, and who is told of it."""

    tokens: TokenSet
    done: Callable[[], object]
    went_on: Callable[[TokenSet], object]
    steps: Iterator[TokenSet | None] | None = None


class Callbacks:
    """The callback thread. It lives only while there is something to run, so that a steady node has
    one thread.

    Args:
        on_rebalance: Called with a RebalanceEvent, or without arguments if it takes none.
        on_release: Called with the tokens that are about to be handed over. A generator tells with
            each value which of them are still in use, so that the others go at once; None: as
            before. Other callbacks have their turns between its steps.

    Raises:
        ConfigurationError: One of them cannot be called so.
    """

    def __init__(
        self,
        on_rebalance: Callable[..., object] | None,
        on_release: Callable[[TokenSet], object] | None,
    ) -> None:
        self._on_rebalance = with_event(on_rebalance) if on_rebalance is not None else None
        if on_release is not None:
            check_release(on_release)
        self._on_release = on_release
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._queue: deque[RebalanceEvent | _Leaving] = deque()
        self._running = False
        self._thread_refused = False
        self._returned = threading.Event()
        self._returned.set()
        self._is_bound: Callable[[], bool] | None = None
        self.failures = 0
        self.slow = 0

    def rebalanced(self, event: RebalanceEvent) -> None:
        """Queue an event; it is merged into one that waits and has not begun."""
        if self._on_rebalance is None:
            return
        with self._lock:
            last = self._queue[-1] if self._queue else None
            if isinstance(last, RebalanceEvent):
                self._queue[-1] = RebalanceEvent(
                    last.is_initial or event.is_initial,
                    event.token_version,
                    last.tokens_added + event.tokens_added,
                    last.tokens_removed + event.tokens_removed,
                )
            else:
                self._queue.append(event)
            self._ensure_thread()

    def hold(self) -> None:
        """Call no on_rebalance before `go_on`."""
        self._returned.clear()

    def go_on(self, is_bound: Callable[[], bool] | None = None) -> None:
        """`__enter__` returns: call on_rebalance as soon as `is_bound()`, which tells whether the
        caller has got what it returns.
        """
        self._is_bound = is_bound
        self._returned.set()

    def drop(self) -> None:
        """`__enter__` fails: on_rebalance is not called."""
        with self._lock:
            self._on_rebalance = None
            self._returned.set()

    def release(
        self,
        tokens: TokenSet,
        done: Callable[[], object],
        went_on: Callable[[TokenSet], object] = lambda used: None,
    ) -> None:
        """Queue `on_release(tokens)`; `done` is called when it has returned or raised, `went_on`
        before, with those that are still in use.
        """
        with self._lock:
            self._queue.append(_Leaving(tokens, done, went_on))
            self._ensure_thread()

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is queued or running, at most `timeout` seconds; whether that is so.
        True at once on the callback thread.
        """
        with self._idle:
            return self._idle.wait_for(lambda: not self._running and not self._queue, timeout)

    def retry(self) -> None:
        """Start the thread for what is queued, where that was not possible before."""
        if self._queue and not self._running:
            with self._lock:
                self._ensure_thread()

    def _ensure_thread(self) -> None:
        if self._running or not self._queue:
            return
        try:
            threading.Thread(target=self._run, name='jobsync-callbacks', daemon=True).start()
        except RuntimeError as error:  # no more threads, or the interpreter ends
            if not self._thread_refused:
                logger.error('callbacks wait: %s', error)
            self._thread_refused = True
            return
        self._running, self._thread_refused = True, False

    def _run(self) -> None:
        try:
            self._run_queued()
        except BaseException:
            with self._idle:  # what is left goes to another thread
                self._running = False
                self._idle.notify_all()
            raise

    def _run_queued(self) -> None:
        while True:
            with self._idle:
                if not self._queue:
                    self._running = False
                    self._idle.notify_all()
                    return
                item = self._queue.popleft()
            if isinstance(item, RebalanceEvent):
                self._wait_bound()
                self._call('on_rebalance', self._on_rebalance, item)
            else:
                if self._call('on_release', self._step, item):
                    with self._lock:
                        self._queue.append(item)
                else:
                    item.done()

    def _step(self, leaving: _Leaving) -> bool:
        """Run on_release, or the next step of it; whether there are more."""
        if leaving.steps is None:
            found = self._on_release(leaving.tokens) if self._on_release is not None else None
            if not inspect.isgenerator(found):
                return False
            leaving.steps = cast('Iterator[TokenSet | None]', found)
        try:
            used = next(leaving.steps)
        except StopIteration:
            return False
        if used is not None:
            leaving.went_on(used)
        return True

    def _wait_bound(self) -> None:
        """The callback may use the name that `with Job(...) as job` binds, which happens after
        `__enter__` has returned.
        """
        self._returned.wait()
        is_bound, deadline, pause = self._is_bound, clock.now() + _BINDING_SEC, _LOOK_FIRST
        waiting = threading.Event()
        while is_bound is not None and not is_bound() and clock.now() < deadline:
            waiting.wait(pause)
            pause = min(2 * pause, _LOOK_LAST)
        self._is_bound = None

    def _call(
        self, name: str, function: Callable[[Any], object] | None, argument: object
    ) -> object:
        if function is None:
            return None
        began, found = clock.now(), None
        try:
            found = function(argument)
        except BaseException as error:
            # SystemExit and its like, too: they are meant for a whole program, and would end this
            # thread without a word.
            self.failures += 1
            logger.exception('%s raised %s; coordination goes on', name, type(error).__name__)
        took = clock.now() - began
        if took > SLOW_SEC:
            self.slow += 1
            logger.warning('%s took %.1f s: delegate long work to a thread of your own', name, took)
        return found


def with_event(function: Callable[..., object]) -> Callable[[RebalanceEvent], object]:
    """Accept callbacks with and without a parameter; decided once, not by catching TypeError from
    inside the callback.

    Raises:
        ConfigurationError: It cannot be called in either way.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-ins have no signature
        return function
    if accepts(signature, None):
        return function
    if accepts(signature):
        return lambda event: function()
    raise ConfigurationError(
        f'on_rebalance={function!r} takes {signature}: give a function that can be called with '
        'one argument, the RebalanceEvent, or none'
    )


def accepts(signature: inspect.Signature, *arguments: object) -> bool:
    """Whether a function can be called with these arguments."""
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def check_release(function: Callable[..., object]) -> None:
    """Refuse an `on_release` that cannot be called with the tokens.

    Raises:
        ConfigurationError: It cannot.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    if not accepts(signature, None):
        raise ConfigurationError(
            f'on_release={function!r} takes {signature}: give a function that can be called with '
            'one argument, a TokenSet'
        )
