"""A cluster of real `dramatiq` processes."""
from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..waiting import eventually

ROOT = Path(__file__).parents[2]


class Workers:
    """Worker processes of one broker and one database, and their log."""

    def __init__(self, app: Any, folder: Path, environment: dict[str, str]) -> None:
        self.app = app
        self._folder, self._environment = folder, environment
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, processes: int = 1, *options: str) -> subprocess.Popen[bytes]:
        with (self._folder / f'worker{len(self.started)}').open('wb') as output:
            process = subprocess.Popen(
                [sys.executable, '-m', 'dramatiq', '-p', str(processes), '-t', '4', 'tests.dramatiq.worker_app', *options], cwd=ROOT,
                env=self._environment, stdout=output, stderr=output, start_new_session=True)
        self.started.append(process)
        return process

    def output(self) -> str:
        return '\n'.join(path.read_text() for path in sorted(self._folder.glob('worker*')))

    def wait_for_nodes(self, number: int) -> None:
        def known() -> bool:
            owners = self.app.plugin._owner_map()
            owners.reread()
            return len({place.node for place in owners._copy.places if place.queue}) == number
        eventually(known, 30)

    def lines(self, start: str) -> list[str]:
        return [line for line in self.app.log.lrange('log', 0, -1) if line.startswith(start)]

    def counts(self, start: str) -> Counter[str]:
        return Counter(line.split()[0] for line in self.lines(start))

    def stop(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def workers(redis_server: Any, postgres: Any, make_config: Callable[..., Any], tmp_path: Path,
            monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    config = make_config()
    space = redis_server.new_space()
    monkeypatch.setenv('TEST_REDIS', redis_server.url(space))
    monkeypatch.setenv('TEST_DATABASE', postgres.url(config.dbname))
    monkeypatch.delitem(sys.modules, 'tests.dramatiq.worker_app', raising=False)
    app = importlib.import_module('tests.dramatiq.worker_app')
    found = Workers(app, tmp_path, dict(os.environ))
    yield found
    found.stop()
    app.broker.client.close()
    app.log.close()
    redis_server.drop_space(space)

