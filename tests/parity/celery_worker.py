"""`celery -A tests.parity.celery_worker worker`: the app of a worker process."""

from __future__ import annotations

from .celery_app import make_app
from .celery_side import CONFIGURATIONS
from .harness import Order

order = Order.from_environment()
(configuration,) = (item for item in CONFIGURATIONS if item.name == order.configuration)
app = make_app(order, dict(configuration.settings), plugin=order.mode != 'plain')
