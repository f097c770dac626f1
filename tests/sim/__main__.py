"""Play many schedules: `python -m tests.sim --schedules 1000000`, or one again: `python -m
tests.sim --seed 17 --trace`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from .invariants import Violation
from .scenarios import FAMILIES, run

_CHUNK = 50


def _play_some(seeds: range, family: str | None) -> tuple[int, list[tuple[int, str]], float]:
    failures, slowest = [], 0.0
    for seed in seeds:
        try:
            slowest = max(slowest, run(seed, family).healed_after)
        except Violation as violation:
            failures.append((seed, str(violation)))
    return len(seeds), failures, slowest


def _chunks(first: int, count: int) -> Iterator[range]:
    for start in range(first, first + count, _CHUNK):
        yield range(start, min(start + _CHUNK, first + count))


def _results(
    args: argparse.Namespace, until: float
) -> Iterator[tuple[int, list[tuple[int, str]], float]]:
    chunks = _chunks(args.first, args.schedules)
    if args.processes <= 1:
        for chunk in chunks:
            if time.monotonic() > until:
                return
            yield _play_some(chunk, args.family)
        return
    with ProcessPoolExecutor(args.processes) as pool:
        waiting = [
            pool.submit(_play_some, chunk, args.family)
            for chunk in itertools.islice(chunks, 2 * args.processes)
        ]
        while waiting:
            yield waiting.pop(0).result()
            if time.monotonic() < until:
                waiting += [
                    pool.submit(_play_some, chunk, args.family)
                    for chunk in itertools.islice(chunks, 1)
                ]


def _main() -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.sim', description=__doc__)
    parser.add_argument('--schedules', type=int, default=2000, help='how many')
    parser.add_argument('--first', type=int, default=0, help='the first seed')
    parser.add_argument(
        '--family', choices=sorted(FAMILIES), help='only this family; by default the seed chooses'
    )
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--minutes', type=float, default=1e9, help='stop after so long')
    parser.add_argument('--most-failures', type=int, default=10, help='stop after so many')
    parser.add_argument('--seed', type=int, help='play this one alone')
    parser.add_argument(
        '--trace',
        nargs='?',
        type=int,
        const=200,
        default=0,
        metavar='EVENTS',
        help='with --seed: show the last events',
    )
    args = parser.parse_args()
    if args.seed is not None:
        try:
            done = run(args.seed, args.family, tracing=args.trace)
        except Violation as violation:
            print(violation)
            return 1
        print('\n'.join(done.world.history))
        print(
            f'seed {args.seed}, family {done.family}: all invariants hold; whole '
            f'{done.healed_after:.2f} s after the last fault'
        )
        return 0
    started = time.monotonic()
    played, failures, slowest = 0, [], 0.0
    for count, failed, healed in _results(args, started + 60 * args.minutes):
        played += count
        failures += failed
        slowest = max(slowest, healed)
        for _, text in failed:
            print(text, flush=True)
        if len(failures) >= args.most_failures:
            break
    took = time.monotonic() - started
    families = Counter(
        args.family or sorted(FAMILIES)[seed % len(FAMILIES)] for seed, _ in failures
    )
    print(
        f'{played} schedules in {took:.0f} s ({played / took:.0f}/s), {len(failures)} failures '
        f'{dict(families) or ""}, '
        f'slowest recovery {slowest:.1f} s of virtual time'
    )
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(_main())
