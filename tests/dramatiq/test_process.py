"""A worker process sees that its master is gone."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jobsync_core.assignment.patterns import NodeNames
from jobsync_dramatiq import process


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals that this process sends to itself."""
    found: list[int] = []
    kill = os.kill
    monkeypatch.setattr(
        os, 'kill', lambda pid, number: kill(pid, number) if number == 0 else found.append(number)
    )
    monkeypatch.setattr(logging, 'disable', lambda level: None)
    return found


@pytest.mark.parametrize('pattern', ['gpu-primary-01', '%-01', 'gpu-%'])
def test_a_pattern_without_at_means_a_machine(pattern: str) -> None:
    name = process.new_node_name('gpu-primary-01')
    assert NodeNames([name, process.new_node_name('other')]).eligible([pattern]) == {name}


@pytest.mark.parametrize('gone', [True, False])
def test_a_master_that_was_killed_before_anybody_looked_is_missed(
    sent: list[int], monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """The process has another parent from the beginning, and siblings that keep the master's pipe
    open.
    """
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    master = SimpleNamespace(pid=ended.pid if gone else os.getppid(), is_alive=lambda: True)
    monkeypatch.setattr(multiprocessing, 'parent_process', lambda: master)
    watch = process.OrphanWatch()
    watch.look(False)
    watch.look(False)
    assert sent == ([signal.SIGTERM] if gone else [])
