"""What is put between a broker and its worker while that is a node: which middleware hears of
what, and who acknowledges.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dramatiq.logging import get_logger as logger_of
from dramatiq.middleware import Middleware, Retries

from jobsync_core.logs import get_logger

from .errors import DeclarationRefused
from .gate import WorkerGate
from .groups import mark_members, unmark_members
from .notes import is_quiet

__all__ = ['Consumers', 'attach', 'check_broker']

logger = get_logger(__name__)


class Consumers(dict[str, Any]):
    """A worker's consumers. Any of them can acknowledge any message: the gate knows where it came
    from. So one that has not reached the broker yet, and a queue that is not consumed here, are
    answered by another: a message of theirs may have come by the node's queue.
    """

    def __getitem__(self, queue: str) -> Any:
        own = self.get(queue)
        if own is None or own.consumer is None:
            # As it is: a queue that is declared now gets its consumer by another thread.
            others = list(self.values())
            return next((found for found in others if found.consumer is not None), own)
        return own


def check_broker(bound: Any, native: Any, plugin: type) -> None:
    """Refuse a plugin that was added twice, or to two brokers.

    Args:
        bound: The broker that the plugin belongs to; None: to none yet.
        native: The broker that it was added to.
        plugin: The plugin's class.

    Raises:
        DeclarationRefused: It was.
    """
    number = sum(isinstance(item, plugin) for item in native.middleware)
    if number > 1:
        raise DeclarationRefused(
            f'JobSync is {number} times among the middleware of {native!r}, so that each '
            'message would be routed more than once: '
            'add it once, in the settings (DRAMATIQ_BROKER) or in code'
        )
    if bound is not None and bound is not native:
        raise DeclarationRefused(
            f'this JobSync belongs to {bound!r} already, and would coordinate nothing '
            f'of {native!r}: '
            'make one for each broker, with an appname of its own'
        )


def attach(native: Any, gate: WorkerGate) -> Callable[[], None]:
    """Put a gate between a broker and its worker.

    Args:
        native: Dramatiq's broker.
        gate: The worker's gate.

    Returns:
        What takes it out again.
    """
    before, after = native.emit_before, native.emit_after
    native.emit_before = _hiding(gate, before)
    native.emit_after = _hiding(gate, _without_retries(gate, native, after))
    mark_members(native, gate.actors)
    last = _Last(gate)
    native.middleware.append(last)
    quiet, theirs = _QuietSkips(), logger_of('dramatiq.worker', 'WorkerThread')
    theirs.addFilter(quiet)

    def detach() -> None:
        theirs.removeFilter(quiet)
        native.emit_before, native.emit_after = before, after
        unmark_members(native)
        native.middleware.remove(last)

    return detach


class _QuietSkips(logging.Filter):
    """Leaves out Dramatiq's own line for each message that comes back or goes back: ours says so,
    once for a key.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (isinstance(record.args, tuple) and any(is_quiet(item) for item in record.args))


class _Last(Middleware):
    """At the end of the list: the others have seen a message begin by now, and so may see it
    end.
    """

    def __init__(self, gate: WorkerGate) -> None:
        self._gate = gate

    def before_process_message(self, broker: Any, message: Any) -> None:
        """Have a message fail that has no route."""
        self._gate.refuse(message)


def _hiding(gate: WorkerGate, emit: Callable[..., None]) -> Callable[..., None]:
    def emit_seen(signal: str, *args: Any, **kwargs: Any) -> None:
        if not args or not gate.hides(signal, args[0]):
            emit(signal, *args, **kwargs)

    return emit_seen


def _without_retries(
    gate: WorkerGate, native: Any, emit: Callable[..., None]
) -> Callable[..., None]:
    """In place of a broker's `emit_after`: Retries do not hear of a message that was refused, which
    would fail for hours.
    """

    def emit_after(signal: str, *args: Any, **kwargs: Any) -> None:
        if not args or not gate.is_refused(signal, args[0]):
            emit(signal, *args, **kwargs)
            return
        args[0].options.pop('throws', None)
        for item in reversed(native.middleware):
            if not isinstance(item, Retries):
                try:
                    item.after_process_message(native, *args, **kwargs)
                except Exception:
                    logger.critical(
                        'unexpected failure in after_process_message of %r', item, exc_info=True
                    )

    return emit_after
