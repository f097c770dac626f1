"""Nodes that are cut off from their broker, on a real database."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from jobsync_core import CoordinationConfig, Job, clock
from jobsync_core.store.queues import QueueStore
from jobsync_core.store.status import StatusStore
from jobsync_core.store.tables import Tables
from jobsync_core.worker.consuming import SelfDrain
from tests.support.cluster import query
from tests.support.rows import rows_of
from tests.support.waiting import eventually


def test_when_all_have_drained_one_takes_all_keys_and_the_others_come_back_with_the_broker(
    make_config: Callable[..., CoordinationConfig],
) -> None:
    config = make_config(heartbeat_interval_sec=0.2, heartbeat_timeout_sec=2)
    silence = [99.0]
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(Job(name, config, wait_on_enter=0)) for name in ('n1', 'n2')]
        drains = [SelfDrain(job, lambda: silence[0], 1.0) for job in jobs]
        for job, drain in zip(jobs, drains, strict=True):
            # As both do that look at one moment.
            job.stand_aside()
            drain.drained = True
        eventually(lambda: [_state(job) for job in jobs] == ['draining'] * 2)
        for drain in drains:
            stack.callback(drain.stop)
            drain.start()
        eventually(lambda: len(jobs[0].my_tokens) == config.total_tokens, 20)
        assert _state(jobs[1]) == 'draining' and drains[1].drained
        silence[0] = 0.0
        eventually(lambda: all(len(job.my_tokens) == config.total_tokens / 2 for job in jobs), 20)


def test_what_an_operator_drains_stays_drained_when_the_broker_is_back(
    make_config: Callable[..., CoordinationConfig],
) -> None:
    config = make_config(heartbeat_interval_sec=0.2, heartbeat_timeout_sec=2)
    silence = [0.5]
    with Job('n1', config, wait_on_enter=0) as first, Job('n2', config, wait_on_enter=0) as second:
        drain = SelfDrain(second, lambda: silence[0], 1.0)
        drain.look()
        silence[0] = 99.0
        drain.look()
        eventually(lambda: len(first.my_tokens) == config.total_tokens, 20)
        _set_drain(config, True)
        silence[0] = 0.0
        drain.look()
        assert not drain.drained
        # The wish of the node is answered before the next heartbeats.
        beats = _beats(config)
        eventually(lambda: _beats(config) > beats + 3)
        assert _state(second) == 'draining' and not second.my_tokens
        _set_drain(config, False)
        eventually(lambda: len(second.my_tokens) == config.total_tokens / 2, 20)


def test_an_outage_of_the_broker_itself_moves_no_keys(
    make_config: Callable[..., CoordinationConfig],
) -> None:
    config = make_config(heartbeat_interval_sec=0.3, heartbeat_timeout_sec=3)
    lost: list[float] = []
    with contextlib.ExitStack() as stack:
        nodes = [Cut(stack, config, f'n{number}', lost) for number in range(6)]
        share = config.total_tokens // 6
        eventually(lambda: all(len(node.job.my_tokens) >= share for node in nodes), 30)
        before = _plans(config)
        lost.append(clock.now())
        eventually(lambda: clock.now() - lost[0] > 7, 20)
        silent = query(config, 'SELECT count(*)::int FROM "{}node" WHERE silent')
        assert silent == [(6,)]
        lost.clear()
        eventually(lambda: not query(config, 'SELECT FROM "{}node" WHERE silent'), 20)
        after = _plans(config)
        print(f'six nodes, an outage: {after[0] - before[0]} plans, {after[1] - before[1]} tokens')
        assert after == before and not any(node.drain.drained for node in nodes)
        nodes[3].cut = [clock.now()]
        eventually(lambda: not nodes[3].job.my_tokens, 20)
        assert _state(nodes[3].job) == 'draining', 'one alone gives its keys away as ever'


class Cut:
    """A node that reaches its broker unless that is lost, a bit later than the one before, or it
    is cut off itself.
    """

    def __init__(
        self, stack: contextlib.ExitStack, config: CoordinationConfig, name: str, lost: list[float]
    ) -> None:
        self.lost, self.cut = lost, list[float]()
        self.late = int(name[1:]) * 0.05
        self.tables = Tables.of(config)
        self.job = stack.enter_context(Job(name, config, wait_on_enter=0))
        self.drain = SelfDrain(self.job, self.silence, 2.0, self.tell)
        stack.callback(self.drain.stop)
        self.drain.start()

    def silence(self) -> float:
        return max(0.0, *(clock.now() - at - self.late for at in (*self.lost, *self.cut)), 0.0)

    def tell(self, silent: bool) -> None:
        with self.job.session(pinned=True) as connection:
            store = QueueStore(connection, self.tables)
            store.tell_silent(self.job.node_name, self.job.incarnation, silent)


def _plans(config: CoordinationConfig) -> tuple[int, int]:
    """How many there were, and how many tokens they moved."""
    ((number, moved),) = query(
        config, 'SELECT count(*)::int, coalesce(sum(tokens_moved), 0)::int FROM "{}rebalance"'
    )
    return number, moved


def _set_drain(config: CoordinationConfig, draining: bool) -> None:
    with rows_of(config) as rows, rows.sessions.session() as connection:
        assert StatusStore(connection, rows.tables).set_drain('n2', draining)


def _beats(config: CoordinationConfig) -> int:
    ((beats,),) = query(config, 'SELECT beat FROM "{}node" WHERE name = \'n2\'')
    return int(beats)


def _state(job: Job) -> Any:
    return job.local_status()['state']
