"""The Job of a worker process: what it does to the cluster while it enters."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobsync_core.belonging import Belonging, Peer
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.job import Job
from jobsync_core.store.queues import QueueStore
from jobsync_core.worker import entering
from jobsync_core.worker.entering import make_job
from jobsync_core.worker.settings import PluginSettings
from tests.support.cluster import query
from tests.support.waiting import eventually


def _worker(
    config: CoordinationConfig,
    name: str,
    pins: dict[str, tuple[str, ...]] | None = None,
    *,
    wait: float = 5,
    kind: str = 'celery',
    mark: str | None = 'mark',
    application: str = '',
) -> Job:
    return make_job(
        PluginSettings(config=config, pin_slots=4, wait_on_enter=wait),
        name,
        {'': f'q.{name}'},
        kind,
        pins or {},
        known=['render', 'charge'],
        identify=lambda make: mark,
        place=f'redis://h/{mark}',
        application=application,
        prepare=lambda: None,
        busy=lambda tokens: False,
        on_rebalance=lambda event: None,
        on_release=lambda tokens: None,
    )


def _pinned(job: Job) -> set[str]:
    return {lock['task_id'].partition('#')[0] for lock in job.list_locks()}


def test_a_pin_that_left_the_code_leaves_the_cluster_with_the_next_worker(
    config: CoordinationConfig,
) -> None:
    with _worker(config, 'old', {'render': ('%-gpu',), 'elsewhere': ('%-gpu',)}) as old:
        assert _pinned(old) == {'render', 'elsewhere'}
        assert not old.can_claim_task('render#1')
        with _worker(config, 'new', {'charge': ('new',)}) as new:
            # A task that the new worker does not know may be pinned by others.
            assert _pinned(new) == {'charge', 'elsewhere'}
            eventually(lambda: old.owner_of('render#1') is not None)


@pytest.mark.parametrize(
    ('other', 'named'),
    [
        ({'mark': 'another'}, ["'one'", 'redis://h/mark', 'redis://h/another', 'appname']),
        ({'kind': 'dramatiq'}, ["'one'", 'celery', 'dramatiq', 'appname']),
        ({'application': 'crm'}, ["'shop'", "'crm'", 'appname', 'setting application']),
        ({'mark': None}, ['redis://h/mark', 'redis://h/None']),
    ],
)
def test_a_worker_of_another_project_is_refused_with_both_names(
    config: CoordinationConfig,
    other: dict[str, Any],
    named: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entering, '_MARK_SEC', 0.3)
    with _worker(config, 'one', wait=0, application='shop') as one:
        with pytest.raises(ConfigurationError) as caught:
            _worker(config, 'two', wait=0, **{'application': 'shop', **other}).__enter__()
        assert all(name in str(caught.value) for name in named), caught.value
        eventually(lambda: len(one.my_tokens) == config.total_tokens)


@pytest.mark.parametrize('other', [{}, {'mark': ''}, {'application': ''}])
def test_workers_of_one_project_are_one_cluster(
    config: CoordinationConfig, other: dict[str, Any]
) -> None:
    with _worker(config, 'one', wait=0, application='shop') as one:
        with _worker(config, 'two', wait=0, **{'application': 'shop', **other}) as two:
            eventually(
                lambda: (
                    len(one.my_tokens) + len(two.my_tokens) == config.total_tokens
                    and bool(two.my_tokens)
                )
            )


def test_a_mark_that_the_broker_lost_is_waited_for(config: CoordinationConfig) -> None:
    answers: list[str | None] = [None, None, 'mark']
    with _worker(config, 'one', wait=0):
        late = make_job(
            PluginSettings(config=config),
            'two',
            {'': 'q.two'},
            'celery',
            {},
            prepare=lambda: None,
            busy=lambda tokens: False,
            identify=lambda make: 'made' if make else answers.pop(0),
            on_rebalance=lambda event: None,
            on_release=lambda tokens: None,
        )
        with late:
            assert late.belonging.broker == 'mark' and not answers


def test_a_plain_job_is_no_member_of_a_cluster_of_workers_nor_the_other_way_round(
    config: CoordinationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entering, '_MARK_SEC', 0.3)
    with _worker(config, 'one', wait=0):
        with pytest.raises(ConfigurationError, match=r"'one'.*celery worker.*plain Job.*appname"):
            Job('plain', config, wait_on_enter=0).__enter__()
    with Job('plain', config, wait_on_enter=0):
        with pytest.raises(
            ConfigurationError, match=r"'plain', a plain Job.*celery worker.*appname"
        ):
            _worker(config, 'two', wait=0).__enter__()
    assert Belonging() == Job('x', config).belonging


def test_workers_that_enter_together_are_not_taken_for_plain_jobs(
    config: CoordinationConfig,
) -> None:
    """The first plan makes one active that has not recorded yet what it is."""
    inside, go = threading.Event(), threading.Event()

    def slow(job: Job) -> None:
        query(config, 'UPDATE "{}queue" SET node = node || \'-\' WHERE node = %s', ('one',))
        query(config, 'UPDATE "{}node" SET state = \'active\' WHERE name = %s', ('one',))
        inside.set()
        assert go.wait(30)
        query(config, 'UPDATE "{}queue" SET node = %s WHERE node = %s', ('one', 'one-'))

    first = make_job(
        PluginSettings(config=config, lock_provider=slow),
        'one',
        {'': 'q.one'},
        'celery',
        {},
        prepare=lambda: None,
        busy=lambda tokens: False,
        identify=lambda make: 'mark',
        on_rebalance=lambda event: None,
        on_release=lambda tokens: None,
    )
    entering = threading.Thread(target=first.__enter__)
    entering.start()
    try:
        assert inside.wait(30)
        threading.Timer(0.5, go.set).start()
        with _worker(config, 'two', wait=0) as two:
            assert two.belonging.kind == 'celery'
    finally:
        go.set()
        entering.join(30)
        first.__exit__(None, None, None)


def test_workers_that_become_active_together_do_not_wait_for_others(
    config: CoordinationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, both = QueueStore.peers, threading.Barrier(2)
    looked: set[str] = set()

    def peers(store: QueueStore, node: str, timeout: float) -> list[Peer]:
        if node not in looked:
            looked.add(node)
            both.wait(30)  # both are in the node table
            query(config, 'UPDATE "{}node" SET state = \'active\'')
            both.wait(30)
        return look(store, node, timeout)

    monkeypatch.setattr(QueueStore, 'peers', peers)
    monkeypatch.setattr(entering, '_MARK_SEC', 60.0)
    workers = [_worker(config, name, wait=0) for name in ('one', 'two')]
    with ThreadPoolExecutor() as pool:
        entries = [pool.submit(worker.__enter__) for worker in workers]
        for entered in entries:
            assert entered.result(30).belonging.broker == 'mark'
    for worker in workers:
        worker.__exit__(None, None, None)


def test_a_worker_that_is_refused_leaves_no_queue_behind(
    config: CoordinationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entering, '_MARK_SEC', 0.3)
    with Job('plain', config, wait_on_enter=0):
        query(
            config,
            "INSERT INTO \"{}queue\" (name, node, kind) VALUES ('q.former', 'former', 'celery')",
        )
        for name in ('new', 'former'):
            with pytest.raises(ConfigurationError, match='plain Job'):
                _worker(config, name, wait=0).__enter__()
        # What an earlier life of the node left at the broker is still known.
        assert query(config, 'SELECT name FROM "{}queue"') == [('q.former',)]
