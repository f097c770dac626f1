"""Messages that nobody should send, among good ones, to real `dramatiq` processes with the default
flags, on Redis and on RabbitMQ.

Each good message, and each that a plain worker would run, runs once. Each that no worker can have,
or that has no key, is among the dead letters once. Nothing is left anywhere, no worker ends, and no
log has a traceback.
"""

from __future__ import annotations

import os
import re
import signal
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from dramatiq.common import current_millis

from jobsync_core.worker.routing import is_of_cluster
from tests.support.waiting import eventually

from ..dramatiq.conftest import Workers, options, server, workers
from .dramatiq_wire import UNREADABLE, body, odd_options
from .messages import Hostile, bad_arguments, bad_stamps, forged_keys, random_stamps

__all__ = ['options', 'server', 'workers']

SEED = 20
PARKED, OLD_PARKED = 'default.jobsync.sync_.parked', 'jobsync.sync_.parked'


class Wire:
    """Puts bytes where producers put messages, and looks at what is left."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._broker: Any = workers.app.broker
        if not self.is_redis:
            for queue in list(self._broker.queues):
                self._broker._ensure_queue(queue)

    @property
    def is_redis(self) -> bool:
        return self._workers.server.kind == 'redis'

    def put(self, queue: str, data: bytes) -> None:
        if self.is_redis:
            number = uuid.uuid4().hex
            self._broker.client.hset(f'dramatiq:{queue}.msgs', number, data)
            self._broker.client.rpush(f'dramatiq:{queue}', number)
        else:
            exchange = 'jobsync.sync_' if is_of_cluster(queue, 'sync_') else ''
            self._broker.channel.basic_publish(exchange, queue, data)

    def dead(self, queue: str) -> list[bytes]:
        if self.is_redis:
            return list(self._broker.client.hgetall(f'dramatiq:{queue}.XQ.msgs').values())
        # By a name that RabbitMQ deletes nothing for: the messages go back.
        channel, found = self._broker.connection.channel(), []
        while (data := channel.basic_get(f'{queue}.XQ')[2]) is not None:
            found.append(data)
        channel.close()
        return found

    def nodes(self) -> list[str]:
        """The queues of the nodes."""
        return sorted(self._workers.queues())


def hostile() -> Iterator[Hostile]:
    yield from bad_stamps()
    yield from forged_keys()
    yield from bad_arguments()
    yield from random_stamps(SEED, 150)
    for name, found in odd_options().items():
        yield Hostile(name, found)


def mixed(wire: Wire, targets: list[str]) -> tuple[list[str], int, int]:
    """Send all of it, each beside a good message. Which keys run, and how many messages are
    unroutable, and unreadable.
    """
    run, unroutable, unreadable = [], 0, 0
    for number, (each, good) in enumerate(zip(hostile(), _good(), strict=False)):
        queue = targets[number % len(targets)]
        wire.put(queue, good)
        run.append(f'good{number}')
        args = [f'odd{number}'] if each.args is None else each.args
        wire.put(queue, body(args=args, kwargs=each.kwargs or {}, options=dict(each.stamps)))
        run.extend([f'odd{number}'] if each.runs else [])
        unroutable += not each.runs
    for number, data in enumerate(UNREADABLE.values()):
        wire.put(targets[number % len(targets)], data)
        unreadable += 1
    return run, unroutable, unreadable


def _good() -> Iterable[bytes]:
    number = 0
    while True:
        yield body(args=[f'good{number}'], message_timestamp=current_millis())
        number += 1


def check(workers: Workers, wire: Wire, run: list[str], unroutable: int, unreadable: int) -> None:
    def runs() -> bool:
        counts = workers.counts('keyed:')
        return len(counts) >= len(run) and len(wire.dead('default')) >= unroutable + unreadable

    eventually(lambda: runs() or any(process.poll() is not None for process in workers.started), 90)
    assert not [process.returncode for process in workers.started if process.poll() is not None], (
        workers.output()[-5000:]
    )
    counts = workers.counts('keyed:')
    assert {name: count for name, count in counts.items() if count != 1} == {}
    assert set(counts) == {f'keyed:{name}' for name in run}
    eventually(lambda: not _left(workers), 20)
    dead = eventually(
        lambda: found if len(found := wire.dead('default')) >= unroutable + unreadable else [], 10
    )
    assert wire.dead(OLD_PARKED) == []  # the users of `default` look at its own dead letters
    assert len(dead) == unroutable + unreadable
    assert sorted(data for data in dead if data in UNREADABLE.values()) == sorted(
        UNREADABLE.values()
    )
    log = workers.output()
    assert 'Traceback' not in log and 'encountered an unexpected' not in log, log[-5000:]
    assert len(re.findall(r'cannot be routed, and goes to the dead letters', log)) == unroutable
    assert len(re.findall(r'goes to default\.XQ: ', log)) == unreadable


def _left(workers: Workers) -> dict[str, int]:
    return {
        name: count
        for name, count in workers.server.depths(workers.space).items()
        if not name.endswith('.XQ')
    }


@pytest.mark.timeout(240)
@pytest.mark.parametrize('where', ['home', 'node'])
def test_one_bad_message_harms_nobody_else(workers: Workers, where: str) -> None:
    workers.start(2)
    workers.wait_for_nodes(2)
    wire = Wire(workers)
    check(workers, wire, *mixed(wire, ['default'] if where == 'home' else wire.nodes()))


@pytest.mark.timeout(240)
def test_what_lies_in_parked_and_orphaned_queues_harms_nobody_either(workers: Workers) -> None:
    first = workers.start(1)
    workers.wait_for_nodes(1)
    wire = Wire(workers)
    (orphan,) = wire.nodes()
    os.killpg(first.pid, signal.SIGKILL)  # its processes, too
    first.wait()
    expected = mixed(wire, [orphan, PARKED, OLD_PARKED])
    workers.start(2)
    workers.started.remove(first)
    check(workers, wire, *expected)
