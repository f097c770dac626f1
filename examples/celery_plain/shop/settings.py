"""Celery's settings, and JobSync's beside them."""

from __future__ import annotations

import os

broker_url = os.environ.get('CELERY_BROKER_URL', 'redis://localhost:6379/0')
result_backend = os.environ.get('CELERY_RESULT_BACKEND', broker_url)

# Tables and node queues of this project begin with it.
jobsync_appname = 'shop_'
# A pinned task, as an alternative to the option `jobsync_pin` of the task itself: first that
# machine, else any node.
jobsync_pins = {'shop.tasks.draw': ['gpu-primary', '%']}
