"""What a worker has handed to its pool: what may not begin any more is taken back, and what runs is
known, by its tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

from celery.worker import state

from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.worker.gate import Gate

from ..broker.forwarding import Forwarder
from ..broker.queues import Queues
from ..logs import get_logger
from ..tasks.coordinated import Tasks
from .delivery import Note
from .pool_entry import PoolEntry
from .requeueing import requeue

__all__ = ['AtPool']

logger = get_logger(__name__)


class AtPool:
    """Coordinated requests that were handed to the pool and have not ended.

    Args:
        gate: The node's gate.
        tasks: The app's coordinated tasks.
        queues: The cluster's.
        forwarder: Passes messages on.
        pool_entry: Knows which of them have begun.
    """

    def __init__(
        self, gate: Gate, tasks: Tasks, queues: Queues, forwarder: Forwarder, pool_entry: PoolEntry
    ) -> None:
        self._gate = gate
        self._tasks = tasks
        self._queues, self._forwarder = queues, forwarder
        self._pool_entry = pool_entry
        self._handed: weakref.WeakKeyDictionary[Any, Note] = weakref.WeakKeyDictionary()

    def add(self, request: Any, note: Note) -> None:
        """A request goes to the pool."""
        self._handed[request] = note

    def discard(self, request: Any) -> bool:
        """A request does not go to the pool after all; whether it was known."""
        return self._handed.pop(request, None) is not None

    def withdraw(self) -> Iterator[Any]:
        """Take back, one by one, what waits for a process or a thread, and may not begin here any
        more.
        """
        for request, note in self._requests():
            if (
                request in state.reserved_requests
                and not self._gate.may_begin(note.received)
                and self._pool_entry.withdraw(request)
            ):
                yield request

    def busy(self, tokens: TokenSet) -> bool:
        """Whether a task on one of these tokens runs, or may begin at any moment."""
        job, group_of, reserved = self._gate.job, self._gate.group_of, state.reserved_requests
        return any(
            note.key
            and request in reserved
            and self._pool_entry.has_begun(request)
            and (token := job.token_of(note.key, group_of(note.home))) is not None
            and token in tokens
            for request, note in self._requests()
        )

    def requeue_running(self) -> None:
        """Requeue what is executed here, if its task completes once: others execute it, and this
        attempt's end does not count.
        """
        for request, note in self._requests():
            if request not in state.active_requests or request.acknowledged:
                continue
            try:
                if self._tasks.completes_once(note.name):
                    logger.warning(
                        'Task %s[%s] is executed without a lease: its message goes back',
                        request.name,
                        request.id,
                    )
                    message = request.message
                    requeue(
                        message,
                        note.home,
                        self._forwarder,
                        partial(request.reject, requeue=True),
                        self._queues.is_of_node(message),
                        self._queues.counts(note.home),
                    )
            except Exception as error:  # each on its own
                logger.warning('Task %s[%s] does not go back: %r', request.name, request.id, error)

    def _requests(self) -> list[tuple[Any, Note]]:
        """Any thread may ask while the event loop hands the pool more: the references are copied in
        one step, the dictionary's items are not.
        """
        requests = (reference() for reference in self._handed.keyrefs())
        found = ((each, self._handed.get(each)) for each in requests if each is not None)
        return [(request, note) for request, note in found if note is not None]
