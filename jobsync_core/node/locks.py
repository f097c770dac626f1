"""What a Job does with locks: which tasks are tied to which nodes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from ..assignment.arguments import check_creator, check_locks
from ..results import LockInfo
from .view import NodeView

__all__ = ['LockView']


class LockView(NodeView):
    """The part of a Job that registers locks, shows and clears them. It works while the Job enters,
    too, in `lock_provider`.
    """

    def _check_member(self) -> None:
        """Refuse where the Job neither enters nor is entered."""
        raise NotImplementedError

    def register_lock(
        self,
        task_id: Hashable,
        node_patterns: str | Sequence[str],
        reason: str | None = None,
        expires_in_days: float | None = None,
        *,
        queue: str | None = None,
    ) -> None:
        """Pin a task to nodes by SQL LIKE patterns, tried in order; replaces the task's lock.

        Args:
            task_id: The task.
            node_patterns: A pattern or several; the first that matches a live node counts.
            reason: For people.
            expires_in_days: Days until the lock ends; None never.
            queue: The queue group in which it counts; None in all, and in `can_claim_task`.
        """
        self.register_locks_bulk([(task_id, node_patterns, reason, expires_in_days, queue)])

    def register_locks_bulk(self, locks: Iterable[Sequence[Any]]) -> int:
        """Pin many tasks in one statement: tuples (task_id, node_patterns, reason[,
        expires_in_days[, queue]]); returns how many.

        Raises:
            ConfigurationError: A tuple is malformed; the message names it and nothing is
                registered.
        """
        self._check_member()
        rows = check_locks(locks)
        return self._node.register_locks(rows) if rows else 0

    def list_locks(self) -> list[LockInfo]:
        """All locks: dicts with task_id, node_patterns, reason, created_at, created_by,
        expires_at.
        """
        self._check_member()
        return self._node.list_locks()

    def clear_locks_by_creator(self, creator: str) -> int:
        """Delete the locks that the node named `creator` registered; returns how many."""
        self._check_member()
        return self._node.clear_locks(check_creator(creator))

    def clear_all_locks(self) -> int:
        """Delete all locks; returns how many."""
        self._check_member()
        return self._node.clear_locks()
