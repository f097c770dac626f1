"""`celery beat` as processes, and the messages that they sent."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from kombu.connection import Connection

from jobsync_core.config import CoordinationConfig
from tests.support.cluster import query
from tests.support.waiting import eventually

__all__ = ['Beat', 'Message', 'Stage', 'gaps', 'repeated']

_ROOT = Path(__file__).parents[2]
_START_SEC = 40.0


@dataclass(frozen=True)
class Message:
    """A task that was sent.

    Args:
        name: The entry's.
        sender: Process id of the scheduler.
    """

    name: str
    id: str
    slot: datetime
    sender: int


class Beat:
    """One process."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_idle(self) -> None:
        """Until it has found another scheduler active."""
        eventually(
            lambda: (
                'another scheduler is the active one' in self.log or self.process.poll() is not None
            ),
            _START_SEC,
        )
        assert self.process.poll() is None, self.log

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 20.0) -> int:
        return self.process.wait(timeout)


class Stage:
    """Beats of one cluster and one broker.

    Args:
        config: Where the database is; what the beats are told of it can be changed by the arguments
            of `beat`.
        schedule: Seconds between the slots of each entry.
    """

    def __init__(
        self,
        config: CoordinationConfig,
        broker_url: str,
        directory: Path,
        schedule: dict[str, float],
    ) -> None:
        self.config = config
        self.broker_url = broker_url
        self.schedule = schedule
        self._directory = directory
        self._beats: list[Beat] = []
        self._messages: list[Message] = []

    def beat(self, fault: str = '', **settings: Any) -> Beat:
        """Start a beat.

        Args:
            fault: As BEAT_FAULT in beat_app.
            settings: Fields of CoordinationConfig.
        """
        config = self.config
        fields = {
            name: getattr(config, name)
            for name in (
                'host',
                'port',
                'dbname',
                'user',
                'password',
                'appname',
                'heartbeat_interval_sec',
                'heartbeat_timeout_sec',
                'connect_timeout_sec',
            )
        }
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith('JOBSYNC_')
        }
        environ.update(
            {
                f'JOBSYNC_{name.upper()}': str(value)
                for name, value in {**fields, **settings}.items()
            }
        )
        environ.update(
            BEAT_BROKER=self.broker_url, BEAT_SCHEDULE=json.dumps(self.schedule), BEAT_FAULT=fault
        )
        log = self._directory / f'beat{len(self._beats)}.log'
        command = [
            sys.executable,
            '-m',
            'celery',
            '-A',
            'tests.celery.beat_app',
            'beat',
            '-S',
            'jobsync',
            '-l',
            'INFO',
        ]
        with log.open('wb') as output:
            process = subprocess.Popen(
                command, cwd=_ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT
            )
        self._beats.append(Beat(process, log))
        return self._beats[-1]

    def close(self) -> None:
        for beat in self._beats:
            if beat.process.poll() is None:
                beat.process.kill()
            beat.process.wait()

    def messages(self, name: str | None = None) -> list[Message]:
        """What was sent, for one entry or for all, in order."""
        with Connection(self.broker_url) as connection, connection.channel() as channel:
            with contextlib.suppress(*connection.channel_errors):  # no queue yet
                while (raw := channel.basic_get('celery', no_ack=True)) is not None:
                    self._messages.append(_message(raw.headers))
        return [message for message in self._messages if name in (None, message.name)]

    def wait_messages(self, count: int, timeout: float = _START_SEC) -> list[Message]:
        """All messages, when there are at least `count`."""
        eventually(lambda: len(self.messages()) >= count, timeout)
        return self.messages()

    def wait_from(self, beat: Beat, count: int = 1, timeout: float = _START_SEC) -> list[Message]:
        """The messages of one process, when there are at least `count`."""
        eventually(
            lambda: len(self._from(beat)) >= count or beat.process.poll() is not None, timeout
        )
        assert len(self._from(beat)) >= count, beat.log
        return self._from(beat)

    def _from(self, beat: Beat) -> list[Message]:
        return [message for message in self.messages() if message.sender == beat.pid]

    def recorded(self, name: str) -> datetime | None:
        """The slot in an entry's row."""
        rows = query(self.config, 'SELECT slot FROM {}schedule WHERE name = %s', (name,))
        return rows[0][0] if rows else None

    def wait_calm(self) -> None:
        """Until all that was sent is recorded and the next slots are not near: then nobody holds
        anything.
        """
        eventually(self._is_calm, every=0.005)

    def _is_calm(self) -> bool:
        now = datetime.now(timezone.utc)
        for name, seconds in self.schedule.items():
            messages = self.messages(name)
            if (
                not messages
                or self.recorded(name) != messages[-1].slot
                or now > messages[-1].slot + timedelta(seconds=seconds - 0.4)
            ):
                return False
        return True


def _message(headers: dict[str, Any]) -> Message:
    sender = headers['origin'].partition('@')[0].removeprefix('gen')
    return Message(
        headers['task'].removeprefix('beats.'),
        headers['id'],
        datetime.fromisoformat(headers['jobsync_slot']),
        int(sender),
    )


def gaps(messages: list[Message], seconds: float) -> list[float]:
    """Distances of neighbouring slots that are not those of the schedule; a slot that was sent
    twice is a distance of zero.
    """
    slots = sorted(message.slot for message in messages)
    steps = [(after - before) / timedelta(seconds=seconds) for before, after in pairwise(slots)]
    return [step for step in steps if step != 1]


def repeated(messages: list[Message]) -> dict[str, int]:
    """Ids that were sent more than once."""
    return {
        task_id: count
        for task_id, count in Counter(message.id for message in messages).items()
        if count > 1
    }
