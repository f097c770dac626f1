"""`python -m bench celery` and `python -m bench dramatiq`: how fast workers get through messages on
Redis, beside the framework alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobsync_core.embedded.postgres import EmbeddedPostgres
from tests.support.brokers import RedisServer

from .nodes import Databases
from .peer import ROOT

__all__ = ['Failed', 'Framework', 'Stage', 'Variant', 'main']

_RECORD = struct.calcsize('dq')
_TABLES = "SELECT to_regclass('sync_assignment') IS NOT NULL"
_OWNERS = 'SELECT count(DISTINCT node) FROM sync_assignment'


@dataclass(frozen=True)
class Variant:
    """One way of working.

    Args:
        title: What the table calls it.
        mode: Of the framework's app.
        group: Variants with the same are compared with the first of them, the framework alone on as
            many processes.
        workers, pool, concurrency: The workers.
        least: The ratio to plain Celery that is the target.
    """

    title: str
    mode: str
    group: str
    workers: int = 1
    pool: str = 'solo'
    concurrency: int = 1
    least: float | None = None


class Failed(Exception):
    """A run gave no figure; the message says why."""


@dataclass
class Stage:
    """A broker, a database server, and the workers of one run."""

    redis: RedisServer
    databases: Databases
    server: EmbeddedPostgres
    place: Path
    workers: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    dbname: str = ''

    @contextlib.contextmanager
    def run(self, mode: str, **extra: str) -> Iterator[None]:
        """A fresh part of the broker and a fresh database; ends the workers afterwards."""
        space, control = self.redis.new_space(), self.redis.new_space()
        times = self.place / 'times'
        times.write_bytes(b'')
        with self.databases.database() as database:
            self.dbname = database['dbname']
            self.environment = {
                **{
                    key: value
                    for key, value in os.environ.items()
                    if not key.startswith(('CELERY', 'DRAMATIQ', 'JOBSYNC'))
                },
                **extra,
                'BENCH_MODE': mode,
                'BENCH_BROKER': self.redis.url(space),
                'BENCH_CONTROL': self.redis.url(control),
                'BENCH_TIMES': str(times),
                'JOBSYNC_DATABASE_URL': self.server.url(self.dbname),
                'PYTHONPATH': str(ROOT),
            }
            self.client = self.redis.client(control)
            self.broker = self.redis.client(space)
            try:
                yield
            finally:
                self.end_workers()
                for client in (self.client, self.broker):
                    client.flushdb()
                    client.close()

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a worker: `python -m` with these arguments."""
        log = (self.place / f'{name}.log').open('wb')
        with log:
            self.workers.append(
                (
                    name,
                    subprocess.Popen(
                        [sys.executable, '-m', *command],
                        env={**self.environment, 'BENCH_NODE': name},
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    ),
                )
            )

    def kill(self, number: int) -> float:
        """SIGKILL to a worker and its pool; when, on the monotonic clock."""
        process, moment = self.workers[number][1], time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return moment

    def end_workers(self) -> None:
        """End all workers."""
        for _, process in self.workers:
            process.terminate()
        for number, (_, process) in enumerate(self.workers):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            self.kill(number)
        self.workers.clear()

    def wait(self, what: str, condition: Callable[[], bool], timeout: float = 60) -> None:
        """Wait for a condition.

        Raises:
            Failed: It does not come true.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            gone = [
                name
                for name, process in self.workers
                if process.poll() not in (None, -signal.SIGKILL)
            ]
            if gone or time.monotonic() > deadline:
                logs = '; '.join(
                    (self.place / f'{name}.log').read_text(errors='replace')[-300:]
                    for name, _ in self.workers
                )
                raise Failed(
                    f'{what}: {"a worker ended" if gone else f"not within {timeout:g} s"}: {logs}'
                )
            time.sleep(0.05)

    def owners(self) -> int:
        """Number of nodes that own tokens."""
        if not self.databases.query(_TABLES, self.dbname)[0][0]:
            return 0
        return int(self.databases.query(_OWNERS, self.dbname)[0][0])

    def publish(self, app: str, count: int) -> float:
        """Publish in a process of its own; seconds for one message."""
        done = subprocess.run(
            [sys.executable, '-m', app, str(count)],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            raise Failed(f'the producer failed: {done.stderr[-300:]}')
        return float(done.stdout)

    def times(self) -> list[tuple[float, int]]:
        """When which message was run, on the monotonic clock."""
        return list(struct.iter_unpack('dq', (self.place / 'times').read_bytes()))

    def cpu(self) -> float:
        """Seconds of CPU time that the workers and their pools have used; 0 where there is no
        /proc.
        """
        sessions = {str(process.pid) for _, process in self.workers}
        total = 0
        for stat in Path('/proc').glob('[0-9]*/stat'):
            with contextlib.suppress(OSError):
                fields = stat.read_text(errors='replace').rpartition(')')[2].split()
                if fields[3] in sessions:
                    total += int(fields[11]) + int(fields[12])
        return total / os.sysconf('SC_CLK_TCK')

    def completed(self) -> int:
        """Number of messages that were run."""
        return (self.place / 'times').stat().st_size // _RECORD


@dataclass(frozen=True)
class Framework:
    """What is measured.

    Args:
        title: Its name.
        app: The module of its app, which is the producer as well.
        modes: What the app can do: mode -> the module that it needs beside the framework, or ''.
        variants: What is measured by default.
        messages: Messages of a run.
        command: Arguments after `python -m` of a worker of this name.
        hold: Have the workers wait until all messages are published.
        go: Let them go on.
        recovery: Measures how long it takes until what a killed worker had prefetched is run
            elsewhere; seconds by what it is called.
        note: Printed below the table.
    """

    title: str
    app: str
    modes: Mapping[str, str]
    variants: Sequence[Variant]
    messages: int
    command: Callable[[Stage, str, Variant], list[str]]
    hold: Callable[[Stage, Variant], None]
    go: Callable[[Stage, Variant], None]
    recovery: Callable[[Stage], dict[str, float]] | None = None
    note: str = ''

    def is_ours(self, mode: str) -> bool:
        """Whether a mode has workers that are nodes."""
        return self.modes[mode].startswith('jobsync_')


def measure(framework: Framework, stage: Stage, variant: Variant, count: int) -> dict[str, float]:
    """One run: microseconds per message in the workers and in the producer, and of the workers' CPU
    time.

    The workers are held until all messages are published, so that the producer does not set the
    pace.

    Raises:
        Failed: There is no figure.
    """
    with stage.run(variant.mode):
        for number in range(variant.workers):
            stage.start(f'node{number}', framework.command(stage, f'node{number}', variant))
        if framework.is_ours(variant.mode):
            stage.wait('tokens', lambda: stage.owners() == variant.workers)
        framework.hold(stage, variant)
        publishing = stage.publish(framework.app, count)
        before = stage.cpu()
        framework.go(stage, variant)
        stage.wait('completion', lambda: stage.completed() >= count, 300)
        used = stage.cpu() - before
        times = stage.times()
        if sorted(number for _, number in times) != list(range(count)):
            raise Failed(f'{len(times)} completions of {count} messages')
        moments = [moment for moment, _ in times]
        return {
            'work': (max(moments) - min(moments)) / (count - 1) * 1e6,
            'publish': publishing * 1e6,
            'cpu': used / count * 1e6,
        }


@dataclass
class Figures:
    """All values: variant -> metric -> one per round."""

    variants: Sequence[Variant]
    values: dict[Variant, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[Variant, str] = field(default_factory=dict)

    def median(self, variant: Variant, metric: str) -> float | None:
        """The median of a metric."""
        found = self.values.get(variant, {}).get(metric)
        return statistics.median(found) if found and variant not in self.failures else None

    def total(self, variant: Variant) -> float | None:
        """Microseconds for publishing and working together."""
        found = self.values.get(variant, {})
        both = [
            sum(pair) for pair in zip(found.get('work', ()), found.get('publish', ()), strict=True)
        ]
        return statistics.median(both) if both and variant not in self.failures else None

    def ratio(self, variant: Variant, metric: str = 'work') -> float | None:
        """Throughput over that of the framework alone in the same round; the median of the rounds.
        'cpu': by CPU time alone.
        """
        plain = next(other for other in self.variants if other.group == variant.group)
        ours, theirs = (self.values.get(each, {}).get(metric, []) for each in (variant, plain))
        if (
            not ours
            or len(ours) != len(theirs)
            or not all(ours)
            or variant in self.failures
            or plain in self.failures
        ):
            return None
        return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def render(figures: Figures, chosen: Sequence[Variant]) -> str:
    """The table."""
    lines = [
        ('variant', 'messages/s', 'of plain', 'target', 'by CPU', 'publish µs', 'publish + work µs')
    ]
    notes = []
    for variant in chosen:
        if variant.mode == 'plain':
            lines.append((f'— {variant.group}', '', '', '', '', '', ''))
        work, publish, total, ratio = (
            figures.median(variant, 'work'),
            figures.median(variant, 'publish'),
            figures.total(variant),
            figures.ratio(variant),
        )
        target = (
            ''
            if variant.least is None
            else f'≥ {variant.least:g} '
            + ('?' if ratio is None else 'met' if ratio >= variant.least else 'MISSED')
        )
        lines.append(
            (
                variant.title,
                _text('{:,.0f}', 1e6 / work if work else None),
                _text('{:.2f}', ratio),
                target,
                _text('{:.2f}', figures.ratio(variant, 'cpu')),
                _text('{:,.0f}', publish),
                _text('{:,.0f}', total),
            )
        )
        if variant in figures.failures:
            notes.append(f'{variant.group}, {variant.title}: {figures.failures[variant]}')
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    text = [
        '  '.join(
            cell.ljust(width) if column in (0, 3) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return '\n'.join([*text, *notes])


def _text(form: str, value: float | None) -> str:
    return '—' if value is None else form.format(value)


def main(framework: Framework, arguments: Sequence[str]) -> int:
    """Measure and print; 1 if a figure of ours is missing or misses its target, else 0."""
    name, modes = framework.title.lower(), framework.modes
    extra = ['recovery'] if framework.recovery is not None else []
    parser = argparse.ArgumentParser(
        f'python -m bench {name}',
        description=f'Measure JobSync for {framework.title} beside plain {framework.title}, on '
        'Redis.',
    )
    parser.add_argument(
        '--rounds', type=int, default=5, metavar='N', help='runs of each variant (default: 5)'
    )
    parser.add_argument(
        '--messages',
        type=int,
        default=framework.messages,
        metavar='N',
        help=f'messages of a run (default: {framework.messages})',
    )
    parser.add_argument(
        '--only',
        action='append',
        metavar='MODE',
        choices=[*modes, *extra],
        help='a mode beside plain; repeatable',
    )
    parser.add_argument(
        '--group',
        action='append',
        metavar='TEXT',
        help='groups whose name has this in it; repeatable',
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write every single value there')
    options = parser.parse_args(arguments)
    missing = sorted(
        {module for module in modes.values() if module and importlib.util.find_spec(module) is None}
    )
    if missing:
        print(
            f'not installed, hence not measured: {", ".join(missing)}; pip install '
            '"jobsync-workers[bench]"',
            file=sys.stderr,
        )
    chosen = [
        variant
        for variant in framework.variants
        if modes[variant.mode] not in missing
        and (not options.only or variant.mode in ('plain', *options.only))
        and (not options.group or any(text in variant.group for text in options.group))
    ]
    if options.only == ['recovery']:
        chosen = []
    figures, recovered = Figures(framework.variants), dict[str, float]()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(EmbeddedPostgres(settings={'max_connections': '200'}))
        redis = RedisServer()
        stack.enter_context(redis)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='jobsync-bench-')))
        stage = Stage(redis, Databases(server.config('postgres')), server, place)
        for number in range(options.rounds if chosen else 0):
            # There and back, so that a drift of the machine weighs on all alike.
            for variant in chosen if number % 2 == 0 else chosen[::-1]:
                _add(figures, framework, stage, variant, options.messages)
        if framework.recovery is not None and (options.only is None or 'recovery' in options.only):
            recovered = framework.recovery(stage)
    if chosen:
        print(render(figures, chosen))
        print(
            'Medians; noop tasks. Ratios: median of the rounds, by time, and by CPU time of the '
            'workers, which bears other load.'
        )
        print(framework.note)
    for title, seconds in recovered.items():
        print(f'SIGKILL until what was prefetched is run elsewhere: {seconds:5.1f} s  {title}')
    if recovered:
        print('(visibility_timeout is 3,600 s by default; a shorter one runs longer tasks twice)')
    if options.json:
        document = {
            'environment': {
                'python': platform.python_version(),
                'processors': os.cpu_count(),
                'load': os.getloadavg()[0],
            },
            'values': [
                {'group': variant.group, 'title': variant.title, **values}
                for variant, values in figures.values.items()
            ],
            'recovery': recovered,
        }
        options.json.write_text(
            json.dumps(document, indent=1, ensure_ascii=False) + '\n', encoding='utf-8'
        )
    ours = [variant for variant in chosen if variant.least is not None]
    return int(
        any(
            (ratio := figures.ratio(variant)) is None or ratio < (variant.least or 0)
            for variant in ours
        )
    )


def _add(
    figures: Figures, framework: Framework, stage: Stage, variant: Variant, messages: int
) -> None:
    if variant in figures.failures:
        return
    try:
        found: dict[str, Any] = measure(framework, stage, variant, messages)
    except Failed as failure:
        figures.failures[variant] = str(failure)
        print(f'  {variant.group}, {variant.title}: failed', file=sys.stderr, flush=True)
        return
    for metric, value in found.items():
        figures.values.setdefault(variant, {}).setdefault(metric, []).append(value)
    print(
        f'  {variant.group}, {variant.title}: {1e6 / found["work"]:,.0f}/s',
        file=sys.stderr,
        flush=True,
    )
