"""Whether a node's workers pause, because the database server refuses to begin anything: in memory
that forked children share.

A server that is out of disk space, or that lacks a right of this role, refuses the next message as
it refused the last one. Workers that went on would take every message, fail to begin it and send it
back. They stop taking messages instead, and after the pause one message tries. Each failed try
doubles the pause; the first begin that is answered ends it.
"""

from __future__ import annotations

import mmap

from ..errors import DatabaseRefused

__all__ = ['FIRST_SEC', 'MOST_SEC', 'PROBE_SEC', 'SIZE', 'Pausing', 'remedy']

#: Seconds of the first pause, and of the longest one.
FIRST_SEC, MOST_SEC = 5.0, 60.0
#: Seconds after which another message may try, should the one before have come to no end at the
#: database.
PROBE_SEC = 5.0
_TIMES = 16  # two doubles: when the pause ends; how long it is, 0 where the server refuses nothing
_CODE = 8  # the SQLSTATE, as text that ends with NULs
_TEXT = 256  # why, likewise
#: Bytes of memory that it takes.
SIZE = _TIMES + _CODE + _TEXT

_REMEDIES = {
    '53': 'free disk space, memory or connections at the database server',
    '58': 'look into the log of the database server: its disk or its files fail',
    'XX': 'look into the log of the database server: its files are damaged',
    '28': 'mend the login of this role',
    '42': "give this role what it lacks: 'jobsync doctor' names it",
    '3D': 'create the database that was dropped, or mend its name in the URL',
    '55': "end the transaction that has locked the table: 'jobsync doctor' names it",
    '3F': "create the schema that was dropped: 'jobsync doctor' names it",
}


def remedy(sqlstate: str) -> str:
    """What people do about a refusal that meets every statement."""
    return _REMEDIES.get(
        sqlstate[:2], "look into the log of the database server, and run 'jobsync doctor'"
    )


class Pausing:
    """A node's pause. Any thread and any forked child writes and reads it without a lock: a write
    that is lost costs one more try.

    Times are seconds of the clock that the caller reads; forked children read the same one.

    Args:
        memory: `SIZE` bytes, zero at first, which forked children share; None: of its own.
    """

    def __init__(self, memory: memoryview | None = None) -> None:
        view = memory if memory is not None else memoryview(mmap.mmap(-1, SIZE))
        self._times = view[:_TIMES].cast('d')
        self._code = view[_TIMES : _TIMES + _CODE]
        self._text = view[_TIMES + _CODE : SIZE]
        self._probe_at: float | None = None

    @property
    def until(self) -> float:
        """When the pause ends; 0 where there is none."""
        return self._times[0]

    @property
    def length(self) -> float:
        """Seconds of the latest pause; 0 once the server has answered a begin."""
        return self._times[1]

    @property
    def error(self) -> DatabaseRefused:
        """Why."""
        return DatabaseRefused(_read(self._text), _read(self._code), True)

    def is_paused(self, now: float) -> bool:
        """Whether nothing may begin now."""
        return now < self._times[0]

    def refused(self, error: DatabaseRefused, now: float) -> None:
        """The server has refused a begin: pause, for twice as long as before where it refused the
        try after the last pause too.
        """
        until, length = self._times
        if now < until:
            return  # it was asked before the pause began
        if now - until > MOST_SEC:
            length = 0.0  # nobody has asked for so long that this is another trouble
        length = min(2 * length, MOST_SEC) if length else FIRST_SEC
        _write(self._code, error.sqlstate)
        _write(self._text, str(error))
        self._times[1] = length
        self._times[0] = now + length

    def answered(self) -> None:
        """The server has answered a begin, whatever it said: there is no pause any more."""
        if self._times[1]:
            self._times[0] = self._times[1] = 0.0

    def admits(self, now: float) -> bool:
        """Whether one more message that asks the database may begin: all of them in quiet times,
        none in a pause, and after it one, which tries. Threads exclude each other, or several may
        try.
        """
        if not self._times[1]:
            self._probe_at = None
            return True
        if now < self._times[0]:
            self._probe_at = None
            return False
        if self._probe_at is not None and now - self._probe_at < PROBE_SEC:
            return False
        self._probe_at = now
        return True


def _write(memory: memoryview, text: str) -> None:
    found = text.encode(errors='replace')[: len(memory)]
    memory[:] = found.ljust(len(memory), b'\0')


def _read(memory: memoryview) -> str:
    return bytes(memory).rstrip(b'\0').decode(errors='ignore')
