"""Parent process of an embedded server: ends the server when its owner is gone.

It runs as a script of its own, with the standard library alone, so that it starts in a few
milliseconds and survives whatever happens to the owner. The owner holds the other end of its
standard input: the first line is the order, and end of file means that the owner has gone or wants
the server ended. Should this process be killed, Linux ends the server.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ['running', 'server_processes', 'signal_server']

_QUIT_SEC = 5.0
_WATCH_SEC = 0.5
#: Of prctl(2): the signal that a process gets when its parent is gone.
_PDEATHSIG = 1


def server_processes(postmaster: int) -> list[int]:
    """Ids of a server's processes, the postmaster first. Backends lead sessions of their own, so no
    process group names them all.
    """
    parents = _parents()
    return [pid for pid in (postmaster,) if pid in parents] + [
        pid for pid, parent in parents.items() if parent == postmaster
    ]


def running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    return pid in _parents()


def signal_server(postmaster: int, number: int) -> list[int]:
    """Send a signal to all processes of a server, and return their ids; meanwhile it can start no
    further ones.
    """
    if not _send(postmaster, signal.SIGSTOP):
        return []
    pids = server_processes(postmaster)
    # The postmaster comes last: continued before its children it could restart the cluster on their
    # account.
    for pid in [*pids[1:], *pids[:1]]:
        _send(pid, number)
    return pids


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _parents() -> dict[int, int]:
    """Parent of each living process."""
    if not Path('/proc/self/stat').exists():
        listing = subprocess.run(
            ['ps', '-A', '-o', 'pid=,ppid=,stat='], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        rows = (line.split() for line in listing.splitlines())
        return {int(row[0]): int(row[1]) for row in rows if not row[2].startswith('Z')}
    parents = {}
    for entry in os.listdir('/proc'):
        if entry.isdecimal():
            try:
                state, parent = (
                    Path('/proc', entry, 'stat')
                    .read_text(errors='replace')
                    .rpartition(')')[2]
                    .split()[:2]
                )
            except (OSError, ValueError):
                continue
            if state not in 'ZX':
                parents[int(entry)] = int(parent)
    return parents


def _first_line() -> bytes:
    """The first line of standard input, and nothing of what follows."""
    line = b''
    while not line.endswith(b'\n'):
        part = os.read(0, 1)
        if not part:
            sys.exit(1)
        line += part
    return line


def _supervise(order: dict[str, Any]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    with _open_log(order['log'], order['identity']) as log:
        server = subprocess.Popen(
            order['command'],
            stdin=subprocess.PIPE if order['text'] else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=order['environment'],
            cwd=order['directory'],
            start_new_session=True,
            preexec_fn=_prepare(),
            **order['identity'],
        )
    if server.stdin is not None:
        with server.stdin as stream:
            stream.write(order['text'].encode())
    print(server.pid, flush=True)
    owner = order['owner']
    while server.poll() is None:
        readable, _, _ = select.select([0, wake_read], [], [], _WATCH_SEC)
        if wake_read in readable:
            os.read(wake_read, 4096)
        # A forked child of the owner may hold the pipe open after the owner's death: hence the look
        # at the parent.
        if 0 in readable or os.getppid() != owner:
            _end(server)
            if order['remove']:
                shutil.rmtree(order['remove'], ignore_errors=True)
    return server.returncode or 0


def _open_log(path: str, identity: dict[str, Any]) -> Any:
    """Open the log with the rights of the server's user, who could have put a link to somebody
    else's file in its place.
    """
    before = os.geteuid(), os.getegid()
    if identity:
        os.setegid(identity['group'])
        os.seteuid(identity['user'])
    try:
        return os.fdopen(
            os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600), 'ab'
        )
    finally:
        os.seteuid(before[0])
        os.setegid(before[1])


def _prepare() -> Callable[[], None]:
    """What is done in the server's process before its program starts."""
    prctl = None
    if sys.platform.startswith('linux'):
        import ctypes

        prctl = ctypes.CDLL(None).prctl
    supervisor = os.getpid()

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if prctl is not None:
            prctl(_PDEATHSIG, int(signal.SIGQUIT))
            if os.getppid() != supervisor:
                os._exit(1)

    return prepare


def _end(server: subprocess.Popen[bytes]) -> None:
    pids = server_processes(server.pid)
    for pid in [*pids[1:], *pids[:1]]:
        _send(pid, signal.SIGCONT)
    # An immediate shutdown, unlike SIGKILL, gives the shared memory back.
    _send(server.pid, signal.SIGQUIT)
    try:
        server.wait(_QUIT_SEC)
    except subprocess.TimeoutExpired:
        pids += signal_server(server.pid, signal.SIGKILL)
        server.wait()
    deadline = time.monotonic() + _QUIT_SEC
    while any(running(pid) for pid in pids[1:]) and time.monotonic() < deadline:
        for pid in pids[1:]:
            _send(pid, signal.SIGKILL)
        time.sleep(0.01)


if __name__ == '__main__':
    sys.exit(_supervise(json.loads(_first_line())))
