"""The one clock that leases and waits are measured on."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

__all__ = ['now']


def _boot_clock() -> Callable[[], float]:
    clock_id = getattr(time, 'CLOCK_BOOTTIME', None)
    if clock_id is None:
        return time.monotonic
    try:
        time.clock_gettime(clock_id)
    except OSError:
        return time.monotonic
    return partial(time.clock_gettime, clock_id)


#: Seconds since some fixed moment. It runs on while the machine is suspended, where the system has
#: such a clock, so that a machine which wakes up does so without its lease.
now: Callable[[], float] = _boot_clock()
