"""Tasks that may not be claimed although their tokens are here: a sorted set of 64-bit keys in
memory that forked children share.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import pairwise

from ..assignment.hashing import task_digest
from ..assignment.model import Range
from ..errors import JobSyncError

__all__ = ['Exclusions']

#: Keys of one block. A block that outgrows it is divided; 32 kB are copied in microseconds.
_BLOCK = 4096
_WORD = 8
#: Blocks that the index can name: 268 million keys.
_MOST_BLOCKS = 1 << 16
#: Words of one index: how many blocks there are, then the first key, the place and the length of
#: each.
_INDEX = 1 + 3 * _MOST_BLOCKS
#: Looks at a set that changes all the time, after which a task counts as excluded: it is asked for
#: again.
_TRIES = 1000


class Exclusions:
    """A set of tasks, 8 bytes each, written by one process and read by it and by its forked
    children.

    A key is the token in its upper bits and the task's digest in the rest, so that all keys of a
    range of tokens stand together and can be replaced at once. Keys lie in blocks, in a file
    without a name that grows; an index in memory of fixed size names the blocks. A change writes
    new blocks into free places, then the other one of two indexes, and then raises the generation,
    whose lowest bit tells which index counts. A reader that finds another generation after its look
    than before looks again: so it may even be stopped in the middle, and no lock is needed between
    processes.

    Args:
        total_tokens: Tokens of the cluster.
        lock: Keeps the writer's threads apart, where there are several.

    Attributes:
        head: For readers that cannot afford a call: the generation, another number after each
            change; how many keys there are.
    """

    def __init__(
        self, total_tokens: int, lock: AbstractContextManager[object] | None = None
    ) -> None:
        self._token_bits = (total_tokens - 1).bit_length()
        self._digest_bits = 64 - self._token_bits
        self._pid = os.getpid()
        self._lock = lock if lock is not None else nullcontext()
        self._file = _open_file()
        self._identity = _identity(self._file.fileno())
        self.head = memoryview(mmap.mmap(-1, _WORD * (2 + 2 * _INDEX))).cast('Q')
        self._indexes = self.head[2 : 2 + _INDEX], self.head[2 + _INDEX :]
        self._data = memoryview(b'').cast('Q')
        # The writer's own copy of the index, and places of the file that no index names.
        self._firsts: list[int] = []
        self._places: list[int] = []
        self._lengths: list[int] = []
        self._free: list[int] = []
        self._room = 0

    def __len__(self) -> int:
        return self.head[1]

    def __contains__(self, text: object) -> bool:
        raise TypeError('ask `excludes(token, text)`: the token is known to whoever asks')

    def excludes(self, token: int, text: str) -> bool:
        """Whether the task is in the set; it may be wrong for one task in 2 ** 64 / len(self), and
        says True then.
        """
        if not self.head[1]:
            return False
        key = token << self._digest_bits | task_digest(text) >> self._token_bits
        for _ in range(_TRIES):
            generation = self.head[0]
            with suppress(IndexError, ValueError):  # of an index that is being written
                found = self._look(self._indexes[generation & 1], key)
                if self.head[0] == generation:
                    return found
        return True

    def _look(self, index: memoryview, key: int) -> bool:
        count = index[0]
        at = bisect_right(index[1 : 1 + count], key)
        if not at:
            return False
        place, length = index[count + at], index[2 * count + at]
        end = (place + 1) * _BLOCK
        if end > len(self._data) and not self._map(end):
            return True
        block = self._data[place * _BLOCK : place * _BLOCK + length]
        where = bisect_left(block, key)
        return where < length and block[where] == key

    def _map(self, end: int) -> bool:
        """See as much of the file as there is; False in a process that has closed it."""
        with suppress(OSError, ValueError):
            descriptor = self._file.fileno()
            if _identity(descriptor) == self._identity:  # else another file got its number
                self._data = memoryview(mmap.mmap(descriptor, os.fstat(descriptor).st_size)).cast(
                    'Q'
                )
        return end <= len(self._data)

    def keys_of(self, tasks: Iterable[tuple[int, str]]) -> array[int]:
        """Sorted keys of tasks, given as token and text."""
        return array(
            'Q',
            sorted(
                {
                    token << self._digest_bits | task_digest(text) >> self._token_bits
                    for token, text in tasks
                }
            ),
        )

    def replace(self, ranges: Sequence[Range], keys: array[int]) -> None:
        """Let exactly `keys` (sorted) be what is excluded of these ranges of tokens (sorted,
        disjoint); other tokens stay as they are.
        """
        if not ranges or os.getpid() != self._pid:
            return
        bits = self._digest_bits
        with self._lock:
            first, last = self._blocks_of(ranges[0][0] << bits, ranges[-1][1] << bits)
            old = self._read(first, last)
            merged: array[int] = array('Q')
            done = 0
            for lo, hi in ranges:
                start = bisect_left(old, lo << bits, done)
                end = bisect_left(old, hi << bits, start)
                merged += old[done:start]
                merged += keys[bisect_left(keys, lo << bits) : bisect_left(keys, hi << bits)]
                done = end
            merged += old[done:]
            if merged != old:
                self._write(first, last, merged)

    def add(self, keys: Sequence[int]) -> None:
        """Exclude further tasks, given by their sorted keys."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            done = 0
            while done < len(keys):
                first, last = self._blocks_of(keys[done], keys[done] + 1)
                bound = self._firsts[last] if last < len(self._firsts) else 1 << 64
                end = max(bisect_left(keys, bound, done), done + 1)
                old = self._read(first, last)
                self._write(first, last, array('Q', sorted({*old, *keys[done:end]})))
                done = end

    def clear(self) -> None:
        """Forget all."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._firsts:
                self._write(0, len(self._firsts), array('Q'))
                with suppress(
                    AttributeError, OSError, ValueError
                ):  # give the memory back, where the system can
                    view = self._data.obj
                    assert isinstance(view, mmap.mmap)
                    view.madvise(mmap.MADV_REMOVE)

    def _blocks_of(self, lo: int, hi: int) -> tuple[int, int]:
        """The blocks, from the first up to the last, that hold keys from `lo` up to `hi`, or that
        such keys join.
        """
        first = max(bisect_right(self._firsts, lo) - 1, 0)
        return first, max(bisect_left(self._firsts, hi), min(first + 1, len(self._firsts)))

    def _read(self, first: int, last: int) -> array[int]:
        found: array[int] = array('Q')
        for place, length in zip(self._places[first:last], self._lengths[first:last], strict=True):
            found.frombytes(self._data[place * _BLOCK : place * _BLOCK + length].tobytes())
        return found

    def _write(self, first: int, last: int, keys: array[int]) -> None:
        """Put these keys in the place of those blocks, and publish that."""
        count = -(-len(keys) // _BLOCK)
        if len(self._firsts) - (last - first) + count > _MOST_BLOCKS:
            raise JobSyncError(
                f'more than {_MOST_BLOCKS * _BLOCK} tasks are audited for one date: use another '
                'date, or more nodes'
            )
        cuts = [len(keys) * part // count for part in range(count + 1)] if count else []
        places = [self._take_place() for _ in range(count)]
        for place, (start, end) in zip(places, pairwise(cuts), strict=True):
            self._data[place * _BLOCK : place * _BLOCK + end - start] = memoryview(keys)[start:end]
        freed = self._places[first:last]
        self._firsts[first:last] = [keys[start] for start in cuts[:-1]]
        self._places[first:last] = places
        self._lengths[first:last] = [end - start for start, end in pairwise(cuts)]
        self._publish()
        self._free += freed

    def _publish(self) -> None:
        number = len(self._firsts)
        index = self._indexes[(self.head[0] + 1) & 1]
        index[: 1 + 3 * number] = memoryview(
            array('Q', [number, *self._firsts, *self._places, *self._lengths])
        )
        total = sum(self._lengths)
        if total:
            self.head[1] = (
                # before: whoever sees the tokens of these tasks must not take the set for empty
                total
            )
        self.head[0] += 1
        self.head[1] = total

    def _take_place(self) -> int:
        if not self._free:
            fresh = max(16, self._room // 4)
            os.ftruncate(self._file.fileno(), (self._room + fresh) * _BLOCK * _WORD)
            self._free = list(range(self._room + fresh - 1, self._room - 1, -1))
            self._room += fresh
            if not self._map(self._room * _BLOCK):
                raise JobSyncError(
                    'the memory for tasks that others have taken was closed: leave the '
                    'descriptors of this process open'
                )
        return self._free.pop()


def _open_file() -> _File:
    if hasattr(os, 'memfd_create'):
        with suppress(OSError):
            return _File(os.memfd_create('jobsync-exclusions'))
    with tempfile.TemporaryFile() as file:
        return _File(os.dup(file.fileno()))


class _File:
    """A descriptor that is closed when nobody needs it any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._inode = _identity(descriptor)

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def __del__(self) -> None:
        with suppress(OSError):
            if _identity(self._descriptor) == self._inode:
                os.close(self._descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino
