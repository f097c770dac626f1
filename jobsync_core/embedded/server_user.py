"""The user that a PostgreSQL server runs as: never root, as which PostgreSQL refuses to run."""

from __future__ import annotations

import contextlib
import os
import pwd
from pathlib import Path
from typing import Any

from .errors import EmbeddedServerError

__all__ = ['ServerUser']


class ServerUser:
    """The user that a server runs as: the present one, under root an unprivileged one.

    Attributes:
        identity: How subprocess becomes this user, as keyword arguments; empty: it is the present
            one.

    Raises:
        EmbeddedServerError: This is root, and there is no other user to run a server.
    """

    def __init__(self) -> None:
        self.identity = _identity()

    @property
    def uid(self) -> int:
        """The user's number."""
        return int(self.identity.get('user', os.geteuid()))

    @property
    def name(self) -> str:
        """The user's name, or the number where it has none."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    def own(self, file: Path | int) -> None:
        """Make a path, or an open file, the user's."""
        if self.identity:
            os.chown(file, self.identity['user'], self.identity['group'])


def _identity() -> dict[str, Any]:
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
