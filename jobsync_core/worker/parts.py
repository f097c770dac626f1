"""Looks whether installed packages have the private parts that an adapter uses of them."""

from __future__ import annotations

import contextlib
import dis
import importlib
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any, NamedTuple

__all__ = ['Part', 'missing']


class Part(NamedTuple):
    """Something that is used and not promised to stay.

    Attributes:
        use: What it is used for; parts of one use stand and fall together.
        owner: `module:Class`, or a module.
        names: Attributes. One that an instance gets from a method, or anything from a function of
            the module, is found as well.
    """

    use: str
    owner: str
    names: tuple[str, ...]


def missing(parts: Iterable[Part], uses: Iterable[str] = ()) -> list[str]:
    """What of these parts the installed versions lack, as 'owner.name'; an empty list is well.

    Args:
        parts: The parts.
        uses: Only what is used for these; all, by default.
    """
    wanted = set(uses)
    return [
        f'{part.owner}.{name}'
        for part in parts
        if not wanted or part.use in wanted
        for name in _lacking(part)
    ]


def _lacking(part: Part) -> list[str]:
    module, _, attribute = part.owner.partition(':')
    try:
        owner: Any = importlib.import_module(module)
        owner = getattr(owner, attribute) if attribute else owner
    except (ImportError, AttributeError):
        return list(part.names)
    return [name for name in part.names if not hasattr(owner, name) and not _stores(owner, name)]


def _stores(owner: Any, name: str) -> bool:
    # What an instance gets when a method runs, without making one: the method's code stores it.
    owners = owner.__mro__ if isinstance(owner, type) else (owner,)
    functions = [function for one in owners for function in vars(one).values()]
    return any(
        step.opname == 'STORE_ATTR' and step.argval == name
        for code in _codes(functions)
        if name in code.co_names
        for step in dis.get_instructions(code)
    )


def _codes(functions: Iterable[Any]) -> Iterator[CodeType]:
    """The codes of functions, and of those that stand behind them: what traces a package puts its
    own in their place, which keeps them in a cell (Sentry, for Dramatiq's `Broker.__init__`).
    """
    waiting, seen = list(functions), set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        code = getattr(function, '__code__', None)
        if isinstance(code, CodeType) and code not in seen:
            seen.add(code)
            yield code
            for cell in getattr(function, '__closure__', None) or ():
                with contextlib.suppress(ValueError):  # it is empty
                    if inspect.isfunction(cell.cell_contents):
                        waiting.append(cell.cell_contents)
