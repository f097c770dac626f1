"""The two sides: this library, and the package `jobsync` from PyPI in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ['PEER_VERSION', 'PeerUnavailable', 'Side', 'our_side', 'peer_side']

PEER_VERSION = '1.3.14'
ROOT = Path(__file__).resolve().parent.parent
_ENVIRONMENT = ROOT / '.cache' / 'bench-peer'


class PeerUnavailable(Exception):
    """The peer cannot be installed or started here; measure with --no-peer."""


@dataclass(frozen=True)
class Side:
    """One of the two libraries.

    Args:
        key: 'ours' or 'peer'.
        title: Heading of its column.
        python: Interpreter that can import it.
        module: Name to import.
        driver: The PostgreSQL driver that it uses.
        environ: Environment of its processes.
    """

    key: str
    title: str
    python: str
    module: str
    driver: str
    environ: dict[str, str] = field(repr=False)


def _environ(**extra: str) -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(('PYTHON', 'PG', 'JOBSYNC'))
    }
    return {**kept, 'PYTHONDONTWRITEBYTECODE': '1', **extra}


def our_side() -> Side:
    """This library, as it lies in the source tree."""
    return Side(
        'ours',
        'JobSync',
        sys.executable,
        'jobsync_core',
        'psycopg2',
        _environ(PYTHONPATH=str(ROOT)),
    )


def peer_side() -> Side:
    """The peer, installed on first use into `.cache/bench-peer`.

    Raises:
        PeerUnavailable: It needs Python 3.11, or pip failed.
    """
    python = _ENVIRONMENT / 'bin' / 'python'
    if not _installed(python):
        if sys.version_info < (3, 11):
            raise PeerUnavailable('it needs Python 3.11')
        print(
            f'installing jobsync {PEER_VERSION} into {_ENVIRONMENT.relative_to(ROOT)} ...',
            file=sys.stderr,
            flush=True,
        )
        _run([sys.executable, '-m', 'venv', '--clear', str(_ENVIRONMENT)])
        _run(
            [
                str(python),
                '-m',
                'pip',
                'install',
                '--quiet',
                '--disable-pip-version-check',
                f'jobsync=={PEER_VERSION}',
            ]
        )
        if not _installed(python):
            raise PeerUnavailable(f'jobsync {PEER_VERSION} is installed but cannot be imported')
    return Side('peer', f'jobsync {PEER_VERSION}', str(python), 'jobsync', 'psycopg', _environ())


def _installed(python: Path) -> bool:
    if not python.exists():
        return False
    look = 'import jobsync; print(jobsync.__version__)'
    found = subprocess.run(
        [str(python), '-c', look],
        env=_environ(),
        cwd='/',
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() == PEER_VERSION


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ['no output']
        raise PeerUnavailable(f'{" ".join(command[1:4])} failed: {last[0]}')
