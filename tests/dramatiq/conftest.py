"""A cluster of real `dramatiq` processes."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from jobsync_core.worker.owners import OwnerMap, Place
from tests.support.brokers import BrokerServer
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]


class Workers:
    """Worker processes of one broker and one database, and their log."""

    def __init__(
        self, app: Any, server: BrokerServer, space: str, folder: Path, environment: dict[str, str]
    ) -> None:
        self.app, self.server, self.space = app, server, space
        self._folder, self._environment = folder, environment
        config = app.plugin.settings.config
        self._sessions = Sessions(config, 'jobsync test')
        self.owners: Any = OwnerMap(self._sessions, Tables.of(config), app.plugin.settings.group_of)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(
        self, processes: int = 1, *options: str, method: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a master, whose processes are started by that method of multiprocessing; default:
        Dramatiq's own choice.
        """
        program = ['-m', 'dramatiq']
        if method is not None:
            choice = f'import multiprocessing; multiprocessing.set_start_method({method!r})'
            program = [
                '-c',
                f'{choice}\nimport sys\nfrom dramatiq.cli import main\nsys.exit(main())',
            ]
        with (self._folder / f'worker{len(self.started)}').open('wb') as output:
            process = subprocess.Popen(
                [
                    sys.executable,
                    *program,
                    '-p',
                    str(processes),
                    'tests.dramatiq.worker_app',
                    *options,
                ],
                cwd=ROOT,
                env=self._environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def output(self) -> str:
        return '\n'.join(path.read_text() for path in sorted(self._folder.glob('worker*')))

    def wait_for_nodes(self, number: int, home: str = 'default') -> None:
        """Wait until so many nodes own all keys of a home queue."""

        def found() -> bool:
            places = self._places(home)
            return all(place.queue for place in places) and len({p.node for p in places}) == number

        eventually(found, 30)

    def queues(self, home: str = 'default') -> set[str]:
        """The queues of the nodes that own keys of a home queue."""
        return {place.queue for place in self._places(home) if place.queue}

    def _places(self, home: str) -> list[Place]:
        self.owners.reread()
        return [self.owners.find(f'probe:{n}', home) for n in range(100)]

    def depth(self, queue: str) -> int:
        """Messages in a queue, those that were taken and not acknowledged included."""
        depths = self.server.depths(self.space)
        if self.server.kind == 'redis':
            return depths.get(f'dramatiq:{queue}.msgs', 0)
        return depths.get(queue, 0) + depths.get(f'{queue} (unacked)', 0)

    def wait_until_empty(self) -> None:
        """Wait until the broker has nothing more, what is not acknowledged included. A task's last
        line comes before that: who is killed in between leaves a message behind.
        """
        eventually(lambda: not self.server.depths(self.space), 30)

    def lines(self, start: str) -> list[str]:
        return [line for line in self.app.log.lrange('log', 0, -1) if line.startswith(start)]

    def counts(self, start: str) -> Counter[str]:
        return Counter(line.split()[0] for line in self.lines(start))

    def check_ends(self, line: str, victim: subprocess.Popen[bytes], threads: int) -> None:
        """Each has ended once, but for what a killed worker had ended and not recorded yet: that is
        done again.

        Args:
            line: How the lines of ends begin.
            victim: The worker.
            threads: How many it had.
        """
        ended = self.counts(line)
        again = [one for one, number in ended.items() if number > 1]
        assert len(again) <= threads and max(ended.values()) <= 2, again
        for one in again:
            assert any(f'@{victim.pid}-' in found for found in self.lines(f'{one} ')), one

    def stop(self) -> None:
        self._sessions.close_all()
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            # Dramatiq 1 starts a process for Prometheus, which outlives a master that was killed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(params=['redis', 'rabbitmq'])
def server(request: pytest.FixtureRequest) -> BrokerServer:
    """Each broker in turn."""
    found: BrokerServer = request.getfixturevalue(f'{request.param}_server')
    return found


@pytest.fixture
def options() -> dict[str, Any]:
    """Settings of the plugin, in the workers and in the test process."""
    return {}


@pytest.fixture
def workers(
    server: BrokerServer,
    redis_server: Any,
    postgres: Any,
    make_config: Callable[..., Any],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Workers]:
    config = make_config()
    space, store = server.new_space(), redis_server.new_space()
    monkeypatch.setenv('TEST_BROKER', server.url(space))
    monkeypatch.setenv('TEST_REDIS', redis_server.url(store))
    monkeypatch.setenv('TEST_DATABASE', postgres.url(config.dbname))
    monkeypatch.setenv('TEST_OPTIONS', json.dumps(options))
    # Dramatiq 1 serves Prometheus at a fixed port, at which there is one worker at a time; this one
    # is free.
    monkeypatch.setenv('dramatiq_prom_port', '0')
    monkeypatch.delitem(sys.modules, 'tests.dramatiq.worker_app', raising=False)
    app = importlib.import_module('tests.dramatiq.worker_app')
    found = Workers(app, server, space, tmp_path, dict(os.environ))
    yield found
    found.stop()
    print(found.output()[-8000:])  # shown where the test fails
    app.close()
    server.drop_space(space)
    redis_server.drop_space(store)
