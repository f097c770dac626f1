"""Home queues of nodes that tests put together by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jobsync_core.job import Job
from jobsync_core.worker.duties.homes import Homes

__all__ = ['fixed_homes']


def fixed_homes(job: Job, homes: Sequence[str], name_of: Callable[[str], str]) -> Homes:
    """Home queues that stay as they are, each a group of its own.

    Args:
        job: The node.
        homes: The home queues.
        name_of: Name of the node's queue for one.
    """
    return Homes(
        homes,
        name_of=name_of,
        groups=lambda homes: sorted(homes - {''}),
        record=lambda home, queue: None,
        declare=lambda home, queue: None,
        enroll=job.enroll,
        holds=job.holds,
        retire=lambda queues: None,
    )
