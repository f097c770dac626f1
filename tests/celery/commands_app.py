"""An app with JobSync for the tests of commands: where things are comes from the environment, under
names that are not JobSync's own.
"""

from __future__ import annotations

import json
import os

from celery import Celery

from jobsync_celery import JobSync, exactly_once

__all__ = ['app']

app = Celery('commands', broker=os.environ['TEST_BROKER'], backend=os.environ['TEST_BROKER'])
app.conf.broker_connection_retry_on_startup = True
if os.environ['TEST_SETTINGS']:
    JobSync(app, **json.loads(os.environ['TEST_SETTINGS']))


@app.task  # type: ignore[untyped-decorator]  # celery has no types
@exactly_once(key='order:{number}')
def charge(number: int) -> int:
    return 2 * number
