"""The app whose beats the tests run as processes: schedule, broker and faults come from the
environment.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from celery import Celery
from celery.signals import after_task_publish, before_task_publish

_schedule: dict[str, float] = json.loads(os.environ['BEAT_SCHEDULE'])

app = Celery('beats', broker=os.environ['BEAT_BROKER'])
app.conf.update(
    timezone='Europe/Berlin',
    task_ignore_result=True,
    beat_schedule={
        name: {'task': f'beats.{name}', 'schedule': seconds} for name, seconds in _schedule.items()
    },
)


def _nothing() -> None:
    """The tests read the messages."""


for _name in _schedule:
    app.task(_nothing, name=f'beats.{_name}')

#: Such as 'after:SIGKILL:2': what this process does to itself at its second message.
_moment, _signal, _number = (os.environ.get('BEAT_FAULT') or ':SIGKILL:0').split(':')
_published = 0


def _fault(**_: Any) -> None:
    global _published
    _published += 1
    if _published == int(_number):
        os.kill(os.getpid(), getattr(signal, _signal))


if _moment == 'before':
    before_task_publish.connect(_fault, weak=False)
elif _moment == 'after':
    after_task_publish.connect(_fault, weak=False)
