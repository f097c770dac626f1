"""The app of the Celery measurements: `BENCH_MODE` says what its one task is. Also the producer:
`python -m bench.celery_app N`.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any

from celery import Celery
from redis import Redis

from .noop import note, publish

__all__ = ['MODES', 'app', 'hold', 'noop']

#: What can be measured: mode -> the module that it needs beside Celery, or ''.
MODES = {
    'plain': '',
    'plain_late': '',
    'uncoordinated': 'jobsync_celery',
    'coordinated': 'jobsync_celery',
    'routed': 'jobsync_celery',
    'pinned': 'jobsync_celery',
    'once': 'jobsync_celery',
    'celery_once': 'celery_once',
    'celery_singleton': 'celery_singleton',
}
_MODE = os.environ.get('BENCH_MODE', 'plain')
_BROKER = os.environ.get('BENCH_BROKER', 'redis://127.0.0.1/0')

app = Celery('bench', broker=_BROKER)
app.conf.update(
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    # The least that celery-once and celery-singleton can do with.
    ONCE={
        'backend': 'celery_once.backends.Redis',
        'settings': {'url': _BROKER, 'default_timeout': 3600},
    },
    singleton_backend_url=_BROKER,
)
if 'BENCH_VISIBILITY_SEC' in os.environ:
    app.conf.broker_transport_options = {
        'visibility_timeout': float(os.environ['BENCH_VISIBILITY_SEC'])
    }

_options: dict[str, Any] = {}
if MODES[_MODE] == 'jobsync_celery':
    from jobsync_celery import JobSync

    # The environment gives the database. Producers know the owners by default; here not, where
    # forwarding is measured.
    JobSync(
        app, route_producers=_MODE in ('routed', 'pinned', 'once'), rebalance_check_interval_sec=1
    )
    if _MODE in ('coordinated', 'routed'):
        _options['jobsync_key'] = '{number}'
    elif _MODE == 'pinned':
        _options['jobsync_pin'] = ['first', 'second']
elif _MODE == 'plain_late':
    _options['acks_late'] = True
elif _MODE == 'celery_once':
    _options['base'] = importlib.import_module('celery_once').QueueOnce
elif _MODE == 'celery_singleton':
    _options['base'] = importlib.import_module('celery_singleton').Singleton


def _noop(number: int) -> None:
    note(number)


if _MODE == 'once':
    from jobsync_celery import exactly_once

    _noop = exactly_once(key='{number}')(_noop)

noop = app.task(name='noop', **_options)(_noop)


@app.task(name='hold')  # type: ignore[untyped-decorator]  # celery has no types
def hold(times: int = 1) -> None:
    """Keep a process of the pool busy until the driver says go."""
    client = Redis.from_url(os.environ['BENCH_CONTROL'])
    client.rpush('held', os.getpid())
    client.blpop(['go'], timeout=300)


@app.task(name='stick')  # type: ignore[untyped-decorator]  # celery has no types
def stick() -> None:
    """Keep the process busy until its worker is killed."""
    time.sleep(600)


if __name__ == '__main__':
    # Under its importable name, so that keys which come from the module are the worker's.
    print(publish(importlib.import_module('bench.celery_app').noop.delay, int(sys.argv[1])))
