"""Queue groups on the number line of tokens: each has a window of it, with a ring of its own.

Group g has the tokens from g * GROUP_SPAN on, as many as the cluster has. So one table under one
exclusion constraint holds all rings, and whatever hands tokens over works on all of them alike.
Group 0 has the tokens of the plain Job; every node belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .model import Range, Segment
from .tokens import TokenSet

__all__ = [
    'GROUP_SPAN',
    'MOST_GROUPS',
    'PLAIN',
    'cut_by_group',
    'group_of',
    'shifted',
    'tokens_by_group',
    'window',
]

#: From the first token of one group to that of the next: more than a cluster may have tokens.
GROUP_SPAN = 1 << 20
#: The highest id of a group: PostgreSQL's int4range holds the window of this one, and no further.
MOST_GROUPS = 2047

#: The group of the plain Job.
PLAIN = 0


def window(group: int, total_tokens: int) -> Range:
    """The tokens of a group."""
    first = group * GROUP_SPAN
    return first, first + total_tokens


def group_of(token: int) -> int:
    """The group that a token belongs to."""
    return token // GROUP_SPAN


def shifted(row: Segment, by: int) -> Segment:
    """The same row elsewhere on the number line."""
    return _moved(row, row.lo + by, row.hi + by)


def cut_by_group(rows: Iterable[Segment], total_tokens: int) -> dict[int, list[Segment]]:
    """The rows of each group as if it were alone, with tokens from 0 on. What lies in no window
    is left out.
    """
    found: dict[int, list[Segment]] = {}
    for row in rows:
        for group in range(group_of(row.lo), group_of(row.hi - 1) + 1):
            first, end = window(group, total_tokens)
            lo, hi = max(row.lo, first), min(row.hi, end)
            if lo < hi:
                found.setdefault(group, []).append(_moved(row, lo - first, hi - first))
    return found


def tokens_by_group(held: TokenSet, ids: Mapping[str, int], total_tokens: int) -> dict[str, int]:
    """How many of these tokens are of each queue group; without that of the plain Job.

    Args:
        held: Tokens on the number line.
        ids: Of the groups, by name.
        total_tokens: Tokens of each group.
    """
    return {
        name: len(held & TokenSet([window(group, total_tokens)]))
        for name, group in sorted(ids.items())
        if group != PLAIN
    }


def _moved(row: Segment, lo: int, hi: int) -> Segment:
    """The row with other tokens. A plan of many locks has many rows, and most are as they should
    be.
    """
    return row if (lo, hi) == (row.lo, row.hi) else replace(row, lo=lo, hi=hi)
