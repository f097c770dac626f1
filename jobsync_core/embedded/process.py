"""A server program that ends with the process that started it: the owner's side of
supervisor.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import supervisor as embedded_supervisor
from .supervisor import running, signal_server

__all__ = ['SupervisedServer', 'server_environment']

#: What a server gets to know of the environment: nothing that could be a secret, steer a client, or
#: load a library into it.
_KEPT = ('PATH', 'TMPDIR', 'TZ', 'LD_LIBRARY_PATH', 'SYSTEMROOT')


def server_environment() -> dict[str, str]:
    """The environment of a server."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ} | {'LC_ALL': 'C'}


class SupervisedServer:
    """One run of a server program.

    The order goes to the supervisor through a pipe, since everybody can read the arguments of a
    process.

    Args:
        command: Program and arguments. Nothing secret, for the same reason.
        log: Its output is appended to this file.
        directory: Where it runs.
        identity: The user that it becomes, as keyword arguments of subprocess.Popen; empty: the
            present one.
        remove: A directory that the supervisor removes if the owner is gone.
        text: What the server reads on its standard input.

    Attributes:
        pid: The server's main process.

    Raises:
        OSError: The program cannot be run.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        directory: Path | str = '/',
        *,
        identity: Mapping[str, Any] | None = None,
        remove: Path | None = None,
        text: str = '',
    ) -> None:
        order = {
            'command': list(command),
            'environment': server_environment(),
            'directory': str(directory),
            'log': str(log),
            'identity': dict(identity or {}),
            'owner': os.getpid(),
            'remove': None if remove is None else str(remove),
            'text': text,
        }
        self._ended = False
        self._supervisor = subprocess.Popen(
            [sys.executable, '-I', '-S', embedded_supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd='/',
            start_new_session=True,
        )
        assert self._supervisor.stdin is not None and self._supervisor.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._supervisor.stdin.write(json.dumps(order) + '\n')
            self._supervisor.stdin.flush()
        line = self._supervisor.stdout.readline()
        if not line:
            self._reap(None)
            raise OSError(f'{command[0]} cannot be run')
        self.pid = int(line)

    def is_running(self) -> bool:
        """Whether the server is there, and its supervisor."""
        return self._supervisor.poll() is None

    def end(self) -> None:
        """End the server at once and wait for it."""
        with contextlib.suppress(BrokenPipeError):
            if self._supervisor.stdin is not None:
                self._supervisor.stdin.close()
        self.wait(None)

    def wait(self, seconds: float | None) -> None:
        """Wait until the server has ended.

        Raises:
            subprocess.TimeoutExpired: It has not within so many seconds.
        """
        if self._reap(seconds) < 0 and not self._ended:
            # Somebody killed the supervisor. The kernel has told the server, where it can; nobody
            # else is left who would wait for it.
            signal_server(self.pid, signal.SIGKILL)
            while running(self.pid):
                time.sleep(0.005)
        self._ended = True

    def _reap(self, seconds: float | None) -> int:
        code = self._supervisor.wait(seconds)
        for stream in (self._supervisor.stdin, self._supervisor.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        return code
