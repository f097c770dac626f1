"""For tests of code that uses JobSync: a Job without a cluster, and fixtures for a real one.
PYTEST_DONT_REWRITE

In a `conftest.py`: `pytest_plugins = ['jobsync_core.testing']`. Without pytest there are the
classes alone.
"""

from .cluster import Cluster
from .fake import FakeJob, standing_in
from .memory import MemoryLedger

__all__ = ['Cluster', 'FakeJob', 'MemoryLedger', 'standing_in']

try:
    import pytest  # noqa: F401  # is it there?
except ModuleNotFoundError:
    pass  # unittest will do
else:
    from .fixtures import (
        jobsync_cluster,
        jobsync_config,
        jobsync_database_url,
        jobsync_job,
        jobsync_node,
        jobsync_postgres,
    )

    __all__ += [
        'jobsync_cluster',
        'jobsync_config',
        'jobsync_database_url',
        'jobsync_job',
        'jobsync_node',
        'jobsync_postgres',
    ]
