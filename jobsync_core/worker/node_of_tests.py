"""The node that tests put in the place of the nodes of this process's workers."""

from __future__ import annotations

from ..job import Job

__all__ = ['node_of_tests', 'set_node_of_tests']

_node_of_tests: Job | None = None


def set_node_of_tests(job: Job | None) -> None:
    """Let a Job, which the caller has entered, stand in for the nodes of this process's workers;
    for `jobsync_core.testing`.
    """
    global _node_of_tests
    _node_of_tests = job


def node_of_tests() -> Job | None:
    """The Job that stands in: a worker then makes no node, routes nothing, and runs all that it
    receives.
    """
    return _node_of_tests
