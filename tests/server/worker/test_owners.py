"""The owner map: what producers and gates know of who owns what."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.store.queues import QueueStore
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from jobsync_core.worker import owners
from jobsync_core.worker.owners import FRESH_SEC, PAUSE_SEC, STALE_SEC, OwnerMap, Place
from tests.support.cluster import query
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

ROUTES = [f'order-{number}' for number in range(200)]


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(owners, 'clock', made)
    return made


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The version that each statement of a map knew."""
    found: list[int] = []
    read = QueueStore.owners

    def counted(store: QueueStore, known: int) -> Any:
        found.append(known)
        return read(store, known)

    monkeypatch.setattr(QueueStore, 'owners', counted)
    return found


@pytest.fixture
def make_map(config: CoordinationConfig) -> Iterator[Callable[..., OwnerMap]]:
    create_schema(config)
    made: list[Sessions] = []

    def make(config: CoordinationConfig = config) -> OwnerMap:
        made.append(Sessions(config, 'test'))
        return OwnerMap(made[-1], Tables(config.appname))

    yield make
    for sessions in made:
        sessions.close_all()


def settle(config: CoordinationConfig, *jobs: Job) -> None:
    eventually(
        lambda: (
            sum(len(job.my_tokens) for job in jobs) == config.total_tokens
            and all(job.my_tokens for job in jobs)
        ),
        30,
    )


def add_queue(config: CoordinationConfig, name: str, node: str) -> None:
    query(
        config,
        """INSERT INTO "{}queue" (name, node, kind) VALUES (%s, %s, 'celery')""",
        (name, node),
    )


def test_it_finds_the_node_that_may_claim(
    config: CoordinationConfig, make_map: Callable[..., OwnerMap]
) -> None:
    with Job('n1', config, wait_on_enter=0) as first, Job('n2', config, wait_on_enter=0) as second:
        settle(config, first, second)
        add_queue(config, 'q2', 'n2')
        found = make_map()
        assert found.refresh()
        for route in ROUTES:
            assert found.find(route) == (
                Place('n1', None) if first.owns(route) else Place('n2', 'q2')
            )


def test_before_the_first_look_it_knows_nothing(
    make_map: Callable[..., OwnerMap], statements: list[int]
) -> None:
    found = make_map()
    assert (found.version, found.find('a'), statements) == (-1, Place(), [])


def test_nobody_owns_anything_in_a_cluster_without_nodes(make_map: Callable[..., OwnerMap]) -> None:
    found = make_map()
    assert found.refresh()
    assert found.find_fresh('a') == Place()


def test_a_new_plan_is_seen_with_the_next_look(
    config: CoordinationConfig, make_map: Callable[..., OwnerMap]
) -> None:
    with Job('n1', config, wait_on_enter=0) as first:
        settle(config, first)
        found = make_map()
        found.refresh()
        before = found.version
        with Job('n2', config, wait_on_enter=0) as second:
            settle(config, first, second)
            assert {found.find(route).node for route in ROUTES} == {'n1'}
            assert found.refresh()
            assert found.version > before
            assert {found.find(route).node for route in ROUTES} == {'n1', 'n2'}


def test_while_tokens_move_the_map_shows_where_they_go(
    config: CoordinationConfig, make_map: Callable[..., OwnerMap]
) -> None:
    seen: list[str | None] = []
    found = make_map()

    def look(tokens: TokenSet) -> None:
        found.refresh()
        seen.extend(
            found.find(route).node for route in ROUTES if first.task_to_token(route) in tokens
        )

    with Job('n1', config, wait_on_enter=0, on_release=look) as first:
        settle(config, first)
        with Job('n2', config, wait_on_enter=0) as second:
            settle(config, first, second)
            assert seen and set(seen) == {'n2'}


def test_one_statement_a_second_at_most_and_none_while_nobody_asks(
    config: CoordinationConfig,
    make_map: Callable[..., OwnerMap],
    clock: Clock,
    statements: list[int],
) -> None:
    with Job('n1', config, wait_on_enter=0) as job:
        settle(config, job)
        found = make_map()
        for _ in range(1000):
            assert found.find_fresh('a') == Place('n1', None)
        assert len(statements) == 1
        clock.time += FRESH_SEC
        found.find_fresh('a')
        assert len(statements) == 1
        clock.time += 0.01
        for _ in range(1000):
            assert found.find_fresh('a') == Place('n1', None)
        eventually(lambda: len(statements) == 2)
        for _ in range(1000):
            found.find_fresh('a')
        assert len(statements) == 2
        clock.time += 100
        found.find('a')
        assert len(statements) == 2


def test_threads_share_one_statement(
    config: CoordinationConfig,
    make_map: Callable[..., OwnerMap],
    clock: Clock,
    statements: list[int],
) -> None:
    with Job('n1', config, wait_on_enter=0) as job:
        settle(config, job)
        found = make_map()
        found.refresh()
        clock.time += STALE_SEC + 1
        barrier = threading.Barrier(8)
        places: list[Place | None] = []

        def ask() -> None:
            barrier.wait()
            places.extend(found.find_fresh(route) for route in ROUTES)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert places == [Place('n1', None)] * (8 * len(ROUTES))
        assert len(statements) == 2


def test_a_new_queue_is_seen_although_the_version_is_the_same(
    config: CoordinationConfig, make_map: Callable[..., OwnerMap]
) -> None:
    with Job('n1', config, wait_on_enter=0) as job:
        settle(config, job)
        found = make_map()
        found.refresh()
        assert found.find('a') == Place('n1', None)
        add_queue(config, 'q1', 'n1')
        assert found.refresh()
        assert found.find('a') == Place('n1', 'q1')
        query(config, """UPDATE "{}queue" SET name = 'q2'""")
        found.refresh()
        assert found.find('a') == Place('n1', 'q1')  # nobody's queue is missing
        assert found.reread()
        assert found.find('a') == Place('n1', 'q2')


def test_while_the_database_is_away_nobody_waits_for_it_again_and_again(
    config: CoordinationConfig,
    make_config: Callable[..., CoordinationConfig],
    make_map: Callable[..., OwnerMap],
    clock: Clock,
    statements: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Proxy(config.host, int(config.port)) as proxy, Job('n1', config, wait_on_enter=0) as job:
        settle(config, job)
        found = make_map(make_config(host=proxy.host, port=proxy.port, connect_timeout_sec=1))
        assert found.find_fresh('a') == Place('n1', None)
        proxy.switch(Mode.HOLD)
        clock.time += STALE_SEC + 1
        assert found.find_fresh('a') is None
        eventually(lambda: warnings(caplog) == 1)
        for _ in range(100):
            assert found.find_fresh('a') is None
        assert warnings(caplog) == 1
        assert found.find('a') == Place('n1', None), 'what is known stays'
        proxy.switch(Mode.PASS)
        assert found.find_fresh('a') is None
        clock.time += PAUSE_SEC
        eventually(lambda: found.find_fresh('a') == Place('n1', None))


def warnings(caplog: pytest.LogCaptureFixture) -> int:
    return sum('owners are unknown' in record.getMessage() for record in caplog.records)


def test_where_no_worker_has_started_yet_the_database_is_not_blamed(
    config: CoordinationConfig, make_map: Callable[..., OwnerMap], caplog: pytest.LogCaptureFixture
) -> None:
    query(config, 'DROP TABLE "{}queue"')
    assert make_map().find_fresh('a') is None
    assert (
        'no worker of this version has started yet' in caplog.text
        and 'database is away' not in caplog.text
    )


def test_a_node_asks_at_once_after_a_pause_is_over_for_it(
    config: CoordinationConfig, make_map: Callable[..., OwnerMap], clock: Clock
) -> None:
    """A new plan has come: the database must be there again."""
    with Job('n1', config, wait_on_enter=0) as job:
        settle(config, job)
        found = make_map()
        found._pause_until = clock.time + 4
        assert not found.refresh()
        assert found.reread()
        assert found.find('a') == Place('n1', None)
