"""The fixtures with a real database, and the fake beside the real thing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest

from jobsync_core import (
    ClaimLost,
    ClusterNotFormed,
    CoordinationConfig,
    DuplicateExecution,
    ExecutionRunning,
    Job,
    current_execution,
    exactly_once,
)
from jobsync_core.testing import Cluster, FakeJob
from jobsync_core.worker.node_of_tests import node_of_tests
from tests.support.waiting import eventually

pytest_plugins = ['jobsync_core.testing']


class TestFixtures:
    def test_the_database_is_fresh_and_its_url_leads_there(
        self, jobsync_config: CoordinationConfig, jobsync_database_url: str
    ) -> None:
        connection = psycopg2.connect(jobsync_database_url)
        with connection, connection.cursor() as cursor:
            cursor.execute('SELECT current_database()')
            assert cursor.fetchone() == (jobsync_config.dbname,)
            cursor.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
            assert cursor.fetchone() == (0,)
        connection.close()

    def test_a_node_stands_in_with_its_ledger(self, jobsync_node: Job) -> None:
        assert node_of_tests() is jobsync_node
        assert jobsync_node.am_i_healthy()
        assert len(jobsync_node.my_tokens) == 10_000

        @exactly_once(key='{n}', scope='f', on_duplicate='result')
        def function(n: int) -> int:
            with current_execution().transaction() as connection, connection.cursor() as cursor:
                cursor.execute('SELECT 1')
            return n

        assert (function(1), function(1)) == (1, 1)

    def test_nothing_stands_in_by_default(self, jobsync_cluster: Cluster) -> None:
        assert node_of_tests() is None
        assert jobsync_cluster.jobs == []


class TestCluster:
    def test_a_loss_goes_to_the_others(self, jobsync_cluster: Cluster) -> None:
        one, two = jobsync_cluster.join('one', 'two')
        assert len(one.my_tokens) == len(two.my_tokens) == 5_000
        assert one.my_tokens.isdisjoint(two.my_tokens)
        jobsync_cluster.leave(one)
        jobsync_cluster.settle()
        assert len(two.my_tokens) == 10_000
        assert jobsync_cluster.jobs == [two]

    def test_what_cannot_enter_says_why_and_the_rest_goes_on(
        self, jobsync_config: CoordinationConfig, jobsync_cluster: Cluster
    ) -> None:
        jobsync_cluster.join('one')
        lonely = Cluster(dataclasses.replace(jobsync_config, minimum_nodes=5, appname='lonely_'))
        with pytest.raises(ClusterNotFormed):
            lonely.join('two')
        lonely.close()
        jobsync_cluster.settle()

    def test_locks_without_a_node_do_not_settle(self, jobsync_cluster: Cluster) -> None:
        (one,) = jobsync_cluster.join('one')
        one.register_lock('t', 'gpu-%')
        eventually(lambda: not one.owns('t'))
        with pytest.raises(AssertionError, match=r"10000 tokens within 0\.2 s: \{'one': 9999\}"):
            jobsync_cluster.settle(0.2)
        (two,) = jobsync_cluster.join('gpu-1')
        assert two.can_claim_task('t')


def told(call: Callable[[], Any]) -> Any:
    """What a call gives, or the class of its error."""
    try:
        return call()
    except (ClaimLost, ExecutionRunning, DuplicateExecution) as error:
        return type(error)


def story(job: Job, lose: Callable[[], object]) -> list[Any]:
    """What a Job says over its life in a test."""
    found = [told(lambda: job.can_claim_task('a')), told(lambda: job.add_task('a'))]
    job.write_audit()
    found += [
        told(lambda: job.owner_of('a') == job.node_name),
        job.am_i_healthy(),
        job.am_i_leader(),
        [row['task_id'] for row in job.get_audit()],
        [node['name'] == job.node_name for node in job.get_active_nodes()],
        sorted(job.local_status()),
        sorted(job.get_coordination_status()),
        job.local_status()['state'],
        told(lambda: job.register_lock('x', ['%'], 'why')),
        [sorted(lock) for lock in job.list_locks()],
        job.clear_all_locks(),
        {'task_id', 'token', 'owner'} <= set(job.explain('a')),
    ]

    def once(fail: bool = False) -> Any:
        with job.once('k') as execution:
            if fail:
                raise KeyError
            execution.result = (1, 2)
            assert execution.fence > 0
            return execution.attempts

    def again() -> Any:
        try:
            once()
        except DuplicateExecution as error:
            return error.key, error.result

    with pytest.raises(KeyError):
        once(fail=True)
    found += [told(once), again()]
    with job.once('held'):
        found.append(told(lambda: job.once('held').__enter__()))
    lose()
    found += [
        told(lambda: job.can_claim_task('b')),
        told(lambda: job.add_task('b')),
        told(lambda: job.set_claim(['b', 'c'])),
        len(job.my_tokens),
        job.local_status()['state'],
    ]
    job.undrain()
    eventually(lambda: job.can_claim_task('b'))
    return found


def test_the_fake_tells_the_same_story_as_a_real_node(jobsync_cluster: Cluster) -> None:
    (real,) = jobsync_cluster.join('real')
    theirs = story(real, real.drain)
    fake = FakeJob()
    with fake:
        mine = story(fake, fake.drain)
    assert mine == theirs
