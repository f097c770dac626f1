"""A task that ends its process: whoever waits for it is told, its message is a dead letter, or is
kept, and runs when it is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig
from jobsync_core.executions import ExecutionFilter, Executions
from tests.celery.programs import Programs
from tests.support.brokers import BrokerServer, RabbitServer, RedisServer
from tests.support.waiting import eventually

_APP = """
import os
import signal
from pathlib import Path

from celery import Celery
from kombu import Queue
from jobsync_celery import JobSync, exactly_once

arguments = {'x-dead-letter-exchange': '', 'x-dead-letter-routing-key': 'dead'}
app = Celery('shop')
app.conf.update(
    task_queues=[Queue('celery', queue_arguments=arguments if 'DEAD' in os.environ else None)],
    broker_connection_retry_on_startup=True,
)
JobSync(app, max_lost=2)


def note(text):
    with Path('notes').open('a') as notes:
        notes.write(f'{text}\\n')


@app.task(autoretry_for=(Exception,), max_retries=3, default_retry_delay=1)
@exactly_once(key='{n}')
def work(n, bad=True):
    note(f'begins {n}')
    if bad and not Path('mended').exists():
        os.kill(os.getpid(), signal.SIGKILL)
    note(f'ends {n}')
    return n


@app.task
def total(values):
    note(f'total {values}')


@app.task
def failed(request, error, traceback):
    note(f'failed {request.args[0]} {error!r}')
"""
_SEND = """python - <<'END'
from celery import chord
from shop import failed, total, work

chord([work.s(1), work.s(2, bad=False)], total.s()).apply_async(task_id='chord')
work.apply_async([3], link_error=failed.s(), task_id='three')
for n in range(10, 20):
    work.delay(n, bad=False)
END
"""
_TOLD = """python - <<'END'
from shop import app

for name in ('chord', 'three'):
    result = app.AsyncResult(name)
    try:
        result.get(timeout=20)
    except Exception as error:
        print(name, result.state, repr(error))
END
"""
_AGAIN = """python - <<'END'
from shop import work

work.apply_async([3], task_id='again')
END
"""
_DEAD = """python - <<'END'
from shop import app

with app.connection() as connection:
    print('dead', connection.channel().queue_declare('dead', durable=True, auto_delete=False)[1])
END
"""


@pytest.fixture(params=['redis', 'rabbitmq', 'dead letters'])
def programs(
    request: pytest.FixtureRequest,
    config: CoordinationConfig,
    redis_server: RedisServer,
    rabbitmq_server: RabbitServer,
    tmp_path: Path,
) -> Iterator[Programs]:
    place = tmp_path / 'project'
    place.mkdir()
    (place / 'shop.py').write_text(_APP)
    server: BrokerServer = redis_server if request.param == 'redis' else rabbitmq_server
    made = Programs(config, server, place, tmp_path)
    made.environment['CELERY_RESULT_BACKEND'] = redis_server.url(redis_server.new_space())
    if request.param == 'dead letters':
        made.environment['DEAD'] = '1'
    yield made
    made.close()


def notes(programs: Programs) -> list[str]:
    place = programs.place / 'notes'
    return place.read_text().splitlines() if place.exists() else []


@pytest.mark.parametrize('pool', ['prefork', 'threads'])
def test_its_senders_are_told_and_its_message_is_kept_or_a_dead_letter(
    programs: Programs, config: CoordinationConfig, pool: str
) -> None:
    has_dead_letters = 'DEAD' in programs.environment
    if has_dead_letters:
        assert 'dead 0' in programs.run(_DEAD)
    programs.run(_SEND)
    begun: dict[int, int] = {}
    # It may end before it has said that it is ready.
    command = f'celery -A shop worker -n one@test -P {pool} -c 2'
    worker = programs.start(command, '')

    def until(condition: Callable[[], object]) -> None:
        def look() -> bool:
            nonlocal worker
            if worker.process.poll() is not None:
                worker = programs.start(command, '')
            return bool(condition())

        eventually(look, 60)

    until(lambda: any(line.startswith('failed 3') for line in notes(programs)))
    until(lambda: {f'ends {n}' for n in (2, *range(10, 20))} <= set(notes(programs)))
    with Executions(config) as executions:
        until(lambda: executions.count(ExecutionFilter(state='dead')) == 2)
        (told,) = [line for line in notes(programs) if line.startswith('failed')]
        assert 'AttemptsExhausted' in told
        text = programs.run(_TOLD)
        assert 'three FAILURE AttemptsExhausted' in text and 'chord FAILURE ChordError' in text
        for n in (1, 3):
            found = executions.show(f'shop.work:{n}')
            assert [each['outcome'] for each in found['history']] == ['lost', 'lost']
            # Threads die together: an attempt may end before it has written its note.
            begun[n] = notes(programs).count(f'begins {n}')
            assert begun[n] <= 2 if pool == 'threads' else begun[n] == 2
            kept = found['message']
            assert (kept is None) is has_dead_letters
    if has_dead_letters:
        until(lambda: 'dead 2' in programs.run(_DEAD))

    # a duplicate gets the same
    programs.run(_AGAIN)
    until(lambda: 'again FAILURE' in programs.run(_TOLD.replace('three', 'again')))
    assert notes(programs).count('begins 3') == begun[3]

    (programs.place / 'mended').touch()
    said = programs.run('celery -A shop jobsync executions retry shop.work:1 shop.work:3')
    if has_dead_letters:
        assert said.count('none is sent by this') == 2
        programs.run(_AGAIN)
    else:
        assert said.count('its message is sent') == 2
        until(lambda: 'ends 1' in notes(programs))
    until(lambda: 'ends 3' in notes(programs))
    assert notes(programs).count('ends 3') == 1
    worker.kill()
