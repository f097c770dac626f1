"""The broker and the one actor of the Dramatiq measurements: `BENCH_MODE` says what it is. Also the
producer.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from .noop import note, publish

__all__ = ['MODES', 'STAGING', 'broker', 'noop']

#: What can be measured: mode -> the module that it needs beside Dramatiq, or ''.
MODES = {
    'plain': '',
    'uncoordinated': 'jobsync_dramatiq',
    'coordinated': 'jobsync_dramatiq',
    'routed': 'jobsync_dramatiq',
    'once': 'jobsync_dramatiq',
}
#: The part of Redis to which the producer publishes, until the driver moves everything to where the
#: workers look.
STAGING = 'staging'
_MODE = os.environ.get('BENCH_MODE', 'plain')

broker = RedisBroker(
    url=os.environ.get('BENCH_BROKER', 'redis://127.0.0.1/0'),
    namespace=os.environ.get('BENCH_NAMESPACE', 'dramatiq'),
)
_options: dict[str, Any] = {}
if MODES[_MODE]:
    from jobsync_dramatiq import JobSync

    # The environment gives the database. Producers know the owners by default; here not, where
    # forwarding is measured.
    broker.add_middleware(
        JobSync(
            node_name=os.environ.get('BENCH_NODE', 'producer'),
            route_producers=_MODE in ('routed', 'once'),
            rebalance_check_interval_sec=1,
        )
    )
    if _MODE in ('coordinated', 'routed'):
        _options['jobsync_key'] = '{number}'
dramatiq.set_broker(broker)


def _noop(number: int) -> None:
    note(number)


if _MODE == 'once':
    from jobsync_dramatiq import exactly_once

    _noop = exactly_once(key='{number}')(_noop)

noop = dramatiq.actor(actor_name='noop', **_options)(_noop)

if __name__ == '__main__':
    os.environ['BENCH_NAMESPACE'] = STAGING
    # Under its importable name, so that keys which come from the module are the worker's.
    print(publish(importlib.import_module('bench.dramatiq_app').noop.send, int(sys.argv[1])))
