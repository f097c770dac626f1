"""Attempts that a test drives by hand: begin, then finish, fail or abandon."""

from __future__ import annotations

import contextvars

from jobsync_core.ledger.attempt import Attempt
from jobsync_core.ledger.execution import Execution
from jobsync_core.ledger.interface import Ledger

__all__ = ['abandon', 'begin', 'fail', 'finish']

# By the execution's identity. None is forgotten: an attempt that is collected would be left.
_driven: dict[int, Attempt] = {}


def begin(
    ledger: Ledger, key: str = 'k', retention_sec: float = 60, max_lost: int | None = None
) -> Execution:
    """Begin an attempt, which is not what runs here."""
    attempt = Attempt(ledger, key, retention_sec, max_lost=max_lost)
    try:
        execution = contextvars.copy_context().run(attempt.begin)
    except BaseException:
        attempt.leave()
        raise
    _driven[id(execution)] = attempt
    return execution


def finish(execution: Execution) -> None:
    """Its work is done: record that."""
    attempt = _driven[id(execution)]
    attempt.succeed()
    _settle(attempt)


def fail(execution: Execution, error: BaseException) -> None:
    """Its work has failed: record that."""
    attempt = _driven[id(execution)]
    attempt.fail(error)
    _settle(attempt)


def abandon(execution: Execution) -> None:
    """Leave it to the background."""
    _driven[id(execution)].leave()


def _settle(attempt: Attempt) -> None:
    try:
        attempt.settle()
    finally:
        attempt.leave()
