"""Fixtures of pytest, for `pytest_plugins = ['jobsync_core.testing']`. PYTEST_DONT_REWRITE"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from ..config import CoordinationConfig
from ..embedded.postgres import EmbeddedPostgres
from ..job import Job
from .cluster import Cluster
from .fake import FakeJob, standing_in

__all__ = [
    'jobsync_cluster',
    'jobsync_config',
    'jobsync_database_url',
    'jobsync_job',
    'jobsync_node',
    'jobsync_postgres',
]

#: Times that make a cluster's life quick to watch, in seconds.
_TIMES: dict[str, Any] = {
    'heartbeat_interval_sec': 0.25,
    'heartbeat_timeout_sec': 2.0,
    'rebalance_check_interval_sec': 1.0,
}
#: A test's data need not survive the machine.
_SERVER = {'fsync': 'off', 'synchronous_commit': 'off', 'full_page_writes': 'off'}


@pytest.fixture
def jobsync_job() -> Iterator[FakeJob]:
    """A FakeJob that is entered and owns every task: single-node mode with a ledger in memory. No
    database.
    """
    with FakeJob() as job:
        yield job


@pytest.fixture(scope='session')
def jobsync_postgres() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL server for all tests of this process; needs the extra `embedded`, or an
    installed PostgreSQL.
    """
    with EmbeddedPostgres(settings=_SERVER) as server:
        yield server


@pytest.fixture
def jobsync_config(jobsync_postgres: EmbeddedPostgres) -> Iterator[CoordinationConfig]:
    """A cluster in a fresh database, with short times."""
    name = f'test_{uuid.uuid4().hex[:12]}'
    jobsync_postgres.create_database(name)
    yield jobsync_postgres.config(name, **_TIMES)
    jobsync_postgres.drop_database(name)


@pytest.fixture
def jobsync_database_url(
    jobsync_config: CoordinationConfig, jobsync_postgres: EmbeddedPostgres
) -> str:
    """The URL of the database of `jobsync_config`."""
    return jobsync_postgres.url(jobsync_config.dbname)


@pytest.fixture
def jobsync_cluster(jobsync_config: CoordinationConfig) -> Iterator[Cluster]:
    """A Cluster on the database of `jobsync_config`; its nodes leave when the test ends."""
    cluster = Cluster(jobsync_config)
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def jobsync_node(jobsync_cluster: Cluster) -> Iterator[Job]:
    """A real Job on a real database, alone in its cluster; workers in this process use it, and its
    ledger.
    """
    (job,) = jobsync_cluster.join('test-node')
    with standing_in(job):
        yield job
