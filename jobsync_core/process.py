"""Who this process is, and whether another one is known to be dead."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

__all__ = ['Process', 'is_known_alive', 'is_known_dead', 'this_process']


@dataclass(frozen=True)
class Process:
    """Identity of an operating-system process: enough to know whether it is dead, on the machine
    where it ran.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started: str


def _boot_id() -> str:
    try:
        return Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    except OSError:
        return ''


def _pid_namespace() -> str:
    try:
        return os.readlink('/proc/self/ns/pid')
    except OSError:
        return ''


def _started(pid: int) -> str | None:
    """The start time of a process in clock ticks since boot; None where it cannot be read or only a
    zombie is left.
    """
    try:
        # The command name may hold spaces and brackets; the fields after its closing bracket are
        # fixed.
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    # A zombie whose other threads still run is no corpse yet.
    return None if fields[0] in 'ZX' and int(fields[17]) <= 1 else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def this_process() -> Process:
    """Identity of the calling process. Where the system does not tell (no /proc), nothing is ever
    known dead.
    """
    pid = os.getpid()
    return Process(
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=pid,
        started=_started(pid) or '',
    )


def is_known_dead(process: Process) -> bool:
    """Whether `process` ran on this machine, since this boot, in this pid namespace, and is gone.

    A host name proves nothing: a rescheduled container has the old one's name while the old one may
    live on elsewhere.
    """
    if not (process.boot_id and process.pid_namespace and process.started):
        return False
    if process.boot_id != _boot_id() or process.pid_namespace != _pid_namespace():
        return False
    started = _started(process.pid)
    if started is not None:
        return started != process.started
    # Unreadable is not gone: /proc may hide the processes of other users.
    return not _exists(process.pid) or _is_zombie(process.pid)


def is_known_alive(process: Process) -> bool:
    """Whether `process` runs on this machine. Where the system does not tell, nothing is known."""
    if (
        not process.started
        or process.boot_id != _boot_id()
        or process.pid_namespace != _pid_namespace()
    ):
        return False
    return _started(process.pid) == process.started


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] in 'ZX'
    except OSError:
        return False
