"""This process among those of `dramatiq -p`: its node's name, and what becomes of it when its master is gone."""
from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import socket
import time

__all__ = ['OrphanWatch', 'new_node_name', 'process_number']

#: Seconds after which an orphan ends that does not obey its signal.
_ORPHAN_SEC = 10.0


def new_node_name(given: str | None) -> str:
    """Unique for each start: a reload keeps the master and the process numbers."""
    start = f'{time.time_ns() // 1_000_000:x}'[-8:]
    return f'{given or socket.gethostname()}-{os.getppid()}-{process_number()}-{start}'


def process_number() -> int:
    """From 1 in a process of `dramatiq -p`; 0 elsewhere."""
    return int(re.sub(r'\D', '', multiprocessing.current_process().name) or 0)


class OrphanWatch:
    """Ends a process whose master was killed: it would go on for ever, as nobody is left who stops it."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._since = 0.0

    def look(self, leaving: bool) -> None:
        """Look whether the master lives.

        Args:
            leaving: The worker shuts down already.
        """
        if self._since and not leaving and time.monotonic() - self._since > _ORPHAN_SEC:
            os._exit(1)  # its main thread waits for the master, whom it was about to tell that it has started
        master = multiprocessing.parent_process()
        # A forked process gets another parent when the master is gone, but its siblings keep the master's pipe open; one of a fork server,
        # the default from Python 3.14 on, keeps its parent, but that pipe ends.
        if not self._since and master is not None and (os.getppid() != self._parent or not master.is_alive()):
            # Nothing is logged: the log goes to the master through a pipe that nobody empties any more, and would block.
            logging.disable(logging.CRITICAL)
            self._since = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
