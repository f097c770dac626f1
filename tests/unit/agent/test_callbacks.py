"""The callback thread: order, coalescing, failures, and its absence when idle."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from jobsync_core.agent.callbacks import Callbacks
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.protocol.effects import RebalanceEvent

WAIT = 10.0


def event(added: int, removed: int = 0, initial: bool = False, version: int = 1) -> RebalanceEvent:
    return RebalanceEvent(initial, version, added, removed)


def test_events_arrive_in_order() -> None:
    seen: list[int] = []
    busy, go = threading.Event(), threading.Event()

    def on_release(tokens: TokenSet) -> None:
        busy.set()
        assert go.wait(WAIT)
        seen.append(-len(tokens))

    callbacks = Callbacks(lambda e: seen.append(e.tokens_added), on_release)
    callbacks.release(TokenSet([(0, 3)]), lambda: seen.append(0))
    assert busy.wait(WAIT)
    callbacks.rebalanced(event(7))
    go.set()
    assert callbacks.wait_idle(WAIT)
    assert seen == [-3, 0, 7]


def test_a_generator_tells_what_is_in_use_and_others_have_their_turns_between_its_steps() -> None:
    seen: list[object] = []
    go = threading.Event()

    def on_release(tokens: TokenSet) -> Iterator[TokenSet | None]:
        yield TokenSet([(1, 2)])
        while not go.is_set():
            yield None
        seen.append('end')

    callbacks = Callbacks(lambda e: go.set(), on_release)
    callbacks.release(TokenSet([(0, 3)]), lambda: seen.append('done'), seen.append)
    callbacks.rebalanced(event(7))
    assert callbacks.wait_idle(WAIT)
    assert seen == [TokenSet([(1, 2)]), 'end', 'done']


def test_events_that_wait_are_merged_into_one() -> None:
    seen: list[RebalanceEvent] = []
    busy, go = threading.Event(), threading.Event()

    def on_rebalance(e: RebalanceEvent) -> None:
        seen.append(e)
        busy.set()
        assert go.wait(WAIT)

    callbacks = Callbacks(on_rebalance, None)
    callbacks.rebalanced(event(1, initial=True))
    assert busy.wait(WAIT)
    callbacks.rebalanced(event(2, 1, version=2))
    callbacks.rebalanced(event(4, 8, version=3))
    go.set()
    assert callbacks.wait_idle(WAIT)
    assert seen == [event(1, initial=True), RebalanceEvent(False, 3, 6, 9)]


@pytest.mark.parametrize(
    'error',
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_callback_raises_the_next_is_called(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[object] = []

    def raises(argument: object) -> None:
        seen.append(argument)
        raise error

    callbacks = Callbacks(raises, raises)
    callbacks.rebalanced(event(1))
    callbacks.release(TokenSet([(0, 3)]), lambda: seen.append('done'))
    callbacks.rebalanced(event(2))
    assert callbacks.wait_idle(WAIT)
    assert seen == [event(1), TokenSet([(0, 3)]), 'done', event(2)]
    assert callbacks.failures == 3
    assert f'raised {type(error).__name__}' in caplog.text


def test_a_callback_without_parameters_is_called_without_any() -> None:
    calls: list[str] = []
    callbacks = Callbacks(lambda: calls.append('called'), None)
    callbacks.rebalanced(event(1))
    assert callbacks.wait_idle(WAIT)
    assert calls == ['called']


def test_an_exception_is_counted_and_the_hand_over_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(tokens: TokenSet) -> None:
        raise OSError('the socket is gone')

    done = threading.Event()
    callbacks = Callbacks(None, fail)
    callbacks.release(TokenSet([(0, 1)]), done.set)
    assert done.wait(WAIT)
    assert callbacks.wait_idle(WAIT)
    assert callbacks.failures == 1
    assert 'on_release raised' in caplog.text


def test_a_type_error_inside_of_a_callback_is_not_taken_for_a_wrong_signature() -> None:
    calls: list[int] = []

    def on_rebalance(e: RebalanceEvent) -> None:
        calls.append(e.tokens_added)
        raise TypeError('takes 0 positional arguments')

    callbacks = Callbacks(on_rebalance, None)
    callbacks.rebalanced(event(5))
    assert callbacks.wait_idle(WAIT)
    assert calls == [5]
    assert callbacks.failures == 1


def test_no_thread_stays_when_there_is_nothing_to_do() -> None:
    callbacks = Callbacks(lambda e: None, None)
    callbacks.rebalanced(event(1))
    assert callbacks.wait_idle(WAIT)
    for thread in threading.enumerate():
        if thread.name == 'jobsync-callbacks':
            thread.join(WAIT)
            assert not thread.is_alive()
