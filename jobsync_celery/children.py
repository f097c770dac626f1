"""Pool processes that are gone: what one of them was executing may run again."""

from __future__ import annotations

from typing import Any

from jobsync_core.job import Job

from .logs import get_logger

__all__ = ['PoolChildren']

logger = get_logger(__name__)


class PoolChildren:
    """The processes of a worker's pool, where it has any.

    Args:
        worker: Celery's `WorkController`.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._known: set[int] = set()

    def release_lost(self, job: Job) -> None:
        """Release what a process was executing that is gone.

        Args:
            job: The node.
        """
        pool = getattr(getattr(self._worker, 'pool', None), '_pool', None)
        processes = getattr(pool, '_pool', None)
        if not isinstance(processes, list):
            return
        present = {process.pid for process in processes if getattr(process, 'pid', None)}
        for pid in self._known - present:
            count = job.release_child(pid)
            if count:
                logger.warning(
                    'JobSync: pool process %d is gone; %d of its keys may run again', pid, count
                )
            self._known.discard(pid)
        self._known |= present
