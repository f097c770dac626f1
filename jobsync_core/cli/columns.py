"""Columns of plain text, for lists of any length: a table of rich takes half a millisecond for each
row.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ['columns', 'cut']


def columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of cells below their names, each column as wide as its widest cell."""
    widths = [
        max(len(name), *map(len, column))
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    ]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (names, *rows)
    )


def cut(text: str, width: int) -> str:
    """The text, or its beginning where it has more characters."""
    return text if len(text) <= width else f'{text[: width - 1]}…'
