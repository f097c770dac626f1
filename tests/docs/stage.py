"""The surroundings in which the blocks of one document run: a database, short waits, and what the
document takes for granted.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import jobsync
import jobsync_core
from jobsync_core import CoordinationConfig, Job
from jobsync_core.embedded.postgres import EmbeddedPostgres

from .blocks import ROOT, Block

__all__ = ['Stage', 'connected', 'entered']

_GRACE_SEC = 0.5


@contextlib.contextmanager
def connected(
    config: CoordinationConfig, **replace: object
) -> Iterator[psycopg2.extensions.connection]:
    """A connection on which every statement is its own transaction."""
    where: dict[str, Any] = {
        'host': config.host,
        'port': config.port,
        'dbname': config.dbname,
        'user': config.user,
        'password': config.password,
        **replace,
    }
    with contextlib.closing(psycopg2.connect(**where)) as connection:
        connection.autocommit = True
        yield connection


@contextlib.contextmanager
def entered(config: CoordinationConfig, *names: str) -> Iterator[list[Job]]:
    """Nodes of these names, which enter at the same time."""
    with contextlib.ExitStack() as stack:
        jobs = [Job(name, config, wait_on_enter=_GRACE_SEC) for name in names]
        threads = [threading.Thread(target=job.__enter__) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job in jobs:
            stack.push(job)
        yield jobs


class Stage:
    """Runs blocks against a database of its own.

    The documents name a database at localhost:5432 and wait for up to two minutes. Here,
    `CoordinationConfig` points to the test's server whatever it is given, and `Job` waits for half
    a second at most; where a document asks for several nodes, others really join. The statements
    themselves, imports included, run unchanged.

    Args:
        config: The test's database, with the default prefix.
        postgres: Its server.
        directory: Where shell blocks run.
        monkeypatch: Puts these classes where the documents import them from.
    """

    def __init__(
        self,
        config: CoordinationConfig,
        postgres: EmbeddedPostgres,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.config = config
        self.names: dict[str, Any] = {'__name__': 'document'}
        self.printed: list[str] = []
        self._directory = directory
        url = f'postgresql://{config.user}:{config.password}@{config.host}:{config.port}/{config.dbname}'
        here = {
            name: getattr(config, name) for name in ('host', 'port', 'dbname', 'user', 'password')
        }

        class HereConfig(CoordinationConfig):
            def __init__(self, **settings: Any) -> None:
                super().__init__(**{**settings, **here, 'connection_options': {}})

        class ShortJob(Job):
            def __init__(self, *args: Any, **settings: Any) -> None:
                super().__init__(
                    *args,
                    **{
                        **settings,
                        'wait_on_enter': min(settings.get('wait_on_enter', 120), _GRACE_SEC),
                    },
                )
                self._others = contextlib.ExitStack()

            def __enter__(self) -> Job:
                if self.config is not None and self.config.minimum_nodes > 1:
                    # The others stay as long as this node does, and begin to register when it does.
                    names = [f'other-{number}' for number in range(1, self.config.minimum_nodes)]
                    enter = threading.Thread(
                        target=lambda: self._others.enter_context(entered(self._plain(), *names))
                    )
                    enter.start()
                    try:
                        return super().__enter__()
                    finally:
                        enter.join()
                return super().__enter__()

            def _plain(self) -> CoordinationConfig:
                assert self.config is not None
                return self.config

            def __exit__(self, *details: Any) -> None:
                super().__exit__(*details)
                self._others.close()

        for package in (jobsync, jobsync_core):
            monkeypatch.setattr(package, 'CoordinationConfig', HereConfig)
            monkeypatch.setattr(package, 'Job', ShortJob)
        monkeypatch.setenv('JOBSYNC_DATABASE_URL', url)
        monkeypatch.delenv('JOBSYNC_APPNAME', raising=False)
        monkeypatch.setitem(sys.modules, 'flask', _flask())
        self._path = os.pathsep.join(
            [str(_commands(directory)), str(postgres.bin_dir), os.environ.get('PATH', '')]
        )

    def run(self, block: Block) -> None:
        """Run one block; what it raises, this raises, with the document's own line."""
        runners = {
            'python': self._python,
            'sql': self._sql,
            'sh': self._shell,
            'ini': self._settings,
        }
        runners[block.language](block)

    def _python(self, block: Block) -> None:
        if block.text.startswith('# proj.py\n'):
            # An app of Celery's is known in all of its process: it gets one of its own.
            program = self._directory / 'proj.py'
            program.write_text(block.text, encoding='utf-8')
            done = subprocess.run(
                [sys.executable, '-W', 'error', str(program)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=60,
                env={**os.environ, 'PYTHONPATH': str(ROOT)},
            )
            assert done.returncode == 0, f'{block} ended with {done.returncode}:\n{done.stdout}'
            return
        # Empty lines in front, so that a traceback shows the line of the document.
        exec(compile('\n' * (block.line - 1) + block.text, str(block.path), 'exec'), self.names)

    def _sql(self, block: Block) -> None:
        with connected(self.config) as connection, connection.cursor() as cursor:
            cursor.execute(block.text)

    def _shell(self, block: Block) -> None:
        done = subprocess.run(
            ['sh', '-eux', '-c', block.text],
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, 'PATH': self._path, 'PYTHONPATH': str(ROOT)},
        )
        assert done.returncode == 0, f'{block} ended with {done.returncode}:\n{done.stdout}'
        self.printed.append(done.stdout)

    def _settings(self, block: Block) -> None:
        with connected(self.config) as connection, connection.cursor() as cursor:
            for line in block.text.splitlines():
                name = line.partition('=')[0].strip()
                cursor.execute('SELECT count(*) FROM pg_settings WHERE name = %s', (name,))
                assert cursor.fetchone() == (1,), f'{block}: PostgreSQL has no setting {name}'


def _commands(directory: Path) -> Path:
    """A directory with the command `jobsync`, as an installation makes it."""
    place = directory / 'commands'
    place.mkdir()
    command = place / 'jobsync'
    command.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; from jobsync_core.cli import main; '
        'sys.exit(main())" "$@"\n'
    )
    command.chmod(0o755)
    return place


def _flask() -> types.ModuleType:
    """As much of Flask as the documents use."""
    module = types.ModuleType('flask')

    class Flask:
        def __init__(self, name: str) -> None:
            self.name = name

        def route(self, path: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
            return lambda function: function

    vars(module).update(Flask=Flask, jsonify=lambda value: value)
    return module
