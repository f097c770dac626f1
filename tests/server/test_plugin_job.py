"""The Job of a worker process: what it does to the cluster while it enters."""
from __future__ import annotations

from jobsync_core.config import CoordinationConfig
from jobsync_core.job import Job
from jobsync_core.plugin import PluginSettings, make_job
from tests.waiting import eventually


def _worker(config: CoordinationConfig, name: str, pins: dict[str, tuple[str, ...]]) -> Job:
    return make_job(
        PluginSettings(config=config, pin_slots=4, wait_on_enter=5), name, f'q.{name}', 'celery', pins, known=['render', 'charge'],
        prepare=lambda: None, busy=lambda tokens: False, on_rebalance=lambda event: None, on_release=lambda tokens: None)


def _pinned(job: Job) -> set[str]:
    return {lock['task_id'].partition('#')[0] for lock in job.list_locks()}


def test_a_pin_that_left_the_code_leaves_the_cluster_with_the_next_worker(config: CoordinationConfig) -> None:
    with _worker(config, 'old', {'render': ('%-gpu',), 'elsewhere': ('%-gpu',)}) as old:
        assert _pinned(old) == {'render', 'elsewhere'}
        assert not old.can_claim_task('render#1')
        with _worker(config, 'new', {'charge': ('new',)}) as new:
            # A task that the new worker does not know may be pinned by others.
            assert _pinned(new) == {'charge', 'elsewhere'}
            eventually(lambda: old.owner_of('render#1') is not None)
