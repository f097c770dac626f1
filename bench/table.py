"""The rows that measurements give and the table that is printed of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ['Limit', 'Row', 'as_dict', 'render']

_HEADINGS = ('measurement', 'unit', 'JobSync', 'peer', 'ratio', 'target')


@dataclass(frozen=True)
class Limit:
    """A target: the most that our figure, or its ratio to the peer's, may be."""

    most: float
    ratio: bool = False

    def __str__(self) -> str:
        return f'≤ {self.most:g}{" of peer" if self.ratio else ""}'


@dataclass(frozen=True)
class Row:
    """One figure of each side.

    Args:
        label: What was measured.
        unit: Of both figures.
        ours: Median; None where it could not be measured.
        peer: Median; None where the peer was not measured or cannot do the same.
        note: Why a figure is missing, or how it is to be read.
        limit: The target.
        more: Whether more is better; otherwise less is.
    """

    label: str
    unit: str
    ours: float | None
    peer: float | None
    note: str = ''
    limit: Limit | None = None
    more: bool = False

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return self.ours / self.peer if self.ours is not None and self.peer else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where that is unknown."""
        figure = self.ratio if self.limit is not None and self.limit.ratio else self.ours
        return figure <= self.limit.most if self.limit is not None and figure is not None else None


def as_dict(row: Row) -> dict[str, Any]:
    """The row for JSON."""
    return {
        'label': row.label,
        'unit': row.unit,
        'ours': row.ours,
        'peer': row.peer,
        'ratio': row.ratio,
        'more_is_better': row.more,
        'target': str(row.limit) if row.limit else None,
        'met': row.met,
        'note': row.note or None,
    }


def render(rows: Sequence[Row], peer_title: str) -> str:
    """The table and its footnotes.

    Args:
        rows: In the order in which they are shown.
        peer_title: Heading of the peer's column.
    """
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    cells = [tuple(peer_title if heading == 'peer' else heading for heading in _HEADINGS)]
    cells += [_cells(row, notes) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines = [
        '  '.join(
            _aligned(cell, width, column)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, '  '.join('─' * width for width in widths))
    lines += ['', 'Medians. Ratio: JobSync over the peer; less is better, except in rows marked ↑.']
    lines += [f'[{number}] {note}' for number, note in enumerate(notes, 1)]
    return '\n'.join(lines)


def _cells(row: Row, notes: Sequence[str]) -> tuple[str, ...]:
    label = (
        row.label
        + (' ↑' if row.more else '')
        + (f' [{notes.index(row.note) + 1}]' if row.note else '')
    )
    target = (
        f'{row.limit} { ({True: "met", False: "MISSED", None: "?"}[row.met]) }' if row.limit else ''
    )
    ratio = f'{row.ratio:.2f}' if row.ratio is not None else '—'
    return label, row.unit, _number(row.ours), _number(row.peer), ratio, target


def _number(value: float | None) -> str:
    if value is None:
        return '—'
    size = abs(value)
    return (
        f'{value:,.0f}'
        if size >= 1000 or value == int(value)
        else f'{value:.1f}'
        if size >= 100
        else f'{value:.3g}'
    )


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.rjust(width) if column in (2, 3, 4) else cell.ljust(width)
