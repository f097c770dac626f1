"""What the tests of the three demos share: a place for its files, and what it left running."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ['left', 'place']


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for all temporary files of the demo; its server's user may enter it too."""
    place = Path(tempfile.mkdtemp(prefix='demo-test-'))
    place.chmod(0o711)
    yield place
    shutil.rmtree(place, ignore_errors=True)


def left(place: Path) -> list[str]:
    """Processes that the demo started: they have its environment, or (PostgreSQL, which overwrites
    that) work in its directory.
    """
    found = []
    for directory in Path('/proc').iterdir():
        if not directory.name.isdecimal() or directory.name == str(os.getpid()):
            continue
        try:
            environment, working = (
                (directory / 'environ').read_bytes(),
                Path(os.readlink(directory / 'cwd')),
            )
            if f'TMPDIR={place}'.encode() in environment or working.is_relative_to(place):
                found.append(f'{directory.name} {(directory / "cmdline").read_bytes()!r}')
        except OSError:
            pass  # gone meanwhile, or another user's
    return found
