"""What `jobsync doctor` finds, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.text import Text

from .context import console, printable

__all__ = ['Check', 'show']


@dataclass(frozen=True)
class Check:
    """One thing that was tried. `warn` is worth knowing, `bad` must be mended."""

    name: str
    verdict: Literal['ok', 'warn', 'bad']
    found: str
    remedy: str = ''


def show(checks: list[Check]) -> None:
    """Print the findings."""
    out = console()
    for check in checks:
        style = {'ok': 'green', 'warn': 'yellow', 'bad': 'red'}[check.verdict]
        out.print(
            Text(f'{check.verdict:<5}', style=style)
            + Text(f'{check.name}: {printable(check.found)}'),
            soft_wrap=True,
        )
        if check.remedy:
            out.print(f'     {printable(check.remedy)}', soft_wrap=True)
