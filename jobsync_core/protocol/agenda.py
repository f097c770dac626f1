"""What there is to send, and from when on: one value says both, so that what is sent next and when
to wake for it cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from .messages import Request

__all__ = ['NEVER', 'NOTHING', 'NOW', 'Due', 'earliest', 'first_due']

NEVER = float('inf')
NOW = -NEVER

#: The time from which something is due, NEVER where there is nothing to send; and what makes the
#: request at the moment when it is sent. A plain tuple: a node makes about ten of them at each
#: step.
Due: TypeAlias = tuple[float, Callable[[], 'Request | None']]

NOTHING: Due = (NEVER, lambda: None)


def first_due(agenda: Iterable[Due], now: float) -> Request | None:
    """The request that goes now: of those that are due, the one that stands first."""
    for at, request in agenda:
        if now >= at:
            return request()
    return None


def earliest(agenda: Iterable[Due]) -> float:
    """When something is due if nothing happens before; the past means now."""
    return min((at for at, _ in agenda), default=NEVER)
