"""A worker that is registered, and cannot take messages yet: it owns nothing."""

from __future__ import annotations

import threading

from .. import clock
from ..job import Job
from ..logs import get_logger

__all__ = ['Standby']

logger = get_logger(__name__)

#: Seconds between two looks, should nothing have told of the end.
_LOOK_SEC = 1.0


class Standby:
    """Holds a Job that enters, before plans give it tokens.

    The first plan of a cluster may give it some all the same. Then it is held for no longer than
    `patience_sec`: once it has entered, it can give them away.

    Args:
        patience_sec: Seconds for which a Job that has tokens is held.
    """

    def __init__(self, patience_sec: float) -> None:
        self._patience = patience_sec
        self._registered, self._over = threading.Event(), threading.Event()
        self._owns_since: float | None = None

    @property
    def registered(self) -> bool:
        """Whether a Job is held here, or was."""
        return self._registered.is_set()

    def hold(self, job: Job) -> None:
        """Return when the worker can take messages, the node has failed, or patience is at its
        end. By the thread that enters.
        """
        self._registered.set()
        while not self._is_over(job):
            job.wait_until(lambda: self._is_over(job), _LOOK_SEC)

    def give_away(self, job: Job) -> None:
        """Have a Job that has entered too early own nothing, and return when the worker can take
        messages.
        """
        if self._over.is_set() or not job.is_running:
            return
        logger.warning(
            'node=%s has got keys and cannot take messages yet: it gives them away until it can',
            job.node_name,
        )
        job.stand_aside()
        while not self._over.is_set() and job.is_running:
            job.wait_until(self._over.is_set, _LOOK_SEC)
        if job.is_running:
            job.stand_aside(False)

    def end(self) -> None:
        """The worker can take messages. Whoever is held hears of it once its Job is woken."""
        self._over.set()

    def _is_over(self, job: Job) -> bool:
        if self._over.is_set() or not job.is_running:
            return True
        now = clock.now()
        if not job.my_tokens:
            self._owns_since = None
        elif self._owns_since is None:
            self._owns_since = now
        return self._owns_since is not None and now - self._owns_since > self._patience
