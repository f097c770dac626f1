"""One node of a test cluster, in a process of its own: `python -m tests.support.node_process`.

The first line on standard input is a JSON object with the node's settings; each later line is a
command. Events go to standard output, one JSON object per line, with the time at which they
happened.

Settings: name, config (fields of CoordinationConfig), record (a file), tasks (the sample to ask
about), job (further arguments of Job), clock_offset (seconds by which every wall clock that Python
code can read is wrong), log (a file), without (a fence that is taken away: lease or shrink).
Commands: drain, undrain, leave, explain TASK, health.
"""

from __future__ import annotations

import ctypes
import datetime
import faulthandler
import json
import logging
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.history import Recorder, moment

if TYPE_CHECKING:
    from jobsync_core import Job

_PAUSE_SEC = 0.005
_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


def main() -> int:
    """Enter, answer until told to leave, leave."""
    _die_with_parent()
    settings = json.loads(sys.stdin.readline())
    logging.basicConfig(
        filename=settings['log'],
        level=logging.INFO,
        format='%(asctime)s %(levelname)s %(name)s %(message)s',
    )
    crash_file = Path(settings['log'] + '.crash').open('w')  # noqa: SIM115  # to the end of the process
    faulthandler.enable(crash_file)
    faulthandler.register(10, crash_file)  # SIGUSR1 tells where every thread is
    if settings.get('clock_offset'):
        _shift_wall_clocks(settings['clock_offset'])
    from jobsync_core import CoordinationConfig, Job, JobSyncError

    if settings.get('without'):
        _take_away(settings['without'])
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(commands,), daemon=True).start()
    recorder = Recorder(Path(settings['record']))

    def rebalanced(event: Any) -> None:
        _say(
            'rebalanced',
            initial=event.is_initial,
            version=event.token_version,
            added=event.tokens_added,
            removed=event.tokens_removed,
        )

    def released(tokens: Any) -> None:
        _say('released', tokens=len(tokens))

    try:
        job = Job(
            settings['name'],
            CoordinationConfig(**settings['config']),
            on_rebalance=rebalanced,
            on_release=released if settings.get('on_release') else None,
            **settings['job'],
        )
        _say('constructed', pid=os.getpid())
        with job:
            _say('entered')
            _answer(job, recorder, settings['tasks'], commands)
            _say('leaving')
    except JobSyncError as error:
        _say('failed', error=type(error).__name__, message=str(error))
        return 1
    _say('left')
    return 0


def _answer(
    job: Job, recorder: Recorder, tasks: list[int], commands: queue.SimpleQueue[str]
) -> None:
    from jobsync_core import DatabaseUnavailable, Task

    def claims(task: int) -> bool:
        try:
            return job.can_claim_task(Task(task))
        except DatabaseUnavailable:
            return False  # somebody else may have taken it, and nobody can be asked

    while True:
        recorder.ask(tasks, claims)
        time.sleep(_PAUSE_SEC)
        while not commands.empty():
            command, _, detail = commands.get().partition(' ')
            if command == 'leave':
                return
            if command == 'drain':
                job.drain()
                _say('drained')
            elif command == 'undrain':
                job.undrain()
                _say('undrained')
            elif command == 'explain':
                _say('explained', explanation=repr(job.explain(int(detail))))
            elif command == 'health':
                _say(
                    'health',
                    healthy=job.am_i_healthy(),
                    leader=job.am_i_leader(),
                    tokens=len(job.my_tokens),
                )
            else:
                raise ValueError(f'unknown command {command!r}')


def _read_commands(commands: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        commands.put(line.strip())
    os._exit(3)  # whoever started this process is gone


def _say(event: str, **fields: object) -> None:
    # One write, so that lines of two threads do not mix.
    os.write(1, (json.dumps({'event': event, 'at': moment(), **fields}) + '\n').encode())


def _take_away(fence: str) -> None:
    """Break the library on purpose, for tests that must see an overlap."""
    from jobsync_core.protocol.handover import HandOver
    from jobsync_core.protocol.ownership import Ownership

    def for_ever(self: Ownership, deadline: float) -> None:
        self.lease[0] = float('inf')

    replacements: dict[str, list[tuple[type, str, Any]]] = {
        'lease': [(Ownership, 'extend', for_ever), (Ownership, 'suspend', lambda self: None)],
        'shrink': [(HandOver, '_shrink', lambda self, kept: None)],
    }
    for owner, name, replacement in replacements[fence]:
        assert hasattr(owner, name), f'{owner.__name__}.{name} is gone: name the fence anew'
        setattr(owner, name, replacement)


def _die_with_parent() -> None:
    """A stopped process reads no end of file; the kernel can kill it all the same."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def _shift_wall_clocks(offset: float) -> None:
    """Put every wall clock of this process wrong. Clocks that measure durations stay as they
    are.
    """
    true_time, true_time_ns, true_gettime = time.time, time.time_ns, time.clock_gettime
    true_datetime = datetime.datetime

    def now(cls: type, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return true_datetime.now(tz) + datetime.timedelta(seconds=offset)

    def today(cls: type) -> datetime.date:
        return now(cls).date()

    def gettime(clock_id: int) -> float:
        return true_gettime(clock_id) + (offset if clock_id == time.CLOCK_REALTIME else 0.0)

    shifted: dict[str, object] = {
        'time': lambda: true_time() + offset,
        'time_ns': lambda: true_time_ns() + int(offset * 1e9),
        'clock_gettime': gettime,
    }
    for name, function in shifted.items():
        setattr(time, name, function)
    kinds = {
        'datetime': type('datetime', (true_datetime,), {'now': classmethod(now)}),
        'date': type('date', (datetime.date,), {'today': classmethod(today)}),
    }
    for name, kind in kinds.items():
        setattr(datetime, name, kind)


if __name__ == '__main__':
    sys.exit(main())
