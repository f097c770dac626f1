"""`dramatiq tests.conformance.dramatiq_worker`: the broker of a worker process."""

from __future__ import annotations

import dramatiq

from .dramatiq_app import make_app, use_in_worker
from .work import Order

order = Order.from_environment()
app = make_app(order)
use_in_worker(order, app)
dramatiq.set_broker(app.broker)
