"""What the tasks do, whatever framework runs them. Every function notes when it starts and when it
ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg2

from .history import Notes

__all__ = [
    'Flaky',
    'Order',
    'add',
    'body',
    'by_id',
    'flaky',
    'hasty',
    'keyed',
    'late',
    'loose',
    'node',
    'order',
    'overdue',
    'pinned',
    'plain',
    'poison',
    'seal',
    'sour',
    'total',
]

_VARIABLE = 'CONFORMANCE_ORDER'


class Flaky(Exception):
    """An attempt fails on purpose."""


@dataclass
class Order:
    """What a worker process is told, through its environment.

    Attributes:
        broker, results: URLs.
        database: libpq URL of the test's database.
        notes: Path of the file of notes.
        node: The worker's name.
        jobsync: False leaves JobSync out.
        settings: JobSync's.
        conf: The framework's.
        without: Names of tasks that this worker does not know.
        pins: Names of pinned tasks that the cluster has: where no node matches a pin, it blocks
            tokens that other keys have too.
        loose: Names of those of them that are not pinned here, and have no affinity.
        pause: Seconds that every task takes longer on this worker.
        torn: The worker gets SIGQUIT while it writes this task into a process's pipe; 0 for none.
    """

    broker: str
    results: str
    database: str
    notes: str
    node: str = 'producer'
    jobsync: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    conf: dict[str, Any] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    pins: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    pause: float = 0.0
    torn: int = 0

    def environment(self) -> dict[str, str]:
        """Environment variables that tell it."""
        return {_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Order:
        """The order of this process."""
        return cls(**json.loads(os.environ[_VARIABLE]))


class _Now:
    """Set by the framework's tasks: who processes which message."""

    order: Order | None = None
    #: The node, where it is not named as the worker is.
    node: Callable[[], str] | None = None
    message_id: Callable[[], str] = staticmethod(lambda: '')
    attempt: Callable[[], int] = staticmethod(lambda: 0)
    execution: Callable[[], Any] | None = None


now = _Now()


def order() -> Order:
    """The order of this process."""
    assert now.order is not None
    return now.order


def node() -> str:
    """The name of this process's node."""
    return now.node() if now.node is not None else order().node


def note(event: str, key: str, more: Any = None) -> None:
    """Write a note about the message that is being processed."""
    Notes(Path(order().notes)).write(event, key, now.message_id(), node(), more)


@contextlib.contextmanager
def _noted(key: str, end: bool = True) -> Iterator[None]:
    note('start', key, now.attempt())
    try:
        time.sleep(order().pause)
        yield
    except BaseException as error:
        note('error', key, repr(error))
        raise
    if end:
        note('end', key)


def keyed(n: int, sleep: float = 0.0) -> dict[str, Any]:
    """Its effect is written in the transaction that carries its completion."""
    return _effect(f'k:{n}', n, sleep)


def loose(n: int, sleep: float = 0.0) -> dict[str, Any]:
    """The same, without affinity."""
    return _effect(f'l:{n}', n, sleep)


def hasty(n: int, sleep: float = 0.0) -> dict[str, Any]:
    """The same; a message whose key is running is skipped."""
    return _effect(f'h:{n}', n, sleep)


def late(n: int, sleep: float = 0.0) -> dict[str, Any]:
    """Its transaction carries its completion; what it returns comes later."""
    key, message = f't:{n}', now.message_id()
    with _noted(key, end=False):
        assert now.execution is not None
        with now.execution().transaction() as connection:
            _insert(connection, (key, message, node(), os.getpid()))
            note('end', key)
        time.sleep(sleep)
    return {'n': n, 'message': message}


def _effect(key: str, n: int, sleep: float) -> dict[str, Any]:
    with _noted(key, end=False):
        time.sleep(sleep)
        row = (key, now.message_id(), node(), os.getpid())
        result = {'n': n, 'message': now.message_id()}
        if now.execution is not None:
            execution = now.execution()
            # A duplicate may ask between the transaction's end and the task's.
            execution.result = result
            with execution.transaction() as connection:
                _insert(connection, row)
                # Before the commit: a worker that is killed right after it has completed the key,
                # and nobody runs it again.
                note('end', key)
        else:
            with contextlib.closing(psycopg2.connect(order().database)) as connection:
                _insert(connection, row)
                note('end', key)
                connection.commit()
    return result


def _insert(connection: Any, row: tuple[object, ...]) -> None:
    with connection.cursor() as cursor:
        cursor.execute('INSERT INTO effect VALUES (%s, %s, %s, %s)', row)


def body(n: int, sleep: float = 0.0) -> dict[str, Any]:
    """Completes without a transaction of its own."""
    with _noted(f'b:{n}'):
        time.sleep(sleep)
    return {'n': n, 'message': now.message_id()}


def by_id(n: int) -> int:
    """Its key is the message's id."""
    with _noted(f'i:{n}'):
        return n


def plain(n: int, sleep: float = 0.0) -> int:
    """Not coordinated. It sleeps in short turns: Python hears a signal that comes between the last
    look for signals and the beginning of a sleep when that sleep ends.
    """
    with _noted(f'p:{n}'):
        until = time.monotonic() + sleep
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(0.05, left))
        return n


def routed(n: int) -> int:
    """Coordinated by a key, without a ledger."""
    with _noted(f'r:{n}'):
        return n


def pinned(n: int) -> str:
    """Pinned to certain nodes; returns where it ran."""
    with _noted(f'g:{n}'):
        return node()


def flaky(n: int, times: int = 1) -> dict[str, Any]:
    """Fails `times` times before it succeeds."""
    with _noted(f'f:{n}'):
        if now.attempt() < times:
            raise Flaky(f'attempt {now.attempt()} of {n}')
    return {'n': n, 'attempt': now.attempt()}


def sour(n: int) -> None:
    """Fails always."""
    with _noted(f's:{n}'):
        raise Flaky(f'{n} cannot work')


def poison(n: int) -> None:
    """Ends its process."""
    with _noted(f'x:{n}'):
        os.kill(os.getpid(), signal.SIGKILL)


def overdue(n: int, sleep: float = 0.0) -> int:
    """May take longer than it is allowed to. Threads can be interrupted between two calls of the
    system only.
    """
    with _noted(f'o:{n}'):
        until = time.monotonic() + sleep
        while time.monotonic() < until:
            time.sleep(0.05)
        return n


def add(x: int, y: int, tag: str = '') -> int:
    """Member of chains, groups and chords."""
    with _noted(f'a:{tag}:{x}:{y}'):
        return x + y


def total(values: list[int], tag: str = '') -> int:
    """End of a chord."""
    with _noted(f't:{tag}'):
        return sum(values)


def seal(value: Any, tag: str = '') -> Any:
    """A callback; returns what it was given."""
    with _noted(f'c:{tag}'):
        return value
