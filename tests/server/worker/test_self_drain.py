"""Nodes that are cut off from their broker, on a real database."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from jobsync_core import CoordinationConfig, Job
from jobsync_core.store.status import StatusStore
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
    silence = [99.0]
    with Job('n1', config, wait_on_enter=0) as first, Job('n2', config, wait_on_enter=0) as second:
        drain = SelfDrain(second, lambda: silence[0], 1.0)
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


def _set_drain(config: CoordinationConfig, draining: bool) -> None:
    with rows_of(config) as rows, rows.sessions.session() as connection:
        assert StatusStore(connection, rows.tables).set_drain('n2', draining)


def _beats(config: CoordinationConfig) -> int:
    ((beats,),) = query(config, 'SELECT beat FROM "{}node" WHERE name = \'n2\'')
    return int(beats)


def _state(job: Job) -> Any:
    return job.local_status()['state']
