"""Sets of tokens as the bits of an int, which a simulation compares after each step.

On the number line the groups lie far apart; the bits of their tokens lie next to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jobsync_core.assignment.groups import GROUP_SPAN, group_of
from jobsync_core.assignment.model import Range

__all__ = ['bit_of', 'mask_of', 'renamed', 'tokens_in', 'window_mask']

#: Bits of each group: more than a simulated cluster has tokens.
_BITS = 32
_WHOLE = (1 << _BITS) - 1


def bit_of(token: int) -> int:
    """The place of a token's bit."""
    return group_of(token) * _BITS + token % GROUP_SPAN


def mask_of(ranges: Iterable[Range]) -> int:
    """The tokens of the ranges, each of which lies in one group."""
    mask = 0
    for lo, hi in ranges:
        mask |= (2 << bit_of(hi - 1)) - (1 << bit_of(lo))
    return mask


def tokens_in(mask: int) -> list[int]:
    """The tokens of a mask."""
    return [
        bit // _BITS * GROUP_SPAN + bit % _BITS
        for bit in range(mask.bit_length())
        if mask >> bit & 1
    ]


def window_mask(number: int) -> int:
    """All bits of a group."""
    return _WHOLE << number * _BITS


def renamed(mask: int, ids: Mapping[str, int], slots: Mapping[str, int]) -> int:
    """The mask with the bits of each group where its name has its slot, whatever id one node knows
    it by. Of groups whose name is not known the bits lie above all others.
    """
    if mask <= _WHOLE:
        return mask  # of group 0 alone, which has the same place everywhere
    found = 0
    for name, number in ids.items():
        part = mask & window_mask(number)
        mask ^= part
        found |= part >> number * _BITS << slots[name] * _BITS
    return found | mask << len(slots) * _BITS
