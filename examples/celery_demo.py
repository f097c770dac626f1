"""The Celery plugin at work: workers share the standard library's source files, each counted once,
though one worker is killed.

Run `python examples/celery_demo.py` (or `make demo`). It starts a PostgreSQL and a Redis of its own
and three `celery worker` processes, publishes one task per file, a tenth of them twice, kills one
worker with SIGKILL midway, lets another join, and reads the verdict from the database. Heartbeats
are shortened (0.5 s, dead after 2 s; the defaults are 5 s and 15 s) so that all of it takes less
than a minute.

This file is also the app that the workers run: `celery -A examples.celery_demo worker`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # works from a checkout without an installation

from celery import Celery, signals, states

from examples.core_demo import PIN, PINNED, SETTINGS
from examples.demo_queues import SLOTS, QueueDemo, count_once, end_with_the_demo, main
from jobsync_celery import JobSync, current_execution, exactly_once
from jobsync_core.embedded.redis import EmbeddedRedis

# --- the app: broker and database come from CELERY_BROKER_URL, CELERY_RESULT_BACKEND and
# JOBSYNC_DATABASE_URL ---

app = Celery('celery_demo')
JobSync(app, **SETTINGS)


def _node(task: Any) -> str:
    return str(task.request.hostname).partition('@')[0]


@app.task(bind=True, name='count_file')  # type: ignore[untyped-decorator]  # celery has no types
@exactly_once(key='{path}', scope='file')
def count_file(self: Any, path: str) -> dict[str, Any]:
    """Count a file, on the node that owns its path."""
    return count_once(path, _node(self), current_execution())


@app.task(bind=True, name='count_on_gpu', jobsync_pin=[PIN])  # type: ignore[untyped-decorator]  # celery has no types
@exactly_once(key='{path}', scope='file')
def count_on_gpu(self: Any, path: str) -> dict[str, Any]:
    """The same, on a node whose name ends in -gpu."""
    return count_once(path, _node(self), current_execution())


@signals.worker_init.connect  # type: ignore[untyped-decorator]  # celery has no types
def _end_with_the_demo(**unused: object) -> None:
    end_with_the_demo()


@dataclass
class CeleryDemo(QueueDemo):
    """One run with Celery workers."""

    framework: ClassVar[str] = 'Celery'

    @staticmethod
    def environment(redis: EmbeddedRedis) -> dict[str, str]:
        return {'CELERY_BROKER_URL': redis.url(0), 'CELERY_RESULT_BACKEND': redis.url(1)}

    def command(self, name: str) -> list[str]:
        return [
            '-m',
            'celery',
            '-A',
            'examples.celery_demo',
            'worker',
            '-n',
            f'{name}@demo',
            '-c',
            str(SLOTS),
            '-l',
            'INFO',
        ]

    def send(self, path: str) -> Any:
        return (count_on_gpu if path.startswith(PINNED) else count_file).delay(path).id

    def answer(self, sent: Any) -> Any:
        found = app.backend.get_task_meta(sent)
        return found['result'] if found['status'] in states.READY_STATES else None


if __name__ == '__main__':
    sys.exit(main(CeleryDemo, __doc__ or ''))
