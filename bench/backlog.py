"""How soon a worker that joins has work, beside one all of whose slots are busy: `python -m
bench.backlog`.

One worker runs tasks of many seconds; keyed tasks wait behind them. Another one joins. Its seconds
are counted from its start until it owns its first tokens, and from there until it says that it is
ready and until its first task ends.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from jobsync_core.embedded.postgres import EmbeddedPostgres
from tests.conformance.harness import Cluster, Place
from tests.conformance.setups import ADAPTERS, BROKERS, QUICK, Setup
from tests.support.brokers import BrokerServer, RabbitServer, RedisServer
from tests.support.waiting import eventually

_BUSY_SEC, _WAITING, _LOOK_SEC = 20.0, 24, 0.005
#: The defaults of a cluster, but for its heartbeats.
_SETTINGS = {**QUICK, 'total_tokens': 10_000, 'heartbeat_timeout_sec': 15}


@dataclass(frozen=True)
class _Joined:
    """How a worker joined.

    Attributes:
        owns: Seconds from its start to its first tokens.
        ready: Seconds from there until it says that it is ready; less than 0 where it was before.
        first: Seconds from its first tokens to the first end of a task.
        later: Tasks that had ended two seconds later.
    """

    owns: float
    ready: float
    first: float
    later: int


def _join(cluster: Cluster) -> _Joined:
    cluster.start('busy')
    slots = 2
    held = [f'k:{n}' for n in range(1000, 1000 + 3 * slots)]
    for key in held:
        cluster.send('keyed', int(key[2:]), _BUSY_SEC, routed=True)
    eventually(lambda: len(cluster.notes.of('start', held)) >= slots, 60)
    keys = [f'k:{n}' for n in range(_WAITING)]
    for n in range(_WAITING):
        cluster.send('keyed', n, routed=True)
    began = time.monotonic()
    worker = cluster.launch('joins', concurrency=8)
    happenings: dict[str, Callable[[], bool]] = {
        'owns': lambda: 'joins' in cluster.owning(),
        'ready': worker.is_ready,
        'first': lambda: bool(cluster.ended(*keys)),
    }
    seen: dict[str, float] = {}

    def look() -> bool:
        for what, happened in happenings.items():
            if what not in seen and happened():
                seen[what] = time.monotonic()
        return len(seen) == 3

    eventually(look, 60, _LOOK_SEC)
    owns = seen['owns']
    time.sleep(2)
    return _Joined(
        owns - began, seen['ready'] - owns, seen['first'] - owns, len(cluster.ended(*keys))
    )


def _measure(setup: Setup, server: BrokerServer, rounds: int) -> None:
    figures: list[_Joined] = []
    for number in range(rounds):
        with (
            ExitStack() as stack,
            EmbeddedPostgres() as postgres,
            tempfile.TemporaryDirectory() as place,
        ):
            name = f'bench_{number}'
            postgres.create_database(name)
            results = stack.enter_context(RedisServer())
            adapter = ADAPTERS[setup.framework](
                Place(
                    server,
                    server.new_space(),
                    results.url(results.new_space()),
                    postgres.config(name, total_tokens=_SETTINGS['total_tokens']),
                    Path(place),
                ),
                True,
                dict(_SETTINGS),
            )
            cluster = stack.enter_context(Cluster(adapter, setup.pool))
            try:
                figures.append(_join(cluster))
            except AssertionError as error:
                print(f'{setup}: no task of {_WAITING} ran: {error}', file=sys.stderr)
    if figures:
        owns, ready, first, later = (
            statistics.median(getattr(each, what) for each in figures)
            for what in ('owns', 'ready', 'first', 'later')
        )
        print(
            f'{setup!s:32} {owns:8.2f} {ready:8.2f} {first:8.2f} {later:10.0f} of {_WAITING}',
            flush=True,
        )


def _main() -> None:
    parser = argparse.ArgumentParser(prog='python -m bench.backlog', description=__doc__)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--only', choices=sorted(ADAPTERS), help='one framework')
    options = parser.parse_args()
    print(f'{"":32} {"owns":>8} {"ready":>8} {"first":>8} {"2 s later":>16}')
    kinds: dict[str, type[RedisServer] | type[RabbitServer]] = {
        'redis': RedisServer,
        'rabbitmq': RabbitServer,
    }
    for broker in BROKERS:
        with kinds[broker]() as server:
            for framework, kind in (
                ('celery', 'processes'),
                ('celery', 'threads'),
                ('dramatiq', 'threads'),
            ):
                if options.only in (None, framework):
                    _measure(Setup(framework, broker, kind), server, options.rounds)


if __name__ == '__main__':
    _main()
