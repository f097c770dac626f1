"""`jobsync evacuate` on Dramatiq's brokers: what was in the plugin's queues is where plain Dramatiq
finds it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

from tests.support.waiting import eventually

from .conftest import ROOT, Workers, options, server, workers

__all__ = ['options', 'server', 'workers']


def evacuate(workers: Workers) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'jobsync_core.cli',
            'evacuate',
            '--app',
            'tests.dramatiq.worker_app:plugin',
            '--json',
        ],
        cwd=ROOT,
        env=workers._environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, 2), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found['complete'] is (done.returncode == 0)
    return found


def test_all_messages_go_home_and_none_is_lost(workers: Workers) -> None:
    worker = workers.start(1)
    workers.wait_for_nodes(1)
    for n in range(40):
        workers.app.slow.send(n)
    for n in range(3):
        workers.app.homeless.send(n)
    eventually(
        lambda: workers.depth('default.jobsync.sync_.parked') == 3 and workers.lines('slowend:'), 30
    )
    busy = evacuate(workers)
    assert (busy['complete'], len(busy['busy'])) == (False, 1), busy
    # The worker parks again what came home. While a message is on its way there are two of it, and
    # a kill would leave both.
    eventually(
        lambda: workers.depth('default.jobsync.sync_.parked') == 3 and workers.depth('default') == 0
    )
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    ended = len(workers.counts('slowend:'))
    eventually(lambda: evacuate(workers)['complete'], 60)
    # What had ended may not have been acknowledged: it is a duplicate then.
    home = workers.depth('default')
    assert 43 - ended <= home <= 43
    left = {
        name
        for name in workers.server.depths(workers.space)
        if 'jobsync.' in name and '.XQ' not in name
    }
    assert left == set()
    assert evacuate(workers) | {'deleted': []} == {
        'restored': 0,
        'moved': {},
        'deleted': [],
        'busy': [],
        'failed': {},
        'complete': True,
    }
    assert workers.depth('default') == home
    # A worker finds them there.
    workers.start(1)
    eventually(lambda: len(workers.counts('slowend:')) == 40, 40)
