"""The demo runs to a good verdict, and ends all that it started when it is interrupted."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.demo import left, place
from tests.support.waiting import eventually

__all__ = ['place']

_ROOT = Path(__file__).parents[3]
_DEMO = [sys.executable, str(_ROOT / 'examples' / 'core_demo.py'), '--workers', '3']


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
    eventually(lambda: not left(place))


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
        assert len(left(place)) > 3
        demo.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the end of a terminal
            while True:
                read()
        assert demo.wait(60) == 130, shown
        eventually(lambda: not left(place), timeout=20)
    finally:
        demo.kill()
        demo.wait()
        os.close(master)
