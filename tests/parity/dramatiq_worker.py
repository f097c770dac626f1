"""`dramatiq tests.parity.dramatiq_worker`: the broker of a worker process."""

from __future__ import annotations

import dramatiq

from .dramatiq_app import make_broker
from .dramatiq_side import CONFIGURATIONS
from .harness import Order

order = Order.from_environment()
(configuration,) = (item for item in CONFIGURATIONS if item.name == order.configuration)
broker = make_broker(order, dict(configuration.settings), plugin=order.mode != 'plain')
dramatiq.set_broker(broker)
