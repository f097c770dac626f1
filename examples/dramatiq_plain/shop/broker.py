"""The broker, with JobSync and a place for results."""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from jobsync_dramatiq import JobSync

URL = os.environ.get('BROKER_URL', 'redis://localhost:6379/0')

broker = RedisBroker(url=URL)
# Before actors are declared. The database comes from JOBSYNC_DATABASE_URL; tables and node queues
# begin with `appname`.
jobsync = JobSync(
    appname='shop_',
    # A pinned actor, as an alternative to the option `jobsync_pin` of the actor itself: first those
    # machines, else any node.
    pins={'draw': ['gpu', '%']},
)
broker.add_middleware(jobsync)
broker.add_middleware(Results(backend=RedisBackend(url=URL)))
dramatiq.set_broker(broker)
