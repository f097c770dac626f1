"""What there is to send, and from when on: one value says both, so that what is sent next and when
to wake for it cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from .messages import Request

__all__ = ['NEVER', 'NOTHING', 'NOW', 'Due', 'first_due']

NEVER = float('inf')
NOW = -NEVER

#: The time from which something is due, NEVER where there is nothing to send; and what makes the
#: request at the moment when it is sent. A plain tuple: a node makes about ten of them at each
#: step.
Due: TypeAlias = tuple[float, Callable[[], 'Request | None']]

NOTHING: Due = (NEVER, lambda: None)


def first_due(agenda: Iterable[Due], now: float) -> tuple[Request | None, float]:
    """The request that goes now: of those that are due, the one that stands first. With it, when
    something is due if nothing happens before; the past means now.
    """
    wake_at = NEVER
    for at, request in agenda:
        if now >= at:
            return request(), at
        if at < wake_at:
            wake_at = at
    return None, wake_at
