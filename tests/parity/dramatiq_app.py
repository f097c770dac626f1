"""The broker and actors of the parity suite, of a worker process and of the sender."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO, GroupCallbacks, SkipMessage
from dramatiq.rate_limits.backends import RedisBackend as Counters
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from .harness import LAST, Order

__all__ = ['OTHER_QUEUE', 'make_broker']

OTHER_QUEUE = 'other'


class Odd(Exception):
    """What actors raise."""


def make_broker(order: Order, conf: dict[str, Any], plugin: bool) -> Any:
    """A broker with all actors.

    Args:
        order: The side's.
        conf: Arguments of the broker.
        plugin: Whether JobSync is installed: not in senders.
    """
    kind = RedisBroker if order.broker.startswith('redis') else RabbitmqBroker
    broker: Any = kind(url=order.broker, **conf)
    once: Callable[[Any], Any] = _same
    if plugin:
        from jobsync_dramatiq import JobSync, exactly_once

        broker.add_middleware(
            JobSync(
                database_url=order.database,
                coordinate='keyed' if order.mode in ('idle', 'free') else 'all',
                **order.settings,
            )
        )
        if order.mode in ('once', 'free'):
            once = exactly_once(affinity=False if order.mode == 'free' else None)
    broker.add_middleware(Results(backend=RedisBackend(url=order.results), store_results=True))
    broker.add_middleware(GroupCallbacks(Counters(url=order.results)))
    broker.add_middleware(AsyncIO())
    _add_actors(broker, order, once)
    return broker


def _same(function: Any) -> Any:
    return function


def _add_actors(found: Any, order: Order, once: Callable[[Any], Any]) -> None:
    def actor(name: str, **options: Any) -> Callable[[Any], Any]:
        def add(function: Any) -> Any:
            return dramatiq.actor(actor_name=name, broker=found, **{'max_retries': 0, **options})(
                once(function)
            )

        return add

    @actor('last')
    def last() -> None:
        order.note(LAST)

    @actor('echo')
    def echo(label: str, value: Any = None, **more: Any) -> Any:
        order.note(label)
        return more or value

    @actor('other', queue_name=OTHER_QUEUE)
    def other(label: str) -> str:
        order.note(label)
        return label

    @actor('urgent', priority=-10)
    def urgent(label: str) -> str:
        order.note(label)
        return label

    @actor('add')
    def add(label: str, x: int, y: int) -> int:
        order.note(label)
        return x + y

    @actor('step')
    def step(x: int, label: str) -> int:
        """Of a pipeline: what comes before is its last argument."""
        order.note('pipeline.step')
        return x + 1 if isinstance(x, int) else -1

    @actor('silent', store_results=False)
    def silent(label: str) -> None:
        order.note(label)

    @actor('sour')
    def sour(label: str) -> None:
        order.note(label)
        raise Odd('sour')

    @actor('expected', throws=Odd, max_retries=5)
    def expected(label: str) -> None:
        order.note(label)
        raise Odd('expected')

    @actor('retrying', max_retries=3, min_backoff=100, max_backoff=300)
    def retrying(label: str, times: int) -> int:
        order.note(label)
        if _count(order, label) <= times:
            raise Odd('once more')
        return times

    @actor('asking', max_retries=3, min_backoff=100, max_backoff=300)
    def asking(label: str) -> str:
        order.note(label)
        if _count(order, label) <= 1:
            raise dramatiq.errors.Retry('later', delay=300)
        return 'asked'

    @actor(
        'exhausted', max_retries=1, min_backoff=100, max_backoff=300, on_retry_exhausted='handler'
    )
    def exhausted(label: str) -> None:
        order.note(label)
        raise Odd('never')

    @actor('handler')
    def handler(message: dict[str, Any], info: Any = None) -> None:
        order.note(f'{message["args"][0].partition(".")[0]}.handler')

    @actor('skipping')
    def skipping(label: str) -> None:
        order.note(label)
        raise SkipMessage('not today')

    @actor('slow', time_limit=1000)
    def slow(label: str) -> None:
        order.note(label)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            time.sleep(0.05)

    @actor('coroutine')
    async def coroutine(label: str) -> str:
        order.note(label)
        await asyncio.sleep(0.01)
        return 'awaited'

    @actor('sending')
    def sending(label: str) -> str:
        order.note(label)
        echo.send(f'{label}.inner', 1)
        return 'sent'

    class Classy(dramatiq.GenericActor):
        class Meta:
            broker = found
            actor_name = 'classy'
            max_retries = 0

        @once
        def perform(self, label: str) -> str:
            order.note(label)
            return 'Classy'


def _count(order: Order, label: str) -> int:
    with open(order.notes, encoding='utf-8') as file:
        return file.read().splitlines().count(label)
