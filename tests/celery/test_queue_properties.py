"""Priorities and times to live of two queues, whose messages have owners: they come out as without
the plugin.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig
from tests.celery.programs import Programs, project
from tests.support.brokers import RabbitServer
from tests.support.waiting import eventually

_APP = """
import os
import time
from pathlib import Path

from celery import Celery
from kombu import Queue

dead = {'x-dead-letter-exchange': '', 'x-dead-letter-routing-key': 'dead'}
app = Celery('orders')
app.conf.update(
    task_queues=[
        Queue('urgent', queue_arguments={'x-max-priority': 10}),
        Queue('brief', queue_arguments={'x-message-ttl': 1500, **dead}),
    ],
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
)
KEY = {}
if 'PLAIN' not in os.environ:
    from jobsync_celery import JobSync

    JobSync(app)
    KEY = {'jobsync_key': '{n}'}


@app.task(**KEY)
def work(n):
    with Path('notes').open('a') as notes:
        notes.write(f'{n}\\n')
    while n.startswith('block') and not Path('go').exists():
        time.sleep(0.05)
"""
_DEAD = """python - <<'END'
from orders import app

with app.connection() as connection:
    connection.channel().queue_declare('dead', durable=True, auto_delete=False)
END
"""
_SEND = """{plain} python - <<'END'
from orders import app, work

for n in {numbers}:
    work.apply_async([f'{queue}-{{n}}'], queue='{queue}', priority=n)
END
"""


@pytest.fixture
def programs(
    config: CoordinationConfig, rabbitmq_server: RabbitServer, tmp_path: Path
) -> Iterator[Programs]:
    with project(config, rabbitmq_server, tmp_path, _APP) as made:
        yield made


@pytest.mark.parametrize('plain', ['PLAIN=1', ''], ids=['plain', 'plugin'])
def test_the_urgent_go_first_and_what_waits_too_long_is_a_dead_letter(
    programs: Programs, rabbitmq_server: RabbitServer, plain: str
) -> None:
    notes = programs.place / 'notes'
    notes.touch()

    def ran() -> list[str]:
        return notes.read_text().splitlines()

    def send(queue: str, numbers: list[object]) -> None:
        programs.run(_SEND.format(plain=plain, queue=queue, numbers=numbers))

    programs.run(_DEAD)
    for name, queues in (('w1', 'urgent'), ('w2', 'brief')):
        command = f'{plain} celery -A orders worker -n {name}@test -c 1 -l INFO -Q {queues}'
        programs.start(command, 'ready.')
    programs.run(f'{plain} celery -A orders call orders.work --args \'["block-1"]\' --queue urgent')
    programs.run(f'{plain} celery -A orders call orders.work --args \'["block-2"]\' --queue brief')
    eventually(lambda: len(ran()) == 2, 30)
    order: list[object] = [3, 9, 1, 7, 5, 2, 8]
    send('urgent', order)
    send('brief', [1, 2, 3])
    eventually(lambda: rabbitmq_server.depths(programs.space).get('dead') == 3, 30)
    (programs.place / 'go').touch()
    eventually(lambda: len(ran()) == 2 + len(order), 30)
    send('brief', [4])
    eventually(lambda: 'brief-4' in ran(), 30)
    assert ran()[2:] == [f'urgent-{n}' for n in (9, 8, 7, 5, 3, 2, 1)] + ['brief-4']
    assert rabbitmq_server.depths(programs.space) == {'dead': 3}
