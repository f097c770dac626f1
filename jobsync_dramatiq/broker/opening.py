"""Which class stands for which of Dramatiq's brokers."""

from __future__ import annotations

from typing import Any

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.backlog import QueueCounter

from .interface import Origins, UnknownOrigins, WorkerBroker

__all__ = ['open_broker', 'open_counter']


def open_broker(
    native: Any, config: CoordinationConfig, origins: Origins | None = None
) -> WorkerBroker:
    """How to work with a broker. It is not connected to before it is used.

    Args:
        native: Dramatiq's own broker.
        config: The cluster.
        origins: What this process knows of actors; None: nothing.

    Raises:
        ConfigurationError: It is neither of Redis nor of RabbitMQ.
    """
    known = origins if origins is not None else UnknownOrigins()
    if _is_redis(native):
        from .redis_broker import RedisWorkerBroker

        return RedisWorkerBroker(native, config.appname, known)
    from .rabbit_broker import RabbitWorkerBroker

    return RabbitWorkerBroker(native, config, known)


def open_counter(native: Any, appname: str) -> QueueCounter:
    """Who counts what waits at a broker.

    Args:
        native: Dramatiq's own broker.
        appname: The cluster.

    Raises:
        ConfigurationError: It is neither of Redis nor of RabbitMQ.
    """
    if _is_redis(native):
        from .redis_counter import RedisCounter

        return RedisCounter(native, appname)
    from .rabbit_counter import RabbitCounter

    return RabbitCounter(native, appname)


def _is_redis(native: Any) -> bool:
    # By name: the other broker's client need not be installed.
    kinds = {f'{kind.__module__}.{kind.__name__}' for kind in type(native).__mro__}
    if 'dramatiq.brokers.redis.RedisBroker' in kinds:
        return True
    if 'dramatiq.brokers.rabbitmq.RabbitmqBroker' in kinds:
        return False
    raise ConfigurationError(
        f'{type(native).__name__}: JobSync coordinates workers of RedisBroker and RabbitmqBroker '
        'only'
    )
