"""A unit of work, as `can_claim_task`, `add_task` and the ledger take it."""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ['Task', 'task_id_of']


class Task:
    """A task id with an optional name for people. Two tasks are equal when their ids are.

    Args:
        id: Any hashable value whose text is the same in every process.
        name: What to call it in logs; the id counts alone.
    """

    __slots__ = ('id', 'name')

    def __init__(self, id: Hashable, name: str | None = None) -> None:
        self.id = id
        self.name = name

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, Task) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return (
            f'Task({self.id!r})' if self.name is None else f'Task({self.id!r}, name={self.name!r})'
        )


def task_id_of(task: object) -> object:
    """The id of a Task or of any object with an `id`; any other value is the id itself."""
    return getattr(task, 'id', task)
