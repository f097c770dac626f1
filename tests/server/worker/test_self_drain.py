"""Nodes that are cut off from their broker, on a real database."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from jobsync_core import CoordinationConfig, Job
from jobsync_core.worker.consuming import SelfDrain
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
            job.drain(0)
            drain.drained = True
        eventually(lambda: [_state(job) for job in jobs] == ['draining'] * 2)
        for drain in drains:
            stack.callback(drain.stop)
            drain.start()
        eventually(lambda: len(jobs[0].my_tokens) == config.total_tokens, 20)
        assert _state(jobs[1]) == 'draining' and drains[1].drained
        silence[0] = 0.0
        eventually(lambda: all(len(job.my_tokens) == config.total_tokens / 2 for job in jobs), 20)


def _state(job: Job) -> Any:
    return job.local_status()['state']
