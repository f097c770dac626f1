"""Real PostgreSQL for every test that asks for it, and a database of its own for each test."""

from __future__ import annotations

import dataclasses
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.embedded.postgres import EmbeddedPostgres
from tests.support.brokers import BrokerServer, BrokerUnavailable, RabbitServer, RedisServer
from tests.support.impatience import impatient_rabbitmq as make_impatient_rabbitmq
from tests.support.newer_rabbitmq import newer_rabbitmq as newer_rabbitmq_program
from tests.support.pgbouncer import PgBouncer, PgBouncerUnavailable

#: Times that make a cluster's life quick to watch.
SHORT = {
    'heartbeat_interval_sec': 0.2,
    'heartbeat_timeout_sec': 1.0,
    'rebalance_check_interval_sec': 1.0,
}
#: The tests crash processes, never the machine: what fsync protects against does not happen.
SETTINGS = {'fsync': 'off', 'full_page_writes': 'off', 'max_connections': '200'}


#: What takes longest begins first, so that two processes end at about the same time.
_ORDER = ('conformance', 'parity', 'celery', 'docs', 'dramatiq', 'server', 'testing')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return _ORDER.index(folder) if folder in _ORDER else len(_ORDER)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """A Celery worker in this process makes the root logger its own: the next test finds it as it
    was.
    """
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


def _server() -> EmbeddedPostgres:
    return EmbeddedPostgres(bin_dir=os.environ.get('JOBSYNC_TEST_PG_BIN'), settings=SETTINGS)


@pytest.fixture(scope='session')
def postgres() -> Iterator[EmbeddedPostgres]:
    """A server that all tests of this process share: never kill or pause it."""
    with _server() as server:
        yield server


@pytest.fixture
def own_server() -> Iterator[EmbeddedPostgres]:
    """A server that this test may kill or pause."""
    with _server() as server:
        yield server


@pytest.fixture
def make_config(postgres: EmbeddedPostgres) -> Iterator[Callable[..., CoordinationConfig]]:
    """Makes CoordinationConfigs for one fresh database, with short times unless told otherwise."""
    name = f'test_{uuid.uuid4().hex[:12]}'
    postgres.create_database(name)

    def make(**settings: Any) -> CoordinationConfig:
        return postgres.config(name, **{**SHORT, **settings})

    yield make
    postgres.drop_database(name)


@pytest.fixture
def config(make_config: Callable[..., CoordinationConfig]) -> CoordinationConfig:
    """A CoordinationConfig for a fresh database, with short times."""
    return make_config()


@pytest.fixture
def make_pgbouncer() -> Iterator[Callable[..., PgBouncer]]:
    """Starts PgBouncers of this test's own: `make_pgbouncer(config, mode='transaction')`; skips
    where none is installed.
    """
    started: list[PgBouncer] = []

    def make(config: CoordinationConfig, **settings: Any) -> PgBouncer:
        try:
            pooler = PgBouncer(config, **settings)
        except PgBouncerUnavailable as error:
            pytest.skip(str(error))
        started.append(pooler)
        pooler.start()
        return pooler

    yield make
    for pooler in started:
        pooler.close()


@pytest.fixture
def pooled(
    config: CoordinationConfig, make_pgbouncer: Callable[..., PgBouncer]
) -> CoordinationConfig:
    """A CoordinationConfig for a fresh database behind a PgBouncer in transaction mode."""
    pooler = make_pgbouncer(config)
    return dataclasses.replace(config, host=pooler.host, port=pooler.port, listen=False)


def _broker(make: Callable[[], BrokerServer]) -> Iterator[BrokerServer]:
    try:
        server = make()
    except BrokerUnavailable as error:
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture(scope='session')
def redis_server() -> Iterator[BrokerServer]:
    """A Redis that all tests of this process share: take a space of it, never kill or pause it."""
    yield from _broker(RedisServer)


@pytest.fixture(scope='session')
def rabbitmq_server() -> Iterator[BrokerServer]:
    """A RabbitMQ that all tests of this process share: take a space of it; to kill or pause it, ask
    for `own_rabbitmq`.
    """
    yield from _broker(RabbitServer)


@pytest.fixture(scope='session')
def newer_rabbitmq() -> Iterator[BrokerServer]:
    """A RabbitMQ of version 3.12 or later that all tests of this process share: take a space of it,
    never kill or pause it.
    """
    yield from _broker(lambda: RabbitServer(newer_rabbitmq_program()))


@pytest.fixture(scope='session')
def impatient_rabbitmq() -> Iterator[BrokerServer]:
    """As newer_rabbitmq, with a `consumer_timeout` of three seconds in place of 30 minutes."""
    yield from _broker(make_impatient_rabbitmq)


@pytest.fixture
def own_redis() -> Iterator[BrokerServer]:
    """A Redis that this test may kill and restart: it keeps its data."""
    yield from _broker(lambda: RedisServer(durable=True))


@pytest.fixture
def own_rabbitmq(rabbitmq_server: BrokerServer) -> Iterator[BrokerServer]:
    """A RabbitMQ that this test may kill and restart: the shared one, as no other test uses it
    meanwhile and it takes seconds to start.
    """
    yield rabbitmq_server
    rabbitmq_server.start()
