"""A process that sends does not wait for a database that is silent, but for once."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.store.schema import create_schema
from jobsync_core.worker import owners
from jobsync_core.worker.lookup import OwnerLookup
from jobsync_core.worker.owners import FRESH_SEC, STALE_SEC, WAIT_SEC
from jobsync_core.worker.settings import PluginSettings
from tests.support.cluster import query
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

#: Seconds from which a call has waited, and what a busy machine may add to a wait.
WAITED_SEC, LATE_SEC = 0.5, 1.0


@pytest.fixture
def proxy(config: CoordinationConfig) -> Iterator[Proxy]:
    create_schema(config)
    with Proxy(config.host, int(config.port)) as made:
        yield made


@pytest.fixture
def lookup(
    make_config: Callable[..., CoordinationConfig], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> OwnerLookup:
    monkeypatch.setattr(owners, 'PAUSE_SEC', 0.1)
    settings = PluginSettings(
        config=make_config(host=proxy.host, port=proxy.port, connect_timeout_sec=1)
    )
    return OwnerLookup(lambda: settings, lambda: None)


@pytest.fixture
def owner(config: CoordinationConfig) -> Iterator[Job]:
    """A node that owns everything, with a queue of its own."""
    with Job('n1', config, wait_on_enter=0) as job:
        eventually(lambda: job.owns('order-1'), 30)
        query(config, """INSERT INTO "{}queue" (name, node, kind) VALUES ('q1', 'n1', 'celery')""")
        yield job


def waits_of(lookup: OwnerLookup, seconds: float, every: float = 0.02) -> list[float]:
    """The times, in seconds, of those calls that waited."""
    found, until = list[float](), time.monotonic() + seconds
    while time.monotonic() < until:
        before = time.monotonic()
        lookup.queue_of('order-1')
        found.append(time.monotonic() - before)
        time.sleep(every)
    return [taken for taken in found if taken > WAITED_SEC]


def test_who_sends_all_the_time_does_not_wait_at_all(
    lookup: OwnerLookup, proxy: Proxy, owner: Job
) -> None:
    eventually(lambda: lookup.queue_of('order-1') is not None)
    proxy.switch(Mode.SWALLOW)
    check_waits(waits_of(lookup, 9.0), most=0)


def test_who_sends_now_and_then_waits_once_and_finds_owners_again_afterwards(
    lookup: OwnerLookup, proxy: Proxy, owner: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    eventually(lambda: lookup.queue_of('order-1') is not None)
    proxy.switch(Mode.SWALLOW)
    monkeypatch.setattr(owners, 'STALE_SEC', FRESH_SEC)
    check_waits(waits_of(lookup, 9.0, every=FRESH_SEC + 0.1), most=1)
    proxy.switch(Mode.PASS)
    eventually(lambda: lookup.queue_of('order-1') is not None, 20)


def test_threads_wait_once_together(lookup: OwnerLookup, proxy: Proxy) -> None:
    proxy.switch(Mode.SWALLOW)
    found: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda: found.append(waits_of(lookup, 6.0))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8
    for waits in found:
        check_waits(waits, most=1)


def check_waits(waits: list[float], most: int) -> None:
    assert len(waits) <= most, waits
    assert all(taken < WAIT_SEC + LATE_SEC for taken in waits), waits


def test_a_process_that_forks_and_ends_while_it_reads_waits_once_in_each_and_ends(
    make_config: Callable[..., CoordinationConfig], proxy: Proxy
) -> None:
    config = make_config(host=proxy.host, port=proxy.port, connect_timeout_sec=10)
    proxy.switch(Mode.SWALLOW)
    told = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in ('host', 'port', 'dbname', 'user', 'appname', 'connect_timeout_sec')
    }
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, '-m', 'tests.support.producer_process', json.dumps(told)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    ended = time.monotonic()
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert 'Traceback' not in done.stderr, done.stderr
    for who in ('parent', 'child'):
        calls = [line['sec'] for line in lines if line['what'] == who]
        assert len(calls) == {'parent': 40, 'child': 20}[who]
        check_waits([taken for taken in calls if taken > WAITED_SEC], most=1)
    assert [line['what'] for line in lines].count('ends') == 2
    assert ended - max(line['at'] for line in lines) < LATE_SEC
    assert ended - began < 2 * WAIT_SEC + STALE_SEC + 4 * LATE_SEC


def test_who_asks_nothing_has_no_thread(lookup: OwnerLookup, owner: Job) -> None:
    def threads() -> list[str]:
        return [
            thread.name for thread in threading.enumerate() if thread.name == 'jobsync owner map'
        ]

    assert threads() == []
    assert lookup.queue_of('order-1') == 'q1', 'the first message goes straight'
    eventually(lambda: threads() == [])
