"""A PostgreSQL server's directory: its data, its password and its log."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..secret import Secret
from .errors import EmbeddedServerError
from .process import server_environment
from .server_user import ServerUser

__all__ = ['Home']


class Home:
    """A directory of the server's user. It is made when it is first asked for.

    Args:
        path: Where it is. None: a temporary one, which `remove()` removes.
        user: Who runs the server.

    Attributes:
        is_kept: Whether it stays.
    """

    def __init__(self, path: Path | None, user: ServerUser) -> None:
        self.is_kept = path is not None
        self._path = path.absolute() if path is not None else None
        self._user = user

    @property
    def path(self) -> Path:
        """The directory."""
        if self._path is None:
            self._path = Path(tempfile.mkdtemp(prefix='jobsync-postgres-'))
            self._user.own(self._path)
        elif not self._path.exists():
            self._path.mkdir(parents=True, mode=0o700)
            self._user.own(self._path)
        return self._path

    @property
    def data(self) -> Path:
        """The server's data directory."""
        return self.path / 'data'

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self.path / 'server.log'

    @property
    def _password_file(self) -> Path:
        return self.path / 'password'

    @property
    def has_data(self) -> bool:
        """Whether there is a database cluster."""
        return (self.data / 'PG_VERSION').exists()

    def read_password(self) -> Secret | None:
        """The server's password; None where it is not written down."""
        return Secret(self._read(self._password_file)) or None

    def renew_password(self) -> Secret:
        """Write a new password down, for the server's user alone, and never through a link that
        somebody put there.
        """
        password = Secret(secrets.token_urlsafe(24))
        self._password_file.unlink(missing_ok=True)
        descriptor = os.open(
            self._password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600
        )
        with os.fdopen(descriptor, 'w') as file:
            file.write(password)
            self._user.own(descriptor)
        return password

    def log_tail(self) -> str:
        """The end of the log."""
        return self._read(self.log)[-2000:] or '(no log)'

    def _read(self, path: Path) -> str:
        """The text of a file that is the server's own; '' where there is none, or what is there is
        somebody else's.
        """
        with contextlib.suppress(OSError):
            with os.fdopen(
                os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), errors='replace'
            ) as file:
                if os.fstat(file.fileno()).st_uid == self._user.uid:
                    return file.read()
        return ''

    def create_data(self, initdb: Path, superuser: str) -> Secret:
        """Make a database cluster; returns the superuser's password.

        Raises:
            EmbeddedServerError: It cannot be made; nothing is left of it.
        """
        password = self.renew_password()
        command = [
            str(initdb),
            '--pgdata',
            str(self.data),
            '--username',
            superuser,
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
            **self._user.identity,
        )
        if done.returncode != 0:
            shutil.rmtree(self.data, ignore_errors=True)
            raise EmbeddedServerError(
                f'initdb failed in {self.path}; if it is a question of rights, give a data_dir '
                f'that user {self._user.name} can reach:\n{done.stdout[-2000:]}'
            )
        return password

    def remove(self) -> None:
        """Remove it, unless it is kept."""
        if not self.is_kept and self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._path = None
