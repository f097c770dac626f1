"""`python -m bench`: measure this library beside the peer and print one table. `python -m bench
celery|dramatiq`: see messages.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jobsync_core import CoordinationConfig
from jobsync_core.embedded.postgres import EmbeddedPostgres

from . import changes, heartbeats, local, spread
from .nodes import Databases
from .peer import PEER_VERSION, PeerUnavailable, our_side, peer_side
from .rounds import Bench
from .table import Row, as_dict, render

__all__ = ['MEASUREMENTS', 'main']

MEASUREMENTS: dict[str, Callable[[Bench], list[Row]]] = {
    'claims': local.claims,
    'memory': local.memory,
    'distribution': spread.distribution,
    'movement': spread.movement,
    'first_distribution': spread.first_distribution,
    'locks': spread.locks,
    'follower': changes.follower,
    'failover': changes.failover,
    'join': changes.join,
    'heartbeats': heartbeats.heartbeats,
    'tasks': local.tasks,
    'ledger': local.ledger,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements that the command line names; 1 if a figure of ours is missing or misses
    its target, else 0.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] in (['celery'], ['dramatiq']):
        # The framework is needed for that alone.
        side, messages = (
            importlib.import_module(f'bench.{name}')
            for name in (f'{arguments[0]}_side', 'messages')
        )
        return int(messages.main(side.FRAMEWORK, arguments[1:]))
    options = _parse(arguments)
    sides = [our_side()]
    if not options.no_peer:
        try:
            sides.append(peer_side())
        except PeerUnavailable as error:
            print(f'the peer is not measured: {error}', file=sys.stderr)
    rows: list[Row] = []
    with _server(options.url) as server:
        bench = Bench(Databases(server), sides, options.quick)
        environment = _environment(bench)
        for name in options.only or MEASUREMENTS:
            print(f'{name} ...', file=sys.stderr, flush=True)
            rows += MEASUREMENTS[name](bench)
    print(render(rows, f'jobsync {PEER_VERSION}'))
    print(', '.join(f'{key}: {value}' for key, value in environment.items()))
    if options.json:
        document = {
            'environment': environment,
            'rows': [as_dict(row) for row in rows],
            'samples': bench.raw,
        }
        options.json.write_text(
            json.dumps(document, indent=1, ensure_ascii=False) + '\n', encoding='utf-8'
        )
    return int(any(row.ours is None or row.met is False for row in rows))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        'python -m bench',
        description=f'Measure JobSync beside the PyPI package jobsync {PEER_VERSION}.',
    )
    parser.add_argument(
        '--only',
        action='append',
        choices=MEASUREMENTS,
        metavar='NAME',
        help=f'one of {", ".join(MEASUREMENTS)}; repeatable',
    )
    parser.add_argument('--quick', action='store_true', help='one run of each side, smaller sizes')
    parser.add_argument(
        '--json', type=Path, metavar='FILE', help='write the rows and every single value there'
    )
    parser.add_argument('--no-peer', action='store_true', help='measure this library alone')
    parser.add_argument(
        '--url',
        help='URL of a PostgreSQL superuser; databases are made and dropped there. Default: an '
        'embedded server',
    )
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _server(url: str | None) -> Iterator[CoordinationConfig]:
    if url:
        yield CoordinationConfig.from_url(url)
        return
    with EmbeddedPostgres(settings={'max_connections': '300'}) as postgres:
        yield postgres.config('postgres')


def _environment(bench: Bench) -> dict[str, str]:
    """What the figures depend on."""
    return {
        'python': platform.python_version(),
        'postgresql': str(bench.databases.query('show server_version')[0][0]),
        'processors': str(os.cpu_count()),
        'load at the start': f'{os.getloadavg()[0]:.1f}',
        'date': datetime.date.today().isoformat(),
    }


if __name__ == '__main__':
    sys.exit(main())
