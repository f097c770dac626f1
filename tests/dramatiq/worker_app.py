"""The broker and the actors of the tests: the same in workers and in the test process."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.rate_limits.backends import RedisBackend as RateBackend
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from redis import Redis

from jobsync_dramatiq import JobSync, exactly_once

URL = os.environ['TEST_REDIS']
SHORT = {
    'heartbeat_interval_sec': 0.2,
    # Long enough that a busy machine costs no lease: then keys run again.
    'heartbeat_timeout_sec': 3.0,
    'rebalance_check_interval_sec': 0.5,
}
options = json.loads(os.environ.get('TEST_OPTIONS', '{}'))
ADDRESS = os.environ['TEST_BROKER']
more: dict[str, Any] = json.loads(os.environ.get('TEST_BROKER_OPTIONS', '{}'))
broker: Any = (
    RedisBroker(url=ADDRESS, **more)
    if ADDRESS.startswith('redis')
    else RabbitmqBroker(url=ADDRESS, **more)
)
if (
    'TEST_LOCK_PROVIDER' in os.environ
):  # as users write them: it fails where its machine is not known
    options['lock_provider'] = lambda job: {'cpu': 1}[os.environ['TEST_LOCK_PROVIDER']]
plugin = JobSync(database_url=os.environ['TEST_DATABASE'], **{**SHORT, **options})
broker.add_middleware(plugin)
broker.add_middleware(Results(backend=RedisBackend(url=URL), store_results=True))
broker.add_middleware(dramatiq.middleware.GroupCallbacks(RateBackend(url=URL)))


class SlowStart(dramatiq.Middleware):
    """A worker that is a node, and has not told its master yet that it is up."""

    def after_worker_boot(self, broker: Any, worker: Any) -> None:
        time.sleep(float(os.environ['TEST_SLOW_START']))


if 'TEST_SLOW_START' in os.environ:
    broker.add_middleware(SlowStart())
if 'TEST_PROMETHEUS' in os.environ:
    from dramatiq.middleware.prometheus import Prometheus

    if not any(
        isinstance(item, Prometheus) for item in broker.middleware
    ):  # in Dramatiq 1 it is there
        broker.add_middleware(Prometheus())
dramatiq.set_broker(broker)
log = Redis.from_url(URL, decode_responses=True)


def close() -> None:
    """Close what the test process has opened."""
    broker.close()
    if isinstance(broker, RedisBroker):
        broker.client.close()
    for middleware in broker.middleware:
        store = getattr(middleware, 'backend', getattr(middleware, 'rate_limiter_backend', None))
        if store is not None:
            store.client.close()
    log.close()


def note(text: object) -> None:
    node = plugin.job.node_name if plugin.job is not None else '?'
    log.rpush('log', f'{text} {node}')


@dramatiq.actor(max_retries=0)
@exactly_once(key='k:{n}')
def keyed(n: Any) -> Any:
    note(f'keyed:{n}')
    return n * 2


@dramatiq.actor(max_retries=0)
@exactly_once(key='s:{n}')
def slow(n: int) -> int:
    note(f'slow:{n}')
    time.sleep(0.2)
    note(f'slowend:{n}')
    return n


@dramatiq.actor(max_retries=3, min_backoff=50, max_backoff=100)
@exactly_once(key='f:{n}')
def flaky(n: int) -> int:
    note(f'flaky:{n}')
    if log.incr(f'try:{n}') < 2:
        raise ValueError('once more')
    return n


@dramatiq.actor(max_retries=0)
@exactly_once(key='a:{x}:{y}')
def add(x: int, y: int) -> int:
    return x + y


@dramatiq.actor(max_retries=0)
@exactly_once(key='lasting:{n}')
def lasting(n: int) -> None:
    note(f'lasting:{n}')
    time.sleep(12)
    note(f'lasting_end:{n}')


@dramatiq.actor(max_retries=0)
@exactly_once(key='held:{n}')
def held(n: int) -> None:
    note(f'held:{n}')
    while not log.exists('go'):
        time.sleep(0.02)
    note(f'heldend:{n}')


@dramatiq.actor(max_retries=0)
def long(seconds: float) -> None:
    note('long')
    time.sleep(seconds)


@dramatiq.actor(max_retries=0)
def seal(tag: str) -> None:
    note(f'seal:{tag}')


@dramatiq.actor(max_retries=0, jobsync_key='r:{n}')
def unledgered(n: int) -> None:
    note(f'routed:{n}')


@dramatiq.actor(max_retries=0, jobsync_pin=['gpu-%'])
def homeless(n: int) -> None:
    note(f'homeless:{n}')


@dramatiq.actor(queue_name='second', max_retries=0)
@exactly_once(key='second:{n}')
def on_second(n: int) -> None:
    note(f'second:{n}')


@dramatiq.actor(queue_name='second', max_retries=0)
@exactly_once(key='slow_second:{n}')
def slow_second(n: int) -> None:
    note(f'slow_second:{n}')
    time.sleep(0.2)
    note(f'slow_second_end:{n}')


@dramatiq.actor(queue_name='second', max_retries=0)
@exactly_once(key='failing:{n}')
def failing(n: int) -> None:
    raise ValueError('it fails')


@dramatiq.actor(max_retries=0)
def declare_late() -> None:
    """Declare an actor, and its queue, while the worker runs."""
    _declare_late()


def _declare_late() -> Any:
    if 'late' not in broker.actors:

        @dramatiq.actor(queue_name='late', max_retries=0)
        @exactly_once(key='late:{n}')
        def late(n: int) -> None:
            note(f'late:{n}')

    return broker.actors['late']


def send_late(n: int) -> None:
    _declare_late().send(n)


@dramatiq.actor(max_retries=0)
def plain(n: Any) -> None:
    note(f'plain:{n}')


@dramatiq.actor(max_retries=3, min_backoff=50, max_backoff=100, time_limit=1000)
@exactly_once(key='limited:{n}')
def limited(n: int) -> int:
    note(f'limited:{n}')
    if log.incr(f'try:limited:{n}') == 1:
        _wait(20)
    note(f'limitedend:{n}')
    return n


@dramatiq.actor(max_retries=3, min_backoff=50, max_backoff=100, notify_shutdown=True)
@exactly_once(key='notified:{n}')
def notified(n: int) -> int:
    note(f'notified:{n}')
    if log.incr(f'try:notified:{n}') == 1:
        _wait(20)
    note(f'notifiedend:{n}')
    return n


@dramatiq.actor(max_retries=0, max_age=4000, jobsync_pin=['gpu-%'])
def aged(n: int) -> None:
    note(f'aged:{n}')


def _wait(seconds: float) -> None:
    """In steps, since Dramatiq interrupts no call of the system."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)
