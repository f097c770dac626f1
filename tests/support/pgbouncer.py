"""A private PgBouncer in front of a test's server, which can be pointed at another server while
clients stay connected.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg2

from jobsync_core.config import CoordinationConfig
from tests.support.brokers import die_with_parent, free_port
from tests.support.waiting import eventually

__all__ = ['PgBouncer', 'PgBouncerUnavailable']

_HOST = '127.0.0.1'
_ADMIN = 'pgbouncer_admin'
_STOP_SEC = 10.0
_PLACES = ('/usr/sbin', '/usr/local/sbin', '/usr/local/bin', '/opt/homebrew/bin')


class PgBouncerUnavailable(Exception):
    """This machine has no PgBouncer. The message says what is missing."""


class PgBouncer:
    """A PgBouncer that passes every database on to one server, as a context manager.

    Args:
        config: The server behind it; its user and password are known to the pooler.
        mode: 'transaction' or 'session'.
        users: Passwords of further roles that may connect.
        settings: Further settings of pgbouncer.ini, for example `{'default_pool_size': '2'}`.

    Raises:
        PgBouncerUnavailable: The program is not installed.
    """

    host = _HOST

    def __init__(
        self,
        config: CoordinationConfig,
        mode: str = 'transaction',
        users: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        program = shutil.which('pgbouncer') or shutil.which(
            'pgbouncer', path=os.pathsep.join(_PLACES)
        )
        if program is None:
            raise PgBouncerUnavailable('pgbouncer is not installed: apt install pgbouncer')
        self.port = free_port()
        self._program = program
        self._target = config.host, int(config.port)
        self._users = {config.user: config.password or '', **(users or {})}
        self._settings = {
            'pool_mode': mode,
            'max_client_conn': '500',
            'default_pool_size': '20',
            **(settings or {}),
        }
        self._home = Path(tempfile.mkdtemp(prefix='jobsync-pgbouncer-'))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PgBouncer:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start it and wait until it answers; nothing happens if it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        self._write()
        identity = _identity()
        if identity:
            for path in (self._home, *self._home.iterdir()):
                os.chown(path, identity['user'], identity['group'])
        with (self._home / 'output').open('ab') as output:
            self._process = subprocess.Popen(
                [self._program, str(self._home / 'pgbouncer.ini')],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd='/',
                start_new_session=True,
                preexec_fn=die_with_parent(),
                **identity,
            )
        eventually(self._answers, timeout=20)

    def point_at(self, host: str, port: int) -> None:
        """Pass what comes from now on to another server; clients stay connected, and no connection
        to the old server is used again.

        A transaction that is open ends on the server on which it began.
        """
        self._target = host, port
        self._write()
        self.command('RELOAD')
        self.command('RECONNECT')

    def restart(self) -> None:
        """Kill it, so that clients lose their connections, and start it again on its port."""
        self.kill()
        self.start()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stop it with SIGSTOP: connections stay open, nothing answers."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it and remove its files."""
        self.kill()
        shutil.rmtree(self._home, ignore_errors=True)

    def command(self, text: str) -> list[tuple[Any, ...]]:
        """Give a command to its console, for example `SHOW SERVERS`."""
        with contextlib.closing(
            psycopg2.connect(
                host=self.host,
                port=self.port,
                dbname='pgbouncer',
                user=_ADMIN,
                password=_ADMIN,
                connect_timeout=5,
            )
        ) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(text)
                return cursor.fetchall() if cursor.description else []

    def log(self) -> str:
        """The end of its output."""
        with contextlib.suppress(OSError):
            return (self._home / 'output').read_text(errors='replace')[-3000:]
        return '(no output)'

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f'pgbouncer ended at once:\n{self.log()}')
        try:
            return bool(self.command('SHOW VERSION'))
        except psycopg2.OperationalError:
            return False

    def _write(self) -> None:
        host, port = self._target
        users = ''.join(
            f'"{name}" "{password}"\n' for name, password in {**self._users, _ADMIN: _ADMIN}.items()
        )
        settings = {
            'listen_addr': self.host,
            'listen_port': str(self.port),
            'unix_socket_dir': '',
            'auth_type': 'md5',
            'auth_file': str(self._home / 'users.txt'),
            'admin_users': _ADMIN,
            'server_login_retry': '0.1',
            'server_round_robin': '1',
            **self._settings,
        }
        lines = ''.join(f'{name} = {value}\n' for name, value in settings.items())
        (self._home / 'users.txt').write_text(users)
        (self._home / 'pgbouncer.ini').write_text(
            f'[databases]\n* = host={host} port={port}\n[pgbouncer]\n{lines}'
        )

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(_STOP_SEC)


def _identity() -> dict[str, Any]:
    """How subprocess becomes the user that runs it: PgBouncer refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam('nobody')
    return {'user': entry.pw_uid, 'group': entry.pw_gid, 'extra_groups': []}
