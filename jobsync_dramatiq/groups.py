"""Members of a group that are delivered twice are counted once.

Dramatiq counts down for each message of a group that ends well. A worker that dies between counting
and acknowledging leaves a message that would be counted again: the completion callback would run
early, and once more at the end. So each counted message of an `@exactly_once` actor leaves a mark
where the group is counted. Only a death between these two steps still counts twice.
"""

from __future__ import annotations

from typing import Any

from dramatiq.middleware import GroupCallbacks, Middleware

from jobsync_core.worker.adapter import CoordinatedTasks

__all__ = ['forget_group', 'mark_members', 'unmark_members', 'was_counted']

_GROUP = 'group_completion_uuid'


class _Marks(Middleware):
    """Right ahead of GroupCallbacks in the list, so that it comes right after it when a message has
    ended.
    """

    def __init__(self, counter: GroupCallbacks, actors: CoordinatedTasks) -> None:
        self._actors = actors
        self._backend = counter.rate_limiter_backend
        # Dramatiq 1 has no such setting.
        self._ttl = int(getattr(counter, 'barrier_ttl', 86_400_000))

    def after_process_message(
        self,
        broker: Any,
        message: Any,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        """Leave a mark."""
        if exception is not None or _GROUP not in message.options:
            return
        found = self._actors.find(message.actor_name)
        if (
            found is not None
            and found.once is not None
            and not self._backend.add(_mark(message), 1, self._ttl)
        ):
            self._backend.incr(_mark(message), 1, 1, self._ttl)

    def is_marked(self, message: Any) -> bool:
        """Whether a message has its mark. Looking leaves none: a count of zero."""
        self._backend.add(_mark(message), 0, self._ttl)
        return not self._backend.incr(_mark(message), 0, 0, self._ttl)


def mark_members(broker: Any, actors: CoordinatedTasks) -> None:
    """Have a worker's groups leave marks."""
    for position, item in enumerate(broker.middleware):
        if isinstance(item, GroupCallbacks):
            broker.middleware.insert(position, _Marks(item, actors))
            return


def unmark_members(broker: Any) -> None:
    """Undo `mark_members`."""
    broker.middleware[:] = [item for item in broker.middleware if not isinstance(item, _Marks)]


def was_counted(broker: Any, message: Any) -> bool:
    """Whether an earlier delivery of a message was counted for its group."""
    if _GROUP not in message.options:
        return False
    return any(item.is_marked(message) for item in broker.middleware if isinstance(item, _Marks))


def forget_group(message: Any) -> None:
    """Have this delivery of a message not be counted."""
    message.options.pop(_GROUP)


def _mark(message: Any) -> str:
    return f'{message.options[_GROUP]}@{message.message_id}'
