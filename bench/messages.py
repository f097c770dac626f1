"""`python -m bench celery`: how fast a worker gets through messages on Redis, beside plain Celery and its lock packages."""
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobsync_core.embedded import EmbeddedPostgres
from tests.brokers import RedisServer

from .celery_app import MODES
from .nodes import Databases
from .peer import ROOT

__all__ = ['VARIANTS', 'main']

_RECORD = struct.calcsize('dq')
_TABLES = "SELECT to_regclass('sync_assignment') IS NOT NULL"
_OWNERS = 'SELECT count(DISTINCT node) FROM sync_assignment'
VISIBILITY_SEC = 30


@dataclass(frozen=True)
class Variant:
    """One way of working.

    Args:
        title: What the table calls it.
        mode: Of `celery_app`.
        group: Variants with the same are compared with the first of them, plain Celery on as many processes.
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


def _variants() -> list[Variant]:
    locks = [('exactly_once', 'once'), ('celery-once', 'celery_once'), ('celery-singleton', 'celery_singleton')]
    found = []
    for group, pool, processes in (('one worker, solo', 'solo', 1), ('one worker, prefork 2', 'prefork', 2)):
        rows: list[tuple[str, str, float | None]] = [
            ('plain Celery', 'plain', None), ('plain Celery, acks_late', 'plain_late', None),
            ('uncoordinated tasks', 'uncoordinated', 0.99), ('coordinated, all owned', 'coordinated', 0.95),
            *((title, mode, None) for title, mode in locks)]
        found += [Variant(title, mode, group, 1, pool, processes, least) for title, mode, least in rows]
    return [*found, *(Variant(title, mode, 'two workers, solo', 2, least=least) for title, mode, least in (
        ('plain Celery', 'plain', None), ('coordinated, half forwarded', 'coordinated', 0.7), ('producer-routed', 'routed', 0.95)))]


VARIANTS = _variants()


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
                **{key: value for key, value in os.environ.items() if not key.startswith(('CELERY', 'JOBSYNC'))}, **extra,
                'BENCH_MODE': mode, 'BENCH_BROKER': self.redis.url(space), 'BENCH_CONTROL': self.redis.url(control),
                'BENCH_TIMES': str(times), 'JOBSYNC_DATABASE_URL': self.server.url(self.dbname), 'PYTHONPATH': str(ROOT)}
            self.client = self.redis.client(control)
            self.broker = self.redis.client(space)
            try:
                yield
            finally:
                self.end_workers()
                for client in (self.client, self.broker):
                    client.flushdb()
                    client.close()

    def start(self, name: str, pool: str, concurrency: int, queues: str) -> None:
        """Start a worker."""
        log = (self.place / f'{name}.log').open('wb')
        with log:
            self.workers.append((name, subprocess.Popen(
                [sys.executable, '-m', 'celery', '-A', 'bench.celery_app', 'worker', '-n', f'{name}@bench', '-P', pool, '-c',
                 str(concurrency), '-Q', queues, '-l', 'WARNING', '--without-gossip', '--without-mingle', '--without-heartbeat',
                 *(['--jobsync-node', name] if MODES[self.environment['BENCH_MODE']] == 'jobsync_celery' else [])],
                env=self.environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)))

    def kill(self, number: int) -> None:
        """SIGKILL to a worker and its pool."""
        process = self.workers[number][1]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

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
            gone = [name for name, process in self.workers if process.poll() not in (None, -signal.SIGKILL)]
            if gone or time.monotonic() > deadline:
                logs = '; '.join((self.place / f'{name}.log').read_text(errors='replace')[-300:] for name, _ in self.workers)
                raise Failed(f'{what}: {"a worker ended" if gone else f"not within {timeout:g} s"}: {logs}')
            time.sleep(0.05)

    def owners(self) -> int:
        """Number of nodes that own tokens."""
        if not self.databases.query(_TABLES, self.dbname)[0][0]:
            return 0
        return int(self.databases.query(_OWNERS, self.dbname)[0][0])

    def send(self, task: str, queue: str) -> None:
        """Send one of the app's helping tasks."""
        from celery import Celery

        with Celery('driver', broker=self.environment['BENCH_BROKER']) as producer:
            producer.send_task(task, queue=queue, ignore_result=True)

    def publish(self, count: int) -> float:
        """Publish in a process of its own; seconds for one message."""
        done = subprocess.run(
            [sys.executable, '-m', 'bench.celery_app', str(count)], env=self.environment, cwd=ROOT, capture_output=True, text=True,
            timeout=300, check=False)
        if done.returncode:
            raise Failed(f'the producer failed: {done.stderr[-300:]}')
        return float(done.stdout)

    def times(self) -> list[tuple[float, int]]:
        """When which message was run, on the monotonic clock."""
        return list(struct.iter_unpack('dq', (self.place / 'times').read_bytes()))

    def cpu(self) -> float:
        """Seconds of CPU time that the workers and their pools have used; 0 where there is no /proc."""
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


def measure(stage: Stage, variant: Variant, count: int) -> dict[str, float]:
    """One run: microseconds per message in the workers and in the producer, and of the workers' CPU time.

    Every process of the pool is held until all messages are published, so that the producer does not set the pace.

    Raises:
        Failed: There is no figure.
    """
    with stage.run(variant.mode):
        names = [f'node{number}' for number in range(variant.workers)]
        for name in names:
            stage.start(name, variant.pool, variant.concurrency, f'celery,hold.{name}')
        if MODES[variant.mode] == 'jobsync_celery':
            stage.wait('tokens', lambda: stage.owners() == variant.workers)
        for name in names:
            for _ in range(variant.concurrency):
                stage.send('hold', f'hold.{name}')
        held = variant.workers * variant.concurrency
        stage.wait('held', lambda: bool(stage.client.llen('held') == held))
        publishing = stage.publish(count)
        before = stage.cpu()
        stage.client.rpush('go', *range(held))
        stage.wait('completion', lambda: stage.completed() >= count, 300)
        used = stage.cpu() - before
        times = stage.times()
        if sorted(number for _, number in times) != list(range(count)):
            raise Failed(f'{len(times)} completions of {count} messages')
        moments = [moment for moment, _ in times]
        return {'work': (max(moments) - min(moments)) / (count - 1) * 1e6, 'publish': publishing * 1e6, 'cpu': used / count * 1e6}


def recovery(stage: Stage, mode: str) -> float:
    """Seconds from a worker's SIGKILL until all that it had prefetched was run by another; two prefork workers.

    Raises:
        Failed: There is no figure.
    """
    with stage.run(mode, BENCH_VISIBILITY_SEC=str(VISIBILITY_SEC)) if mode == 'plain' else stage.run(mode):
        stage.start('first', 'prefork', 1, 'celery,stick')
        coordinated = mode != 'plain'
        if coordinated:
            stage.start('second', 'prefork', 2, 'celery')
            stage.wait('tokens', lambda: stage.owners() == 2)
        stage.send('stick', 'stick')
        unacked = 'jobsync.sync_.first.unacked' if coordinated else 'unacked'
        # Acknowledged early: the message that is running is lost with plain Celery, and no part of this.
        stage.wait('stuck', lambda: bool(not stage.broker.llen('stick') and stage.broker.hlen(unacked) == 0) and _is_up(stage))
        stage.publish(3)
        stage.wait('prefetched', lambda: bool(stage.broker.hlen(unacked) == 3))
        if not coordinated:
            stage.start('second', 'prefork', 2, 'celery,hold.second')
            stage.send('hold', 'hold.second')
            stage.wait('second', lambda: bool(stage.client.llen('held') == 1))
        killed = time.monotonic()
        stage.kill(0)
        stage.wait('recovery', lambda: stage.completed() >= 3, 300)
        stage.client.rpush('go', 1)
        return max(moment for moment, _ in stage.times()) - killed


def _is_up(stage: Stage) -> bool:
    return bool(stage.broker.exists('_kombu.binding.stick'))


@dataclass
class Figures:
    """All values: variant -> metric -> one per round."""

    values: dict[Variant, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[Variant, str] = field(default_factory=dict)

    def median(self, variant: Variant, metric: str) -> float | None:
        """The median of a metric."""
        found = self.values.get(variant, {}).get(metric)
        return statistics.median(found) if found and variant not in self.failures else None

    def total(self, variant: Variant) -> float | None:
        """Microseconds for publishing and working together."""
        found = self.values.get(variant, {})
        both = [sum(pair) for pair in zip(found.get('work', ()), found.get('publish', ()), strict=True)]
        return statistics.median(both) if both and variant not in self.failures else None

    def ratio(self, variant: Variant, metric: str = 'work') -> float | None:
        """Throughput over that of plain Celery in the same round; the median of the rounds. 'cpu': by CPU time alone."""
        plain = next(other for other in VARIANTS if other.group == variant.group)
        ours, theirs = (self.values.get(each, {}).get(metric, []) for each in (variant, plain))
        if not ours or len(ours) != len(theirs) or not all(ours) or variant in self.failures or plain in self.failures:
            return None
        return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def render(figures: Figures, chosen: Sequence[Variant]) -> str:
    """The table."""
    lines = [('variant', 'messages/s', 'of plain', 'target', 'by CPU', 'publish µs', 'publish + work µs')]
    notes = []
    for variant in chosen:
        if lines[-1][0] != variant.group and variant.title == 'plain Celery':
            lines.append((f'— {variant.group}', '', '', '', '', '', ''))
        work, publish, total, ratio = (
            figures.median(variant, 'work'), figures.median(variant, 'publish'), figures.total(variant), figures.ratio(variant))
        target = '' if variant.least is None else f'≥ {variant.least:g} ' + (
            '?' if ratio is None else 'met' if ratio >= variant.least else 'MISSED')
        lines.append((variant.title, _text('{:,.0f}', 1e6 / work if work else None), _text('{:.2f}', ratio), target,
                      _text('{:.2f}', figures.ratio(variant, 'cpu')), _text('{:,.0f}', publish), _text('{:,.0f}', total)))
        if variant in figures.failures:
            notes.append(f'{variant.group}, {variant.title}: {figures.failures[variant]}')
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    text = ['  '.join(cell.ljust(width) if column in (0, 3) else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
    return '\n'.join([*text, *notes])


def _text(form: str, value: float | None) -> str:
    return '—' if value is None else form.format(value)


def main(arguments: Sequence[str]) -> int:
    """Measure and print; 1 if a figure of ours is missing or misses its target, else 0."""
    parser = argparse.ArgumentParser('python -m bench celery', description='Measure JobSync for Celery beside plain Celery, on Redis.')
    parser.add_argument('--rounds', type=int, default=5, metavar='N', help='runs of each variant (default: 5)')
    parser.add_argument('--messages', type=int, default=4000, metavar='N', help='messages of a run (default: 4000)')
    parser.add_argument('--only', action='append', metavar='MODE', choices=[*MODES, 'recovery'], help='a mode beside plain; repeatable')
    parser.add_argument('--group', action='append', metavar='TEXT', help='groups whose name has this in it; repeatable')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write every single value there')
    options = parser.parse_args(arguments)
    missing = sorted({module for module in MODES.values() if module and importlib.util.find_spec(module) is None})
    if missing:
        print(f'not installed, hence not measured: {", ".join(missing)}; pip install "jobsync-workers[bench]"', file=sys.stderr)
    chosen = [
        variant for variant in VARIANTS
        if MODES[variant.mode] not in missing and (not options.only or variant.mode in ('plain', *options.only))
        and (not options.group or any(text in variant.group for text in options.group))]
    if options.only == ['recovery']:
        chosen = []
    figures, recovered = Figures(), {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(EmbeddedPostgres(settings={'max_connections': '200'}))
        redis = RedisServer()
        stack.enter_context(redis)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='jobsync-bench-')))
        stage = Stage(redis, Databases(server.config('postgres')), server, place)
        for number in range(options.rounds if chosen else 0):
            # There and back, so that a drift of the machine weighs on all alike.
            for variant in chosen if number % 2 == 0 else chosen[::-1]:
                _add(figures, stage, variant, options.messages)
        if options.only is None or 'recovery' in options.only:
            for title, mode in (
                    (f'plain Celery, visibility_timeout={VISIBILITY_SEC}', 'plain'), ('JobSync, heartbeat_timeout_sec=15', 'pinned')):
                try:
                    recovered[title] = recovery(stage, mode)
                except Failed as failure:
                    print(f'recovery, {title}: {failure}', file=sys.stderr)
    if chosen:
        print(render(figures, chosen))
        print('Medians; noop tasks. Ratios: median of the rounds, by time, and by CPU time of the workers, which bears other load.\n'
              'exactly_once and the lock packages: compare "publish + work", since those do half of theirs in the producer.')
    for title, seconds in recovered.items():
        print(f'SIGKILL until what was prefetched is run elsewhere: {seconds:5.1f} s  {title}')
    if recovered:
        print('(visibility_timeout is 3,600 s by default; a shorter one runs longer tasks twice)')
    if options.json:
        document = {
            'environment': {'python': platform.python_version(), 'processors': os.cpu_count(), 'load': os.getloadavg()[0]},
            'values': [{'group': variant.group, 'title': variant.title, **values} for variant, values in figures.values.items()],
            'recovery': recovered}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    ours = [variant for variant in chosen if variant.least is not None]
    return int(any((ratio := figures.ratio(variant)) is None or ratio < (variant.least or 0) for variant in ours))


def _add(figures: Figures, stage: Stage, variant: Variant, messages: int) -> None:
    if variant in figures.failures:
        return
    try:
        found: dict[str, Any] = measure(stage, variant, messages)
    except Failed as failure:
        figures.failures[variant] = str(failure)
        print(f'  {variant.group}, {variant.title}: failed', file=sys.stderr, flush=True)
        return
    for metric, value in found.items():
        figures.values.setdefault(variant, {}).setdefault(metric, []).append(value)
    print(f'  {variant.group}, {variant.title}: {1e6 / found["work"]:,.0f}/s', file=sys.stderr, flush=True)
