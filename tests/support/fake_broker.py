"""A broker in memory, as the duties of a node see one, with errors on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jobsync_core.worker.broker import Delivery

__all__ = ['Contents', 'FakeBroker', 'FakeDelivery', 'Item']


@dataclass
class Item:
    """A message."""

    route: str | None
    home: str = 'home'
    task: str = 'known'


@dataclass
class Contents:
    """Queues, and what nodes hold unacknowledged; shared by the connections of several nodes.

    Attributes:
        queues: Messages by queue, the next one first.
        held: Messages by node.
        requeued: How many messages went back to the queue that they were taken off.
        on_forward: Called before a message is sent on; what it raises is the broker's error.
    """

    queues: dict[str, list[Item]] = field(default_factory=dict)
    held: dict[str, list[Item]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    requeued: int = 0
    on_forward: Callable[[Item], object] = lambda item: None

    def put(self, queue: str, *routes: str | None) -> None:
        with self.lock:
            self.queues.setdefault(queue, []).extend(Item(route) for route in routes)

    def put_of(self, queue: str, *tasks: str) -> None:
        """Messages of tasks, without a route."""
        with self.lock:
            items = [Item(None, f'home of {task}', task) for task in tasks]
            self.queues.setdefault(queue, []).extend(items)

    def routes(self, queue: str) -> list[str | None]:
        """Sorted."""
        return sorted(self.order(queue), key=str)

    def order(self, queue: str) -> list[str | None]:
        with self.lock:
            return [item.route for item in self.queues.get(queue, [])]

    def tasks(self, queue: str) -> list[str]:
        with self.lock:
            return [item.task for item in self.queues.get(queue, [])]

    def size(self, queue: str) -> int:
        return len(self.order(queue))

    def total(self) -> int:
        with self.lock:
            return sum(map(len, (*self.queues.values(), *self.held.values())))


class FakeDelivery:
    """A message that was taken."""

    def __init__(self, contents: Contents, source: str, item: Item) -> None:
        self._contents, self._source, self._item = contents, source, item
        self.id, self.task = f'id of {item.route}', item.task
        self.route, self.home = item.route, item.home

    def forward(self, queue: str) -> None:
        self._contents.on_forward(self._item)
        with self._contents.lock:
            self._contents.queues.setdefault(queue, []).append(self._item)

    def requeue(self) -> None:
        self._contents.requeued += 1
        with self._contents.lock:
            self._contents.queues.setdefault(self._source, []).insert(0, self._item)


class FakeBroker:
    """A connection to the broker.

    Args:
        contents: The broker.
        catches_strays, requeue_is_free: As Broker says.
    """

    def __init__(
        self, contents: Contents, catches_strays: bool = False, requeue_is_free: bool = True
    ) -> None:
        self.contents = contents
        self.catches_strays = catches_strays
        self.requeue_is_free = requeue_is_free
        #: What was done: nodes restored, queues deleted, marks written, messages taken by queue.
        self.restored: list[str] = []
        self.deleted: list[str] = []
        #: Queues of which somebody has something in hand.
        self.in_use: set[str] = set()
        self.marks: list[str] = []
        self.taken: list[str] = []
        self.resets = 0
        #: How many queues each question was about that was about several; how many questions.
        self.asked: list[int] = []
        self.questions = 0
        #: Errors that the next calls of `restore` raise.
        self.errors: list[Exception] = []
        self.on_restore: Callable[[str], object] = lambda node: None
        self.on_size: Callable[[str], object] = lambda queue: None
        self.on_take: Callable[[str], object] = lambda queue: None
        self.on_delete: Callable[[str], object] = lambda queue: None

    def mark(self, mark: str) -> None:
        self.questions += 1
        self.marks.append(mark)

    def restore(self, node: str) -> int:
        if self.errors:
            raise self.errors.pop()
        self.restored.append(node)
        self.on_restore(node)
        with self.contents.lock:
            items = self.contents.held.pop(node, [])
            self.contents.queues.setdefault('home', []).extend(items)
            return len(items)

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        self.questions += 1
        self.asked.append(len(queues))
        with self.contents.lock:
            return frozenset(
                queue
                for queue, node in queues.items()
                if self.contents.queues.get(queue) or self.contents.held.get(node)
            )

    def size(self, queue: str) -> int:
        self.questions += 1
        self.on_size(queue)
        return self.contents.size(queue)

    def take(self, queue: str) -> Delivery | None:
        self.taken.append(queue)
        self.on_take(queue)
        with self.contents.lock:
            items = self.contents.queues.get(queue)
            return FakeDelivery(self.contents, queue, items.pop(0)) if items else None

    def delete(self, queue: str) -> bool:
        self.on_delete(queue)
        with self.contents.lock:
            if self.contents.queues.get(queue) or queue in self.in_use:
                return False
            self.contents.queues.pop(queue, None)
        self.deleted.append(queue)
        return True

    def reset(self) -> None:
        self.resets += 1
