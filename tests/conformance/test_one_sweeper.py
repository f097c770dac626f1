"""A hundred pods, redeployed five times: what 500 queues of nodes that are gone cost a cluster of
three nodes, on real servers.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import Celery

import jobsync_celery
from jobsync_core import CoordinationConfig, Job
from jobsync_core.belonging import Belonging
from jobsync_core.worker.duties.node import NodeDuties
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.routing import node_queue
from jobsync_core.worker.settings import PluginSettings
from jobsync_dramatiq.broker.opening import open_broker
from tests.support.brokers import BrokerServer, RedisServer
from tests.support.cluster import query
from tests.support.homes import fixed_homes
from tests.support.waiting import eventually

#: How many queues others have left, and for how long it is counted.
_LEFT, _SECONDS = 500, 20.0
#: The home queue of all of them.
_HOME = 'jobs'


def _celery(url: str, config: CoordinationConfig) -> tuple[Any, Callable[[str], object]]:
    app = Celery('sweeping', broker=url, set_as_current=False)
    broker = jobsync_celery.JobSync(app, config=config, route_producers=False).evacuable()
    return broker, lambda node: broker.declare({_HOME: node_queue(_HOME, config.appname, node)})


def _dramatiq(url: str, config: CoordinationConfig) -> tuple[Any, Callable[[str], object]]:
    from dramatiq.brokers.rabbitmq import RabbitmqBroker
    from dramatiq.brokers.redis import RedisBroker

    native: Any = (RedisBroker if url.startswith('redis') else RabbitmqBroker)(url=url)
    broker = open_broker(native, config)

    def make(node: str) -> None:
        broker.join(node)
        broker.declare(_HOME, node_queue(_HOME, config.appname, node))

    return broker, make


_OPEN = {'celery': _celery, 'dramatiq': _dramatiq}


@dataclass
class Fleet:
    """Nodes in this process, with the defaults of a cluster, that do nothing but their duties."""

    config: CoordinationConfig
    url: str
    kind: str
    stack: ExitStack
    counts: Counter[str] = field(default_factory=Counter)
    brokers: list[Any] = field(default_factory=list)

    def start(self, number: int, left: int) -> None:
        """Start nodes beside the queues of others, who have been gone for a minute."""
        jobs = [
            Job(f'n{each}', self.config, wait_on_enter=0, groups=[_HOME]) for each in range(number)
        ]
        for job in jobs:
            job.belonging = Belonging(self.kind)
            self.stack.enter_context(job)
        eventually(lambda: all(job.my_tokens for job in jobs), 30)
        gone = {f'gone-{each}' for each in range(left)}
        broker, make = _OPEN[self.kind](self.url, self.config)
        self.stack.callback(broker.close)
        for node in gone:
            make(node)
        for node in (*gone, *(job.node_name for job in jobs)):
            query(
                self.config,
                """INSERT INTO "{}node_queue" (name, node, home, kind, gone_at)
                   VALUES (%s, %s, %s, %s, now() - make_interval(secs => %s))""",
                (
                    node_queue(_HOME, self.config.appname, node),
                    node,
                    _HOME,
                    self.kind,
                    60 if node in gone else None,
                ),
            )
        for job in jobs:
            self._start(job)

    def _start(self, job: Job) -> None:
        gate = Gate(PluginSettings(config=self.config), job)
        broker, make = _OPEN[self.kind](self.url, self.config)
        make(job.node_name)
        self._count(gate.sessions, 'session')
        for name in ('size', 'left', 'mark', 'delete', 'take'):
            self._count(broker, name)
        duties = NodeDuties(
            gate,
            broker,
            self.kind,
            fixed_homes(
                job, [_HOME], lambda home: node_queue(home, self.config.appname, job.node_name)
            ),
            on_lease=lambda leased: None,
            on_change=lambda: None,
        )
        self.stack.callback(broker.close)
        self.stack.callback(duties.stop, 10)
        duties.start()

    def _count(self, of: Any, name: str) -> None:
        plain = getattr(of, name)

        def counted(*args: Any, **more: Any) -> Any:
            self.counts[name] += 1
            return plain(*args, **more)

        setattr(of, name, counted)

    def per_minute(self, count: Callable[[], int]) -> float:
        before, began = count(), time.monotonic()
        eventually(lambda: time.monotonic() - began >= _SECONDS, 2 * _SECONDS)
        return (count() - before) * 60 / (time.monotonic() - began)

    @property
    def remembered(self) -> int:
        return int(
            query(self.config, """SELECT count(*) FROM "{}node_queue" WHERE home <> ''""")[0][0]
        )


@pytest.fixture(params=sorted(_OPEN))
def make_fleet(
    request: pytest.FixtureRequest, make_config: Callable[..., CoordinationConfig]
) -> Iterator[Callable[[BrokerServer], Fleet]]:
    with ExitStack() as stack:

        def make(server: BrokerServer) -> Fleet:
            space = server.new_space()
            stack.callback(server.drop_space, space)
            config = make_config(rebalance_check_interval_sec=30)
            return Fleet(config, server.url(space), request.param, stack)

        yield make


def test_on_redis_where_they_are_kept_for_an_hour_they_cost_next_to_nothing(
    redis_server: RedisServer, make_fleet: Callable[[BrokerServer], Fleet]
) -> None:
    fleet = make_fleet(redis_server)
    fleet.start(3, _LEFT)
    with contextlib.closing(redis_server.client()) as client:

        def commands() -> int:
            return sum(found['calls'] for found in client.info('commandstats').values())

        before = fleet.counts['session']
        used = fleet.per_minute(commands)
        transactions = (fleet.counts['session'] - before) * 60 / _SECONDS
    assert fleet.remembered == _LEFT + 3
    assert used <= 400 and transactions <= 60, (used, transactions)


def test_on_rabbitmq_they_are_deleted_fifty_at_once(
    rabbitmq_server: BrokerServer, make_fleet: Callable[[BrokerServer], Fleet]
) -> None:
    fleet = make_fleet(rabbitmq_server)
    fleet.start(3, _LEFT)
    eventually(lambda: fleet.remembered <= _LEFT + 3 - 50, 60)
    transactions = fleet.per_minute(lambda: fleet.counts['session'])
    assert transactions <= 60, fleet.counts
