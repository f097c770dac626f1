"""Many nodes that start at once: `python -m bench.starts`. How long until all have registered, and
until all tokens are owned.

Each process is started by itself and holds several Jobs, as where an orchestrator starts a whole
fleet. The database is fresh.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg2

from jobsync_core import CoordinationConfig, Job
from jobsync_core.embedded.postgres import EmbeddedPostgres
from jobsync_core.errors import JobSyncError

__all__ = ['main', 'measure']

_ROOT = Path(__file__).parents[1]


def child(config: CoordinationConfig, number: int, jobs: int, wait: float) -> None:
    """One process: enters all of its Jobs at once, says what became of each, and leaves when its
    input ends.
    """
    done = threading.Event()
    lock = threading.Lock()

    def say(**fields: object) -> None:
        with lock:
            print(json.dumps(fields), flush=True)

    def run(name: str) -> None:
        try:
            with Job(name, config, wait_on_enter=wait):
                say(event='entered', at=time.time())
                done.wait()
        except JobSyncError as error:
            say(event='failed', error=f'{type(error).__name__}: {error}')

    threads = [
        threading.Thread(target=run, args=(f'node-{number:02}-{place:02}',))
        for place in range(jobs)
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    done.set()
    os._exit(0)  # the measurement is over: five hundred nodes need not leave one by one


def measure(
    config: CoordinationConfig, processes: int, jobs: int, wait: float
) -> dict[str, object]:
    """Start them, and watch from outside; times in seconds."""
    fields = {
        name: getattr(config, name) for name in ('host', 'port', 'dbname', 'user', 'password')
    }
    began = time.time()
    started = [
        subprocess.Popen(
            [
                sys.executable,
                '-m',
                'bench.starts',
                '--child',
                str(number),
                '--jobs',
                str(jobs),
                '--wait',
                str(wait),
            ],
            cwd=_ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, 'BENCH_CONFIG': json.dumps(fields)},
        )
        for number in range(processes)
    ]
    events: list[dict[str, object]] = []

    def read(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            events.append(json.loads(line))

    for process in started:
        threading.Thread(target=read, args=(process,), daemon=True).start()
    watcher = psycopg2.connect(
        host=config.host,
        port=config.port,
        dbname=config.dbname,
        user=config.user,
        password=config.password,
    )
    watcher.autocommit = True

    def value(sql: str) -> float:
        try:
            with watcher.cursor() as cursor:
                cursor.execute(sql)
                rows = cursor.fetchall()
                return float(rows[0][0] or 0)
        except psycopg2.errors.UndefinedTable:
            return 0.0

    total = processes * jobs
    found: dict[str, object] = {'nodes': total, 'wait_on_enter': wait}
    try:
        registered = owned = None
        most = 0.0
        while time.time() - began < 60 + wait + 60 and (owned is None or registered is None):
            count = value('SELECT count(*) FROM sync_node')
            most = max(most, count)
            if registered is None and count >= total:
                registered = time.time() - began
            if (
                owned is None
                and value(
                    'SELECT sum(upper(tokens) - lower(tokens)) FROM sync_assignment WHERE node IS '
                    'NOT NULL'
                )
                >= 10_000
            ):
                owned = time.time() - began
            time.sleep(0.2)
        first = value('SELECT extract(epoch FROM min(created_on)) FROM sync_node') - began
        deadline = time.time() + wait + 30
        while time.time() < deadline and len(events) < total:
            time.sleep(0.2)
        entered = [float(str(event['at'])) for event in events if event['event'] == 'entered']
        last = max(entered, default=None)
        found.update(
            registered_most=most,
            first_registered_after=round(first, 1),
            all_registered_after=round(registered, 1) if registered else None,
            owned_after_grace=round(owned - first - wait, 1) if owned else None,
            entered=len(entered),
            last_entered_after_grace=round(last - began - (registered or 0) - wait, 1)
            if last
            else None,
            failed=[event['error'] for event in events if event['event'] == 'failed'][:3],
            failures=sum(event['event'] == 'failed' for event in events),
            load=round(os.getloadavg()[0], 1),
        )
        return found
    finally:
        watcher.close()
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser('python -m bench.starts', description=__doc__)
    parser.add_argument('--processes', type=int, default=50)
    parser.add_argument('--jobs', type=int, default=10)
    parser.add_argument('--wait', type=float, default=90.0, help='wait_on_enter, in seconds')
    parser.add_argument('--child', type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        child(
            CoordinationConfig(**json.loads(os.environ['BENCH_CONFIG'])),
            options.child,
            options.jobs,
            options.wait,
        )
        return 0
    nodes = options.processes * options.jobs
    with EmbeddedPostgres(settings={'max_connections': str(2 * nodes + 50)}) as postgres:
        postgres.create_database('starts')
        print(
            json.dumps(
                measure(postgres.config('starts'), options.processes, options.jobs, options.wait)
            )
        )
    return 0


if __name__ == '__main__':
    sys.exit(main())
