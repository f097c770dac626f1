"""Names that mean nothing where somebody meant something: options of tasks, and tasks that have a
pin and are not there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from ..logs import shown

__all__ = ['misspelt', 'said_elsewhere']

#: How alike two names have to be, from 0 to 1, for one of them to be meant.
_ALIKE = 0.8
#: What is said in another place, and how.
_ELSEWHERE = {'jobsync_affinity': 'write @exactly_once(affinity=…) in its place'}


def misspelt(
    options: Mapping[str, Iterable[str]],
    known: Iterable[str],
    pins: Iterable[str] = (),
    tasks: Iterable[str] = (),
    what: str = 'task',
) -> list[str]:
    """What looks misspelt, a sentence each, with the nearest name that is right.

    Args:
        options: The names of the options of each task. One is reported that begins with `jobsync`,
            or is much like a known one.
        known: The options that there are.
        pins: Names of tasks that have a pin in the settings.
        tasks: The tasks that are known.
        what: What the framework calls a task.
    """
    right, found = sorted(known), []
    for task, names in sorted(options.items()):
        for name in sorted(set(names) - set(right)):
            near = _nearest(name, right, _ALIKE)
            if near or name.startswith('jobsync'):
                hint = said_elsewhere(name) or _hint(near or _nearest(name, right))
                found.append(
                    f'{what} {shown(task, 100)}: its option {shown(name, 100)} means nothing{hint}'
                )
    there = sorted(tasks)
    for name in sorted(set(pins) - set(there)):
        found.append(
            f'pins: there is no {what} {shown(name, 100)} here{_hint(_nearest(name, there))}'
        )
    return found


def said_elsewhere(name: str) -> str:
    """How to say what an option that there is not would say; '' where nothing does."""
    remedy = _ELSEWHERE.get(name)
    return f': {remedy}' if remedy else ''


def _nearest(name: str, known: list[str], alike: float = 0.6) -> str:
    return next(iter(difflib.get_close_matches(name, known, 1, alike)), '')


def _hint(near: str) -> str:
    return f': did you mean {shown(near, 100)}?' if near else ''
