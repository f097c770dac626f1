"""`celery -A tests.hostile.celery_worker worker`."""

from __future__ import annotations

from ..parity.harness import Order
from .celery_app import make_app

app = make_app(Order.from_environment())
