"""Waiting for a condition, in place of sleeping and hoping."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ['eventually']

T = TypeVar('T')


def eventually(condition: Callable[[], T], timeout: float = 10.0, every: float = 0.02) -> T:
    """Call `condition` until its result is true, and return that result.

    Args:
        condition: What must come true. An exception out of it ends the wait.
        timeout: Seconds until the test fails.
        every: Seconds between two calls.

    Raises:
        AssertionError: It did not come true in time; the message shows its source and its last
            result.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() >= deadline:
            raise AssertionError(
                f'not true within {timeout} s, last result {result!r}: {_source(condition)}'
            )
        time.sleep(every)


def _source(condition: Callable[[], object]) -> str:
    try:
        return ' '.join(inspect.getsource(condition).split())
    except (OSError, TypeError):
        return repr(condition)
