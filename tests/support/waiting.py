"""Waiting for a condition, in place of sleeping and hoping."""

from __future__ import annotations

import ast
import inspect
import reprlib
import textwrap
import time
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TypeVar

__all__ = ['eventually']

T = TypeVar('T')
_SHOWN = reprlib.Repr()
_SHOWN.maxother = _SHOWN.maxstring = _SHOWN.maxlong = 300
_SHOWN.maxdict = _SHOWN.maxset = _SHOWN.maxlist = _SHOWN.maxtuple = 20


def eventually(condition: Callable[[], T], timeout: float = 30.0, every: float = 0.02) -> T:
    """Call `condition` until its result is true, and return that result.

    Args:
        condition: What must come true. An exception out of it ends the wait.
        timeout: Seconds until the test fails: many times what it takes, as a machine may be busy.
        every: Seconds between two calls.

    Raises:
        AssertionError: It did not come true in time; the message shows its source, its last result,
            and both sides of each comparison.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() >= deadline:
            raise AssertionError(
                f'not true within {timeout} s, last result {result!r}: {_source(condition)}'
                + ''.join(f'\n  {line}' for line in _sides(condition))
            )
        time.sleep(every)


def _source(condition: Callable[[], object]) -> str:
    try:
        return ' '.join(inspect.getsource(condition).split())
    except (OSError, TypeError):
        return repr(condition)


def _sides(condition: Callable[[], object]) -> Iterator[str]:
    """Both sides of each comparison in a lambda, as they are now."""
    if not isinstance(condition, FunctionType):
        return
    names = {**condition.__globals__, **inspect.getclosurevars(condition).nonlocals}
    for node in ast.walk(_body(condition)):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                text = ast.unparse(side)
                try:
                    yield f'{text} = {_SHOWN.repr(eval(text, names))}'
                except Exception:  # a name of a loop inside, for example
                    continue


def _body(condition: FunctionType) -> ast.AST:
    """The body of a lambda; nothing where it is not found, or where there are several."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(condition)))
        [found] = [node.body for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    except (OSError, TypeError, SyntaxError, ValueError):
        return ast.Module([], [])
    return found
