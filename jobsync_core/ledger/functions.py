"""Which functions `exactly_once` may stand on, and what they are called."""

from __future__ import annotations

import dis
import functools
import inspect
import sys

from ..errors import ConfigurationError

__all__ = ['check_has_run', 'is_async', 'name_of', 'returns_nothing']

#: What a function says that has a result without returning it: `execution.result = …` and Celery's
#: `raise self.replace(…)`.
_OTHER_RESULTS = frozenset({'result', 'replace'})


def name_of(function: object) -> str:
    """Its module and qualified name.

    Raises:
        ConfigurationError: `exactly_once` cannot stand on it.
    """
    if isinstance(function, (classmethod, staticmethod)):
        raise ConfigurationError(
            f'@exactly_once on a {type(function).__name__}: write it below '
            f'@{type(function).__name__}'
        )
    if not inspect.isroutine(function):
        for method, decorator in (
            ('apply_async', '@app.task'),
            ('send_with_options', '@dramatiq.actor'),
        ):
            if callable(getattr(function, method, None)):
                raise ConfigurationError(
                    f'@exactly_once stands above {decorator}, so that messages would run without '
                    f'it: write it below {decorator}'
                )
    if inspect.isclass(function) or not callable(function):
        raise ConfigurationError(
            f'@exactly_once on {function!r}: put it on a function, a method or an `async def`'
        )
    plain = _plain(function)
    name = f'{_module_of(plain)}.{getattr(plain, "__qualname__", type(plain).__qualname__)}'
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise ConfigurationError(
            f'@exactly_once on the generator {name}: it has not run when it returns; return a list'
        )
    return name


def returns_nothing(function: object) -> bool:
    """Whether its code shows that it has no result but None; False where that cannot be told."""
    plain = _plain(function)
    code = getattr(getattr(plain, '__func__', plain), '__code__', None)
    if code is None or not _OTHER_RESULTS.isdisjoint(code.co_names):
        return False
    before = None
    for step in dis.get_instructions(code):
        if step.opname == 'RETURN_CONST' and step.argval is not None:
            return False
        if step.opname == 'RETURN_VALUE' and (
            step.is_jump_target
            or before is None
            or before.opname != 'LOAD_CONST'
            or before.argval is not None
        ):
            return False
        before = step
    return True


def is_async(function: object) -> bool:
    """Whether a call of it gives a coroutine."""
    call = function.__call__  # type: ignore[operator]  # every callable has it
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def check_has_run(name: str, result: object) -> None:
    """Raises ConfigurationError where what a function returned is still to be run."""
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        if inspect.iscoroutine(result):
            result.close()
        raise ConfigurationError(
            f'{name} returned a {type(result).__name__} that has not run yet: put @exactly_once '
            'on the function that does the work'
        )


def _plain(function: object) -> object:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _module_of(function: object) -> str:
    module = str(getattr(function, '__module__', None) or type(function).__module__)
    # `python -m proj.tasks` runs the same functions that others import as proj.tasks.
    spec = getattr(sys.modules.get('__main__'), '__spec__', None) if module == '__main__' else None
    return spec.name if spec is not None else module
