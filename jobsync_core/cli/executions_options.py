"""The options that say which executions are meant."""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..executions import STATES, ExecutionFilter

__all__ = ['filter_options']

_Command = TypeVar('_Command', bound=Callable[..., Any])

_UNITS = {'': 1, 's': 1, 'm': 60, 'h': 3600, 'd': 86_400}
_AGE = re.compile(r'(\d+(?:\.\d+)?)\s*([smhd]?)')


def _age(value: str) -> datetime.timedelta:
    """A number of seconds, or of minutes, hours or days: 90, 90s, 15m, 2h, 7d."""
    found = _AGE.fullmatch(value.strip())
    try:
        if found is not None:
            return datetime.timedelta(seconds=float(found[1]) * _UNITS[found[2]])
    except OverflowError:
        pass
    raise click.BadParameter(f'{value!r} is no age: give seconds, or 15m, 2h, 7d')


def filter_options(command: _Command) -> _Command:
    """Add --state, --key, --function, --node and --older-than to a command, which gets them as
    `which`.
    """

    @functools.wraps(command)
    def wrapped(
        state: tuple[str, ...],
        key: str | None,
        function: str | None,
        node: str | None,
        older_than: datetime.timedelta | None,
        **options: Any,
    ) -> Any:
        which = ExecutionFilter(state or None, key, function, node, older_than)
        return command(**options, which=which)

    result: Any = wrapped
    for option in (
        click.option(
            '--older-than',
            type=_age,
            metavar='AGE',
            help='Whose last attempt ended so long ago, or began and has no end: seconds, or 15m, '
            '2h, 7d.',
        ),
        click.option('--node', metavar='NAME', help='Whose last attempt this node made.'),
        click.option(
            '--function',
            metavar='NAME',
            help='Of this task, actor or function, or scope: what the key begins with.',
        ),
        click.option(
            '--key',
            metavar='PATTERN',
            help='Whose whole key matches: % any text, _ any character, \\ before one of these '
            'that is meant as it stands.',
        ),
        click.option(
            '--state',
            type=click.Choice(STATES),
            multiple=True,
            help='In this state; may be repeated.',
        ),
    ):
        result = option(result)
    given: _Command = result
    return given
