"""Programs of a project that uses Celery, as processes: the commands of the documents and of the
examples.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from jobsync_core import CoordinationConfig
from tests.support.brokers import BrokerServer
from tests.support.waiting import eventually

from ..conftest import SHORT

__all__ = ['Program', 'Programs', 'project']

_ROOT = Path(__file__).parents[2]
_START_SEC = 60.0
_STOP_SEC = 30.0
#: Long enough that a busy machine costs no lease: then keys run again.
_TIMES = {**SHORT, 'heartbeat_timeout_sec': 3.0}


class Program:
    """One process that runs until it is told to end."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors='replace')

    def wait_for(self, text: str) -> None:
        """Until the process has printed a text."""
        eventually(lambda: text in self.log or self.process.poll() is not None, _START_SEC)
        assert text in self.log, self.log

    def kill(self) -> None:
        """End it with SIGKILL, so that it can do nothing more."""
        self.process.kill()
        self.process.wait()


class Programs:
    """Runs the commands of one project, with a database and a broker of its own.

    Args:
        config: The database.
        broker: The broker's server; a part of it is taken.
        place: Where the project is.
        logs: Where the output of processes goes.
    """

    def __init__(
        self, config: CoordinationConfig, broker: BrokerServer, place: Path, logs: Path
    ) -> None:
        self.place = place
        self.broker = broker
        self.space = broker.new_space()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(('JOBSYNC_', 'CELERY_', 'DJANGO_'))
        }
        self.environment.update(
            {f'JOBSYNC_{name.upper()}': str(value) for name, value in _TIMES.items()}
        )
        self.environment.update(
            JOBSYNC_DATABASE_URL=f'postgresql://{config.user}:{config.password}@{config.host}:{config.port}/{config.dbname}',
            CELERY_BROKER_URL=broker.url(self.space),
            CELERY_RESULT_BACKEND=broker.url(self.space),
            PYTHONDONTWRITEBYTECODE='1',
            PYTHONPATH=os.pathsep.join(
                filter(None, [str(_ROOT), str(place), os.environ.get('PYTHONPATH')])
            ),
            PATH=os.pathsep.join([str(_commands(logs)), os.environ.get('PATH', '')]),
        )
        self._logs = logs
        self._programs: list[Program] = []

    def run(self, script: str, timeout: float = 90.0) -> str:
        """Run a script of the shell to its end; what it printed."""
        log = self._logs / 'script.log'
        with log.open('wb') as output:
            done = subprocess.run(
                ['sh', '-eux', '-c', script],
                cwd=self.place,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=timeout,
            )
        text = log.read_text(errors='replace')
        assert done.returncode == 0, f'{script} ended with {done.returncode}:\n{text}'
        return text

    def start(self, command: str, ready: str) -> Program:
        """Start a command, with what the shell's `NAME=value` puts in front of it, and wait until
        it prints `ready`.
        """
        words = shlex.split(command)
        environment = dict(self.environment)
        while '=' in words[0]:
            name, _, value = words.pop(0).partition('=')
            environment[name] = value
        log = self._logs / f'program{len(self._programs)}.log'
        with log.open('wb') as output:
            process = subprocess.Popen(
                words,
                cwd=self.place,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                executable=str(Path(self.environment['PATH'].split(os.pathsep)[0]) / words[0]),
            )
        self._programs.append(Program(process, log))
        self._programs[-1].wait_for(ready)
        return self._programs[-1]

    def end(self) -> None:
        """End all that runs: in order, so that no process of a pool stays."""
        running = [program.process for program in self._programs if program.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(_STOP_SEC)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        """End all that runs, and leave nothing at the broker."""
        self.end()
        self.broker.drop_space(self.space)


@contextlib.contextmanager
def project(
    config: CoordinationConfig, broker: BrokerServer, directory: Path, orders: str
) -> Iterator[Programs]:
    """The programs of a project that is one module, `orders`, and keeps no results.

    Args:
        config: The database.
        broker: The broker's server.
        directory: Where the project is made, and its logs are.
        orders: The module's text.
    """
    place = directory / 'project'
    place.mkdir()
    (place / 'orders.py').write_text(orders)
    made = Programs(config, broker, place, directory)
    del made.environment['CELERY_RESULT_BACKEND']
    yield made
    made.close()


def _commands(directory: Path) -> Path:
    """A directory with the commands of an installation, whatever is on PATH."""
    place = directory / 'bin'
    place.mkdir()
    for name, code in (
        ('python', '"$@"'),
        ('celery', '-m celery "$@"'),
        ('dramatiq', '-m dramatiq "$@"'),
        ('jobsync', '-c "import sys; from jobsync_core.cli import main; sys.exit(main())" "$@"'),
    ):
        command = place / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {code}\n')
        command.chmod(0o755)
    return place
