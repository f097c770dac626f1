"""A channel keeps its Redis client, for as long as that is the client of its present pool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from kombu.transport import redis as transport

from jobsync_celery import JobSync
from jobsync_core.config import CoordinationConfig
from tests.support.brokers import RedisServer


def noop() -> None:
    """Do nothing."""


@pytest.fixture
def app(redis_server: RedisServer) -> Iterator[Celery]:
    space = redis_server.new_space()
    made = Celery('clients', broker=redis_server.url(space), set_as_current=False)
    JobSync(made, config=CoordinationConfig(appname='shop_'), route_producers=False)
    made.task(name='noop', shared=False)(noop)
    with contextlib.closing(made):
        yield made
    redis_server.drop_space(space)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The clients that kombu has made, in order."""
    channel: Any = transport.Channel
    create, clients = channel._create_client, list[Any]()

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        clients.append(create(self, *args, **kwargs))
        return clients[-1]

    monkeypatch.setattr(channel, '_create_client', count)
    return clients


def test_publishing_makes_no_client_each_time(app: Celery, made: list[Any]) -> None:
    app.tasks['noop'].delay()
    before = len(made)
    for _ in range(5):
        app.tasks['noop'].delay()
    assert len(made) == before


def test_another_pool_means_another_client(app: Celery, made: list[Any]) -> None:
    with app.connection_for_write() as connection:
        channel: Any = connection.default_channel
        for _ in range(2):
            with channel.conn_or_acquire() as client:
                assert client.ping() and client.connection_pool is channel.pool
        before = len(made)
        channel._disconnect_pools()
        with channel.conn_or_acquire() as client:
            assert client.ping() and client.connection_pool is channel.pool
        assert len(made) == before + 1


def test_a_consumer_s_own_client_is_another(app: Celery) -> None:
    with app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        with channel.conn_or_acquire() as client:
            assert client is not channel.client
            assert client.connection_pool is not channel.client.connection_pool


def test_other_brokers_are_left_as_they_are() -> None:
    app = Celery('clients', broker='memory://', set_as_current=False)
    JobSync(app, config=CoordinationConfig(appname='shop_'))
    plain: Any = app.connection_for_write()
    assert plain.get_transport_cls().__module__ == 'kombu.transport.memory'
