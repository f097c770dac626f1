"""What a worker is refused for before it starts."""

from __future__ import annotations

from typing import Any

from jobsync_core.errors import ConfigurationError

__all__ = ['check_records', 'checked_pool']


def checked_pool(worker: Any) -> str:
    """The name of a worker's pool.

    Raises:
        ConfigurationError: Its threads are green.
    """
    given = worker.pool_cls
    pool = given if isinstance(given, str) else f'{given.__module__}:{given.__name__}'
    if any(green in pool for green in ('gevent', 'eventlet')):
        raise ConfigurationError(
            f'pool {pool!r}: JobSync does not work with green threads, whose blocking '
            'database calls would stop heartbeats; '
            'use --pool prefork, threads or solo'
        )
    return pool


def check_records(conf: Any, driver: str) -> None:
    """Look whether what the worker takes from Redis is recorded.

    Raises:
        ConfigurationError: It is not, and would be lost with the worker.
    """
    if driver == 'redis' and not (conf.broker_transport_options or {}).get('ack_emulation', True):
        raise ConfigurationError(
            "broker_transport_options['ack_emulation'] is False: Redis keeps no record of what a "
            'worker has taken, and all of it would be lost when the worker is killed; take the '
            'option out'
        )
