"""A Job's life in one process, against a real PostgreSQL: entering, what changes meanwhile,
leaving.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobsync_core import (
    ClaimLost,
    ClusterNotFormed,
    CoordinationConfig,
    Job,
    NotEntered,
    RebalanceEvent,
    Task,
    TokenSet,
)
from jobsync_core.embedded.postgres import EmbeddedPostgres
from tests.support.cluster import query
from tests.support.waiting import eventually

MakeConfig = Callable[..., CoordinationConfig]


def node(config: CoordinationConfig | None, name: str = 'n1', **arguments: object) -> Job:
    """A Job without a grace period."""
    return Job(name, config, **{'wait_on_enter': 0, **arguments})  # type: ignore[arg-type]


def tokens_of(*jobs: Job) -> int:
    """How many tokens these may claim together, none twice."""
    sets = [job.my_tokens for job in jobs]
    total = TokenSet()
    for tokens in sets:
        assert not total & tokens, 'two nodes claim one token'
        total = total | tokens
    return len(total)


def owns(job: Job, task: str | int) -> bool:
    """Whether the task's token is this node's. Unlike can_claim_task it promises the task to
    nobody.
    """
    return job.task_to_token(task) in job.my_tokens


class TestEntering:
    def test_the_first_node_owns_everything_when_enter_returns(
        self, config: CoordinationConfig
    ) -> None:
        with node(config) as job:
            assert len(job.my_tokens) == config.total_tokens
            assert all(job.can_claim_task(Task(number)) for number in range(100))
            assert job.am_i_healthy()
            assert job.am_i_leader()

    def test_the_whole_grace_period_is_waited_even_if_enough_nodes_are_there(
        self, config: CoordinationConfig
    ) -> None:
        began = time.monotonic()
        with node(config, wait_on_enter=1.5):
            assert time.monotonic() - began >= 1.5

    def test_an_outage_within_the_grace_period_is_got_over(
        self, own_server: EmbeddedPostgres
    ) -> None:
        own_server.create_database('grace')
        config = own_server.config(
            'grace', heartbeat_interval_sec=0.2, heartbeat_timeout_sec=1.0, connect_timeout_sec=1
        )
        job = Job('n1', config, wait_on_enter=6)
        with ThreadPoolExecutor(1) as pool:
            entering = pool.submit(job.__enter__)
            eventually(
                lambda: (
                    query(config, """SELECT to_regclass('"{}cluster"') IS NOT NULL""") == [(True,)]
                )
            )
            eventually(lambda: query(config, 'SELECT count(*) FROM "{}node"') == [(1,)])
            own_server.kill()
            down = time.monotonic()
            eventually(
                lambda: time.monotonic() > down + 2.5
            )  # longer than the timeout, shorter than the grace period
            own_server.restart()
            assert entering.result(60) is job
        assert len(job.my_tokens) == config.total_tokens
        job.__exit__(None, None, None)

    def test_a_joiner_owns_nothing_during_its_grace_period(
        self, config: CoordinationConfig
    ) -> None:
        with node(config) as first:
            second = node(config, 'n2', wait_on_enter=1.2)
            entering = threading.Thread(target=second.__enter__)
            entering.start()
            seen: list[tuple[str, bool]] = []
            while entering.is_alive():
                seen += query(
                    config,
                    """
                    SELECT state, EXISTS (SELECT FROM "{}assignment" WHERE node = 'n2' OR moving_to
                        = 'n2')
                    FROM "{}node" WHERE name = 'n2'""",
                )
            assert ('joining', False) in seen
            assert ('joining', True) not in seen
            entering.join(30)
            with contextlib.ExitStack() as stack:
                stack.push(second.__exit__)
                assert len(second.my_tokens) == config.total_tokens // 2
                assert tokens_of(first, second) == config.total_tokens

    def test_too_few_nodes_is_a_timeout_that_says_how_many_were_there(
        self, make_config: MakeConfig
    ) -> None:
        config = make_config(minimum_nodes=3)
        with (
            pytest.raises(ClusterNotFormed, match='1 of minimum_nodes=3') as caught,
            node(config, wait_on_enter=0.3),
        ):
            pytest.fail('entered')
        assert isinstance(caught.value, TimeoutError)
        assert query(config, 'SELECT count(*) FROM "{}node"') == [(0,)]

    def test_nodes_that_enter_together_share_evenly_from_the_start(
        self, make_config: MakeConfig
    ) -> None:
        config = make_config(minimum_nodes=3)
        jobs = [node(config, f'n{number}', wait_on_enter=1.0) for number in range(3)]
        counts: dict[str, int] = {}

        def enter(job: Job) -> None:
            job.__enter__()
            counts[job.node_name] = len(job.my_tokens)

        threads = [threading.Thread(target=enter, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        try:
            # No node had all at first and gave it away later.
            assert sorted(counts.values()) == [3333, 3333, 3334]
        finally:
            for job in jobs:
                job.__exit__(None, None, None)

    def test_weight_is_the_share(self, config: CoordinationConfig) -> None:
        with node(config, weight=3) as heavy, node(config, 'n2', weight=1) as light:
            eventually(lambda: len(light.my_tokens) == config.total_tokens // 4)
            eventually(lambda: tokens_of(heavy, light) == config.total_tokens)

    def test_twice_is_an_error_and_the_first_life_goes_on(self, config: CoordinationConfig) -> None:
        job = node(config)
        with job:
            with pytest.raises(NotEntered, match='new Job'):
                job.__enter__()
            assert job.can_claim_task(1)
        with pytest.raises(NotEntered, match='new Job'):
            job.__enter__()

    def test_five_first_starts_at_once_on_an_empty_database(self, make_config: MakeConfig) -> None:
        config = make_config(appname='fresh_')
        jobs = [node(config, f'n{number}') for number in range(5)]
        threads = [threading.Thread(target=job.__enter__) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        try:
            eventually(
                lambda: [len(job.my_tokens) for job in jobs] == [config.total_tokens // 5] * 5
            )
        finally:
            for job in jobs:
                job.__exit__(None, None, None)


class TestLeaving:
    def test_the_row_is_gone_and_the_others_take_over(self, config: CoordinationConfig) -> None:
        with node(config) as first:
            with node(config, 'n2') as second:
                eventually(lambda: tokens_of(first, second) == config.total_tokens)
            assert query(config, 'SELECT name FROM "{}node"') == [('n1',)]
            eventually(lambda: len(first.my_tokens) == config.total_tokens)

    def test_the_leader_may_leave(self, config: CoordinationConfig) -> None:
        first, second = node(config), node(config, 'n2')
        first.__enter__()
        with second:
            first.__exit__(None, None, None)
            eventually(lambda: len(second.my_tokens) == config.total_tokens)
            eventually(second.am_i_leader)

    def test_use_after_exit_is_an_error(self, config: CoordinationConfig) -> None:
        with node(config) as job:
            pass
        assert not job.am_i_healthy()
        assert len(job.my_tokens) == 0
        for use in (
            lambda: job.can_claim_task(1),
            lambda: job.add_task(1),
            job.write_audit,
            job.get_audit,
            job.get_active_nodes,
            lambda: job.register_lock(1, '%'),
            job.list_locks,
            lambda: job.owner_of(1),
            job.drain,
        ):
            with pytest.raises(NotEntered, match="'n1'"):
                use()

    def test_use_before_enter_is_an_error(self, config: CoordinationConfig) -> None:
        job = node(config)
        with pytest.raises(NotEntered):
            job.can_claim_task(1)

    def test_the_error_of_the_block_comes_through(self, config: CoordinationConfig) -> None:
        with pytest.raises(KeyError, match='mine'), node(config):
            raise KeyError('mine')
        assert query(config, 'SELECT count(*) FROM "{}node"') == [(0,)]

    def test_wait_on_exit_stays_registered_without_tokens(self, config: CoordinationConfig) -> None:
        with node(config) as first:
            second = node(config, 'n2', wait_on_exit=1.0)
            second.__enter__()
            leaving = threading.Thread(target=second.__exit__, args=(None, None, None))
            leaving.start()
            eventually(lambda: len(first.my_tokens) == config.total_tokens)
            assert leaving.is_alive()
            assert 'n2' in [row['name'] for row in first.get_active_nodes()]
            leaving.join(30)
            eventually(lambda: [row['name'] for row in first.get_active_nodes()] == ['n1'])


class TestCallbacks:
    def test_on_rebalance_tells_of_the_first_tokens_and_of_each_change(
        self, config: CoordinationConfig
    ) -> None:
        events: list[RebalanceEvent] = []
        with node(config, on_rebalance=events.append):
            eventually(lambda: events)
            assert events[0].is_initial
            assert (events[0].tokens_added, events[0].tokens_removed) == (config.total_tokens, 0)
            with node(config, 'n2'):
                eventually(
                    lambda: (
                        sum(event.tokens_removed for event in events) == config.total_tokens // 2
                    )
                )
            eventually(
                lambda: sum(event.tokens_added for event in events) == config.total_tokens * 3 // 2
            )
            assert not any(event.is_initial for event in events[1:])
            assert [event.token_version for event in events] == sorted(
                event.token_version for event in events
            )

    def test_a_callback_without_arguments_works(self, config: CoordinationConfig) -> None:
        called = threading.Event()

        def on_rebalance() -> None:
            called.set()

        with node(config, on_rebalance=on_rebalance):
            assert called.wait(10)

    def test_an_exception_in_a_callback_is_counted_and_harms_nothing(
        self, config: CoordinationConfig
    ) -> None:
        def on_rebalance(event: RebalanceEvent) -> None:
            raise RuntimeError('mine')

        def on_release(tokens: TokenSet) -> None:
            raise RuntimeError('mine too')

        with node(config, on_rebalance=on_rebalance, on_release=on_release) as first:
            eventually(lambda: first.get_coordination_status()['callback_failures'] >= 1)
            with node(config, 'n2') as second:
                eventually(lambda: tokens_of(first, second) == config.total_tokens)
            eventually(lambda: first.get_coordination_status()['callback_failures'] >= 3)
            assert first.am_i_healthy()

    def test_a_slow_callback_costs_no_lease(self, config: CoordinationConfig) -> None:
        held = threading.Event()
        started = threading.Event()

        def on_rebalance() -> None:
            started.set()
            held.wait(30)

        with node(config, on_rebalance=on_rebalance) as job:
            assert started.wait(10)
            began = time.monotonic()
            while time.monotonic() < began + 2 * config.heartbeat_timeout_sec:
                assert job.can_claim_task(1)
                time.sleep(0.02)
            held.set()

    def test_nothing_is_handed_over_before_on_release_returns(
        self, make_config: MakeConfig
    ) -> None:
        config = make_config(release_timeout_sec=30)
        releasing, go = threading.Event(), threading.Event()
        released: list[TokenSet] = []

        def on_release(tokens: TokenSet) -> None:
            released.append(tokens)
            releasing.set()
            go.wait(20)

        with node(config, on_release=on_release) as first:
            second = node(config, 'n2')
            entering = threading.Thread(target=second.__enter__)
            entering.start()
            assert releasing.wait(20)
            # The old owner claims them no more, the new one not yet.
            assert not released[0] & first.my_tokens
            began = time.monotonic()
            while time.monotonic() < began + 0.5:
                assert not released[0] & second.my_tokens
                time.sleep(0.01)
            go.set()
            entering.join(30)
            eventually(lambda: released[0] <= second.my_tokens)
            second.__exit__(None, None, None)

    def test_on_release_that_never_returns_holds_the_hand_over_up_for_a_bounded_time(
        self, make_config: MakeConfig
    ) -> None:
        config = make_config(release_timeout_sec=0.5)
        go = threading.Event()
        with (
            node(config, on_release=lambda tokens: go.wait(30)) as first,
            node(config, 'n2') as second,
        ):
            eventually(lambda: len(second.my_tokens) == config.total_tokens // 2, timeout=20)
            assert tokens_of(first, second) == config.total_tokens
            go.set()

    def test_on_release_runs_before_leaving(self, config: CoordinationConfig) -> None:
        seen: list[tuple[int, int]] = []

        def on_release(tokens: TokenSet) -> None:
            seen.append((len(tokens), len(query(config, 'SELECT name FROM "{}node"'))))

        with node(config, on_release=on_release):
            pass
        assert seen == [(config.total_tokens, 1)]


class TestDrain:
    def test_gives_all_away_and_stays_alive(self, config: CoordinationConfig) -> None:
        with node(config) as first, node(config, 'n2') as second:
            assert first.drain()
            eventually(lambda: len(second.my_tokens) == config.total_tokens)
            assert len(first.my_tokens) == 0
            assert not first.can_claim_task(1)
            assert first.am_i_healthy()
            first.undrain()
            eventually(lambda: len(first.my_tokens) == config.total_tokens // 2)

    def test_a_drain_by_an_operator_is_followed_too(self, config: CoordinationConfig) -> None:
        with node(config) as first, node(config, 'n2') as second:
            query(config, """UPDATE "{}node" SET state = 'draining' WHERE name = 'n2'""")
            eventually(lambda: len(second.my_tokens) == 0)
            eventually(lambda: len(first.my_tokens) == config.total_tokens)

    def test_the_last_node_may_drain(self, config: CoordinationConfig) -> None:
        with node(config) as job:
            assert job.drain()
            assert len(job.my_tokens) == 0
            job.undrain()
            eventually(lambda: len(job.my_tokens) == config.total_tokens)


class TestLocks:
    def test_lock_provider_registers_before_tokens_are_given_out(
        self, config: CoordinationConfig
    ) -> None:
        tokens_while_registering: list[int] = []

        def provider(job: Job) -> None:
            tokens_while_registering.append(len(job.my_tokens))
            job.register_lock('pinned', 'n2', reason='test')

        with node(config, lock_provider=provider) as first:
            assert tokens_while_registering == [0]
            assert not first.can_claim_task('pinned')
            assert first.owner_of('pinned') is None
            with node(config, 'n2') as second:
                eventually(lambda: second.can_claim_task('pinned'))
                assert not first.can_claim_task('pinned')

    def test_an_error_in_lock_provider_ends_entering_and_leaves_no_row(
        self, config: CoordinationConfig
    ) -> None:
        def provider(job: Job) -> None:
            raise RuntimeError('mine')

        with pytest.raises(RuntimeError, match='mine'), node(config, lock_provider=provider):
            pytest.fail('entered')
        assert query(config, 'SELECT count(*) FROM "{}node"') == [(0,)]

    def test_clear_existing_locks_deletes_those_of_this_name_only(
        self, config: CoordinationConfig
    ) -> None:
        with node(config) as first, node(config, 'n2') as second:
            first.register_lock('a', '%')
            second.register_lock('b', '%')
        with node(
            config, clear_existing_locks=True, lock_provider=lambda job: job.register_lock('c', '%')
        ) as job:
            assert sorted(lock['task_id'] for lock in job.list_locks()) == ['b', 'c']

    def test_locks_outlive_their_creator(self, config: CoordinationConfig) -> None:
        with node(config) as job:
            job.register_lock('a', ['%-gpu', '%'], reason='why')
        with node(config, 'n2') as job:
            (lock,) = job.list_locks()
            assert (lock['task_id'], lock['node_patterns'], lock['reason'], lock['created_by']) == (
                'a',
                ['%-gpu', '%'],
                'why',
                'n1',
            )
            assert job.clear_locks_by_creator('n1') == 1

    def test_a_new_lock_and_its_clearing_move_the_task_at_once(
        self, config: CoordinationConfig
    ) -> None:
        with node(config) as first, node(config, 'n2') as second:
            eventually(lambda: tokens_of(first, second) == config.total_tokens)
            mine = next(number for number in range(1000) if owns(first, number))
            first.register_lock(mine, 'n2')
            eventually(lambda: owns(second, mine) and second.can_claim_task(mine))
            assert not first.can_claim_task(mine)
            assert first.clear_all_locks() == 1
            first.register_lock('another', 'n1')
            eventually(lambda: owns(first, 'another'))

    def test_a_lock_ends_when_it_expires(self, config: CoordinationConfig) -> None:
        with node(config) as job:
            job.register_lock('short', 'nobody', expires_in_days=2 / 86_400)
            eventually(lambda: not owns(job, 'short'))
            assert not job.can_claim_task('short')
            eventually(lambda: owns(job, 'short'))
            assert job.list_locks() == []

    def test_explain_tells_owner_lock_and_pattern(self, config: CoordinationConfig) -> None:
        with node(config, 'a-gpu') as job:
            job.register_lock('render', ['primary', '%-gpu'], reason='needs_gpu')
            eventually(lambda: job.explain('render').get('pattern') == '%-gpu')
            explanation = job.explain('render')
            assert explanation['owner'] == job.owner_of('render') == 'a-gpu'
            assert explanation['token'] == job.task_to_token('render')


class TestTasks:
    def test_audit_of_a_date(self, config: CoordinationConfig) -> None:
        with node(config, date=datetime.date(2024, 5, 6)) as job:
            for number in range(3):
                job.add_task(Task(number))
            assert job.get_audit() == []
            job.write_audit()
            assert sorted((row['node'], row['task_id']) for row in job.get_audit()) == [
                ('n1', '0'),
                ('n1', '1'),
                ('n1', '2'),
            ]

    def test_leaving_writes_the_audit(self, config: CoordinationConfig) -> None:
        with node(config) as job:
            job.add_task(Task(7))
        with node(config, 'n2', resume=True) as job:
            assert [row['task_id'] for row in job.get_audit()] == ['7']
            assert not job.can_claim_task(7)
            assert job.can_claim_task(8)

    def test_a_task_of_another_node_cannot_be_added(self, config: CoordinationConfig) -> None:
        with node(config) as first, node(config, 'n2') as second:
            eventually(lambda: tokens_of(first, second) == config.total_tokens)
            foreign = next(number for number in range(1000) if second.can_claim_task(number))
            with pytest.raises(ClaimLost):
                first.add_task(foreign)

    def test_set_claim_takes_one_or_many(self, config: CoordinationConfig) -> None:
        with node(config) as job:
            job.set_claim('one')
            job.set_claim([Task(1), 2, '3'])
            assert {task for (task,) in query(config, 'SELECT task_id FROM "{}claim"')} == {
                'one',
                '1',
                '2',
                '3',
            }

    def test_a_forked_child_answers_for_its_node_and_leaves_it_alone(
        self, config: CoordinationConfig
    ) -> None:
        with node(config) as first, node(config, 'n2') as second:
            eventually(lambda: tokens_of(first, second) == config.total_tokens)
            sample = list(range(200))
            expected = [number for number in sample if first.can_claim_task(number)]
            reader, writer = os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter(
                    'ignore', DeprecationWarning
                )  # Python 3.12 warns of forks beside threads; pools do it all the same
                child = os.fork()
            if child == 0:
                status = 1
                try:
                    with first_again(first):
                        answers = [number for number in sample if first.can_claim_task(number)]
                    os.write(writer, repr(answers).encode())
                    status = 0
                finally:
                    os._exit(status)
            os.close(writer)
            with os.fdopen(reader) as answers_of_child:
                assert answers_of_child.read() == repr(expected)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert first.am_i_healthy()
            assert [number for number in sample if first.can_claim_task(number)] == expected
            first.write_audit()


@contextlib.contextmanager
def first_again(job: Job) -> Iterator[None]:
    """What happens in a forked child that unwinds through the parent's `with` block."""
    try:
        yield
    finally:
        job.__exit__(None, None, None)


class TestEviction:
    def test_an_evicted_node_stops_comes_back_and_tells(self, config: CoordinationConfig) -> None:
        events: list[RebalanceEvent] = []
        with node(config) as first, node(config, 'n2', on_rebalance=events.append) as second:
            eventually(lambda: tokens_of(first, second) == config.total_tokens)
            life = second.incarnation
            query(config, """DELETE FROM "{}node" WHERE name = 'n2'""")
            eventually(lambda: second.incarnation != life)
            eventually(lambda: len(second.my_tokens) == config.total_tokens // 2)
            eventually(lambda: tokens_of(first, second) == config.total_tokens)
            assert second.get_coordination_status()['evictions'] == 1
            eventually(
                lambda: (
                    sum(e.tokens_added - e.tokens_removed for e in events)
                    == config.total_tokens // 2
                )
            )

    def test_a_connection_killed_by_the_server_is_made_again(
        self, config: CoordinationConfig
    ) -> None:
        with node(config) as job:
            life = job.incarnation
            query(
                config,
                """
                SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid()""",
            )
            eventually(lambda: job.am_i_healthy() and job.can_claim_task(1))
            began = time.monotonic()
            eventually(lambda: time.monotonic() > began + 2 * config.heartbeat_timeout_sec)
            assert job.can_claim_task(1)
            assert job.incarnation == life


class TestSingleNode:
    def test_everything_is_claimable_without_a_database(self) -> None:
        called: list[str] = []
        with Job(
            'alone', coordination_config=None, lock_provider=lambda job: called.append('locks')
        ) as job:
            assert all(job.can_claim_task(Task(number)) for number in range(10))
            job.add_task(1)
            job.set_claim([1, 2])
            job.write_audit()
            assert job.get_audit() == []
            assert job.list_locks() == []
            assert job.register_locks_bulk([(1, '%', 'why')]) == 0
            assert job.am_i_healthy()
            assert job.drain()
            assert job.owner_of(1) == 'alone'
            assert job.get_coordination_status()['coordination_enabled'] is False
        with pytest.raises(NotEntered):
            job.can_claim_task(1)


class TestStatus:
    def test_nodes_and_leader_as_others_see_them(self, config: CoordinationConfig) -> None:
        with node(config) as first, node(config, 'n2') as second:
            assert [row['name'] for row in second.get_active_nodes()] == ['n1', 'n2']
            assert second.get_dead_nodes() == []
            assert first.am_i_leader()
            assert not second.am_i_leader()
            status = second.get_coordination_status()
            assert status['active_nodes'] == 2
            assert status['healthy'] is True
            assert status['is_leader'] is False
