"""A set of tokens kept as ranges: a million tokens in a few dozen pairs of numbers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Range

__all__ = ['TokenSet']


class TokenSet(AbstractSet[int]):
    """An immutable set of tokens. Length, membership and all operations with another TokenSet cost
    by the range, not by the token.

    Args:
        ranges: Half-open ranges (first, end) in any order; they may overlap, and empty ones are
            ignored.
    """

    __slots__ = ('_length', '_starts', 'ranges')

    #: Sorted, disjoint, non-adjacent half-open ranges.
    ranges: tuple[Range, ...]

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        merged: list[Range] = []
        for lo, hi in sorted(ranges):
            if lo >= hi:
                continue
            if lo < 0:
                raise ValueError(f'token {lo} is negative: tokens count from 0')
            if merged and lo <= merged[-1][1]:
                if hi > merged[-1][1]:
                    merged[-1] = (merged[-1][0], hi)
            else:
                merged.append((lo, hi))
        self._set(merged)

    def _set(self, merged: Iterable[Range]) -> None:
        self.ranges = tuple(merged)
        self._starts = tuple(lo for lo, _ in self.ranges)
        self._length = sum(hi - lo for lo, hi in self.ranges)

    @classmethod
    def of(cls, tokens: Iterable[int]) -> TokenSet:
        """The set of these tokens, one by one."""
        if isinstance(tokens, TokenSet):
            return cls._made(tokens.ranges)
        if isinstance(tokens, range) and tokens.step == 1:
            return cls(((tokens.start, tokens.stop),))
        return cls((token, token + 1) for token in tokens)

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> TokenSet:  # type: ignore[override]  # of ints alone
        return cls.of(it)

    @classmethod
    def _made(cls, merged: Iterable[Range]) -> TokenSet:
        made = cls.__new__(cls)
        made._set(merged)
        return made

    def __len__(self) -> int:
        return self._length

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __contains__(self, token: object) -> bool:
        if not isinstance(token, int):
            return False
        at = bisect_right(self._starts, token) - 1
        return at >= 0 and token < self.ranges[at][1]

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(range(lo, hi) for lo, hi in self.ranges)

    def __reversed__(self) -> Iterator[int]:
        return chain.from_iterable(range(hi - 1, lo - 1, -1) for lo, hi in reversed(self.ranges))

    def __and__(self, other: AbstractSet[Any]) -> TokenSet:
        theirs = _coerced(other)
        if theirs is None:
            return NotImplemented
        return self._made(_common(self.ranges, theirs.ranges))

    __rand__ = __and__

    def __or__(self, other: AbstractSet[Any]) -> TokenSet:
        theirs = _coerced(other)
        if theirs is None:
            return NotImplemented
        return TokenSet(self.ranges + theirs.ranges)

    __ror__ = __or__

    def __sub__(self, other: AbstractSet[Any]) -> TokenSet:
        theirs = _coerced(other)
        if theirs is None:
            return NotImplemented
        return self._made(_difference(self.ranges, theirs.ranges))

    def __rsub__(self, other: AbstractSet[Any]) -> TokenSet:
        theirs = _coerced(other)
        return NotImplemented if theirs is None else theirs - self

    def __xor__(self, other: AbstractSet[Any]) -> TokenSet:
        theirs = _coerced(other)
        if theirs is None:
            return NotImplemented
        return (self - theirs) | (theirs - self)

    __rxor__ = __xor__

    def __le__(self, other: AbstractSet[Any]) -> bool:
        if isinstance(other, TokenSet):
            return self._length <= other._length and not _difference(self.ranges, other.ranges)
        return super().__le__(other)

    def __lt__(self, other: AbstractSet[Any]) -> bool:
        return (
            len(self) < len(other) and self.__le__(other)
            if isinstance(other, AbstractSet)
            else NotImplemented
        )

    def __ge__(self, other: AbstractSet[Any]) -> bool:
        if isinstance(other, TokenSet):
            return other <= self
        return super().__ge__(other)

    def __gt__(self, other: AbstractSet[Any]) -> bool:
        return (
            len(self) > len(other) and self.__ge__(other)
            if isinstance(other, AbstractSet)
            else NotImplemented
        )

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenSet):
            return self.ranges == other.ranges
        return super().__eq__(other)

    def __hash__(self) -> int:
        # Not the hash of an equal frozenset: that would cost a step per token. Use one type within
        # one dict.
        return hash(self.ranges)

    def isdisjoint(self, other: Iterable[Any]) -> bool:
        """Whether the two have no token in common."""
        if isinstance(other, TokenSet):
            return not _common(self.ranges, other.ranges)
        return not any(token in self for token in other)

    def __repr__(self) -> str:
        shown = [f'{lo}-{hi - 1}' if hi - lo > 1 else str(lo) for lo, hi in self.ranges[:8]]
        more = f', … {len(self.ranges) - 8} ranges more' if len(self.ranges) > 8 else ''
        return (
            f'<TokenSet of {self._length}: {", ".join(shown)}{more}>'
            if shown
            else '<TokenSet of 0>'
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenSet, (self.ranges,)

    def write_bitmap(self, buffer: memoryview | bytearray, total_tokens: int) -> None:
        """Make a bitmap show this set: token t is bit t & 7 of byte t >> 3.

        The bitmap is copied whole from a finished one, so that a reader, even in another process,
        never sees a token that is neither in the old set nor in this one.

        Args:
            buffer: At least (total_tokens + 7) // 8 bytes.
            total_tokens: Tokens from here on are left out.
        """
        bits = bytearray((total_tokens + 7) // 8)
        for lo, hi in _common(self.ranges, ((0, total_tokens),)):
            first, last = lo >> 3, (hi - 1) >> 3
            head, tail = 0xFF << (lo & 7) & 0xFF, 0xFF >> (7 - (hi - 1 & 7))
            if first == last:
                bits[first] |= head & tail
                continue
            bits[first] |= head
            bits[first + 1 : last] = b'\xff' * (last - first - 1)
            bits[last] |= tail
        buffer[: len(bits)] = bits


def _coerced(other: object) -> TokenSet | None:
    if isinstance(other, TokenSet):
        return other
    return TokenSet.of(other) if isinstance(other, AbstractSet) else None


def _common(mine: tuple[Range, ...], theirs: tuple[Range, ...]) -> list[Range]:
    found: list[Range] = []
    i = j = 0
    while i < len(mine) and j < len(theirs):
        lo, hi = max(mine[i][0], theirs[j][0]), min(mine[i][1], theirs[j][1])
        if lo < hi:
            found.append((lo, hi))
        if mine[i][1] < theirs[j][1]:
            i += 1
        else:
            j += 1
    return found


def _difference(mine: tuple[Range, ...], theirs: tuple[Range, ...]) -> list[Range]:
    left: list[Range] = []
    j = 0
    for start, hi in mine:
        lo = start
        while j < len(theirs) and theirs[j][1] <= lo:
            j += 1
        k = j
        while k < len(theirs) and theirs[k][0] < hi:
            if lo < theirs[k][0]:
                left.append((lo, theirs[k][0]))
            lo = theirs[k][1]
            k += 1
        if lo < hi:
            left.append((lo, hi))
    return left
