"""This process among those of `dramatiq -p`: its node's name, and what becomes of it when its
master is gone.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ['OrphanWatch', 'StopSignals', 'new_node_name', 'process_number']

#: Seconds after which an orphan is stopped in another way that does not obey its signal.
_ORPHAN_SEC = 5.0


def new_node_name(given: str | None) -> str:
    """`<given or host>@<master>-<number>-<start>`: a pattern without `@` means a machine, as with
    Celery. Unique for each start: a reload keeps the master and the process numbers.
    """
    start = f'{time.time_ns() // 1_000_000:x}'[-8:]
    return f'{given or socket.gethostname()}@{os.getppid()}-{process_number()}-{start}'


def process_number() -> int:
    """From 1 in a process of `dramatiq -p`; 0 elsewhere."""
    return int(re.sub(r'\D', '', multiprocessing.current_process().name) or 0)


class OrphanWatch:
    """Ends a process whose master was killed: it would go on for ever, as nobody is left who stops
    it.

    Args:
        stop: Stops the worker in order.
    """

    def __init__(self, stop: Callable[[], object] = lambda: None) -> None:
        self._parent = os.getppid()
        self._since = 0.0
        self._stop = stop
        self._stops = False

    def look(self, leaving: bool) -> None:
        """Look whether the master lives.

        Args:
            leaving: The worker shuts down already.
        """
        if (
            self._since
            and not leaving
            and not self._stops
            and time.monotonic() - self._since > _ORPHAN_SEC
        ):
            # Its main thread waits for the master, whom it was about to tell that it has started,
            # and will do so for ever.
            self._stops = True
            threading.Thread(target=self._end, name='jobsync-orphan', daemon=True).start()
        master = multiprocessing.parent_process()
        # A forked process gets another parent when the master is gone, but its siblings keep the
        # master's pipe open; one of a fork server, the default from Python 3.14 on, keeps its
        # parent, but that pipe ends. Neither shows one that was killed before this process had
        # begun to look: then its number says so.
        if (
            not self._since
            and master is not None
            and (os.getppid() != self._parent or not master.is_alive() or _is_gone(master.pid))
        ):
            # Nothing is logged: the log goes to the master through a pipe that nobody empties any
            # more, and would block.
            logging.disable(logging.CRITICAL)
            self._since = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

    def _end(self) -> None:
        try:
            self._stop()
        finally:
            os._exit(1)


class StopSignals:
    """Ends this process, while it waits for something before it has started, when it is told to
    stop.

    Dramatiq's own handler only notes that, and is looked at after the start. Handlers belong to the
    main thread: in another, as in tests, nothing is heard.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._stopped = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        handler = self._before[number]
        if callable(handler):
            handler(number, frame)

    def check(self) -> None:
        """Raises SystemExit where the process was told to stop."""
        if self._stopped:
            sys.exit(0)


def _is_gone(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it runs as another user, for example
        return False
    return False
