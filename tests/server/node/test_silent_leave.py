"""A Job that is left while its database is silent ends in time, whatever it still has to say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, DatabaseUnavailable, Job, Task
from jobsync_core.store import hurry
from tests.support.cluster import query
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

#: The times that users have who set none.
DEFAULTS: dict[str, Any] = {
    'heartbeat_interval_sec': 5,
    'heartbeat_timeout_sec': 15,
    'rebalance_check_interval_sec': 30,
}
END_SEC = 5.0


@pytest.fixture
def proxy(config: CoordinationConfig) -> Iterator[Proxy]:
    with Proxy(config.host, int(config.port)) as made:
        yield made


@pytest.fixture
def job(make_config: Callable[..., CoordinationConfig], proxy: Proxy) -> Job:
    """A Job that is entered; whoever asks for it leaves it."""
    made = Job('n1', make_config(host=proxy.host, port=proxy.port, **DEFAULTS), wait_on_enter=0)
    made.__enter__()
    eventually(lambda: made.owns('order-1'), 30)
    return made


def leave(job: Job) -> float:
    """Seconds that leaving takes."""
    before = time.monotonic()
    job.__exit__(None, None, None)
    return time.monotonic() - before


def test_one_that_has_nothing_to_say(job: Job, proxy: Proxy) -> None:
    proxy.switch(Mode.SWALLOW)
    assert leave(job) < END_SEC


def test_one_whose_audit_cannot_be_written_says_so(job: Job, proxy: Proxy) -> None:
    assert job.can_claim_task(Task('order-1'))
    job.add_task(Task('order-1'))
    proxy.switch(Mode.SWALLOW)
    before = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        job.__exit__(None, None, None)
    assert time.monotonic() - before < END_SEC


def test_one_that_had_asked_before_it_is_left(job: Job, proxy: Proxy) -> None:
    proxy.switch(Mode.SWALLOW)
    before = time.monotonic()
    job.drain(0)  # asks, and gets no answer
    with pytest.raises(DatabaseUnavailable), job.once(Task('order-2')):
        raise AssertionError('it begins nothing')
    waited = time.monotonic() - before
    assert leave(job) < min(END_SEC, waited + END_SEC)


def test_one_that_stays_registered_for_a_while(
    make_config: Callable[..., CoordinationConfig], proxy: Proxy
) -> None:
    config = make_config(host=proxy.host, port=proxy.port, **DEFAULTS)
    job = Job('n1', config, wait_on_enter=0, wait_on_exit=60)
    job.__enter__()
    eventually(lambda: job.owns('order-1'), 30)
    proxy.switch(Mode.SWALLOW)
    assert leave(job) < END_SEC


def test_one_that_ends_work_meanwhile(job: Job, proxy: Proxy) -> None:
    job.hurry()
    execution = job.once(Task('order-2'))
    execution.__enter__()
    proxy.switch(Mode.SWALLOW)
    before = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        execution.__exit__(None, None, None)
    assert time.monotonic() - before < hurry.HURRIED_SEC + 1
    assert leave(job) < END_SEC - hurry.HURRIED_SEC


def test_one_whose_database_answers_tells_the_others(job: Job, config: CoordinationConfig) -> None:
    assert leave(job) < END_SEC
    assert query(config, 'SELECT name FROM "{}node"') == []
