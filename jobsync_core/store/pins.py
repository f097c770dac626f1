"""The locks as a plan wants them, in memory: read again only when they have changed, since most of
them are there for many plans.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..assignment.hashing import task_to_token
from ..assignment.patterns import PATTERN_BYTES, read_patterns
from ..assignment.round import Pin
from .connection import Connection
from .locks import LOCKS
from .tables import Tables

__all__ = ['LocksAt', 'PinReader']

#: Locks that one statement reads.
_PAGE = 20_000
#: Complaints about locks that one round hands on.
_COMPLAINTS = 20

#: What pins depend on: the number of the latest change of a lock, and how tasks become tokens.
LocksAt = tuple[int, int, str]


class _Reading:
    """The locks, as far as they have been read.

    Args:
        at: What they depend on.
        most: How many count.
    """

    def __init__(self, at: LocksAt, most: int) -> None:
        self.at = at
        self.most = most
        self.after = ''
        self.number = 0
        self.pins: list[Pin] = []
        self.queues: dict[str, str] = {}
        self.broken: list[str] = []
        self._patterns: dict[str, tuple[str, ...]] = {}

    def take(self, rows: Sequence[tuple[str, str, float, str | None, bool]]) -> None:
        """The next ones, in the order of their tasks."""
        _, total_tokens, hash_function = self.at
        for text, encoded, created_at, queue, loose in rows:
            self.number += 1
            self.after = text
            if self.number > self.most:
                self.broken.append(
                    f'there are more than {self.most:,} locks: those on task {text[:200]!r} and '
                    'what comes after it in order are ignored; '
                    'clear some (`jobsync locks clear`), or pin with fewer keys'
                )
                return
            try:
                known = self._patterns.get(encoded)
                if known is None:
                    known = self._patterns[encoded] = read_patterns(encoded)
                token = task_to_token(text, total_tokens, hash_function)
                self.pins.append(Pin(text, token, known, created_at, loose=loose))
                if queue is not None:
                    self.queues[text] = queue
            except Exception as error:  # whatever is in the row, it concerns this lock alone
                self.broken.append(
                    f'the lock on task {text[:200]!r} is ignored: {error}; clear it, or register '
                    'it again'
                )


class PinReader:
    """Reads the locks, as many at a time as there is time for.

    Args:
        tables: Names of the tables.
        page: How many locks one statement reads.
        most: How many locks count; the others are complained of.

    Attributes:
        pins: Those that were read last, the oldest lock first, as if each counted in all groups.
    """

    def __init__(self, tables: Tables, page: int = _PAGE, most: int = LOCKS) -> None:
        self.pins: tuple[Pin, ...] = ()
        self._queues: dict[str, str] = {}
        self._tables = tables
        self._page = page
        self._most = most
        self._at: LocksAt | None = None
        self._reading: _Reading | None = None
        self._broken: list[str] = []
        self._told: frozenset[str] = frozenset()

    def read(self, connection: Connection, at: LocksAt, until: float) -> bool:
        """Bring the locks up to date, as many as can be read until then; whether all are. A row
        that is none is set aside, with a complaint; the others count.
        """
        if self._at == at:
            return True
        reading = self._reading
        if reading is None or reading.at != at:
            reading = self._reading = _Reading(at, self._most)
        while True:
            rows = connection.execute(
                self._tables.sql('leader.pins'),
                {
                    'size': PATTERN_BYTES,
                    'after': reading.after,
                    'limit': min(self._page, self._most + 1 - reading.number),
                },
            )
            reading.take(rows)
            if len(rows) < self._page or reading.number > self._most:
                break
            if time.monotonic() > until:
                return False
        reading.pins.sort(key=lambda pin: (pin.created_at, pin.task_id))
        self.pins, self._broken = tuple(reading.pins), reading.broken
        self._queues = reading.queues
        self._at, self._reading = at, None
        return True

    def placed(self, ids: Mapping[str, int]) -> tuple[Pin, ...]:
        """The pins, each where it counts: a lock on a queue in that queue group alone, and nowhere
        while no node has named it.

        Args:
            ids: Of the queue groups, by name.
        """
        if not self._queues:
            return self.pins
        found: list[Pin] = []
        for pin in self.pins:
            queue = self._queues.get(pin.task_id)
            if queue is None:
                found.append(pin)
            elif queue in ids:
                found.append(replace(pin, group=ids[queue]))
        return tuple(found)

    def complaints(self, conflicts: tuple[str, ...]) -> tuple[str, ...]:
        """What is wrong with the locks and has not been said since it began: each once, and not too
        many at a time.

        Args:
            conflicts: What the plan has found of them.
        """
        found = (*self._broken, *conflicts)
        fresh = [text for text in found if text not in self._told]
        self._told = frozenset(found)
        more = len(fresh) - _COMPLAINTS
        return (
            (
                *fresh[:_COMPLAINTS],
                f'{more} more locks like these; `jobsync locks list` shows all locks',
            )
            if more > 0
            else tuple(fresh)
        )
