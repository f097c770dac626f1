"""Workers that consume different queues: what is sent to a queue runs on those that consume it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from jobsync_core import CoordinationConfig
from tests.celery.programs import Program, Programs
from tests.support.brokers import BrokerServer, RabbitServer
from tests.support.waiting import eventually

_APP = """
import time
from pathlib import Path

from celery import Celery
from celery.exceptions import Reject
from kombu import Exchange, Queue

from jobsync_celery import JobSync

app = Celery('orders')
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_create_missing_queues=True,
    worker_prefetch_multiplier=1,
    {settings}
)
JobSync(app)


def note(task, text):
    with Path('notes').open('a') as notes:
        notes.write(f'{{task.request.hostname}} {{text}}\\n')


@app.task(bind=True, jobsync_key='{{n}}', acks_late=True)
def keyed(self, n, seconds=0):
    while seconds < 0 and not Path('go').exists():
        time.sleep(0.05)
    time.sleep(max(0, seconds))
    note(self, n)


@app.task(bind=True, jobsync_key='{{n}}', acks_late=True)
def rejected(self, n):
    note(self, n)
    raise Reject('no', requeue=False)


@app.task(bind=True, jobsync_key='{{n}}', acks_late=True)
def tried(self, n):
    note(self, n)
    deaths = self.request.get('x-death') or []
    if sum(death['count'] for death in deaths if death['queue'] == 'heavy') < 3:
        raise Reject('later', requeue=False)
"""
_SEND = """
import sys
from orders import {task}
for n in range({first}, {last}):
    {task}.apply_async([str(n), *{more}], queue={queue!r}, **{options})
"""
_CLASSIC = ''
_QUORUM = """task_default_queue_type='quorum', task_default_exchange_type='topic', task_queues=[
        Queue(name, Exchange(name, 'topic'), name, queue_arguments={'x-queue-type': 'quorum'})
        for name in ('light', 'heavy')
    ],"""
_KINDS = pytest.mark.parametrize(
    ('kind', 'settings'),
    [('redis', _CLASSIC), ('rabbitmq', _CLASSIC), ('rabbitmq', _QUORUM)],
    ids=['redis', 'classic', 'quorum'],
)


class Stage:
    """A project, its workers, and what they note."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.notes_path = programs.place / 'notes'
        self.notes_path.touch()

    def worker(self, name: str, queues: str, *options: str) -> Program:
        words = ' '.join(options)
        worker = self.programs.start(
            f'celery -A orders worker -n {name}@test -Q {queues} -c 2 -l INFO '
            f'--without-gossip --without-mingle {words}',
            'ready.',
        )
        return worker

    def send(
        self,
        queue: str,
        first: int,
        last: int,
        task: str = 'keyed',
        more: tuple[Any, ...] = (),
        **options: Any,
    ) -> None:
        script = _SEND.format(
            task=task, first=first, last=last, queue=queue, more=more, options=options
        )
        (self.programs.place / 'send.py').write_text(script)
        self.programs.run('python send.py')

    def control(self, *words: str) -> None:
        self.programs.run(f'celery -A orders control {" ".join(words)}')

    def depths(self) -> dict[str, int]:
        return self.programs.broker.depths(self.programs.space)

    def notes(self) -> list[tuple[str, str]]:
        lines = self.notes_path.read_text().splitlines()
        return [(line.split()[0], line.split()[1]) for line in lines]

    def ran(self) -> set[str]:
        return {number for _, number in self.notes()}

    def wait_for(self, first: int, last: int) -> None:
        wanted = {str(number) for number in range(first, last)}
        eventually(lambda: wanted <= self.ran(), 60)

    def where(self, first: int, last: int) -> set[str]:
        return {worker for worker, number in self.notes() if first <= int(number) < last}


@pytest.fixture
def make_stage(
    config: CoordinationConfig, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[[str, str], Stage]]:
    made: list[Programs] = []

    def make(kind: str, settings: str) -> Stage:
        place = tmp_path / 'project'
        place.mkdir()
        (place / 'orders.py').write_text(_APP.format(settings=settings))
        server: BrokerServer = request.getfixturevalue(f'{kind}_server')
        programs = Programs(config, server, place, tmp_path)
        del programs.environment['CELERY_RESULT_BACKEND']
        made.append(programs)
        return Stage(programs)

    yield make
    for programs in made:
        programs.close()


@_KINDS
def test_what_is_sent_to_a_queue_runs_on_those_that_consume_it(
    make_stage: Callable[[str, str], Stage], kind: str, settings: str
) -> None:
    stage = make_stage(kind, settings)
    stage.worker('one', 'light')
    stage.worker('two', 'heavy')
    stage.worker('three', 'heavy')
    stage.send('heavy', 0, 40)
    stage.send('light', 40, 60)
    stage.wait_for(0, 60)
    assert stage.where(0, 40) == {'two@test', 'three@test'}
    assert stage.where(40, 60) == {'one@test'}
    assert len(stage.notes()) == 60
    eventually(lambda: not stage.depths())


@_KINDS
def test_a_queue_is_added_and_cancelled_while_its_messages_come(
    make_stage: Callable[[str, str], Stage], kind: str, settings: str
) -> None:
    stage = make_stage(kind, settings)
    one, two = stage.worker('one', 'light'), stage.worker('two', 'heavy')
    stage.send('heavy', 0, 60, more=(0.05,))
    stage.control('add_consumer', 'heavy', '-d', 'one@test')
    one.wait_for('queue=heavy is consumed here')
    stage.wait_for(0, 60)
    eventually(lambda: _runs_on(stage, {'one@test', 'two@test'}), 40, 1.0)
    stage.send('heavy', 1000, 1060, more=(0.05,))
    stage.control('cancel_consumer', 'heavy', '-d', 'two@test')
    two.wait_for('queue=heavy is not consumed here any more')
    stage.wait_for(1000, 1060)
    stage.send('heavy', 2000, 2030)
    stage.wait_for(2000, 2030)
    assert stage.where(2000, 2030) == {'one@test'}
    eventually(lambda: not stage.depths())
    numbers = [number for _, number in stage.notes()]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize('kind', ['redis', 'rabbitmq'])
def test_each_queue_of_an_exchange_gets_its_copy(
    make_stage: Callable[[str, str], Stage], kind: str
) -> None:
    stage = make_stage(
        kind,
        "task_queues=[Queue(name, Exchange('events', 'topic'), 'user.#') "
        "for name in ('light', 'heavy')],",
    )
    stage.worker('one', 'light')
    stage.worker('two', 'heavy')
    stage.send('light', 0, 10)
    stage.send('heavy', 10, 20, exchange='events', routing_key='user.new')
    eventually(lambda: len(stage.notes()) == 40, 60)
    assert {(worker, number) for worker, number in stage.notes()} == {
        (worker, str(number)) for worker in ('one@test', 'two@test') for number in range(20)
    }


_tries = itertools.count(3000, 20)


def _runs_on(stage: Stage, workers: set[str]) -> bool:
    first = next(_tries)
    stage.send('heavy', first, first + 20)
    stage.wait_for(first, first + 20)
    return stage.where(first, first + 20) == workers


_DEAD = """task_queues=[
        Queue('heavy', Exchange('heavy', type='{type}'), 'heavy', queue_arguments={arguments}),
        Queue('dead.XQ', Exchange('dead'), routing_key='heavy'),
    ],"""
_TO_DEAD = {'x-dead-letter-exchange': 'dead'}


@pytest.mark.parametrize(
    ('arguments', 'policy'),
    [(_TO_DEAD, False), ({**_TO_DEAD, 'x-queue-type': 'quorum'}, False), ({}, True)],
    ids=['classic', 'quorum', 'policy'],
)
def test_what_a_task_rejects_is_a_dead_letter_of_its_own_queue(
    make_stage: Callable[[str, str], Stage], arguments: dict[str, Any], policy: bool
) -> None:
    kind = 'topic' if 'x-queue-type' in arguments else 'direct'
    stage = make_stage('rabbitmq', _DEAD.format(type=kind, arguments=arguments))
    server, space = cast(RabbitServer, stage.programs.broker), stage.programs.space
    if policy:
        server.api(
            'PUT',
            f'policies/{space}/dead',
            {
                'pattern': '^heavy$',
                'definition': {'dead-letter-exchange': 'dead', 'dead-letter-routing-key': 'heavy'},
                'apply-to': 'queues',
            },
        )
    stage.programs.run(
        "python -c \"from orders import app; app.amqp.queues['dead.XQ'].bind("
        'app.connection().default_channel).declare()"'
    )
    stage.worker('one', 'heavy')
    stage.worker('two', 'heavy')
    stage.send('heavy', 0, 20, task='rejected')
    eventually(lambda: _size(server, space, 'dead.XQ') == 20, 40)
    assert stage.where(0, 20) == {'one@test', 'two@test'} and len(stage.notes()) == 20
    eventually(lambda: not stage.depths())


def test_a_task_sees_how_often_its_message_was_a_dead_letter(
    make_stage: Callable[[str, str], Stage],
) -> None:
    """The message waits in a queue that nobody consumes, and comes back when it expires there."""
    arguments = {'x-dead-letter-exchange': '', 'x-dead-letter-routing-key': 'wait'}
    stage = make_stage('rabbitmq', f"task_queues=[Queue('heavy', queue_arguments={arguments})],")
    back = {**arguments, 'x-dead-letter-routing-key': 'heavy', 'x-message-ttl': 100}
    cast(RabbitServer, stage.programs.broker).api(
        'PUT', f'queues/{stage.programs.space}/wait', {'durable': True, 'arguments': back}
    )
    stage.worker('one', 'heavy')
    stage.worker('two', 'heavy')
    stage.send('heavy', 0, 12, task='tried')
    eventually(lambda: len(stage.notes()) >= 48 and not stage.depths(), 60)
    assert sorted(number for _, number in stage.notes()) == sorted(
        str(number) for number in range(12) for _ in range(4)
    )


def _size(server: RabbitServer, space: str, queue: str) -> int:
    path = f'queues/{space}?disable_stats=true&enable_queue_totals=true'
    found = {item['name']: item for item in server.api('GET', path)}
    return int(found.get(queue, {}).get('messages_ready', 0))


@pytest.mark.parametrize('kind', ['redis', 'rabbitmq'])
def test_what_is_urgent_at_home_is_urgent_in_the_queue_of_a_node(
    make_stage: Callable[[str, str], Stage], kind: str
) -> None:
    stage = make_stage(kind, "task_queues=[Queue('heavy', max_priority=9)],")
    stage.worker('one', 'heavy', '--concurrency 1')
    stage.send('heavy', 0, 1, more=(-1,))
    # Of Redis 0 is the most urgent, of RabbitMQ the least.
    low, high = (9, 0) if kind == 'redis' else (0, 9)
    stage.send('heavy', 100, 110, priority=low)
    stage.send('heavy', 200, 205, priority=high)
    (stage.programs.place / 'go').touch()
    stage.wait_for(100, 110)
    stage.wait_for(200, 205)
    order = [int(number) for _, number in stage.notes()][1:]  # which was running
    # One of the others may have been prefetched.
    assert {200, 201, 202, 203, 204} <= set(order[:6]), order
