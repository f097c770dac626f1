"""What a cluster has audited counts while it lives; a cluster that forms anew runs its tasks again,
unless it is told to resume.
"""

from __future__ import annotations

import datetime
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.store.layout import MIGRATIONS
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from tests.support.cluster import query
from tests.support.rows import Rows
from tests.support.waiting import eventually

TASKS = range(20)


def node(config: CoordinationConfig, name: str, **arguments: object) -> Job:
    """A Job without a grace period."""
    return Job(name, config, **{'wait_on_enter': 0, **arguments})  # type: ignore[arg-type]


def run(config: CoordinationConfig, name: str = 'a', **arguments: object) -> set[int]:
    """The guide's loop; which tasks it processed."""
    with node(config, name, **arguments) as job:
        done = set()
        for task in TASKS:
            if job.can_claim_task(task):
                job.add_task(task)
                done.add(task)
        job.write_audit()
    return done


def epoch(config: CoordinationConfig) -> int:
    return int(query(config, 'SELECT epoch FROM "{}cluster"')[0][0])


def test_a_second_run_on_the_same_day_runs_again_and_says_so(
    config: CoordinationConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, 'jobsync_core')
    assert run(config) == set(TASKS)
    assert 'audited by a cluster' not in caplog.text
    caplog.clear()
    assert run(config, 'b') == set(TASKS)
    (line,) = [
        record.getMessage()
        for record in caplog.records
        if 'audited by a cluster' in record.getMessage()
    ]
    assert line.startswith(f'node=b date={datetime.date.today()}: {len(TASKS)} tasks were audited')
    assert query(config, 'SELECT DISTINCT node FROM "{}audit"') == [('b',)], (
        'the latest run is on record'
    )


def test_who_resumes_runs_nothing_again_and_says_so(
    config: CoordinationConfig, caplog: pytest.LogCaptureFixture
) -> None:
    run(config)
    caplog.set_level(logging.INFO, 'jobsync_core')
    assert run(config, 'b', resume=True) == set()
    assert f'{len(TASKS)} tasks of its tokens are audited already' in caplog.text
    assert run(config, 'c', resume=True) == set(), 'however often'
    assert run(config, 'd') == set(TASKS)
    assert run(config, 'e', resume=True) == set()


def test_while_the_cluster_lives_nothing_runs_again(config: CoordinationConfig) -> None:
    with node(config, 'keeper') as keeper:
        eventually(lambda: len(keeper.my_tokens) == config.total_tokens)
        mine = {task for task in TASKS if keeper.can_claim_task(task)}
        for task in mine:
            keeper.add_task(task)
        keeper.write_audit()
        before = epoch(config)
        assert run(config) == run(config) == run(config, 'b') == set()
        assert epoch(config) == before


def test_a_node_that_comes_back_after_an_eviction_goes_on(config: CoordinationConfig) -> None:
    with node(config, 'a') as job:
        for task in TASKS:
            job.add_task(task)
        job.write_audit()
        before = epoch(config), job.incarnation
        query(config, 'DELETE FROM "{}node" RETURNING 1')
        eventually(
            lambda: job.incarnation != before[1] and len(job.my_tokens) == config.total_tokens
        )
        assert not any(job.can_claim_task(task) for task in TASKS)
        assert epoch(config) == before[0]


def test_of_many_first_nodes_one_begins_anew(config: CoordinationConfig) -> None:
    run(config)
    before = epoch(config)
    jobs = [node(config, f'n{number}', wait_on_enter=0.5) for number in range(5)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(Job.__enter__, jobs))
        claimed = [task for job in jobs for task in TASKS if job.can_claim_task(task)]
        list(pool.map(lambda job: job.__exit__(None, None, None), jobs))
    assert epoch(config) == before + 1
    assert sorted(claimed) == list(TASKS)


class TestCrashes:
    """A node that was killed leaves its row behind."""

    @pytest.fixture
    def rows(self, config: CoordinationConfig) -> Rows:
        create_schema(config)
        run(config, 'first')
        rows = Rows(config, Sessions(config, 'rows'))
        rows.node('dead')
        return rows

    def test_a_cluster_whose_last_node_was_dead_already_has_ended(self, rows: Rows) -> None:
        before = epoch(rows.config)
        assert run(rows.config, 'next') == set(TASKS)
        assert epoch(rows.config) == before + 1

    def test_unless_the_next_one_resumes(self, rows: Rows) -> None:
        assert run(rows.config, 'next', resume=True) == set()

    def test_a_restart_under_the_same_name_begins_anew_too(self, rows: Rows) -> None:
        assert run(rows.config, 'dead') == set(TASKS)

    def test_a_plan_that_was_made_meanwhile_shows_that_it_lived(self, rows: Rows) -> None:
        """It gave the next node tokens, perhaps, and died before another heartbeat."""
        before = epoch(rows.config)

        def plan() -> None:
            eventually(lambda: query(rows.config, """SELECT 1 FROM "{}node" WHERE name = 'next'"""))
            query(rows.config, 'UPDATE "{}cluster" SET version = version + 1 RETURNING 1')

        thread = threading.Thread(target=plan)
        thread.start()
        try:
            assert run(rows.config, 'next') == set()
        finally:
            thread.join()
        assert epoch(rows.config) == before

    def test_a_cluster_that_lived_when_the_next_node_came_goes_on(self, rows: Rows) -> None:
        before, ended = epoch(rows.config), threading.Event()

        def live() -> None:
            """It sends heartbeats until the next node has seen one, and is then killed."""
            eventually(lambda: query(rows.config, """SELECT 1 FROM "{}node" WHERE name = 'next'"""))
            query(
                rows.config,
                """UPDATE "{}node" SET beat = beat + 1 WHERE name = 'dead' RETURNING 1""",
            )
            ended.set()

        thread = threading.Thread(target=live)
        thread.start()
        try:
            assert run(rows.config, 'next') == set()
        finally:
            thread.join()
        assert ended.is_set() and epoch(rows.config) == before


def test_other_tokens_are_another_cluster(make_config: Callable[..., CoordinationConfig]) -> None:
    assert run(make_config(total_tokens=100)) == set(TASKS)
    assert run(make_config(total_tokens=200), resume=True) == set(TASKS), (
        'what was audited has other tokens now'
    )


def test_an_audit_of_an_epoch_that_is_over_counts_for_that_one(config: CoordinationConfig) -> None:
    """A process slept through the end of its cluster, and writes its audit when another one
    lives.
    """
    late = node(config, 'late')
    with late:
        late.add_task(1)
        query(config, 'DELETE FROM "{}node" RETURNING 1')
        query(config, 'UPDATE "{}cluster" SET epoch = epoch + 1 RETURNING 1')
        late.write_audit()
        ((written,),) = query(config, 'SELECT epoch FROM "{}audit"')
        assert written == epoch(config) - 1


def test_its_migration_holds_nobody_up_behind_a_long_transaction(
    config: CoordinationConfig,
) -> None:
    """A table that somebody reads cannot be changed; whoever waits for its lock makes all others
    wait, heartbeats too.
    """
    create_schema(config)
    rows = Rows(config, Sessions(config, 'rows'))
    rows.run(f'ALTER TABLE {rows.tables.audit} DROP COLUMN epoch')
    rows.run(f'ALTER TABLE {rows.tables.cluster} DROP COLUMN epoch')
    migration = MIGRATIONS[6].sql(rows.tables)
    with (
        rows.sessions.session(limited=False) as reader,
        reader.cursor() as cursor,
        ThreadPoolExecutor(1) as pool,
    ):
        cursor.execute(f'SELECT count(*) FROM {rows.tables.audit}')
        migrating = pool.submit(rows.run, migration)
        eventually(lambda: rows.waiting() == 1)
        for _ in range(20):
            began = time.monotonic()
            rows.run(f'SELECT count(*) FROM {rows.tables.cluster}')
            assert time.monotonic() - began < 5  # not until the reader ends
        assert not migrating.done()
        reader.commit()
        migrating.result(20)
    assert rows.run(f'SELECT epoch FROM {rows.tables.cluster}') == [(0,)]
