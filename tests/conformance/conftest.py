"""Clusters on the servers of the test session, each with its own part of the broker, its own
database and directory.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from jobsync_core.embedded.postgres import EmbeddedPostgres
from tests.support.brokers import BrokerServer
from tests.support.taking import take

from .harness import Cluster, Place
from .setups import ADAPTERS, BROKERS, JOBSYNC, QUICK, Setup

#: Files whose scenarios take long, and run on every framework and broker.
_HALVED = (
    'test_affinity',
    'test_celery_broker',
    'test_celery_kills',
    'test_dramatiq_lifecycle',
    'test_ends',
    'test_faults',
    'test_lifecycle',
    'test_load',
    'test_outages',
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        'markers', 'plain: a scenario of the conformance suite that the bare framework passes too'
    )


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _halve(
        [
            item
            for item in items
            if item.path.stem in _HALVED and item.path.parent.name == 'conformance'
        ]
    )
    if not JOBSYNC:
        for item in items:
            if (
                'make_cluster' in getattr(item, 'fixturenames', ())
                and item.get_closest_marker('plain') is None
            ):
                item.add_marker(pytest.mark.skip(reason='needs JobSync'))


def _halve(items: list[pytest.Item]) -> None:
    """Leave every other setup of a scenario to `soak`, as on a chessboard: each framework and each
    broker stays in each file.
    """
    scenarios: dict[str, int] = {}
    for item in items:
        setup = (
            item.callspec.params.get('setup')
            if isinstance(item, pytest.Function) and hasattr(item, 'callspec')
            else None
        )
        if isinstance(setup, Setup):
            row = scenarios.setdefault(item.nodeid.partition('[')[0], len(scenarios))
            column = (
                [*ADAPTERS].index(setup.framework)
                + BROKERS.index(setup.broker)
                + [*ADAPTERS[setup.framework].pools].index(setup.kind)
            )
            if (row + column) % 2:
                item.add_marker(pytest.mark.soak)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        for cluster in Cluster.alive:
            report.sections.append((f'cluster of {item.name}', cluster.report()))
    return report


def _factory(
    stack: ExitStack, request: pytest.FixtureRequest, directories: pytest.TempPathFactory
) -> Callable[..., Cluster]:
    def make(
        setup: Setup,
        settings: dict[str, Any] | None = None,
        *,
        own: bool = False,
        server: BrokerServer | None = None,
        conf: Mapping[str, Any] | None = None,
        postgres: EmbeddedPostgres | None = None,
        pins: Sequence[str] = (),
    ) -> Cluster:
        server, new_space = (
            (server, server.new_space) if server else take(request, setup.broker, own)
        )
        results: BrokerServer = request.getfixturevalue('redis_server')
        database: EmbeddedPostgres = postgres or request.getfixturevalue('postgres')
        name = f'conformance_{uuid.uuid4().hex[:12]}'
        database.create_database(name)
        stack.callback(_drop, database, name)
        space = new_space()
        stack.callback(server.drop_space, space)
        chosen = {**QUICK, **(settings or {})}
        place = Place(
            server,
            space,
            results.url(results.new_space()),
            database.config(name, total_tokens=chosen['total_tokens']),
            directories.mktemp(setup.name),
            conf or {},
        )
        return stack.enter_context(
            Cluster(ADAPTERS[setup.framework](place, JOBSYNC, chosen, pins), setup.pool)
        )

    return make


def _drop(postgres: EmbeddedPostgres, name: str) -> None:
    if postgres.is_running():
        postgres.drop_database(name)


@pytest.fixture
def make_cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Cluster]]:
    """Makes clusters that end with the test: `make_cluster(setup, settings, own=..., server=...,
    conf=..., postgres=..., pins=...)`.
    """
    with ExitStack() as stack:
        yield _factory(stack, request, tmp_path_factory)


@pytest.fixture(scope='module')
def make_lasting_cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Cluster]]:
    """As `make_cluster`; the clusters end with the module."""
    with ExitStack() as stack:
        yield _factory(stack, request, tmp_path_factory)
