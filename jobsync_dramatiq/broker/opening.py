"""Which class stands for which of Dramatiq's brokers."""

from __future__ import annotations

from typing import Any

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError

from .interface import Origins, UnknownOrigins, WorkerBroker

__all__ = ['open_broker']


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
    # By name: the other broker's client need not be installed.
    kinds = {f'{kind.__module__}.{kind.__name__}' for kind in type(native).__mro__}
    if 'dramatiq.brokers.redis.RedisBroker' in kinds:
        from .redis_broker import RedisWorkerBroker

        return RedisWorkerBroker(native, config.appname, known)
    if 'dramatiq.brokers.rabbitmq.RabbitmqBroker' in kinds:
        from .rabbit_broker import RabbitWorkerBroker

        return RabbitWorkerBroker(native, config, known)
    raise ConfigurationError(
        f'{type(native).__name__}: JobSync coordinates workers of RedisBroker and RabbitmqBroker '
        'only'
    )
