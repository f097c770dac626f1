"""The callback comes after the name of `with Job(...) as job` is bound: the guide's own example
uses it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from jobsync_core.agent.callbacks import Callbacks
from jobsync_core.ledger.binding import Binding
from jobsync_core.protocol.effects import RebalanceEvent

TIMES = 200


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Threads are switched after nearly every instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Entered:
    """What a Job does with its callbacks when it is entered."""

    def __init__(self, on_rebalance: object) -> None:
        self.callbacks = Callbacks(on_rebalance, None)  # type: ignore[arg-type]
        self.done = threading.Event()

    def __enter__(self) -> Entered:
        self.callbacks.hold()
        self.callbacks.rebalanced(RebalanceEvent(True, 1, 10, 0))
        self.callbacks.go_on(Binding().is_done)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.done.wait(10)
        assert self.callbacks.wait_idle(10)
        assert self.callbacks.failures == 0, 'the name was not bound'


# A name of the module, as in the guide, of a function, of a closure, an attribute, an item; entered
# by hand or by an ExitStack.
FORMS = {
    'global': 'with Entered(called) as job:\n    pass',
    'local': (
        'def run():\n    def called():\n        job.done.set()\n    with Entered(called) as '
        'job:\n        pass\nrun()'
    ),
    'attribute': 'with Entered(lambda: space.job.done.set()) as space.job:\n    pass',
    'item': 'with Entered(lambda: found["job"].done.set()) as found["job"]:\n    pass',
    'stack': 'with ExitStack() as stack:\n    job = stack.enter_context(Entered(called))',
    'by hand': 'job = Entered(called).__enter__()\njob.__exit__()',
    'loop': 'for _ in range(1):\n    with Entered(called) as job:\n        pass',
    'subclass': 'class Sub(Entered):\n    def __enter__(self):\n        found = '
    'super().__enter__()\n        return found\n'
    'with Sub(called) as job:\n    pass',
}


@pytest.mark.parametrize('form', FORMS)
def test_the_name_is_bound_when_the_callback_comes(form: str) -> None:
    code = compile(FORMS[form], form, 'exec')
    for _ in range(TIMES):
        space: dict[str, object] = {
            'Entered': Entered,
            'ExitStack': contextlib.ExitStack,
            'space': SimpleNamespace(),
            'found': {},
            '__name__': 'the user',
        }
        exec('def called():\n    job.done.set()', space)
        exec(code, space)


def test_it_comes_promptly_in_a_body_that_only_waits() -> None:
    came = threading.Event()
    with Entered(came.set) as job:
        job.done.set()
        assert came.wait(0.5)


def test_it_is_not_done_before_the_caller_goes_on() -> None:
    seen: list[bool] = []

    class Watched:
        def __enter__(self) -> Binding:
            binding = Binding()
            seen.append(binding.is_done())
            return binding

        def __exit__(self, *_: object) -> None:
            pass

    with Watched() as binding:
        seen.append(binding.is_done())
    assert seen == [False, True]


def test_a_caller_that_never_goes_on_is_not_waited_for_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('jobsync_core.agent.callbacks._BINDING_SEC', 0.05)
    came = threading.Event()
    callbacks = Callbacks(came.set, None)
    callbacks.hold()
    callbacks.rebalanced(RebalanceEvent(True, 1, 10, 0))
    callbacks.go_on(lambda: False)
    assert came.wait(5)


def test_nothing_is_called_where_entering_fails() -> None:
    calls: list[object] = []
    callbacks = Callbacks(calls.append, None)
    callbacks.hold()
    callbacks.rebalanced(RebalanceEvent(True, 1, 10, 0))
    callbacks.drop()
    assert callbacks.wait_idle(10)
    assert not calls
