"""Known dead means: this machine, this boot, this pid namespace, and no such process. Anything less
proves nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobsync_core import process
from jobsync_core.process import Process, is_known_dead, this_process

pytestmark = pytest.mark.skipif(
    not Path('/proc/self/stat').exists(), reason='needs /proc: elsewhere nothing is ever known dead'
)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=subprocess.PIPE
    ) as running:
        yield running
        running.kill()


def identity(pid: int) -> Process:
    started = process._started(pid)
    assert started is not None
    return replace(this_process(), pid=pid, started=started)


def test_this_process_is_alive() -> None:
    mine = this_process()
    assert (
        mine.pid == os.getpid()
        and mine.host
        and mine.boot_id
        and mine.pid_namespace
        and mine.started
    )
    assert this_process() == mine and not is_known_dead(mine)


def test_another_process_is_alive_until_it_ends(child: subprocess.Popen[bytes]) -> None:
    other = identity(child.pid)
    assert not is_known_dead(other)
    child.kill()
    child.wait()
    assert is_known_dead(other)


def test_a_process_that_nobody_has_reaped_is_dead(child: subprocess.Popen[bytes]) -> None:
    other = identity(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_known_dead(other)


def test_a_process_that_took_over_the_pid_is_another_one() -> None:
    assert is_known_dead(replace(this_process(), started='1'))


@pytest.mark.parametrize(
    'change',
    [
        {'boot_id': 'another'},
        {'pid_namespace': 'pid:[1]'},
        {'boot_id': ''},
        {'pid_namespace': ''},
        {'started': ''},
    ],
)
def test_nothing_is_known_of_another_machine_boot_or_container(change: dict[str, str]) -> None:
    gone = replace(this_process(), started='1')
    assert is_known_dead(gone) and not is_known_dead(replace(gone, **change))  # type: ignore[arg-type]  # all are strings


def test_the_host_name_proves_nothing() -> None:
    assert is_known_dead(replace(this_process(), host='another', started='1'))
    assert not is_known_dead(replace(this_process(), host='another'))


def test_without_proc_nothing_is_known_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace(this_process(), started='1')
    monkeypatch.setattr(process, '_boot_id', lambda: '')
    assert not is_known_dead(gone) and not is_known_dead(replace(gone, boot_id=''))


def test_a_process_whose_entry_is_hidden_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(this_process(), started='1')
    monkeypatch.setattr(process, '_started', lambda pid: None)
    monkeypatch.setattr(process, '_is_zombie', lambda pid: False)
    assert not is_known_dead(other)
