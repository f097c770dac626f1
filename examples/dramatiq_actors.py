"""The broker and the actors of dramatiq_demo.py, for its workers too: `dramatiq
examples.dramatiq_actors`.

Broker and database come from DEMO_BROKER_URL and JOBSYNC_DATABASE_URL.
"""

from __future__ import annotations

import os
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import Middleware
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from examples.core_demo import SETTINGS
from examples.demo_queues import count_once, end_with_the_demo
from jobsync_dramatiq import JobSync, current_execution, exactly_once

#: A node's name goes on after that of its worker.
PIN = '%-gpu'


class _Lifeline(Middleware):
    """A worker ends when the demo is gone."""

    def before_worker_boot(self, broker: Any, worker: Any) -> None:
        """Begin to watch, before the worker becomes a node."""
        end_with_the_demo()


URL = os.environ['DEMO_BROKER_URL']
broker = RedisBroker(url=URL)
jobsync = JobSync(**SETTINGS)
broker.add_middleware(jobsync)
broker.add_middleware(_Lifeline())
broker.add_middleware(Results(backend=RedisBackend(url=URL), store_results=True))
dramatiq.set_broker(broker)


def _count(path: str) -> dict[str, Any]:
    assert jobsync.job is not None  # in a worker
    return count_once(path, jobsync.job.node_name, current_execution())


@dramatiq.actor
@exactly_once(key='{path}', scope='file')
def count_file(path: str) -> dict[str, Any]:
    """Count a file, on the node that owns its path."""
    return _count(path)


@dramatiq.actor(jobsync_pin=[PIN])
@exactly_once(key='{path}', scope='file')
def count_on_gpu(path: str) -> dict[str, Any]:
    """The same, on a node of a worker whose name ends in -gpu."""
    return _count(path)
