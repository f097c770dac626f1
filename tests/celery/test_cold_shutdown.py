"""When the cold shutdown of a worker is done: between two turns of its event loop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType, FunctionType, SimpleNamespace

import pytest
from celery import signals
from kombu.asynchronous.hub import Hub

from jobsync_celery.cold_shutdown import ColdShutdown


class Stage:
    """A loop, and handlers that note when they run.

    Attributes:
        log: What happened, in order.
        writes: Pipes that hold part of a task.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.writes: set[int] = set()
        self.hub = Hub()
        self.readable, self.writable = os.pipe()
        self.install(signal.SIGQUIT, 'worker_Cold')
        self.install(signal.SIGINT, 'worker_Warm')
        worker = SimpleNamespace(
            pool=SimpleNamespace(_pool=SimpleNamespace(_active_writes=self.writes))
        )
        self.cold = ColdShutdown(worker)
        self.cold.follow(self.hub)
        self.loop = self.hub.create_loop()
        # Otherwise the loop has nothing to poll for.
        self.hub.add_reader(self.readable, self.read)

    def install(self, number: signal.Signals, name: str) -> None:
        def handler(number: int, frame: FrameType | None) -> None:
            self.log.append(f'{name} {signal.Signals(number).name}')

        handler.__name__ = name
        signal.signal(number, handler)

    def read(self) -> None:
        os.read(self.readable, 1)
        self.amid()

    def amid(self) -> None:
        """Done by the loop."""

    def turn(self) -> None:
        """One turn of the loop."""
        os.write(self.writable, b'.')
        next(self.loop)
        self.log.append('turned')

    def interrupted(self) -> None:
        """Done by the loop, with SIGQUIT in the middle."""
        signal.raise_signal(signal.SIGQUIT)
        self.log.append('done')


@pytest.fixture
def stage() -> Iterator[Stage]:
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGQUIT, signal.SIGINT, signal.SIGTERM)
    }
    found = Stage()
    try:
        yield found
    finally:
        signals.worker_shutting_down.disconnect(found.cold._guard)
        for number, handler in before.items():
            signal.signal(number, handler)
        found.hub.close()
        os.close(found.readable)
        os.close(found.writable)


def test_a_signal_amid_the_loops_work_waits_for_the_next_turn(stage: Stage) -> None:
    stage.amid = stage.interrupted  # type: ignore[method-assign]
    stage.turn()
    assert stage.log == ['done', 'turned']
    stage.amid = lambda: None  # type: ignore[method-assign]
    stage.turn()
    assert stage.log == ['done', 'turned', 'worker_Cold SIGQUIT', 'turned']
    stage.turn()
    assert stage.log.count('worker_Cold SIGQUIT') == 1


def test_a_signal_outside_of_the_loop_is_answered_at_once(stage: Stage) -> None:
    signal.raise_signal(signal.SIGQUIT)
    assert stage.log == ['worker_Cold SIGQUIT']


def test_a_signal_while_the_loop_waits_is_answered_at_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poll(timeout: float | None) -> list[tuple[int, int]]:
        signal.raise_signal(signal.SIGQUIT)
        stage.log.append('polled')
        return []

    # As if it stood where kombu's polling does.
    monkeypatch.setattr(
        stage.hub.poller,
        'poll',
        FunctionType(
            poll.__code__,
            {'signal': signal, '__name__': type(stage.hub.poller).__module__},
            closure=poll.__closure__,
        ),
    )
    stage.turn()
    assert stage.log == ['worker_Cold SIGQUIT', 'polled', 'turned']


def test_a_second_signal_is_answered_at_once(stage: Stage) -> None:
    def twice() -> None:
        stage.interrupted()
        stage.interrupted()

    stage.amid = twice  # type: ignore[method-assign]
    stage.turn()
    assert stage.log == ['done', 'worker_Cold SIGQUIT', 'done', 'turned']
    stage.amid = lambda: None  # type: ignore[method-assign]
    stage.turn()
    assert stage.log.count('worker_Cold SIGQUIT') == 1


def test_a_task_that_is_partly_in_the_pipe_is_written_first(stage: Stage) -> None:
    stage.writes.add(7)
    signal.raise_signal(signal.SIGQUIT)
    stage.turn()
    assert stage.log == ['turned']
    stage.writes.clear()
    stage.turn()
    assert stage.log == ['turned', 'worker_Cold SIGQUIT', 'turned']


def test_what_was_put_off_is_done_when_the_loop_ends(stage: Stage) -> None:
    stage.amid = stage.interrupted  # type: ignore[method-assign]
    stage.turn()
    stage.hub.reset()
    assert stage.log == ['done', 'turned', 'worker_Cold SIGQUIT']


def test_a_second_control_c_waits_too_and_what_hastens_it_does_not(stage: Stage) -> None:
    # Celery's handler of the first one installs that of the second, then tells.
    stage.install(signal.SIGINT, 'worker_Cold')
    signals.worker_shutting_down.send(sender='worker', sig='SIGINT', how='Warm', exitcode=0)

    def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)
        stage.log.append('done')

    stage.amid = interrupted  # type: ignore[method-assign]
    stage.turn()
    assert stage.log == ['done', 'turned']
    stage.amid = lambda: None  # type: ignore[method-assign]
    stage.turn()
    assert stage.log == ['done', 'turned', 'worker_Cold SIGINT', 'turned']

    stage.install(signal.SIGINT, 'worker_Cold')
    signals.worker_shutting_down.send(sender='worker', sig='SIGQUIT', how='Cold', exitcode=1)
    stage.amid = interrupted  # type: ignore[method-assign]
    stage.turn()
    assert stage.log[-3:] == ['worker_Cold SIGINT', 'done', 'turned']
