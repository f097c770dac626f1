"""Which queues an application declares at its broker."""

from __future__ import annotations

from typing import Any

from jobsync_core.worker.routing import is_of_cluster

__all__ = ['own_queues']


def own_queues(native: Any, appname: str) -> list[str]:
    """The queues that actors were declared with, without those of nodes.

    Args:
        native: Dramatiq's broker.
        appname: The cluster.
    """
    return sorted(
        str(queue)
        for queue in native.get_declared_queues()
        if not is_of_cluster(str(queue), appname)
    )
