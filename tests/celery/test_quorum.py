"""Workers on quorum queues of RabbitMQ, with the plugin as without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from kombu.entity import Exchange, Queue

from jobsync_core import CoordinationConfig
from jobsync_core.worker.routing import RETURNS
from tests.celery.programs import Programs, project
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
    with project(config, rabbitmq_server, tmp_path, _APP) as made:
        yield made


_LIMITED = """
from kombu.entity import Exchange, Queue

app.conf.task_queues = [
    Queue('celery', Exchange('celery'), 'celery', queue_arguments={
        'x-queue-type': 'quorum',
        'x-delivery-limit': 2,
        'x-dead-letter-exchange': '',
        'x-dead-letter-routing-key': 'dead',
    }),
]


@app.task(bind=True, acks_late=True, jobsync_key='{n}')
def poison(self, n):
    from celery.exceptions import Reject

    note(n)
    raise Reject('never', requeue=True)
"""


def test_what_came_back_before_it_was_passed_on_counts_for_the_limit(
    programs: Programs, rabbitmq_server: RabbitServer
) -> None:
    """It runs as often in all as it would in one queue: three times, for a limit of two."""
    with (programs.place / 'orders.py').open('a') as project:
        project.write(_LIMITED)
    notes = programs.place / 'notes'
    notes.touch()
    worker = programs.start('celery -A orders worker -n w1@test -c 1 -l INFO -Q celery', 'tasks')
    worker.wait_for('ready.')
    app = Celery('sending', broker=rabbitmq_server.url(programs.space), set_as_current=False)
    app.conf.task_queues = [Queue('celery', Exchange('celery'), 'celery', no_declare=True)]
    with app.connection() as connection:
        Queue('dead')(connection.channel()).declare()
    for returns in range(4):
        headers = {RETURNS: returns} if returns else {}
        app.send_task('orders.poison', [f'after {returns}'], headers=headers)
    eventually(lambda: rabbitmq_server.depths(programs.space).get('dead') == 4, 60)
    ran = Counter(notes.read_text().splitlines())
    assert ran == {'after 0': 3, 'after 1': 2, 'after 2': 1}
    assert 'has come back too often' in worker.log
    app.close()


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
