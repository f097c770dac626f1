"""An app whose worker has troubles, as its environment says: `celery -A tests.celery.trouble_app
worker`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import thread as executor
from pathlib import Path
from typing import Any

from celery import Celery, Task, signals
from celery.exceptions import Reject

from jobsync_celery import JobSync, exactly_once

__all__ = ['app', 'note']

_NOTES = Path(os.environ['TEST_NOTES'])
_READ = os.environ['TEST_BROKER']

app = Celery('trouble', broker=_READ, backend=os.environ['TEST_RESULTS'], set_as_current=False)
app.conf.update(
    broker_write_url=os.environ.get('TEST_BROKER_WRITE') or _READ,
    broker_connection_retry_on_startup=True,
    # So that an outage shows soon. Celery's default asks for 20 s, in the event loop, too.
    result_backend_transport_options={'retry_policy': {'max_retries': 0}},
    redis_retry_on_timeout=False,
    task_publish_retry_policy={'max_retries': 1},
)
JobSync(app, **json.loads(os.environ['TEST_SETTINGS']))


def note(text: str) -> None:
    """Write a line to where the test reads it."""
    with _NOTES.open('a') as notes:
        notes.write(f'{text}\n')


def _wait_for(name: str) -> None:
    while not (_NOTES.parent / name).exists():
        time.sleep(0.02)


@app.task(shared=False, jobsync_key='{n}', acks_late=True)  # type: ignore[untyped-decorator]  # celery has no types
def keyed(n: int) -> int:
    note(f'ran {n}')
    return n


@app.task(shared=False, acks_late=True)  # type: ignore[untyped-decorator]
def late(n: int) -> int:
    note(f'ran {n}')
    return n


@app.task(shared=False, jobsync_key='{n}', acks_late=True)  # type: ignore[untyped-decorator]
def held(n: int, until: str) -> int:
    note(f'began {n}')
    _wait_for(until)
    note(f'ran {n}')
    return n


@app.task(shared=False)  # type: ignore[untyped-decorator]
@exactly_once(key='{n}')
def once(n: int, until: str = '') -> int:
    note(f'began {n}')
    if until:
        _wait_for(until)
    note(f'ran {n}')
    return 2 * n


@app.task(shared=False)  # type: ignore[untyped-decorator]
def total(numbers: Any) -> Any:
    return numbers


@app.task(shared=False)  # type: ignore[untyped-decorator]
def tell(request: Any, error: BaseException, traceback: Any) -> None:
    note('telling')
    _wait_for('told')
    note('told')
    raise SystemExit('an errback that wants the end of it')


class _Ending(Task):  # type: ignore[misc]  # celery has no types
    abstract = True

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        if retval == 'reject':
            raise Reject('on_success', requeue=False)
        if retval == 'memory':
            raise MemoryError('on_success')

    def after_return(self, status: str, retval: Any, *args: Any) -> None:
        if retval == 'reject after':
            raise Reject('after_return', requeue=False)


@app.task(shared=False, base=_Ending)  # type: ignore[untyped-decorator]
@exactly_once(key='{how}')
def ending(how: str) -> str:
    note(f'ran {how}')
    return how


def _spoil(request: Any, **_: Any) -> None:
    """What somebody's handler leaves in a request can be handed to no process."""
    if request.name.endswith('.late') and '100' in str(request.argsrepr):
        request._request_dict['lock'] = threading.Lock()


def _lack_threads(count: int) -> None:
    start, left = threading.Thread.start, iter(range(count))

    def scarce(self: threading.Thread) -> None:
        if getattr(self, '_target', None) is executor._worker and next(left, None) is not None:
            note('no thread')
            raise RuntimeError("can't start new thread")
        start(self)

    threading.Thread.start = scarce  # type: ignore[method-assign]


if os.environ.get('TEST_SPOIL'):
    signals.task_received.connect(_spoil, weak=False)
if os.environ.get('TEST_NO_THREADS'):
    _lack_threads(int(os.environ['TEST_NO_THREADS']))
