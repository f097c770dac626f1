"""Whatever goes wrong beside it, the leader leads; and one that cannot hands leadership on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.errors import StatementCanceled
from jobsync_core.store.sessions import Sessions
from tests.support.cluster import Cluster, node_of, query
from tests.support.history import moment
from tests.support.proxy import Mode
from tests.support.waiting import eventually

MakeConfig = Callable[..., CoordinationConfig]

FAST = {
    'heartbeat_interval_sec': 0.4,
    'heartbeat_timeout_sec': 2.0,
    'connect_timeout_sec': 2,
    'release_timeout_sec': 2,
}


@pytest.fixture
def cluster(make_config: MakeConfig, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(make_config(**FAST), tmp_path) as cluster:
        yield cluster


def test_the_dead_are_evicted_while_no_plan_can_be_made(cluster: Cluster) -> None:
    """Somebody holds a lock on the table of locks, as a CREATE INDEX does: planning fails for as
    long as that lasts, evicting does not.
    """
    cluster.start('n1', 'n2', 'n3')
    sessions = Sessions(cluster.config, 'test')
    with sessions.session(limited=False) as connection, connection.cursor() as cursor:
        cursor.execute('SET LOCAL idle_in_transaction_session_timeout = 0')
        cursor.execute(f'LOCK TABLE public."{cluster.config.appname}lock" IN EXCLUSIVE MODE')
        plans = query(cluster.config, 'SELECT count(*) FROM "{}rebalance"')
        cluster['n3'].kill()
        eventually(lambda: sorted(cluster.members()) == ['n1', 'n2'])
        assert query(cluster.config, 'SELECT count(*) FROM "{}rebalance"') == plans
        assert '' in cluster.owned()
        cluster.wait_claims_of('n1', moment())
        cluster.wait_claims_of('n2', moment())
    sessions.close_all()
    cluster.wait_balanced(['n1', 'n2'])
    cluster.wait_claimed()


def test_a_dead_node_whose_row_somebody_holds_keeps_no_other_in_the_table(cluster: Cluster) -> None:
    cluster.start('n1', 'n2', 'n3', 'n4')
    sessions = Sessions(cluster.config, 'test')
    with sessions.session(limited=False) as connection, connection.cursor() as cursor:
        cursor.execute('SET LOCAL idle_in_transaction_session_timeout = 0')
        for name in ('n3', 'n4'):
            cluster[name].kill()
        cursor.execute(
            f"""SELECT FROM public."{cluster.config.appname}node" WHERE name = 'n3' FOR UPDATE"""
        )
        eventually(lambda: sorted(cluster.members()) == ['n1', 'n2', 'n3'], timeout=20)
    sessions.close_all()
    cluster.wait_balanced(['n1', 'n2'])


def test_a_leader_whose_rounds_always_fail_hands_leadership_on(make_config: MakeConfig) -> None:
    config = make_config(**FAST)
    with Job('n1', config, wait_on_enter=0) as first, Job('n2', config, wait_on_enter=0) as second:
        eventually(
            lambda: len(first.my_tokens) == len(second.my_tokens) == config.total_tokens // 2
        )
        assert first.am_i_leader() and not second.am_i_leader()

        def fails(*args: Any) -> Any:
            raise StatementCanceled('canceling statement due to statement timeout')

        leading = node_of(first).agent._control.leader
        leading.lead = leading.evict = fails  # type: ignore[method-assign,assignment]
        began = moment()
        with Job('n3', config, wait_on_enter=0) as third:
            eventually(lambda: second.am_i_leader() and not first.am_i_leader(), timeout=20)
            assert moment() - began < 2.5 * config.heartbeat_timeout_sec
            jobs = first, second, third
            eventually(
                lambda: sorted(len(job.my_tokens) for job in jobs) == [3333, 3333, 3334], timeout=20
            )
            assert [
                name for (name,) in query(config, 'SELECT name FROM "{}node" ORDER BY created_on')
            ] == ['n2', 'n3', 'n1']
            assert first.get_coordination_status()['evictions'] == 0


def test_rows_that_somebody_deletes_are_made_anew_when_nobody_can_hold_their_tokens_any_more(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Their owner hears of nothing, and claims until its lease ends; the cluster fails the test if
    another one claims before (I1).
    """
    with Cluster(
        make_config(**{**FAST, 'heartbeat_timeout_sec': 6.0, 'rebalance_check_interval_sec': 0.2}),
        tmp_path,
    ) as cluster:
        for name in (
            'n1',
            'n2',
            'n3',
        ):  # one after the other: a plan from nothing gives each of them other tokens
            cluster.start(name)
        victim = 'n3'
        cluster.wait_claims_of(victim, moment())
        cluster[victim].proxy.switch(Mode.HOLD)
        query(cluster.config, 'DELETE FROM "{}assignment"')
        eventually(lambda: sum(cluster.owned().values()) == cluster.config.total_tokens, timeout=20)
        cluster[victim].proxy.heal()
        cluster.wait_balanced(['n1', 'n2', 'n3'])
        cluster.wait_claimed()


def test_a_cluster_that_lost_its_whole_assignment_owns_all_again(make_config: MakeConfig) -> None:
    config = make_config(**FAST)
    with Job('n1', config, wait_on_enter=0) as first, Job('n2', config, wait_on_enter=0) as second:
        jobs = first, second
        eventually(lambda: all(len(job.my_tokens) == config.total_tokens // 2 for job in jobs))
        query(config, 'DELETE FROM "{}assignment"')
        began = moment()
        eventually(lambda: not any(job.my_tokens for job in jobs))
        eventually(
            lambda: all(len(job.my_tokens) == config.total_tokens // 2 for job in jobs), timeout=20
        )
        assert (
            config.heartbeat_timeout_sec
            <= moment() - began
            < 2 * config.heartbeat_timeout_sec + 2 * config.rebalance_check_interval_sec
        )


@pytest.mark.parametrize('count', [2, 3])
def test_the_oldest_nodes_that_die_together_are_found_as_soon_as_one(
    make_config: MakeConfig, tmp_path: Path, count: int
) -> None:
    """With an interval so long that looking once per heartbeat would find them an interval
    later.
    """
    timeout = 9.0
    with Cluster(
        make_config(**{**FAST, 'heartbeat_interval_sec': 4.0, 'heartbeat_timeout_sec': timeout}),
        tmp_path,
    ) as cluster:
        names = [f'n{number}' for number in range(count + 1)]
        cluster.start(*names)
        beats = sum(beat for (beat,) in query(cluster.config, 'SELECT beat FROM "{}node"'))
        eventually(
            lambda: (
                sum(beat for (beat,) in query(cluster.config, 'SELECT beat FROM "{}node"'))
                > beats + 4 * len(names)
            ),
            timeout=60,
        )
        oldest, last = cluster.members()[:count], cluster.members()[-1]
        since = [cluster[name].kill() for name in oldest][-1]
        eventually(lambda: cluster.members() == [last])
        assert moment() - since < timeout + 3, 'a second, and two for a busy machine'
        cluster.wait_balanced([last])
