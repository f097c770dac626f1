"""Claims say what is true, everywhere: in forked children, on tokens that come and go, and without
waiting for the database.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from jobsync_core import CoordinationConfig, DatabaseUnavailable, Job
from jobsync_core.store.schema import create_schema
from tests.support.cluster import node_of, query
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

MakeConfig = Callable[..., CoordinationConfig]
TASKS = range(300)


def node(config: CoordinationConfig, name: str, **arguments: object) -> Job:
    """A Job without a grace period."""
    return Job(name, config, **{'wait_on_enter': 0, **arguments})  # type: ignore[arg-type]


def in_child(question: Callable[[], bool]) -> bool:
    """What a forked child answers."""
    pid = os.fork()
    if not pid:
        status = 2
        try:
            status = 0 if question() else 1
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1), code
    return code == 0


def take(job: Job, *tasks: int) -> bool:
    for task in tasks:
        job.add_task(task)
    return True


@contextlib.contextmanager
def child_of(job: Job) -> Iterator[Callable[[], set[int]]]:
    """A child that is forked now, and which of TASKS it says that it may claim, whenever asked."""
    ask, asking = os.pipe()
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(asking)
            while os.read(ask, 1):
                os.write(tell, bytes(job.can_claim_task(task) for task in TASKS))
        finally:
            os._exit(0)
    os.close(ask)
    os.close(tell)

    def says() -> set[int]:
        os.write(asking, b'?')
        answer = b''
        while len(answer) < len(TASKS):
            answer += os.read(told, len(TASKS))
        return {task for task in TASKS if answer[task]}

    try:
        yield says
    finally:
        os.close(asking)
        os.waitpid(pid, 0)
        os.close(told)


def owned(job: Job) -> set[int]:
    return {task for task in TASKS if job.owns(task)}


class TestChildren:
    def test_a_child_from_before_a_gain_knows_what_others_have_taken(
        self, config: CoordinationConfig
    ) -> None:
        with node(config, 'a') as a, node(config, 'b') as b:
            eventually(lambda: len(owned(b)) > 50 and len(owned(a)) + len(owned(b)) == len(TASKS))
            with child_of(a) as says:
                theirs = owned(b)
                taken = set(sorted(theirs)[::2])
                assert says() == owned(a)
                for task in taken:
                    b.add_task(task)
                b.drain()
                eventually(lambda: len(a.my_tokens) == config.total_tokens)
                assert says() == set(TASKS) - taken, 'on two nodes at once'
                assert {task for task in TASKS if a.can_claim_task(task)} == set(TASKS) - taken
                b.write_audit()
                assert says() == set(TASKS) - taken

    def test_what_a_node_had_taken_is_free_for_all_when_it_is_gone(
        self, config: CoordinationConfig
    ) -> None:
        with node(config, 'a') as a, node(config, 'b') as b:
            eventually(lambda: len(owned(b)) > 50 and len(owned(a)) + len(owned(b)) == len(TASKS))
            with child_of(a) as says:
                taken = set(sorted(owned(b))[::2])
                for task in taken:
                    b.add_task(task)
                b.drain()
                eventually(lambda: len(a.my_tokens) == config.total_tokens)
                assert says() == set(TASKS) - taken
                query(
                    config, """DELETE FROM "{}node" WHERE name = 'b' RETURNING 1"""
                )  # it comes back, as another life, and drains
                eventually(lambda: says() == set(TASKS))

    def test_what_children_take_is_audited_when_the_node_leaves(
        self, config: CoordinationConfig
    ) -> None:
        with node(config, 'other') as other:
            with node(config, 'a') as a:
                eventually(lambda: len(owned(a)) > 50)
                mine = sorted(owned(a))[:9]
                assert in_child(lambda: take(a, *mine[:4]))
                assert in_child(lambda: take(a, *mine[4:8]))
                a.set_claim(mine[8])
            audited = query(config, 'SELECT task_id::int, node FROM "{}audit" ORDER BY 1')
            assert audited == [(task, 'a') for task in mine[:8]]
            assert query(config, 'SELECT count(*) FROM "{}claim"') == [(0,)]
            eventually(lambda: len(other.my_tokens) == config.total_tokens)
            assert {task for task in TASKS if other.can_claim_task(task)} == set(TASKS) - set(
                mine[:8]
            )

    @pytest.mark.parametrize(
        'took', [False, True], ids=['no child took a task', 'a child took a task']
    )
    def test_leaving_without_the_database_fails_where_an_audit_of_children_is_lost(
        self, config: CoordinationConfig, took: bool
    ) -> None:
        with Proxy(config.host, int(config.port)) as proxy:
            a = node(
                replace(
                    config,
                    host=proxy.host,
                    port=proxy.port,
                    connect_timeout_sec=1,
                    release_timeout_sec=1,
                ),
                'a',
            )
            with a:
                eventually(lambda: a.owns(min(TASKS)))
                assert in_child(lambda: a.owns(min(TASKS)))
                if took:
                    assert in_child(lambda: take(a, min(TASKS)))
                proxy.switch(Mode.REFUSE)
                proxy.reset()
                with pytest.raises(DatabaseUnavailable) if took else contextlib.nullcontext():
                    a.__exit__(None, None, None)

    def test_a_child_that_unwinds_through_the_block_audits_what_it_finished(
        self, config: CoordinationConfig
    ) -> None:
        def work(job: Job, tasks: list[int]) -> bool:
            try:
                for task in tasks:
                    job.add_task(task)
                    if task == tasks[-1]:
                        raise ValueError('not finished')
            except ValueError as error:
                job.__exit__(ValueError, error, error.__traceback__)
            return True

        with node(config, 'a') as a:
            a.add_task(TASKS[0])
            assert in_child(lambda: work(a, list(TASKS[1:4])))
            assert query(config, 'SELECT task_id::int FROM "{}audit" ORDER BY 1') == [(1,), (2,)]
            assert query(config, 'SELECT task_id::int FROM "{}claim" ORDER BY 1') == [(0,)], (
                'of the parent; the unfinished one is free'
            )
            assert a.am_i_healthy()

    def test_children_take_nothing_while_the_node_leaves(self, config: CoordinationConfig) -> None:
        with node(config, 'a') as a:
            with child_of(a) as says:
                assert says() == set(TASKS)
                node_of(a).tasks.close()
                assert says() == set()


class TestWithoutTheDatabase:
    def test_nobody_waits_for_a_promise_to_be_taken_back(self, make_config: MakeConfig) -> None:
        """I7: asked 16 s for an answer on a network that swallows everything."""
        config = make_config(heartbeat_interval_sec=1, heartbeat_timeout_sec=5)
        with Proxy(config.host, int(config.port)) as proxy, node(config, 'b') as b:
            behind = replace(config, host=proxy.host, port=proxy.port)
            with node(behind, 'a', wait_on_enter=0) as a:
                eventually(lambda: len(owned(a)) > 50 and owned(b))
                promised = min(owned(a))
                assert a.can_claim_task(promised)
                a.drain()
                eventually(
                    lambda: (
                        query(config, 'SELECT task_id::int FROM "{}claim" WHERE promised')
                        == [(promised,)]
                    )
                )
                proxy.switch(Mode.SWALLOW)
                began = time.monotonic()
                for task in TASKS:
                    a.can_claim_task(task)
                assert time.monotonic() - began < 2
                proxy.heal()
                # Taken back in the background once the network is there again, and free for its new
                # owner then.
                eventually(lambda: b.can_claim_task(promised), timeout=20)

    def test_nobody_waits_to_hear_who_took_a_task(self, make_config: MakeConfig) -> None:
        config = make_config(heartbeat_interval_sec=1, heartbeat_timeout_sec=5)
        with Proxy(config.host, int(config.port)) as proxy, node(config, 'b') as b:
            for task in TASKS:
                b.add_task(task)
            with node(replace(config, host=proxy.host, port=proxy.port), 'a') as a:
                eventually(lambda: len(owned(a)) > 50)
                proxy.switch(Mode.SWALLOW)
                began = time.monotonic()
                assert not any(a.can_claim_task(task) for task in TASKS)
                assert time.monotonic() - began < 2
                proxy.heal()


class TestVolume:
    def test_many_audited_tasks_are_taken_in_pieces_while_heartbeats_go_on(
        self, make_config: MakeConfig
    ) -> None:
        """A node with short limits: one statement for all of them would take longer than it may."""
        config = make_config(heartbeat_interval_sec=0.5, heartbeat_timeout_sec=2, total_tokens=1000)
        create_schema(config)
        count = 200_000
        query(
            config,
            f"""
            INSERT INTO "{{}}audit" (node, task_id, date, token, epoch)
            SELECT 'old', i::text, current_date,
                   ('x' || left(encode(sha256(sha256(convert_to(i::text, 'UTF8'))), 'hex'),
                       15))::bit(60)::bigint %% 1000, 1
            FROM generate_series(1, {count}) AS i RETURNING 1""",
        )
        # The first 8 bytes modulo the tokens, computed with 60 bits: wrong tokens would only make
        # the test say too little.
        query(config, 'UPDATE "{}audit" SET token = NULL WHERE token %% 100 = 0 RETURNING 1')
        query(config, 'UPDATE "{}cluster" SET epoch = 1, total_tokens = 1000 RETURNING 1')
        with node(config, 'a', date=datetime.date.today(), resume=True) as a:
            eventually(lambda: len(a.my_tokens) == config.total_tokens, timeout=60)
            assert node_of(a).protocol.evictions == 0 and a.am_i_healthy()
            assert len(node_of(a).ownership.exclusions) == count
            assert (
                os.fstat(node_of(a).ownership.exclusions._file.fileno()).st_blocks * 512
                < 12 * count
            )
