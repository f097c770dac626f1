"""One bad message harms nobody else: hundreds of them, with good ones between, to real workers with
the default flags.

The worker lives on; every good message runs once; every bad one that a plain worker runs is run,
and every other one is set aside once, with one line, where the dead letters of its queue go.
Whatever becomes of a message in a plain worker that lives on becomes of it in ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from amqp.exceptions import AMQPError
from celery import Celery
from kombu.exceptions import KombuError

from jobsync_celery.broker.abandoning import abandon
from jobsync_core.embedded.postgres import EmbeddedPostgres
from tests.support.brokers import BrokerServer, RedisServer, die_with_parent
from tests.support.waiting import eventually

from ..parity.harness import Configuration, Order, order_of
from .celery_app import make_app
from .celery_messages import ENTRIES, Raw, messages

_ROOT = Path(__file__).parents[2]
_SETTINGS = {
    'heartbeat_interval_sec': 0.5,
    'heartbeat_timeout_sec': 5,
    'rebalance_check_interval_sec': 1,
    'total_tokens': 1_000_000,
}
_SEED, _COUNT, _GOOD_EACH = 20, 120, 5
_POOLS = {'prefork': ('-c', '2'), 'threads': ('-P', 'threads', '-c', '2'), 'solo': ('-P', 'solo')}


class Run:
    """Workers of one kind, and what became of what they were sent.

    Args:
        order: What the workers are told.
        server, space: The broker.
        directory: For the logs.
        options: Of the command line.
        nodes: How many workers.
    """

    def __init__(
        self,
        order: Order,
        server: BrokerServer,
        space: str,
        directory: Path,
        options: tuple[str, ...],
        nodes: int = 1,
    ) -> None:
        self.order, self.server, self.space = order, server, space
        Path(order.notes).touch()
        self.sender: Celery = make_app(Order(**{**vars(order), 'mode': 'plain'}))
        self._declare()
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(('JOBSYNC_', 'CELERY_', 'PYTEST_'))
        }
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self._paths = [directory / f'{order.mode}{number}.log' for number in range(nodes)]
        for number, path in enumerate(self._paths):
            name = f'n{number}@test'
            with path.open('wb') as output:
                self.workers[name] = subprocess.Popen(
                    [
                        sys.executable,
                        '-m',
                        'celery',
                        '-A',
                        'tests.hostile.celery_worker',
                        'worker',
                        '-n',
                        name,
                        '-l',
                        'INFO',
                        *options,
                    ],
                    cwd=_ROOT,
                    env={
                        **kept,
                        **order.environment(),
                        'PYTHONUNBUFFERED': '1',
                        'C_FORCE_ROOT': '1',
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=die_with_parent(),
                )
        self.sent: list[Raw] = []
        self._connection: Any = None
        self._producer: Any = None
        self._options = {'confirm_publish': True} if server.kind == 'rabbitmq' else {}

    def _declare(self) -> None:
        with self.sender.connection_for_write() as connection:
            for item in (*self.sender.extra, *self.sender.amqp.queues.values()):
                item(connection.default_channel).declare()

    @property
    def log(self) -> str:
        return '\n'.join(path.read_text(errors='replace') for path in self._paths)

    @property
    def ended(self) -> bool:
        return any(worker.poll() is not None for worker in self.workers.values())

    def wait_ready(self) -> None:
        eventually(
            lambda: self.ended or all(f'{name} ready.' in self.log for name in self.workers), 60
        )
        self.check_alive()

    def check_alive(self) -> None:
        for name, worker in self.workers.items():
            assert worker.poll() is None, (
                f'{name} has ended with {worker.returncode}:\n{self.log[-6000:]}'
            )

    def send(self, found: list[Raw]) -> None:
        """Send what the broker takes, with good messages between."""
        for number, raw in enumerate(found):
            if number % _GOOD_EACH == 0:
                self.good(number)
            if self._publish(raw):
                self.sent.append(raw)
        self.good(len(found))
        self.good_count = len(range(0, len(found), _GOOD_EACH)) + 1

    def push(self) -> None:
        """What kombu would never write, straight into the list."""
        if isinstance(self.server, RedisServer):
            with contextlib.closing(self.server.client(self.space)) as client:
                for entry in ENTRIES:
                    client.lpush('celery', entry)

    def good(self, number: int) -> None:
        self.sender.send_task('good', (1_000_000 + number,), task_id=f'g{number}')

    def _publish(self, raw: Raw) -> bool:
        if self._connection is None:
            self._connection = self.sender.connection_for_write(transport_options=self._options)
            self._producer = self._connection.Producer()
        try:
            self._producer.publish(
                raw.body,
                exchange='',
                routing_key='celery',
                headers=raw.headers,
                content_type=raw.content_type,
                content_encoding=raw.content_encoding,
                **raw.properties,
            )
        except (
            KombuError,
            AMQPError,
            TypeError,
            ValueError,
            ArithmeticError,
            AttributeError,
            LookupError,
            struct.error,
        ):
            # This broker, or its client, cannot say it. Half of it may be under way on the
            # connection.
            connection, self._connection = self._connection, None
            abandon(connection)
            return False
        return True

    def notes(self) -> Counter[str]:
        return Counter(Path(self.order.notes).read_text().splitlines())

    def wait_good(self) -> None:
        """Until each good message has run; the last one was sent last."""

        def done() -> bool:
            notes = self.notes()
            return (
                sum(key.startswith('ran 1') and len(key) == 11 for key in notes) >= self.good_count
                or self.ended
            )

        with contextlib.suppress(AssertionError):
            eventually(done, 120, every=0.2)
        self.check_alive()

    def outcomes(self) -> dict[str, str]:
        return {raw.id: str(self.sender.backend.get_state(raw.id)) for raw in self.sent}

    def aside(self) -> Counter[str]:
        """How many lines say of a message that it is set aside, by its id."""
        return Counter(
            line.partition('[h')[2].partition(']')[0]
            for line in self.log.splitlines()
            if ' is set aside: ' in line
        )

    def close(self) -> None:
        for worker in self.workers.values():
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self.workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        if self._connection is not None:
            self._connection.release()
        self.sender.close()


@pytest.fixture
def make_run(
    request: pytest.FixtureRequest, postgres: EmbeddedPostgres, tmp_path: Path
) -> Iterator[Any]:
    name = f'hostile_{uuid.uuid4().hex[:12]}'
    postgres.create_database(name)
    with contextlib.ExitStack() as stack:
        stack.callback(postgres.drop_database, name)

        def make(broker: str, mode: str, pool: str, nodes: int = 1) -> Run:
            server = cast(BrokerServer, request.getfixturevalue(f'{broker}_server'))
            results = cast(BrokerServer, request.getfixturevalue('redis_server'))
            space, own = server.new_space(), results.new_space()
            stack.callback(server.drop_space, space)
            stack.callback(results.drop_space, own)
            order = order_of(
                mode,
                Configuration('hostile'),
                server,
                space,
                results.url(own),
                postgres.config(name),
                tmp_path,
                _SETTINGS,
            )
            run = Run(order, server, space, tmp_path, _POOLS[pool], nodes)
            stack.callback(run.close)
            run.wait_ready()
            return run

        yield make


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ('broker', 'pool', 'nodes'),
    [
        ('redis', 'prefork', 2),
        ('rabbitmq', 'prefork', 2),
        ('redis', 'threads', 1),
        ('redis', 'solo', 1),
        *(
            pytest.param(*each, marks=pytest.mark.soak)
            for each in (
                ('redis', 'prefork', 1),
                ('rabbitmq', 'prefork', 1),
                ('rabbitmq', 'threads', 1),
                ('rabbitmq', 'solo', 1),
            )
        ),
    ],
)
def test_a_worker_lives_on_whatever_it_is_sent(
    make_run: Any, broker: str, pool: str, nodes: int
) -> None:
    found = messages(_SEED, _COUNT)
    plain: Run = make_run(broker, 'plain', pool)
    plain.send([raw for raw in found if raw.same and not raw.kills])
    plain.wait_good()
    ours: Run = make_run(broker, 'ours', pool, nodes)
    ours.push()
    ours.send(found)
    ours.wait_good()
    # Behind all of them, and after what came back: the worker is as good as new.
    eventually(lambda: str(_in_hand(ours)) == '{}' or ours.ended, 30)
    # A message that has been handed on too often is parked, and handed out again after a rest.
    wanted = {f'ran {raw.number}' for raw in plain.sent} & plain.notes().keys()
    with contextlib.suppress(AssertionError):  # told below
        eventually(lambda: wanted <= ours.notes().keys() or ours.ended, 30)
    ours.check_alive()
    notes = ours.notes()
    assert {
        key: count for key, count in notes.items() if key.startswith('ran 10') and count != 1
    } == {}
    assert sum(key.startswith('ran 1') and len(key) == 11 for key in notes) == ours.good_count
    outcomes, aside = ours.outcomes(), ours.aside()
    repeated = {raw.name: aside[raw.id[1:]] for raw in ours.sent if aside[raw.id[1:]] > 1}
    assert repeated == {}
    twice = {
        raw.name: notes[f'ran {raw.number}'] for raw in ours.sent if notes[f'ran {raw.number}'] > 1
    }
    assert twice == {}
    both = {raw.name: raw for raw in ours.sent if aside[raw.id[1:]] and notes[f'ran {raw.number}']}
    assert both == {}, 'set aside and run'
    _check_parity(plain, ours, outcomes, aside, notes)
    _check_rules(ours, outcomes, aside, notes)
    print(
        json.dumps(
            {
                'broker': broker,
                'pool': pool,
                'nodes': nodes,
                'sent': len(ours.sent),
                'of': len(found),
                'good': ours.good_count,
                'ran': sum(notes[f'ran {raw.number}'] for raw in ours.sent),
                'set aside': sum(aside.values()),
                'compared': len(plain.sent),
                'would end a plain worker': sum(key.startswith('ended') for key in plain.notes()),
                'left': ours.server.depths(ours.space),
            }
        )
    )


def _in_hand(run: Run) -> dict[str, int]:
    """What is at the broker besides dead letters and what waits for a node, or a worker, that knows
    it.
    """
    return {
        place: count
        for place, count in run.server.depths(run.space).items()
        if place != 'dead' and not place.endswith(('.parked', '.unknown'))
    }


def _check_parity(
    plain: Run, ours: Run, outcomes: dict[str, str], aside: Counter[str], notes: Counter[str]
) -> None:
    """Where the plain worker lives on, ours comes to the same end."""
    theirs, ran, different = plain.outcomes(), plain.notes(), []
    sent = {raw.id for raw in ours.sent}
    for raw in plain.sent:
        assert raw.id in sent
        if ran[f'ended {raw.id}']:
            # It would have ended a plain worker: anything but that will do, once.
            if aside[raw.id[1:]] + notes[f'ran {raw.number}'] != 1:
                different.append(
                    f'{raw.name}: ends a plain worker; set aside {aside[raw.id[1:]]}, ran '
                    f'{notes[f"ran {raw.number}"]}'
                )
        elif ran[f'ran {raw.number}'] != notes[f'ran {raw.number}'] or (
            theirs[raw.id] != outcomes[raw.id] and theirs[raw.id] != 'PENDING'
        ):
            different.append(
                f'{raw.name}: ran {ran[f"ran {raw.number}"]} against {notes[f"ran {raw.number}"]}, '
                f'{theirs[raw.id]} against {outcomes[raw.id]}'
            )
    assert not different, '\n'.join(different)


def _check_rules(
    ours: Run, outcomes: dict[str, str], aside: Counter[str], notes: Counter[str]
) -> None:
    """What is not compared: nothing that has no key runs anywhere, a pin holds, and who is set
    aside finds out why.
    """
    wrong = []
    for raw in ours.sent:
        runs, asides = notes[f'ran {raw.number}'], aside[raw.id[1:]]
        if raw.task in ('homeless', 'keyless', 'empty') and runs:
            wrong.append(f'{raw.name}: ran')
        keyless = raw.name.startswith('arguments: ') or raw.task in ('keyless', 'empty')
        if keyless and (runs, asides, outcomes[raw.id]) != (0, 1, 'FAILURE'):
            wrong.append(f'{raw.name}: ran {runs}, set aside {asides}, {outcomes[raw.id]}')
        if (
            asides
            and isinstance(raw.headers, dict)
            and raw.headers.get('id') == raw.id
            and outcomes[raw.id] != 'FAILURE'
        ):
            wrong.append(f'{raw.name}: set aside, and its sender sees {outcomes[raw.id]}')
    assert not wrong, '\n'.join(wrong)
    if ours.server.kind == 'rabbitmq':
        assert ours.server.depths(ours.space).get('dead', 0) >= sum(aside.values())
