"""Workers on quorum queues of RabbitMQ, with the plugin as without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig
from tests.celery.programs import Programs
from tests.support.brokers import RabbitServer
from tests.support.waiting import eventually

_APP = """
import os
from pathlib import Path

from celery import Celery

from jobsync_celery import JobSync, exactly_once

app = Celery('orders')
app.conf.update(
    task_default_queue_type='quorum',
    task_default_exchange_type='topic',
    broker_connection_retry_on_startup=True,
)
JobSync(app)


def note(text):
    with Path('notes').open('a') as notes:
        notes.write(f'{text}\\n')


@app.task(jobsync_key='{n}')
def keyed(n):
    note(n)


@app.task(bind=True, jobsync_key='{n}')
def retried(self, n):
    note(n)
    if self.request.retries == 0:
        raise self.retry(countdown=2)
"""
_SEND = """celery -A orders call orders.{task} --args '["{n}"]' {more}"""


@pytest.fixture
def programs(
    config: CoordinationConfig, rabbitmq_server: RabbitServer, tmp_path: Path
) -> Iterator[Programs]:
    place = tmp_path / 'project'
    place.mkdir()
    (place / 'orders.py').write_text(_APP)
    made = Programs(config, rabbitmq_server, place, tmp_path)
    del made.environment['CELERY_RESULT_BACKEND']
    yield made
    made.close()


def test_a_task_with_an_eta_waits_in_rabbitmq_and_costs_no_warning(
    programs: Programs, rabbitmq_server: RabbitServer
) -> None:
    notes = programs.place / 'notes'
    notes.touch()
    workers = [
        programs.start(f'celery -A orders worker -n w{n}@test -c 1 -l INFO', 'tasks') for n in '12'
    ]
    for worker in workers:
        worker.wait_for('ready.')
    programs.run(
        '\n'.join(
            [
                _SEND.format(task='keyed', n='soon', more=''),
                _SEND.format(task='retried', n='again', more=''),
                _SEND.format(task='keyed', n='late', more='--countdown 5'),
            ]
        )
    )
    eventually(
        lambda: any('delayed' in name for name in rabbitmq_server.depths(programs.space)), 20
    )
    eventually(lambda: 'late' in notes.read_text(), 30)
    assert sorted(notes.read_text().splitlines()) == ['again', 'again', 'late', 'soon']
    for worker in workers:
        assert 'direct exchange' not in worker.log and 'refuse' not in worker.log
