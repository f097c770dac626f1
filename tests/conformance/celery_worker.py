"""`celery -A tests.conformance.celery_worker worker`: the app of a worker process."""

from __future__ import annotations

import faulthandler
import itertools
import os
import signal
from typing import Any

from billiard import connection

from .celery_app import make_app, use_in_worker
from .work import Order

# A worker that does not end says where it stands.
faulthandler.register(signal.SIGUSR2)
order = Order.from_environment()
app = make_app(order)
use_in_worker(order)


def tear(number: int) -> None:
    """SIGQUIT after the first half, the length, of a task that is written to a process of the
    pool.
    """
    write, count, pid = connection.send_offset, itertools.count(1), os.getpid()

    def torn(*given: Any) -> Any:
        written = write(*given)
        if next(count) == 2 * number - 1 and os.getpid() == pid:
            os.kill(pid, signal.SIGQUIT)
        return written

    connection.send_offset = torn


if order.torn:
    tear(order.torn)
