"""The core at work: processes share the standard library's source files, each file counted once,
though one process is killed.

Run `python examples/core_demo.py` (or `make demo`). It starts a PostgreSQL of its own, several
worker processes with one node each, kills one of them with SIGKILL midway, lets another join, and
reads the verdict from the database. Heartbeats are shortened (0.5 s, dead after 2 s; the defaults
are 5 s and 15 s) so that all of it takes less than a minute.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psycopg2

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # works from a checkout without an installation

from jobsync_core import (
    ClaimLost,
    CoordinationConfig,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    Fenced,
    Job,
    Task,
)

SETTINGS: dict[str, Any] = {
    'appname': 'demo_',
    'total_tokens': 5_000,
    'heartbeat_interval_sec': 0.5,
    'heartbeat_timeout_sec': 2.0,
    'rebalance_check_interval_sec': 3.0,
}
GRACE_SEC = 2.0
#: The run is stretched to about this many seconds, so that there is something to watch and to kill.
LEAST_SEC = 10.0
MOST_SEC = 180.0
PINNED = 'asyncio/'
PIN = '%-gpu'

# No unique key: were a file counted twice, there would be two rows.
TABLES = """
CREATE TABLE result (path text NOT NULL, node text NOT NULL, functions int NOT NULL, classes int NOT
    NULL, lines int NOT NULL,
                     problem text, at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE source (path text PRIMARY KEY);
"""


@dataclass(frozen=True)
class Count:
    """What is found in one file."""

    functions: int = 0
    classes: int = 0
    lines: int = 0
    problem: str | None = None


def count(path: Path) -> Count:
    """Parse a source file and count."""
    data = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        # Some of the standard library's test data is wrong on purpose.
        return Count(lines=data.count(b'\n'), problem=type(error).__name__)
    nodes = list(ast.walk(tree))
    return Count(
        sum(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) for node in nodes),
        sum(isinstance(node, ast.ClassDef) for node in nodes),
        data.count(b'\n'),
    )


def library() -> Path:
    """Where the standard library is."""
    return Path(sysconfig.get_path('stdlib'))


def sources(limit: int | None) -> list[str]:
    """Source files of the standard library, relative to it; with a limit, a fixed sample that has
    some pinned ones.
    """
    root = library()
    paths = sorted(
        str(path.relative_to(root))
        for path in root.rglob('*.py')
        if 'site-packages' not in path.parts
        and 'dist-packages' not in path.parts
        and path.is_file()
    )
    if limit is None or limit >= len(paths):
        return paths
    pinned = [path for path in paths if path.startswith(PINNED)][: max(1, limit // 10)]
    others = [path for path in paths if not path.startswith(PINNED)]
    return sorted(pinned + random.Random(0).sample(others, limit - len(pinned)))


def work(name: str, config: CoordinationConfig, grace: float, pace: float) -> None:
    """What each worker runs: the job proper.

    Args:
        name: The node's name.
        config: The cluster.
        grace: Seconds that entering takes.
        pace: Seconds that one file takes at least.
    """

    def pin(job: Job) -> None:
        job.register_locks_bulk(
            [(path, PIN, 'demo') for path in pending(config) if path.startswith(PINNED)]
        )

    with Job(name, config, wait_on_enter=grace, lock_provider=pin) as job:
        while todo := pending(config):
            for path in todo:
                if job.can_claim_task(Task(path)):
                    process(job, path, pace)
            time.sleep(0.05)  # the rest is other nodes'


def process(job: Job, path: str, pace: float) -> None:
    """Count one file; its row and the record that it is done are one transaction."""
    try:
        with job.once(path) as execution:
            until = time.monotonic() + pace
            found = count(library() / path)
            time.sleep(max(0.0, until - time.monotonic()))
            with execution.transaction() as connection, connection.cursor() as cursor:
                cursor.execute(
                    'INSERT INTO result (path, node, functions, classes, lines, problem) VALUES '
                    '(%s, %s, %s, %s, %s, %s)',
                    (
                        path,
                        job.node_name,
                        found.functions,
                        found.classes,
                        found.lines,
                        found.problem,
                    ),
                )
    except (DuplicateExecution, ExecutionRunning, ClaimLost, Fenced, DatabaseUnavailable):
        pass  # done by somebody else, or to be tried again


def pending(config: CoordinationConfig) -> list[str]:
    """Files without a row."""
    rows = query(
        config,
        'SELECT path FROM source WHERE NOT EXISTS (SELECT FROM result WHERE result.path = '
        'source.path) ORDER BY path',
    )
    return [path for (path,) in rows]


def query(
    config: CoordinationConfig, sql: str, parameters: tuple[object, ...] = ()
) -> list[tuple[Any, ...]]:
    """Run one statement."""
    with contextlib.closing(
        psycopg2.connect(
            host=config.host,
            port=config.port,
            dbname=config.dbname,
            user=config.user,
            password=config.password,
        )
    ) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql, parameters)
            return list(cursor.fetchall()) if cursor.description else []


def worker_main() -> int:
    """A worker process: its settings come on standard input, whose end means that the demo is
    gone.
    """
    settings = json.loads(sys.stdin.readline())

    def watch_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    work(
        settings['name'],
        CoordinationConfig(**settings['config']),
        settings['grace'],
        settings['pace'],
    )
    return 0


@dataclass
class Demo:
    """One run: its workers and what has happened."""

    pin: ClassVar[str] = PIN

    config: CoordinationConfig
    paths: list[str]
    pace: float
    workers: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    notes: list[str] = field(default_factory=list)
    victim: str | None = None
    victim_node: str | None = None
    killed_at: float = 0.0
    in_flight: list[str] = field(default_factory=list)
    recovery_sec: float | None = None
    joined: str | None = None

    def start(self, name: str, grace: float) -> None:
        """Start a worker process."""
        fields = {
            'host': self.config.host,
            'port': self.config.port,
            'dbname': self.config.dbname,
            'user': self.config.user,
            'password': self.config.password,
            'minimum_nodes': self.config.minimum_nodes,
            **SETTINGS,
        }
        # A session of its own, so that Ctrl-C reaches the demo alone, which then ends its workers.
        process = subprocess.Popen(
            [sys.executable, __file__, '--worker'],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(
            json.dumps({'name': name, 'config': fields, 'grace': grace, 'pace': self.pace}) + '\n'
        )
        process.stdin.flush()
        self.workers[name] = process

    def stop(self) -> None:
        """End every worker."""
        for process in self.workers.values():
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()

    def worker_of(self, node: str) -> str:
        """The worker that a node belongs to."""
        return node

    def note(self, text: str) -> None:
        """Remember something that happened, for the screen."""
        self.notes.append(f'{time.monotonic() - self.began:5.1f} s  {text}')

    def done(self) -> int:
        """Number of files that have a row."""
        return int(query(self.config, 'SELECT count(DISTINCT path) FROM result')[0][0])

    def kill_leader(self) -> None:
        """SIGKILL the eldest worker that nothing is pinned to, while it has a file in hand."""
        for (name,) in query(
            self.config,
            "SELECT name FROM demo_node WHERE state = 'active' ORDER BY created_on, name",
        ):
            worker = self.worker_of(name)
            if worker.endswith('-gpu') or worker not in self.workers:
                continue
            running = query(
                self.config,
                "SELECT key FROM demo_execution WHERE node = %s AND state = 'running'",
                (name,),
            )
            if running:
                self.workers[worker].kill()
                self.killed_at = time.monotonic()
                self.workers[worker].wait()
                self.victim, self.victim_node = worker, name
                left = query(
                    self.config,
                    "SELECT key FROM demo_execution WHERE node = %s AND state = 'running'",
                    (name,),
                )
                self.in_flight = [key for (key,) in left]
                self.note(f'{worker} is killed (SIGKILL); it had {len(left)} file in hand')
            return

    def look(self) -> None:
        """Do what is due at this moment."""
        done = self.done()
        if self.victim is None and done >= 0.25 * len(self.paths):
            self.kill_leader()
        if self.victim is not None and self.recovery_sec is None:
            ((owned,),) = query(
                self.config,
                'SELECT coalesce(sum(upper(tokens) - lower(tokens)), 0)::int FROM demo_assignment '
                'WHERE node <> %s',
                (self.victim_node,),
            )
            if owned == self.config.total_tokens:
                self.recovery_sec = time.monotonic() - self.killed_at
                self.note(
                    f'every token has a live owner again, {self.recovery_sec:.2f} s after the kill'
                )
        if self.joined is None and done >= 0.5 * len(self.paths):
            self.joined = f'worker-{len(self.workers) + 1}'
            self.start(self.joined, 0.0)
            self.note(f'{self.joined} joins')

    @property
    def running(self) -> bool:
        """Whether a worker still runs."""
        return any(process.poll() is None for process in self.workers.values())

    def rows(self) -> list[tuple[str, str, int, int]]:
        """Node, state, tokens and files of each worker."""
        found = query(
            self.config,
            """
            SELECT name, state, coalesce(tokens, 0)::int, coalesce(files, 0)::int
            FROM demo_node FULL JOIN (
                SELECT node AS name, sum(upper(tokens) - lower(tokens)) AS tokens FROM
                    demo_assignment WHERE node IS NOT NULL GROUP BY node
            ) t USING (name) FULL JOIN (SELECT node AS name, count(*) AS files FROM result GROUP BY
                node) r USING (name)""",
        )
        rows = {
            name: (name, 'killed' if name == self.victim else 'gone', 0, 0) for name in self.workers
        }
        for node, state, tokens, files in found:
            name = self.worker_of(node)
            if name not in rows:
                continue
            _, before, more_tokens, more_files = rows[name]
            rows[name] = (
                name,
                before if name == self.victim else state or before,
                tokens + more_tokens,
                files + more_files,
            )
        return list(rows.values())


@contextlib.contextmanager
def screen(demo: Demo) -> Iterator[Any]:
    """A function that shows the present state: a live table on a terminal, lines elsewhere."""
    rich = _rich() if sys.stdout.isatty() else None
    if rich is None:
        yield _Lines(demo).show
        return
    live_class, table_class, group_class = rich

    def render() -> Any:
        table = table_class(title=f'{demo.done()} of {len(demo.paths)} files')
        for column, side in (
            ('node', 'left'),
            ('state', 'left'),
            ('tokens', 'right'),
            ('files', 'right'),
        ):
            table.add_column(column, justify=side)
        for row in demo.rows():
            table.add_row(*map(str, row), style='red' if row[1] == 'killed' else None)
        return group_class(table, *demo.notes)

    with live_class(render(), auto_refresh=False) as live:
        yield lambda: live.update(render(), refresh=True)


def _rich() -> tuple[Any, Any, Any] | None:
    try:
        from rich.console import Group
        from rich.live import Live
        from rich.table import Table
    except ImportError:
        return None
    return Live, Table, Group


class _Lines:
    """Plain output: each note once, and the state every two seconds."""

    def __init__(self, demo: Demo) -> None:
        self._demo = demo
        self._shown = 0
        self._next = 0.0

    def show(self) -> None:
        demo = self._demo
        for note in demo.notes[self._shown :]:
            print(note, flush=True)
        self._shown = len(demo.notes)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 2
            nodes = ', '.join(
                f'{name} {state} {tokens} tokens {files} files'
                for name, state, tokens, files in demo.rows()
            )
            print(
                f'{now - demo.began:5.1f} s  {demo.done()} of {len(demo.paths)} files: {nodes}',
                flush=True,
            )


def verdict(demo: Demo) -> bool:
    """Print what the database says; whether it is what was promised."""
    rows, files = query(demo.config, 'SELECT count(*)::int, count(DISTINCT path)::int FROM result')[
        0
    ]
    lost = len(pending(demo.config))
    pinned, astray = query(
        demo.config,
        'SELECT count(*)::int, count(*) FILTER (WHERE node NOT LIKE %s)::int FROM result WHERE '
        'path LIKE %s',
        (PIN, PINNED + '%'),
    )[0]
    functions, classes, lines = query(
        demo.config, 'SELECT sum(functions)::int, sum(classes)::int, sum(lines)::int FROM result'
    )[0]
    again = query(demo.config, 'SELECT node FROM result WHERE path = ANY (%s)', (demo.in_flight,))
    rerun = sum(node != demo.victim for (node,) in again)
    crashed = [
        name
        for name, process in demo.workers.items()
        if name != demo.victim and process.returncode != 0
    ]
    checks = [
        ('files', len(demo.paths), True),
        ('rows', rows, rows == len(demo.paths)),
        ('duplicates', rows - files, rows == files),
        ('lost', lost, lost == 0),
        (
            f'pinned to {PIN}, on such a node',
            f'{pinned - astray} of {pinned}',
            astray == 0 and pinned > 0,
        ),
        ('killed midway', demo.victim or 'nobody', demo.victim is not None),
        (
            'in its hands, run again elsewhere',
            f'{rerun} of {len(demo.in_flight)}',
            rerun == len(demo.in_flight),
        ),
        (
            'kill to full ownership',
            'never' if demo.recovery_sec is None else f'{demo.recovery_sec:.2f} s',
            demo.recovery_sec is not None,
        ),
        ('joined midway', demo.joined or 'nobody', demo.joined is not None),
        ('workers that failed', ', '.join(crashed) or 0, not crashed),
    ]
    print(f'\nCounted: {functions} functions, {classes} classes, {lines} lines. By node:')
    for name, _, _, count_of_files in demo.rows():
        print(f'  {name:<16} {count_of_files:>6} files')
    print('\nVerdict, from the database:')
    for label, value, good in checks:
        print(f'  {"ok  " if good else "FAIL"} {label:<36} {value}')
    good = all(good for _, _, good in checks)
    print('\nEach file was counted once.' if good else '\nThe verdict fails.')
    return good


def run(workers: int, limit: int | None) -> int:
    """Run the demo; the exit code."""
    from jobsync_core.embedded.postgres import EmbeddedPostgres
    from jobsync_core.store.schema import create_schema
    from jobsync_core.store.sessions import Sessions

    paths = sources(limit)
    print(
        f'{len(paths)} source files of {library()}, {workers} workers; heartbeats of '
        f'{SETTINGS["heartbeat_interval_sec"]} s, dead after '
        f'{SETTINGS["heartbeat_timeout_sec"]} s (shortened for the demo)',
        flush=True,
    )
    with EmbeddedPostgres() as server:
        server.create_database('demo')
        config = server.config('demo', minimum_nodes=workers, **SETTINGS)
        sessions = Sessions(config, 'demo')
        with sessions.session() as connection:
            create_schema(connection, config)
        sessions.close_all()
        query(config, TABLES)
        query(config, 'INSERT INTO source SELECT unnest(%s)', (paths,))
        demo = Demo(config, paths, LEAST_SEC * workers / len(paths))
        try:
            for number in range(1, workers + 1):
                demo.start(
                    f'worker-{number}-gpu' if number == workers else f'worker-{number}', GRACE_SEC
                )
            demo.note(f'{workers} workers start')
            with screen(demo) as show:
                while demo.running or (demo.victim is not None and demo.recovery_sec is None):
                    if time.monotonic() - demo.began > MOST_SEC:
                        demo.note(f'given up after {MOST_SEC:.0f} s')
                        break
                    demo.look()
                    show()
                    time.sleep(0.05)
        finally:
            demo.stop()
        return 0 if verdict(demo) else 1


def main() -> int:
    """The command line."""
    if sys.argv[1:] == ['--worker']:
        return worker_main()
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument(
        '--files', type=int, metavar='N', help='take a sample of N files (default: all)'
    )
    parser.add_argument(
        '--workers',
        type=int,
        default=4,
        metavar='N',
        help='worker processes at the start, at least 2 (default: 4)',
    )
    options = parser.parse_args()
    if options.workers < 2 or (options.files is not None and options.files < 20):
        parser.error(
            'at least 2 workers and 20 files are needed for one of them to be killed midway'
        )

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(number, interrupt)
    try:
        return run(options.workers, options.files)
    except KeyboardInterrupt:
        print('\nInterrupted; everything that was started is ended.')
        return 130


if __name__ == '__main__':
    sys.exit(main())
