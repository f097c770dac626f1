"""What one process of a node was promised, has taken and has finished."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..protocol.exclusions import Exclusions
from .promises import Promise, TakingBack

__all__ = ['Added', 'ProcessTasks']


@dataclass
class Added:
    """Who recorded a task: one object for all tasks of a thread and a life of the node."""

    incarnation: str
    thread: int
    epoch: int


class ProcessTasks:
    """What one process knows: a forked child begins with nothing.

    Args:
        node: The node's name.
        free: Frees a task whose promise was given up; False where that has to be tried again.

    Attributes:
        pid: The process.
        promises: By thread id: the task's id, its token, and when; what the thread was told last.
        given: By task id: promises whose tokens went away.
        taking_back: Frees those of them that were given up.
        added: By task id: who recorded it with `add_task`, where that is not audited yet; the
            newest last.
        done: By task id: when it was audited here. Later the exclusions know it: of the node's main
            process the shared ones, which it alone writes; of a forked child its own, `past`.
        auditing: One audit at a time; a signal's handler may be in the middle of one.
    """

    def __init__(self, node: str, free: Callable[[str, Promise], bool]) -> None:
        self.pid = os.getpid()
        self.promises: dict[int, tuple[str, int, float]] = {}
        self.given: dict[str, Promise] = {}
        self.taking_back = TakingBack(node, self.given, free)
        self.added: dict[str, Added] = {}
        self.done: dict[str, float] = {}
        self.past: Exclusions | None = None
        self.auditing = threading.RLock()
