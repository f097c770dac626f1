"""`celery -A tests.conformance.celery_worker worker`: the app of a worker process."""
from __future__ import annotations

import faulthandler
import signal

from .celery_app import make_app, use_in_worker
from .work import Order

# A worker that does not end says where it stands.
faulthandler.register(signal.SIGUSR2)
order = Order.from_environment()
use_in_worker(order)
app = make_app(order)
