"""The demo runs to a good verdict, and ends all that it started when it is interrupted."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..waiting import eventually

_ROOT = Path(__file__).parents[2]
_DEMO = [sys.executable, str(_ROOT / 'examples' / 'core_demo.py'), '--workers', '3']


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for all temporary files of the demo; its server's user may enter it too."""
    place = Path(tempfile.mkdtemp(prefix='demo-test-'))
    place.chmod(0o711)
    yield place
    shutil.rmtree(place, ignore_errors=True)


def _left(place: Path) -> list[str]:
    """Processes that the demo started: they have its environment, or (PostgreSQL, which overwrites that) work in its directory."""
    found = []
    for directory in Path('/proc').iterdir():
        if not directory.name.isdecimal() or directory.name == str(os.getpid()):
            continue
        try:
            mine = f'TMPDIR={place}'.encode() in (directory / 'environ').read_bytes() or Path(os.readlink(directory / 'cwd')).is_relative_to(place)
            if mine:
                found.append(f'{directory.name} {(directory / "cmdline").read_bytes()!r}')
        except OSError:
            pass  # gone meanwhile, or another user's
    return found


def _start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, 'TMPDIR': str(place)}
    return subprocess.Popen([*_DEMO, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_verdict_is_good(place: Path) -> None:
    demo = _start(place, '--files', '300')
    output, _ = demo.communicate(timeout=240)
    assert demo.returncode == 0, output
    for line in ('ok   rows                                 300', 'ok   duplicates                           0', 'ok   lost                                 0'):
        assert line in output, output
    assert 'is killed (SIGKILL)' in output
    assert 'FAIL' not in output
    eventually(lambda: not _left(place))


def test_an_interrupt_leaves_nothing_running(place: Path) -> None:
    demo = _start(place, '--files', '300')
    assert demo.stdout is not None
    try:
        next(line for line in demo.stdout if ' files: ' in line)  # the workers are at it
        assert len(_left(place)) > 3
        demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=60)
        assert demo.returncode == 130, rest
        eventually(lambda: not _left(place), timeout=20)
    finally:
        demo.kill()
        demo.communicate()
