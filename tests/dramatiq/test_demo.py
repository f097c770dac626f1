"""The Dramatiq demo runs to a good verdict, and ends all that it started when it is interrupted or
killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.demo import left, place
from tests.support.waiting import eventually

__all__ = ['place']

_DEMO = Path(__file__).parents[2] / 'examples' / 'dramatiq_demo.py'


def _start(place: Path, files: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(_DEMO), '--files', str(files)],
        env={**os.environ, 'TMPDIR': str(place)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(240)
def test_the_verdict_is_good(place: Path) -> None:
    demo = _start(place, 100)
    output, _ = demo.communicate(timeout=220)
    assert demo.returncode == 0, output
    verdict = {tuple(line.split()) for line in output.splitlines()}
    assert {
        ('ok', 'published,', 'with', 'repeats', '110'),
        ('ok', 'rows', '100'),
        ('ok', 'keys', 'completed', '100'),
        ('ok', 'lost', '0'),
        ('ok', 'tasks', 'with', 'the', 'right', 'result', '110', 'of', '110'),
        ('ok', 'pinned', 'to', '%-gpu,', 'on', 'such', 'a', 'node', '10', 'of', '10'),
    } <= verdict, output
    assert 'is killed (SIGKILL)' in output
    assert 'FAIL' not in output
    eventually(lambda: not left(place), timeout=20)


@pytest.mark.parametrize(
    ('number', 'code'), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_outlives_it(place: Path, number: signal.Signals, code: int) -> None:
    demo = _start(place, 300)
    assert demo.stdout is not None
    try:
        # A master and its worker process, of each of three workers, once they run.
        shown = iter(demo.stdout.readline, '')
        assert any('tasks are published' in line for line in shown)
        assert len(left(place)) > 6
        demo.send_signal(number)
        assert demo.wait(60) == code
        eventually(lambda: not left(place), timeout=20)
    finally:
        demo.kill()
        demo.wait()
        demo.stdout.close()
