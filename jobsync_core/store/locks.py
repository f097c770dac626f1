"""Rows of the lock table: which task ids are pinned to which nodes.

A change that could alter the plan raises the cluster's lock_version and notifies, so that the
leader replans at once; one that could not leaves both alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from ..assignment.arguments import LockRow
from ..errors import ConfigurationError
from ..results import LockInfo
from .base import Store

__all__ = ['LOCKS', 'LockStore']

#: Characters of a text, and bytes of the patterns, that people are shown of one lock.
_SHOWN, _SHOWN_PATTERNS = 200, 4000
#: Locks of one cluster.
LOCKS = 250_000


class LockStore(Store):
    """The locks of a cluster."""

    def register(self, rows: Sequence[LockRow], created_by: str, pin: bool = False) -> int:
        """Write locks; one that exists is replaced, but keeps its age. Of several rows for one task
        the last counts.

        Args:
            rows: What to write.
            created_by: Who registers them; `clear_by_creator` finds them by it.
            pin: They are a worker's, for its pinned tasks.

        Returns:
            How many distinct tasks are locked by `rows`.

        Raises:
            ConfigurationError: There would be more than LOCKS locks.
        """
        if not rows:
            return 0
        encoded: dict[tuple[str, ...], str] = {}
        for _, patterns, *_ in rows:
            if patterns not in encoded:
                encoded[patterns] = json.dumps(patterns)
        self._take_turn()
        ((tasks, replan, differs),) = self._rows(
            'lock.register',
            {
                'tasks': [row[0] for row in rows],
                'patterns': [encoded[row[1]] for row in rows],
                'reasons': [row[2] for row in rows],
                'days': [row[3] for row in rows],
                'queues': [row[4] for row in rows],
                'creator': created_by,
                'pin': pin,
            },
        )
        if replan:
            self._check_number()
            self._changed()
        elif differs:
            self._run('lock.tell', {'channel': self._tables.channel})
        return int(tasks)

    def _check_number(self) -> None:
        ((number,),) = self._rows('lock.count')
        if number > LOCKS:
            raise ConfigurationError(
                f'there would be {number} locks, {LOCKS} at most, as each of them is looked at '
                'with every plan; nothing was registered: '
                'clear some, or pin with fewer keys'
            )

    def list_locks(self) -> list[LockInfo]:
        """The locks in force, oldest first."""
        return cast(list[LockInfo], self._dicts('lock.all'))

    def show_locks(self, limit: int | None) -> tuple[int, list[LockInfo]]:
        """How many locks are in force, and the oldest of them for people to look at: as
        `list_locks`, but long texts are cut by the server.

        Args:
            limit: How many rows; None: all.
        """
        ((number,),) = self._rows('lock.count_in_force')
        rows = self._dicts('lock.show', {'length': _SHOWN, 'size': _SHOWN_PATTERNS, 'limit': limit})
        return int(number), cast(list[LockInfo], rows)

    def of_task(self, text: str) -> LockInfo | None:
        """The lock in force on a task, as `list_locks` gives it."""
        rows = cast(list[LockInfo], self._dicts('lock.of_task', {'task': text}))
        return rows[0] if rows else None

    def clear_by_creator(self, creator: str) -> int:
        """Delete the locks that `creator` registered; returns how many."""
        return self._delete('lock.delete_by_creator', {'creator': creator})

    def clear_queue(self, queue: str) -> int:
        """Delete the locks that count in one queue group alone; returns how many."""
        return self._delete('lock.delete_queue', {'queue': queue})

    def clear_all(self) -> int:
        """Delete every lock; returns how many."""
        return self._delete('lock.delete_all', {})

    def clear_kind(self, *, locks: bool, pins: bool) -> int:
        """Delete what somebody registered, the pins of workers, or both; returns how many."""
        return self._delete('lock.delete_kind', {'locks': locks, 'pins': pins})

    def clear_tasks(self, task_ids: Iterable[str]) -> int:
        """Delete the locks on these tasks; returns how many there were."""
        return self._delete('lock.delete_tasks', {'tasks': list(task_ids)})

    def clear_old_pins(self, unpinned: Iterable[str]) -> int:
        """Delete the locks on the virtual keys (`name#3`) of tasks that were pinned once; returns
        how many there were.
        """
        return self._delete('lock.delete_old_pins', {'unpinned': list(unpinned)})

    def _delete(self, name: str, params: Mapping[str, object]) -> int:
        self._take_turn()
        deleted = self._run(name, params)
        if deleted:
            self._changed()
        return deleted

    def _take_turn(self) -> None:
        # Every node of a cluster registers the same locks when it starts: in turn they cannot
        # deadlock, and all but the first find nothing to change. It is another key than the
        # leader's, which must not wait while rows are written.
        first, second = self._tables.advisory
        self._run('lock.take_turn', {'first': first, 'second': second ^ 1})

    def _changed(self) -> None:
        first, second = self._tables.advisory
        self._run(
            'lock.change', {'first': first, 'second': second, 'channel': self._tables.channel}
        )
