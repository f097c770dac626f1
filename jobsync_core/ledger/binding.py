"""Whether the caller of `__enter__` has gone on: `with Job(...) as job` has bound its name then,
and callbacks may use it.
"""

from __future__ import annotations

import dis
import sys
from types import CodeType, FrameType

__all__ = ['Binding']

#: How far the target of `as` may reach: `with Job(...) as self.jobs[name]` loads a few things
#: before it stores.
_LOOK = 40


class Binding:
    """The place of a `with` statement (or of any other call) in its caller, and whether that is
    past the assignment.

    The interpreter notes in a frame which instruction it executes. As long as that is the call of
    `__enter__`, or one of those that assign its result, the name is not bound yet; at any other, it
    is, since threads are switched between instructions.

    Args:
        depth: Frames between this call and the one whose caller is meant; further `__enter__`s, and
            contextlib's ExitStack, do not count.
    """

    def __init__(self, depth: int = 1) -> None:
        frame: FrameType | None = sys._getframe(depth + 1)
        while frame is not None and (
            frame.f_code.co_name == '__enter__' or frame.f_globals.get('__name__') == 'contextlib'
        ):
            frame = frame.f_back
        self._frame = frame
        if frame is not None:
            self._start = frame.f_lasti
            self._end = _end_of_assignment(frame.f_code, self._start)

    def is_done(self) -> bool:
        """Whether the caller has gone on."""
        if self._frame is None:
            return True
        if self._start <= self._frame.f_lasti < self._end:
            return False
        self._frame = None  # it keeps the caller's variables alive
        return True


def _end_of_assignment(code: CodeType, start: int) -> int:
    """Offset of the instruction after the one that stores, or drops, what the call at `start`
    gives.
    """
    stored = False
    for number, instruction in enumerate(
        item for item in dis.get_instructions(code) if item.offset > start
    ):
        if stored or number == _LOOK:
            return instruction.offset
        stored = instruction.opname.startswith(('STORE_', 'POP_TOP', 'RETURN_'))
    return start + 2
