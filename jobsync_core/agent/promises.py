"""Promises of tasks whose tokens went to another node, and the thread that takes them back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import JobSyncError
from ..logs import get_logger

__all__ = ['Promise', 'TakingBack']

logger = get_logger(__name__)

#: Seconds between two attempts at taking a promise back.
_RETRY_SEC = 0.1


@dataclass
class Promise:
    """What a thread was told, and may still act on, of a token that goes to another node: the
    hand-over records it as a claim.

    Args:
        token: The token that the task hashes to.
        incarnation: The life of this node that promised it.
        since: When, in seconds of `clock`.
        thread: Id of the thread that was told.
        void: That thread has asked again, so that it will not take the task any more.
    """

    token: int
    incarnation: str
    since: float
    thread: int
    void: bool = False


class TakingBack:
    """Frees the tasks whose promises were given up, in a thread that lives until nothing is left.

    Args:
        node: This node's name.
        given: The promises of one process, by task id; those that are taken back are removed.
        free: Frees a task; False where that has to be tried again: the hand-over may not be
            committed yet, and the promise is found once it is.
    """

    def __init__(
        self, node: str, given: dict[str, Promise], free: Callable[[str, Promise], bool]
    ) -> None:
        self._node = node
        self._given = given
        self._free = free
        self._lock = threading.Lock()
        self._is_running = False

    def give_up(self, thread: int) -> None:
        """This thread asks again: what it was promised, did not record, and whose token went to
        another node is free.
        """
        found = False
        for promise in list(self._given.values()):
            if promise.thread == thread and not promise.void:
                promise.void = found = True
        if found:
            with self._lock:
                if not self._is_running:
                    self._is_running = True
                    threading.Thread(target=self._run, name='jobsync promises', daemon=True).start()

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            with self._lock:
                void = [(text, each) for text, each in list(self._given.items()) if each.void]
                if not void:
                    self._is_running = False
                    return
            for text, promise in void:
                try:
                    if self._free(text, promise):
                        self._given.pop(text, None)
                except JobSyncError as error:
                    logger.debug(
                        'node=%s task=%s: a promise cannot be taken back yet: %s',
                        self._node,
                        text,
                        error,
                    )
                except BaseException:
                    with self._lock:
                        self._is_running = False
                    raise
            pause.wait(_RETRY_SEC)
