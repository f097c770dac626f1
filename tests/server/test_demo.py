"""The demo runs to a good verdict, and ends all that it started when it is interrupted."""

from __future__ import annotations

import contextlib
import os
import pty
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


def _start(place: Path, output: int) -> subprocess.Popen[str]:
    environment = {**os.environ, 'TMPDIR': str(place), 'TERM': 'xterm', 'COLUMNS': '120'}
    return subprocess.Popen(
        [*_DEMO, '--files', '300'],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_verdict_is_good(place: Path) -> None:
    demo = _start(place, subprocess.PIPE)
    output, _ = demo.communicate(timeout=240)
    assert demo.returncode == 0, output
    verdict = {tuple(line.split()) for line in output.splitlines()}
    assert {('ok', 'rows', '300'), ('ok', 'duplicates', '0'), ('ok', 'lost', '0')} <= verdict, (
        output
    )
    assert 'is killed (SIGKILL)' in output
    assert 'FAIL' not in output
    eventually(lambda: not _left(place))


def test_an_interrupt_on_a_terminal_leaves_nothing_running(place: Path) -> None:
    master, slave = pty.openpty()
    demo = _start(place, slave)
    os.close(slave)
    shown = ''

    def read() -> str:
        nonlocal shown
        shown += os.read(master, 65536).decode(errors='replace')
        return shown

    try:
        eventually(lambda: 'active' in read(), timeout=60)  # the workers are at it
        assert len(_left(place)) > 3
        demo.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the end of a terminal
            while True:
                read()
        assert demo.wait(60) == 130, shown
        eventually(lambda: not _left(place), timeout=20)
    finally:
        demo.kill()
        demo.wait()
        os.close(master)
