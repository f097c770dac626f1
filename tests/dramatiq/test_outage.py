"""Workers whose broker is away, or which are cut off from it alone: what probes see, what the log
says, who gets the work.
"""

from __future__ import annotations

import itertools
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.brokers import free_port
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

from .conftest import Workers, options, server, workers

__all__ = ['options', 'server', 'workers']


@pytest.fixture
def proxy(workers: Workers) -> Iterator[Proxy]:
    """Between a worker that is started with `through` and its broker."""
    with Proxy('127.0.0.1', workers.server.port) as made:
        yield made
        # while their broker can be reached: a thread of Dramatiq's waits for ever with an
        # acknowledgement
        workers.stop()


def through(workers: Workers, proxy: Proxy, **more: Any) -> int:
    """Start a worker whose way to the broker is the proxy; the port of its probes."""
    port, before = free_port(), dict(workers._environment)
    workers._environment.update(
        TEST_BROKER=workers.server.url(workers.space, proxy.port),
        TEST_OPTIONS=json.dumps({'http': f'127.0.0.1:{port}', **more}),
    )
    workers.start(1)
    workers._environment.clear()
    workers._environment.update(before)
    return port


def probe(port: int) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/health/ready', timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except OSError:
        return 0, {}


@pytest.mark.parametrize('mode', [Mode.REFUSE, Mode.SWALLOW], ids=['refused', 'silent'])
def test_a_worker_cut_off_from_the_broker_is_not_ready_and_gives_its_keys_to_others(
    workers: Workers, proxy: Proxy, mode: Mode
) -> None:
    port = through(workers, proxy)
    workers.wait_for_nodes(1)
    eventually(lambda: probe(port)[0] == 200, 20)
    workers.start(1)
    workers.wait_for_nodes(2)
    proxy.switch(mode)
    if mode is Mode.REFUSE:
        proxy.reset()
    eventually(lambda: probe(port)[0] == 503, 30)
    code, told = probe(port)
    assert (code, told['consuming'], told['lease']) == (503, False, True)
    for n in range(20):
        workers.app.keyed.send(f'cut{n}')
    # Those of the deaf node are run by the other one when it has the keys.
    eventually(lambda: len(workers.counts('keyed:cut')) == 20, 60)
    assert len({line.split()[1] for line in workers.lines('keyed:cut')}) == 1
    assert set(workers.counts('keyed:cut').values()) == {1}
    log = workers.output()
    assert log.count('it gives its keys away until it does') == 1
    assert 'Traceback' not in log, log[-4000:]
    assert len(re.findall('as the broker cannot be asked', log)) <= 2
    proxy.heal()
    eventually(lambda: probe(port)[0] == 200, 60)
    eventually(lambda: 'takes messages again, and keys' in workers.output(), 20)

    rounds = itertools.count()

    def on_both() -> bool:
        at = next(rounds)
        for n in range(20):
            workers.app.keyed.send(f'back{at}.{n}')
        return len({line.split()[1] for line in workers.lines('keyed:back')}) == 2

    eventually(on_both, 40, every=0.5)
    assert set(workers.counts('keyed:').values()) == {1}


def test_a_worker_that_shuts_down_is_not_ready(workers: Workers, proxy: Proxy) -> None:
    port = through(workers, proxy)
    eventually(lambda: probe(port)[0] == 200, 30)
    workers.app.held.send(1)
    eventually(lambda: workers.lines('held:'))
    workers.started[0].terminate()
    eventually(lambda: probe(port)[0] == 503)
    assert probe(port)[1]['reason'] == 'stopped'
    workers.app.log.set('go', 1)
    assert workers.started[0].wait(30) == 0


def test_a_worker_without_coordination_is_ready_when_it_consumes(
    workers: Workers, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers._environment['TEST_LOCK_PROVIDER'] = 'gpu'  # fails
    port = through(workers, proxy, required=False)
    eventually(lambda: probe(port)[0] == 200, 40)
    assert probe(port)[1] | {'node': ''} == {
        'status': 'ready',
        'consuming': True,
        'lease': False,
        'coordinated': False,
        'node': '',
    }
    # Older versions of Dramatiq pass their processes' lines on in a thread of the master.
    eventually(
        lambda: "KeyError: 'gpu' -- THIS WORKER RUNS WITHOUT COORDINATION" in workers.output(), 20
    )
    workers.app.keyed.send(1)
    eventually(lambda: workers.counts('keyed:') == {'keyed:1': 1}, 20)
    proxy.switch(Mode.REFUSE)
    proxy.reset()
    eventually(lambda: probe(port)[0] == 503, 20)
    proxy.heal()
    eventually(lambda: probe(port)[0] == 200, 30)
