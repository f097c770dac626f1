"""Real workers in trouble that is no message's fault: nothing is set aside, nothing is lost, and
they go on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from celery import chord

from jobsync_core import CoordinationConfig
from tests.support.brokers import BrokerServer, RedisServer, die_with_parent
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

_ROOT = Path(__file__).parents[2]
_APP = 'tests.celery.trouble_app'
_ON_BOTH = pytest.mark.parametrize('kind', ['redis', 'rabbitmq'])
#: Long enough that a busy machine costs no lease.
_TIMES = {
    'heartbeat_interval_sec': 0.5,
    'heartbeat_timeout_sec': 8.0,
    'rebalance_check_interval_sec': 1.0,
    'total_tokens': 1000,
}


class Stage:
    """A broker, a result backend behind a proxy, a worker, and an app that sends.

    Attributes:
        results, writing: Proxies in front of the worker's result backend, and of the broker where
            the worker publishes.
    """

    def __init__(
        self,
        config: CoordinationConfig,
        broker: BrokerServer,
        results: RedisServer,
        place: Path,
        **settings: object,
    ) -> None:
        self.broker, self.place = broker, place
        self.space, own = broker.new_space(), results.new_space()
        self.notes_path = place / 'notes'
        self.notes_path.touch()
        self._stack = contextlib.ExitStack()
        self._stack.callback(broker.drop_space, self.space)
        self._stack.callback(results.drop_space, own)
        self.results = self._stack.enter_context(Proxy('127.0.0.1', results.port))
        self.writing = self._stack.enter_context(Proxy('127.0.0.1', broker.port))
        url = f'postgresql://{config.user}:{config.password}@{config.host}:{config.port}/{config.dbname}'
        self.settings = {'database_url': url, 'route_producers': False, **_TIMES, **settings}
        self._sender = {
            'TEST_BROKER': broker.url(self.space),
            'TEST_RESULTS': results.url(own),
            'TEST_NOTES': str(self.notes_path),
            'TEST_SETTINGS': json.dumps(self.settings),
        }
        self._worker = {
            **self._sender,
            'TEST_RESULTS': results.url(own, self.results.port),
            'TEST_BROKER_WRITE': broker.url(self.space, self.writing.port),
        }
        self.process: Any = None
        self.module = self._load()

    def _load(self) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self._sender.items():
                patch.setenv(name, value)
            sys.modules.pop(_APP, None)
            module = importlib.import_module(_APP)
        self._stack.callback(module.app.close)
        module.app.backend.result_consumer.consume_from = lambda task_id: (
            None
        )  # outcomes are asked for
        return module

    def start(self, *options: str, **more: str) -> None:
        """A worker that consumes."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(('JOBSYNC_', 'CELERY_', 'PYTEST_'))
        }
        with (self.place / 'log').open('wb') as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    '-m',
                    'celery',
                    '-A',
                    _APP,
                    'worker',
                    '-n',
                    'one@test',
                    '-l',
                    'INFO',
                    *options,
                ],
                cwd=_ROOT,
                env={**kept, **self._worker, 'PYTHONUNBUFFERED': '1', **more},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )
        eventually(lambda: 'one@test ready.' in self.log or self.process.poll() is not None, 40)
        self.check_alive()

    @property
    def log(self) -> str:
        return (self.place / 'log').read_text(errors='replace')

    def notes(self) -> Counter[str]:
        return Counter(self.notes_path.read_text().splitlines())

    def wait_notes(self, wanted: Sequence[str], timeout: float = 40.0) -> None:
        self.wait(lambda: set(wanted) <= set(self.notes()), timeout)

    def wait(self, condition: Any, timeout: float = 40.0) -> None:
        with contextlib.suppress(AssertionError):
            eventually(lambda: condition() or self.process.poll() is not None, timeout)
        self.check_alive()
        assert condition(), f'{self.notes()} {self.broker.depths(self.space)}\n{self.log[-6000:]}'

    def check_alive(self) -> None:
        assert self.process.poll() is None, (
            f'the worker has ended with {self.process.returncode}:\n{self.log[-6000:]}'
        )

    def state(self, message_id: str) -> str:
        return str(self.module.app.backend.get_task_meta(message_id)['status'])

    def cut(self, proxy: Proxy) -> None:
        proxy.switch(Mode.REFUSE)
        proxy.reset()

    def check_nothing_lost(self) -> None:
        self.wait(lambda: not self.broker.depths(self.space))
        assert 'is set aside' not in self.log

    def end(self) -> int:
        """Its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return int(self.process.wait(50))

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, AttributeError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        self._stack.close()


@pytest.fixture
def make_stage(
    config: CoordinationConfig, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def make(kind: str) -> Stage:
            broker = cast(BrokerServer, request.getfixturevalue(f'{kind}_server'))
            made = Stage(config, broker, request.getfixturevalue('redis_server'), tmp_path)
            stack.callback(made.close)
            return made

        yield make


@_ON_BOTH
def test_a_result_backend_that_is_away_costs_no_expired_member_of_a_chord(
    make_stage: Any, kind: str
) -> None:
    stage: Stage = make_stage(kind)
    tasks = stage.module
    stage.start('-c', '2')
    stage.cut(stage.results)
    members = [tasks.keyed.s(1).set(expires=-5), tasks.late.s(2).set(expires=-5), tasks.late.s(3)]
    result = chord(members, tasks.total.s()).apply_async()
    gone = [member.id for member in result.parent.results[:2]]
    stage.wait(lambda: stage.log.count('cannot be taken now') >= 2)
    assert {stage.state(each) for each in gone} == {'PENDING'}
    stage.results.heal()
    stage.wait(lambda: {stage.state(each) for each in gone} == {'REVOKED'})
    stage.check_nothing_lost()
    assert stage.notes()['ran 1'] == stage.notes()['ran 2'] == 0


def test_a_pool_that_can_start_no_thread_loses_nothing_and_runs_nothing_twice(
    make_stage: Any,
) -> None:
    stage: Stage = make_stage('rabbitmq')
    stage.start('-P', 'threads', '-c', '2', TEST_NO_THREADS='3')
    for n in range(8):
        (stage.module.late if n % 2 else stage.module.keyed).delay(n)
    stage.wait_notes([f'ran {n}' for n in range(8)])
    stage.check_nothing_lost()
    assert {key: count for key, count in stage.notes().items() if key.startswith('ran')} == {
        f'ran {n}': 1 for n in range(8)
    }
    assert stage.notes()['no thread'] == 3


@pytest.mark.parametrize(
    ('kind', 'pool', 'task'),
    [
        ('redis', 'solo', 'late'),
        ('rabbitmq', 'solo', 'late'),
        ('rabbitmq', 'solo', 'keyed'),
        ('redis', 'threads', 'once'),
    ],
)
def test_a_worker_without_processes_keeps_its_messages_while_its_result_backend_is_away(
    make_stage: Any, kind: str, pool: str, task: str
) -> None:
    stage: Stage = make_stage(kind)
    stage.start('-P', pool)
    stage.cut(stage.results)
    message = getattr(stage.module, task).delay(1).id
    stage.wait(lambda: 'cannot be taken now' in stage.log)
    stage.results.heal()
    stage.wait(lambda: stage.state(message) == 'SUCCESS')
    stage.check_nothing_lost()
    assert task != 'once' or stage.notes()['ran 1'] == 1


@_ON_BOTH
@pytest.mark.parametrize('how', [Mode.REFUSE, Mode.HOLD], ids=['refused', 'held'])
def test_a_duplicate_that_cannot_come_back_by_itself_stays(
    make_stage: Any, kind: str, how: Mode
) -> None:
    stage: Stage = make_stage(kind)
    stage.start('-c', '2', '--without-gossip', '--without-heartbeat')
    first = stage.module.once.delay(7, 'go').id
    stage.wait_notes(['began 7'])
    stage.writing.switch(how)
    if how is Mode.REFUSE:
        stage.writing.reset()
    second = stage.module.once.delay(7, 'go').id
    stage.wait(lambda: 'is not known to be sent' in stage.log)
    assert stage.state(second) == 'PENDING'
    stage.writing.heal()
    (stage.place / 'go').touch()
    stage.wait(lambda: stage.state(first) == stage.state(second) == 'SUCCESS')
    stage.check_nothing_lost()
    assert stage.notes()['began 7'] == 1


def test_what_cannot_be_handed_to_a_process_costs_no_slot_and_no_worker(make_stage: Any) -> None:
    stage: Stage = make_stage('rabbitmq')
    tasks = stage.module
    stage.start('-c', '2', '--prefetch-multiplier', '10', TEST_SPOIL='1')
    at_once = [tasks.late.delay(1000 + n).id for n in range(5)]
    stage.wait(lambda: all(stage.state(each) == 'FAILURE' for each in at_once))
    for n in range(2):
        tasks.held.delay(n, 'go')
    stage.wait_notes(['began 0', 'began 1'])
    waiting = [tasks.late.delay(1000 + n).id for n in range(5)]  # for a slot
    for n in range(2, 6):
        tasks.late.delay(n)
    stage.wait(lambda: sum(stage.log.count(each) for each in waiting) >= 5)
    (stage.place / 'go').touch()
    stage.wait_notes([f'ran {n}' for n in range(6)])
    stage.wait(lambda: all(stage.state(each) == 'FAILURE' for each in waiting))
    assert not [key for key in stage.notes() if key.startswith('ran 100')]
    assert stage.end() == 0, stage.log[-3000:]


def test_an_errback_that_takes_long_and_raises_holds_up_nobody(make_stage: Any) -> None:
    stage: Stage = make_stage('rabbitmq')
    tasks = stage.module
    stage.start('-c', '2')
    bad = [
        tasks.app.send_task(f'{_APP}.keyed', (), link_error=[tasks.tell.s()]).id for _ in range(3)
    ]
    stage.wait_notes(['telling'])
    for n in range(5):
        tasks.keyed.delay(n)
    stage.wait_notes([f'ran {n}' for n in range(5)])
    stage.wait(lambda: not stage.broker.depths(stage.space))
    assert stage.notes()['told'] == 0
    (stage.place / 'told').touch()
    stage.wait(lambda: stage.notes()['told'] == 3)
    stage.wait(lambda: all(stage.state(each) == 'FAILURE' for each in bad))
    assert stage.log.count('is set aside') == 3


@pytest.mark.parametrize('pool', ['prefork', 'threads', 'solo'])
def test_what_its_handlers_raise_ends_a_message_and_no_worker(make_stage: Any, pool: str) -> None:
    stage: Stage = make_stage('redis')
    stage.start('-P', pool, '-c', '1')
    for how in ('reject', 'memory', 'reject after'):
        stage.module.ending.delay(how)
    stage.module.keyed.delay(1)
    stage.wait_notes(['ran reject', 'ran memory', 'ran reject after', 'ran 1'])
    stage.check_nothing_lost()
    assert stage.end() == 0, stage.log[-3000:]
